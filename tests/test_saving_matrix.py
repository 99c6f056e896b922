"""Every way to save and to copy a model, from every backend to every backend."""

import copy
import fcntl
import os
import pickle
import subprocess
import sys

import jax
import keras
import matrix_writer
import numpy as np
import pytest
from backends import to_numpy
from matrix_writer import all_values, inputs, make, plain, train_on, trained, write

import jaxwrap

BACKEND = keras.config.backend()
# Those that the session under way is about; nox names them.
BACKENDS = os.environ.get("JAXWRAP_BACKENDS", BACKEND).split(",")
# The first backend reads what each has written, and each reads what itself and the first have.
SOURCES = BACKENDS if BACKENDS[0] == BACKEND else [BACKENDS[0], BACKEND]
WAYS = ["keras", "weights", "sharded", "json", "pickle"]


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A folder for each backend, with the files that it has written."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # all workers of a run share it
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / "written").exists():
            write_on_every_backend(root)
            (root / "written").touch()
    return {name: root / name for name in SOURCES}


def write_on_every_backend(root):
    """Each other backend writes in a process of its own."""
    processes = {
        name: subprocess.Popen(
            [sys.executable, matrix_writer.__file__, str(root / name)],
            env={**os.environ, "KERAS_BACKEND": name},
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in SOURCES
        if name != BACKEND
    }
    write(trained(), root / BACKEND)
    for name, process in processes.items():
        _, errors = process.communicate()
        assert process.returncode == 0, f"{name}: {errors}"


def read(folder, way, compiled):
    if way == "keras":
        return keras.models.load_model(folder / "model.keras", compile=compiled)
    if way == "pickle":
        return pickle.loads((folder / "model.pickle").read_bytes())
    model = make()
    if way == "json":
        model = keras.models.model_from_json((folder / "model.json").read_text())
    file = "sharded.weights.json" if way == "sharded" else "model.weights.h5"
    if compiled:
        model.compile(keras.optimizers.Adam(0.01), "mse")
        model.optimizer.build(model.trainable_variables)
    model.load_weights(folder / file)
    return model


def assert_as_written(model, arrays):
    for index, variable in enumerate(model.variables):
        value = plain(variable.value)
        np.testing.assert_array_equal(value, arrays[f"variable.{index:03d}"], variable.path)
    if model.compiled:
        assert "optimizer.000" in arrays
        for index, variable in enumerate(model.optimizer.variables):
            value = plain(variable.value)
            np.testing.assert_array_equal(value, arrays[f"optimizer.{index:03d}"], variable.path)
    # On other backends sums are rounded in another order.
    np.testing.assert_allclose(to_numpy(model(inputs())), arrays["inference"], 1e-5, 1e-5)
    np.testing.assert_allclose(
        to_numpy(model(inputs(), training=True)), arrays["training"], 1e-5, 1e-5
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("source", SOURCES)
def test_what_one_backend_wrote_another_reads(source, way, folders, backend):
    with np.load(folders[source] / "arrays.npz") as arrays:
        # The optimizer as well, where there is one on both sides.
        compiled = backend.trains and source != "numpy"
        assert_as_written(read(folders[source], way, compiled), arrays)


@pytest.mark.parametrize("source", SOURCES)
def test_adapters_of_one_backend_load_on_another(source, folders):
    model = make()
    before = [plain(variable.value) for variable in model.variables]
    jaxwrap.checkpoints.load(model, folders[source] / "trained.npz")
    with np.load(folders[source] / "arrays.npz") as arrays:
        for index, variable in enumerate(model.variables):
            expected = arrays[f"variable.{index:03d}"] if variable.trainable else before[index]
            np.testing.assert_array_equal(plain(variable.value), expected, variable.path)


@pytest.mark.trains
@pytest.mark.parametrize("source", [name for name in SOURCES if name != "numpy"])
def test_a_training_by_optax_goes_on_on_another_backend(source, folders):
    model = keras.models.load_model(folders[source] / "optax.keras")
    with np.load(folders[source] / "optax.npz") as arrays:
        for name, value in all_values(model).items():
            np.testing.assert_array_equal(value, arrays[f"saved.{name}"])
        train_on(model)
        for name, value in all_values(model).items():
            expected = arrays[f"resumed.{name}"]
            if source == BACKEND:
                np.testing.assert_array_equal(value, expected)
            np.testing.assert_allclose(value, expected, 1e-5, 1e-6)


def copies():
    def clone(model):
        again = keras.models.clone_model(model)
        again.set_weights(model.get_weights())
        return again

    return {
        "deepcopy": copy.deepcopy,
        "pickle": lambda model: pickle.loads(pickle.dumps(model)),
        "clone": clone,
    }


@pytest.mark.parametrize("way", copies())
def test_a_copy_computes_the_same_and_is_another(way):
    model = trained()
    again = copies()[way](model)
    expected = to_numpy(model(inputs()))
    np.testing.assert_allclose(to_numpy(again(inputs())), expected, 1e-6, 1e-6)
    for variable in again.trainable_variables:
        variable.assign(np.zeros(variable.shape, "float32"))
    np.testing.assert_allclose(to_numpy(model(inputs())), expected, 1e-6, 1e-6)


@pytest.mark.trains
@pytest.mark.parametrize("weights_only", [True, False])
def test_model_checkpoint(weights_only, tmp_path):
    model = make()
    model.compile(keras.optimizers.Adam(0.01), "mse")
    path = tmp_path / ("best.weights.h5" if weights_only else "best.keras")
    callback = keras.callbacks.ModelCheckpoint(path, save_weights_only=weights_only)
    model.fit(inputs(), np.ones((6, 2)), epochs=2, verbose=0, callbacks=[callback])
    again = make() if weights_only else keras.models.load_model(path)
    if weights_only:
        again.load_weights(path)
    for one, two in zip(again.variables, model.variables, strict=True):
        np.testing.assert_array_equal(plain(one.value), plain(two.value), one.path)


# Files of Keras's own layers.

BUILT_IN = """
import sys, jax, jax.numpy as jnp, keras, numpy as np, flax.linen as nn
def init(rng, inputs):
    k = jax.random.split(rng, 2)
    size = inputs.shape[-1]
    return ({"b": jax.random.normal(k[0], (size,)), "a": jax.random.normal(k[1], (size, size))},
            {"mean": 2 * jnp.ones(size), "count": jnp.ones(())})
def call(params, state, inputs):
    return inputs @ params["a"] + params["b"] + state["mean"], state
class Net(nn.Module):
    @nn.compact
    def __call__(self, x, training=False):
        return nn.Dense(4)(nn.BatchNorm(use_running_average=not training)(x))
inputs = keras.Input((4,))
hidden = keras.layers.JaxLayer(call, init, seed=3, name="one")(inputs)
model = keras.Model(inputs, keras.layers.FlaxLayer(Net(), name="two")(hidden))
x = np.random.default_rng(0).standard_normal((6, 4)).astype("float32")
for step in range(2):
    model.compile("sgd", "mse")
    model.fit(x, x, verbose=0)
model.save_weights(sys.argv[1])
flat = {f"{layer.name} {jax.tree_util.keystr(path)}": np.asarray(leaf.value)
        for layer in model.layers[1:] for path, leaf in jax.tree_util.tree_leaves_with_path(
            {"params": layer.params, "state": layer.state}, is_leaf=lambda l: isinstance(l, keras.Variable))}
np.savez(sys.argv[2], outputs=model.predict(x, verbose=0), **flat)
"""


def test_weights_of_keras_own_layers_are_read_by_position(tmp_path):
    file, arrays = tmp_path / "built_in.weights.h5", tmp_path / "arrays.npz"
    env = {**os.environ, "KERAS_BACKEND": "jax"}
    subprocess.run([sys.executable, "-c", BUILT_IN, str(file), str(arrays)], env=env, check=True)
    # The same program, with another import.
    source = BUILT_IN.split("x = np.random")[0].replace("keras.layers.", "jaxwrap.")
    namespace = {"jaxwrap": jaxwrap, "__name__": __name__}
    exec(source, namespace)
    model = namespace["model"]
    model.load_weights(file)
    with np.load(arrays) as expected:
        for layer in model.layers[1:]:
            variables = layer.get_variables()
            tree = (
                variables
                if layer.name == "one"
                else {
                    "params": {"params": variables["params"]},
                    "state": {"batch_stats": variables["batch_stats"]},
                }
            )
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                name = f"{layer.name} {jax.tree_util.keystr(path)}"
                if name not in expected.files:
                    name = name.replace("['params']['params']", "['params']")
                np.testing.assert_array_equal(leaf, expected[name], err_msg=name)
        x = np.random.default_rng(0).standard_normal((6, 4)).astype("float32")
        np.testing.assert_allclose(to_numpy(model(x)), expected["outputs"], 1e-5, 1e-5)
