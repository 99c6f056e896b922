"""Calls a function in a fresh Python process with one Keras backend.

What the function yields comes back item by item, so that a crash loses only what comes after it.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Compilation by XLA is measured, so nothing of it may come from a cache on disk. What Python compiles may: of every
# package that is installed it is there.
ENVIRONMENT = {
    "PYTHONDONTWRITEBYTECODE": "",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
DEVICES = {
    "cpu": {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""},
    # PyTorch needs memory too.
    "gpu": {"JAX_PLATFORMS": "cuda,cpu", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
}


class ProcessFailedError(Exception):
    """The process ended early; `items` is what had come by then."""

    def __init__(self, reason, items):
        super().__init__(reason)
        self.items = items


def call(target, backend, device="cpu", **arguments):
    """What the generator `module:function` of this package yields in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path, errors = Path(folder, "items"), Path(folder, "errors")
        path.touch()
        command = [sys.executable, "-m", "benchmarks.process", target, json.dumps(arguments), path]
        env = {**os.environ, **ENVIRONMENT, **DEVICES[device], "KERAS_BACKEND": backend}
        with errors.open("w") as stderr:
            code = subprocess.run(command, env=env, cwd=ROOT, stderr=stderr).returncode
        items = [json.loads(line) for line in path.read_text().splitlines()]
        if code:
            last = (errors.read_text().strip().splitlines() or [""])[-1]
            raise ProcessFailedError(f"exit code {code}: {last}", items)
    return items


def main(target, arguments, path):
    module, name = target.split(":")
    function = getattr(importlib.import_module(f"benchmarks.{module}"), name)
    with Path(path).open("a") as file:
        for item in function(**json.loads(arguments)):
            file.write(json.dumps(item) + "\n")
            file.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
