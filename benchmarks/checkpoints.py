"""How much memory it takes to load a checkpoint, beside the weights: `python benchmarks/checkpoints.py [MEGABYTES]`.

Each format in two processes of its own, one that writes and one that reads. Linux only: /proc tells the peak.
"""

import os
import pathlib
import subprocess
import sys
import tempfile

FORMATS = ("msgpack", "orbax", "safetensors", "npz", "eqx")
ARRAYS = 16


def status(name):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def work(action, path, megabytes):
    import numpy as np

    import jaxwrap

    def layer_of(count, rows):
        zeros = {f"w{index}": np.zeros((rows, 1024), "float32") for index in range(count)}
        return jaxwrap.JaxLayer(lambda params, inputs: inputs, params=zeros)

    layer = layer_of(ARRAYS, megabytes * 2**20 // ARRAYS // 4 // 1024)
    if action == "save":
        jaxwrap.checkpoints.save(layer, path)
        return
    # What is loaded on first use is not the checkpoint's.
    small, small_path = layer_of(1, 1), path.with_name(f"small{path.suffix}")
    jaxwrap.checkpoints.save(small, small_path)
    jaxwrap.checkpoints.load(small, small_path)
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status("VmRSS")
    jaxwrap.checkpoints.load(layer, path)
    print(status("VmHWM") - before)


def main(megabytes):
    print(f"{'format':<12}{'MB':>8}  peak while loading, beside the weights")
    for name in FORMATS:
        with tempfile.TemporaryDirectory() as folder:
            grown = ""
            for action in ("save", "load"):
                command = [sys.executable, __file__, action, f"{folder}/w.{name}", str(megabytes)]
                env = {"KERAS_BACKEND": "jax", **os.environ}
                done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
                grown = done.stdout
            print(f"{name:<12}{megabytes:>8}  {float(grown) / megabytes:.2f}x")


if __name__ == "__main__":
    if len(sys.argv) == 4:
        work(sys.argv[1], pathlib.Path(sys.argv[2]), int(sys.argv[3]))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 1024)
