"""Models with our layers as NNX modules, with `KERAS_NNX_ENABLED`, in a process of their own."""

import json
import pathlib
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.only("jax"), pytest.mark.each_jax]

SCRIPT = pathlib.Path(__file__).parent / "helpers" / "nnx_script.py"
LAYERS = ["keras", "linen", "subclass", "nnx", "haiku", "equinox"]
CHECKS = [
    *(f"{what} {layer}" for what in ("trains", "fits") for layer in LAYERS),
    "state and seeds come out of a trace",
    "metrics come out of a trace",
    "a merged layer has weights of its own",
    "nothing is compiled twice",
]


@pytest.fixture(scope="module")
def results():
    run = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_all_checks_run(results):
    assert list(results) == CHECKS


@pytest.mark.parametrize("name", CHECKS)
def test_layers_are_nnx_modules(results, name):
    assert results[name] is None, results[name]
