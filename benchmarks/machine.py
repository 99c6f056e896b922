"""What the figures were measured on."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

LIBRARIES = (
    *("jaxwrap", "keras", "jax", "jaxlib", "flax", "optax", "numpy", "tensorflow", "torch"),
    *("torchax", "jax2torch", "torch-jax-interop"),
)


def describe():
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        "commit": _commit(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": _field("/proc/cpuinfo", "model name"),
        # Those that this process may use, which in a container are not all.
        "cores": len(os.sched_getaffinity(0)),
        "memory": _field("/proc/meminfo", "MemTotal"),
        "versions": {name: _version(name) for name in LIBRARIES},
    }


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit():
    command = ["git", "describe", "--always", "--dirty"]
    folder = Path(__file__).parent
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def _field(path, name):
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), None)
