"""What FlaxLayer adds to JaxLayer; the models of the table cover values, gradients and state."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import keras
import models
import numpy as np
import pytest
from backends import to_numpy

from jaxwrap import FlaxLayer

pytestmark = pytest.mark.each_jax


def images():
    return np.random.default_rng(0).standard_normal((4, 6, 6, 2)).astype("float32")


def test_collections_and_paths():
    module = models.Cnn()
    layer = FlaxLayer(module, name="cnn")
    layer(images())
    assert layer.module is module
    assert layer.method is None
    variables = module.init(jax.random.key(0), images())
    expected = {
        "cnn/" + "/".join(key.key for key in path)
        for path, _ in jax.tree_util.tree_leaves_with_path(variables)
    }
    assert {v.path for v in layer.variables} - expected == {
        "cnn/seed_generator/seed_generator_state"
    }
    assert {v.path for v in layer.trainable_variables} == {
        path for path in expected if path.startswith("cnn/params/")
    }
    assert jax.tree.structure(layer.params) == jax.tree.structure({"params": variables["params"]})


def test_given_variables_are_used_and_left_alone():
    module = models.Cnn()
    variables = module.init(jax.random.key(3), images())
    layer = FlaxLayer(module, variables=variables)
    expected = module.apply(variables, images())
    np.testing.assert_allclose(to_numpy(layer(images())), expected, 1e-5, 1e-5)
    layer(images(), training=True)
    np.testing.assert_array_equal(variables["batch_stats"]["BatchNorm_0"]["mean"], np.zeros(4))


@pytest.mark.parametrize("given", ["bound", "name", "function"])
def test_method(given):
    module = models.Two()
    pair = (np.ones((2, 3), "float32"), np.zeros((2, 3), "float32"))
    method = {
        "bound": module.encode,
        "name": "encode",
        "function": lambda module, inputs: module.encode(inputs),
    }[given]
    layer = FlaxLayer(module, method=method, seed=0)
    assert layer.method == method
    outputs = to_numpy(layer(pair))
    params = jax.tree.map(lambda v: jnp.asarray(to_numpy(v.value)), layer.params)
    np.testing.assert_allclose(
        outputs, module.apply(params, pair, method=module.encode), 1e-6, 1e-6
    )


def test_every_stream_draws_anew_in_training():
    layer = FlaxLayer(models.Noisy(), seed=0)
    inputs = np.ones((3, 5), "float32")
    first, second = (to_numpy(layer(inputs, training=True)) for _ in range(2))
    assert (first != second).all()
    np.testing.assert_array_equal(to_numpy(layer(inputs)), to_numpy(layer(inputs)))


@pytest.mark.quick
def test_dropout_mask_is_that_of_flax():
    layer = FlaxLayer(
        nn.Dropout(0.5),
        method=lambda module, inputs, training: module(inputs, deterministic=not training),
        seed=4,
    )
    inputs = np.ones((3, 50), "float32")
    key = jnp.array([4, 0], "uint32")
    expected = nn.Dropout(0.5).apply({}, inputs, deterministic=False, rngs={"dropout": key})
    np.testing.assert_array_equal(to_numpy(layer(inputs, training=True)), expected)


@pytest.mark.trains
def test_batch_norm_follows_native_flax_through_fit():
    """Statistics after three steps of SGD, against a native Flax loop."""
    module = models.Cnn()
    targets = np.random.default_rng(1).standard_normal((4, 3)).astype("float32")
    variables = module.init(jax.random.key(0), images())

    class Plain(nn.Module):  # dropout would need the same keys: left out
        @nn.compact
        def __call__(self, inputs, training):
            x = nn.BatchNorm(use_running_average=not training, momentum=0.9)(
                nn.Conv(4, (3, 3))(inputs)
            )
            return nn.Dense(3)(nn.relu(x).mean((1, 2)))

    module = Plain()
    variables = module.init(jax.random.key(0), images(), training=False)
    model = keras.Sequential([FlaxLayer(module, variables=variables)])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.fit(images(), targets, epochs=3, batch_size=4, verbose=0)

    def loss(params, stats):
        outputs, changed = module.apply(
            {"params": params, "batch_stats": stats},
            images(),
            training=True,
            mutable=["batch_stats"],
        )
        return ((outputs - targets) ** 2).mean(), changed["batch_stats"]

    params, stats = variables["params"], variables["batch_stats"]
    for _ in range(3):
        gradients, stats = jax.grad(loss, has_aux=True)(params, stats)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients)
    layer = model.layers[0]
    for ours, native in ((layer.params["params"], params), (layer.state["batch_stats"], stats)):
        jax.tree.map(
            lambda v, value: np.testing.assert_allclose(to_numpy(v.value), value, 1e-4, 1e-5),
            ours,
            native,
        )
