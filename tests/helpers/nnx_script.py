"""Models with our layers as NNX modules; `test_nnx_modules.py` runs it. Writes JSON: an error, or None, by check.

A process of its own, since Keras reads `KERAS_NNX_ENABLED` when it is imported.
"""

import json
import os
import sys
import traceback

os.environ["KERAS_NNX_ENABLED"] = "true"

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
from flax import nnx

import jaxwrap

rng = np.random.default_rng(0)
x, y = (rng.normal(size=(16, size)).astype("float32") for size in (4, 2))


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, training=False):
        x = nn.BatchNorm(use_running_average=not training)(nn.Dense(2)(x))
        return nn.Dropout(0.5, deterministic=not training)(x)


class Doubled(jaxwrap.FlaxLayer):
    def call(self, x):
        return 2 * super().call(x)


def reported(params, inputs):
    return jaxwrap.CallResult(inputs * params, metrics={"size": jnp.abs(params).sum()})


LAYERS = {
    "keras": lambda: keras.layers.Dense(2),  # the control
    "linen": lambda: jaxwrap.FlaxLayer(nn.Dense(2)),
    "subclass": lambda: Doubled(nn.Dense(2)),
    "nnx": lambda: jaxwrap.wrap(nnx.Linear(4, 2, rngs=nnx.Rngs(0))),
    "haiku": lambda: jaxwrap.wrap(hk.transform(lambda x: hk.Linear(2)(x))),
    "equinox": lambda: jaxwrap.wrap(eqx.nn.Linear(4, 2, key=jax.random.key(0))),
}


def model_of(layer):
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layer(inputs))
    model(x)
    return model


def values(layer):
    return [np.asarray(variable.value) for variable in layer.variables]


def assert_close(received, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-5), received, expected)


def trains(make):
    """By `nnx.jit` and `nnx.Optimizer`, as by `jax.grad` of a function of the weights."""
    model = model_of(make())
    trained = nnx.All(keras.Variable, lambda _, v: getattr(v, "_trainable", False))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=trained)

    @nnx.jit
    def step(model, optimizer, x, y):
        def loss_of(model):
            return ((model(x) - y) ** 2).mean()

        wrt = nnx.DiffState(0, trained)
        loss, gradients = nnx.value_and_grad(loss_of, argnums=wrt)(model)
        optimizer.update(model, gradients)
        return loss

    @jax.jit
    def expected_step(weights):
        def loss_of(weights):
            outputs, _ = model.stateless_call(weights, [], x)
            return ((outputs - y) ** 2).mean()

        loss, gradients = jax.value_and_grad(loss_of)(weights)
        return loss, [w - 0.1 * g for w, g in zip(weights, gradients, strict=True)]

    weights = [jnp.array(variable.value) for variable in model.trainable_variables]
    for _ in range(4):
        expected, weights = expected_step(weights)
        assert_close(step(model, optimizer, x, y), expected)
        assert_close(values(model)[:2], weights)
    assert_close(model(x), model.stateless_call(weights, [], x)[0])


def fits(make):
    losses = []
    for one in (keras.optimizers.SGD(0.1), jaxwrap.OptaxOptimizer(optax.sgd, 0.1)):
        keras.utils.set_random_seed(0)
        model = model_of(make())
        model.compile(one, "mse")
        losses.append(model.fit(x, y, epochs=3, shuffle=False, verbose=0).history["loss"])
        one.learning_rate = 0.05
        assert float(one.learning_rate.value) == np.float32(0.05)
    assert_close(losses[1], losses[0])
    assert losses[1][-1] < losses[1][0]


def state_and_seeds_come_out_of_a_trace():
    layers = [jaxwrap.FlaxLayer(Net(), seed=1) for _ in range(2)]
    for layer in layers:
        layer(x)
    step = nnx.jit(lambda layer, x: layer(x, training=True))
    for _ in range(3):
        assert_close(step(layers[0], x), layers[1](x, training=True))
        assert_close(values(layers[0]), values(layers[1]))
    assert_close(layers[0](x, training=True), layers[1](x, training=True))


def metrics_come_out_of_a_trace():
    layer = jaxwrap.JaxLayer(reported, params=np.full(4, 2.0, "float32"))
    layer(x)
    assert len(layer.metrics) == 1
    step = nnx.jit(lambda layer, x: layer(x, training=True))
    for _ in range(3):
        step(layer, x)
    assert float(layer.metrics[0].result()) == 8.0
    assert [float(v.value) for v in layer.non_trainable_variables] == [32.0, 4.0]


def layer_that_counts():
    """A layer, and a list of what JAX has traced it with."""
    traces = []

    def call(params, inputs):
        traces.append(inputs)
        return inputs @ params

    return jaxwrap.JaxLayer(call, params=np.ones((4, 2), "float32")), traces


def a_merged_layer_has_weights_of_its_own():
    layer, traces = layer_that_counts()
    before = layer(x)
    count = len(traces)
    graph, state = nnx.split(layer)
    for factor in (2.0, 3.0):
        merged = nnx.merge(graph, jax.tree.map(lambda leaf: leaf * factor, state))  # noqa: B023
        assert_close(merged(x), before * factor)
        assert_close(merged.get_variables()["params"], np.full((4, 2), factor))
        merged.set_variables({"params": np.zeros((4, 2), "float32"), "state": None})
        assert_close(merged(x), before * 0)
        assert_close(layer(x), before)
    assert len(traces) == count, "compiled again"


def nothing_is_compiled_twice():
    layer, traces = layer_that_counts()
    step = nnx.jit(lambda layer, x: layer(x))
    for _ in range(2):
        layer(x), step(layer, x)
    count = len(traces)
    for _ in range(3):
        layer(x), step(layer, x)
    assert len(traces) == count


CHECKS = {
    **{f"trains {name}": lambda make=make: trains(make) for name, make in LAYERS.items()},
    **{f"fits {name}": lambda make=make: fits(make) for name, make in LAYERS.items()},
    **{
        check.__name__.replace("_", " "): check
        for check in (
            state_and_seeds_come_out_of_a_trace,
            metrics_come_out_of_a_trace,
            a_merged_layer_has_weights_of_its_own,
            nothing_is_compiled_twice,
        )
    },
}


def main():
    results = {}
    for name, check in CHECKS.items():
        try:
            results[name] = check()
        except Exception:
            results[name] = traceback.format_exc()
    sys.stdout.write(json.dumps(results))


if __name__ == "__main__":
    main()
