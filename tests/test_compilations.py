"""Compiled functions on disk: a second process reads them, and computes the same."""

import json
import os
import subprocess
import sys

import keras
import pytest

import jaxwrap

PROGRAM = """
import json, sys
import flax.linen as nn, jax, keras, numpy as np, jaxwrap

jax.numpy.ones(3).block_until_ready()  # a program may have compiled something before
jaxwrap.cache_compilations(sys.argv[1])
hits = []
jax.monitoring.register_event_listener(
    lambda event, **_: hits.append(event) if event.endswith("cache_hits") else None
)
x = np.linspace(-1, 1, 12, dtype="float32").reshape(4, 3)
variables = nn.Dense(2).init(jax.random.key(0), x)
layer = jaxwrap.FlaxLayer(nn.Dense(2), variables=variables)
model = keras.Sequential([keras.Input((3,)), layer])
result = []
if keras.config.backend() != "numpy":
    model.compile("sgd", "mse")
    result = [float(model.train_on_batch(x, np.ones((4, 2), "float32"))) for _ in range(2)]
result += keras.ops.convert_to_numpy(model.predict(x, verbose=0)).tolist()
print(json.dumps([len(hits), result]))
"""


def run(directory):
    env = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")}
    env |= {"JAX_PLATFORMS": "cpu", "KERAS_BACKEND": keras.config.backend()}
    command = [sys.executable, "-c", PROGRAM, str(directory)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def files(directory):
    # JAX notes beside each entry when it was last read.
    return {
        path.relative_to(directory)
        for path in directory.rglob("*")
        if path.is_file() and not path.name.endswith("-atime")
    }


def test_a_second_process_compiles_nothing(tmp_path):
    directory = tmp_path / "new" / "cache"
    _, first = run(directory)
    kept = files(directory)
    assert kept
    if keras.config.backend() == "tensorflow":
        assert any(path.parts[0] == "tensorflow" for path in kept)
    hits, second = run(directory)
    assert hits > 0
    assert files(directory) == kept
    assert second == first


@pytest.mark.once
@pytest.mark.quick
def test_what_is_no_path():
    with pytest.raises(TypeError, match=r"must be a path.*received True"):
        jaxwrap.cache_compilations(True)
