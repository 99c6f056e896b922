"""A Flax transformer on two processes with four devices each, saved by both and resumed by one.

The text comes from Python: its licence, and the documentation of its standard library. All devices are virtual, so this
runs on any machine, in about a minute:

    python examples/scale.py

First one device trains for all steps. Then two processes train together for half of them, with parameters divided by
four and each batch by two, and write one Orbax checkpoint. One process with one device reads it, and trains on.
"""

import argparse
import contextlib
import inspect
import json
import os
import pathlib
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time

STEPS, BATCH, LENGTH, WIDTH, HEADS = 24, 16, 96, 128, 4
MODULES = ["argparse", "datetime", "decimal", "logging", "pathlib", "random", "shutil", "socket"]
MODULES += ["statistics", "string", "subprocess", "threading", "typing", "unittest", "zipfile"]


def read_text():
    """Returns the licence of Python, and all docstrings of some of its modules, as ASCII."""
    library = pathlib.Path(sysconfig.get_path("stdlib"))
    texts = [path.read_text() for path in library.glob("LICENSE*")]
    for name in MODULES:
        module = __import__(name, fromlist=["*"])
        objects = [module, *(value for _, value in sorted(vars(module).items()) if callable(value))]
        texts += [doc for one in objects if (doc := inspect.getdoc(one))]
    return "\n\n".join(texts).encode("ascii", "replace")


def batches(text, steps):
    """Yields a batch of windows of the text for each of these steps, the same in every process."""
    import numpy as np

    codes = np.frombuffer(text, "uint8").astype("int32")
    for step in steps:
        starts = np.random.default_rng(step).integers(0, len(codes) - LENGTH - 1, BATCH)
        windows = np.stack([codes[start : start + LENGTH + 1] for start in starts])
        yield windows[:, :-1], windows[:, 1:]


def make_model():
    """Returns a Keras model of one Flax module."""
    import flax.linen as nn
    import jax.numpy as jnp
    import keras
    import optax

    import jaxwrap

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            mask = nn.make_causal_mask(x[..., 0])
            h = nn.LayerNorm(name="norm_1")(x)
            h = nn.MultiHeadDotProductAttention(HEADS, name="attention")(h, mask=mask)
            x = nn.with_logical_constraint(x + h, ("rows", "time", "embed"))
            h = nn.Dense(4 * WIDTH, name="up")(nn.LayerNorm(name="norm_2")(x))
            h = nn.with_logical_constraint(nn.gelu(h), ("rows", "time", "mlp"))
            return x + nn.Dense(WIDTH, name="down")(h)

    class Transformer(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            places = jnp.arange(tokens.shape[1])
            x = nn.Embed(128, WIDTH, name="tokens")(tokens) + nn.Embed(
                LENGTH, WIDTH, name="places"
            )(places)
            for index in range(2):
                x = Block(name=f"block_{index}")(x)
            return nn.Dense(128, name="logits")(nn.LayerNorm(name="norm")(x))

    rules = (("rows", "batch"), ("mlp", "model"), ("time", None), ("embed", None))
    inputs = keras.Input((LENGTH,), dtype="int32")
    layer = jaxwrap.FlaxLayer(Transformer(), seed=0, axis_rules=rules, name="lm")
    model = keras.Model(inputs, layer(inputs))
    loss = jaxwrap.JaxLoss(optax.losses.softmax_cross_entropy_with_integer_labels)
    # Without state: the checkpoint holds the weights alone.
    model.compile(jaxwrap.OptaxOptimizer(optax.sgd, 0.3, clipnorm=1.0), loss)
    return model, layer


def mesh_scope():
    """Returns the scope in which parameters are divided by four, and batches by two."""
    import keras

    mesh = keras.distribution.DeviceMesh((2, 4), ("batch", "model"))
    layouts = keras.distribution.LayoutMap(mesh)
    block = "lm/params/block_[0-9]/"
    layouts[block + "attention/(query|key|value)/kernel"] = (None, "model", None)
    layouts[block + "attention/(query|key|value)/bias"] = ("model", None)
    layouts[block + "attention/out/kernel"] = ("model", None, None)
    layouts[block + "up/kernel"] = (None, "model")
    layouts[block + "up/bias"] = ("model",)
    layouts[block + "down/kernel"] = ("model", None)
    layouts["lm/params/(tokens|places)/embedding"] = (None, "model")
    layouts["lm/params/logits/kernel"] = (None, "model")
    return keras.distribution.ModelParallel(
        layout_map=layouts, batch_dim_name="batch", auto_shard_dataset=False
    ).scope()


def train(job, folder, rank=0, port=None):
    """Runs one job, and writes what it has seen."""
    import jax

    if port is not None:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{port}", 2, rank)
    import keras

    import jaxwrap

    keras.utils.set_random_seed(0)
    steps = {"one": range(STEPS), "many": range(STEPS // 2), "resumed": range(STEPS // 2, STEPS)}[
        job
    ]
    text = (folder / "text").read_bytes()
    rows = slice(None)
    if job == "many":
        rows = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
    with mesh_scope() if job == "many" else contextlib.nullcontext():
        model, layer = make_model()
        if job == "resumed":
            jaxwrap.checkpoints.load(layer, folder / "weights.orbax")
        losses = [float(model.train_on_batch(x[rows], y[rows])) for x, y in batches(text, steps)]
        if job == "many":
            jaxwrap.checkpoints.save(layer, folder / "weights.orbax")
    shards = [
        (v.path, v.value.nbytes, v.value.addressable_shards[0].data.nbytes) for v in layer.weights
    ]
    if rank == 0:
        (folder / f"{job}.json").write_text(json.dumps({"losses": losses, "bytes": shards}))


def start(devices, *arguments):
    env = {
        **os.environ,
        "KERAS_BACKEND": "jax",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    return subprocess.Popen([sys.executable, __file__, *map(str, arguments)], env=env)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("job", nargs="?", choices=["one", "many", "resumed"])
    parser.add_argument("--folder", type=pathlib.Path)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--port")
    options = parser.parse_args()
    if options.job is not None:
        train(options.job, options.folder, options.rank, options.port)
        return
    with tempfile.TemporaryDirectory() as name:
        # Once: what a module has in it depends on what else a process has imported.
        pathlib.Path(name, "text").write_bytes(read_text())
        folder = ("--folder", name)
        finish([start(1, "one", *folder)])
        port = free_port()
        finish([start(4, "many", *folder, "--port", port, "--rank", rank) for rank in range(2)])
        finish([start(1, "resumed", *folder)])
        jobs = ("one", "many", "resumed")
        print_tables(*[json.loads(pathlib.Path(name, f"{job}.json").read_text()) for job in jobs])


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def finish(running):
    """Waits for processes. When one fails, the other would wait for it for ever."""
    while any(one.poll() is None for one in running):
        if any(one.poll() for one in running):
            for one in running:
                one.kill()
        time.sleep(0.1)
    if any(one.returncode for one in running):
        sys.exit("a process has failed: see its error above")


def print_tables(one, many, resumed):
    print(f"{'step':>4}  {'one device':>10}  {'2 x 4 devices':>13}  {'difference':>10}")
    together = [(loss, "") for loss in many["losses"]]
    together += [(loss, "  resumed on one device") for loss in resumed["losses"]]
    worst = 0.0
    for step, (alone, (loss, note)) in enumerate(zip(one["losses"], together, strict=True)):
        worst = max(worst, abs(loss - alone))
        print(f"{step:4}  {alone:10.4f}  {loss:13.4f}  {loss - alone:10.1e}{note}")
    print(f"\n{'parameters':44}{'bytes':>10}{'per device':>12}")
    for path, whole, part in many["bytes"]:
        if whole >= 2**15:
            print(f"{path:44}{whole:10,}{part:12,}")
    whole, part = (sum(row[column] for row in many["bytes"]) for column in (1, 2))
    print(f"{'all':44}{whole:10,}{part:12,}   {part / whole:.0%}")
    assert worst < 1e-3, f"the losses differ by {worst}"
    assert one["losses"][-1] < one["losses"][0] - 0.3, "the model has not learned"


if __name__ == "__main__":
    main()
