"""Every model of the zoo on the backend under test, against its native run."""

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from backends import to_numpy
from models import rows
from zoo import EVERYWHERE, QUICK, ZOO

pytestmark = [pytest.mark.each_jax, pytest.mark.lowered]


def is_float(leaf):
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, np.inexact)


def as_jax(variables):
    return jax.tree.map(
        lambda leaf: jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf, variables
    )


def key_of(call):
    return jnp.array([5, call], "uint32")


def assert_close(ours, native, tolerance, what):
    assert jax.tree.structure(ours) == jax.tree.structure(native), what
    for one, two in zip(jax.tree.leaves(ours), jax.tree.leaves(native), strict=True):
        if is_float(two):
            np.testing.assert_allclose(one, two, tolerance, tolerance, err_msg=what)
        else:
            one, two = (
                jax.random.key_data(leaf)
                if isinstance(leaf, jax.Array)
                and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
                else leaf
                for leaf in (one, two)
            )
            np.testing.assert_array_equal(one, two, err_msg=what)


def train_natively(entry, variables, targets, first):
    """Three steps of SGD on the float leaves of `params`; returns the losses and the last variables."""

    @jax.jit
    def step(variables, key):
        def loss(params):
            outputs, new = entry.native({**variables, "params": params}, key, entry.inputs, True)
            return ((outputs - targets) ** 2).mean(), new

        (value, new), gradients = jax.value_and_grad(loss, has_aux=True, allow_int=True)(
            variables["params"]
        )
        params = jax.tree.map(
            lambda p, g: p - entry.rate * g if is_float(p) else p, variables["params"], gradients
        )
        return value, {**new, "params": params}

    losses = []
    for index in range(3):
        value, variables = step(variables, key_of(first + index))
        losses.append(float(value))
    return losses, variables


@pytest.mark.parametrize("name", rows(ZOO, QUICK, EVERYWHERE))
def test_inference_is_the_native_one(name):
    entry = ZOO[name]
    layer = entry.make(seed=5)
    before = as_jax(layer.get_variables()) if layer.weights else None
    outputs = to_numpy(layer(entry.inputs))
    if before is None:
        before = as_jax(layer.get_variables())
    apply = jax.jit(entry.native, static_argnums=3)
    native, after = apply(before, key_of(0), entry.inputs, False)
    np.testing.assert_allclose(outputs, native, 1e-4, 1e-4)
    assert_close(layer.get_variables(), after, 1e-4, "state after inference")
    symbolic = layer(keras.KerasTensor((None, *entry.inputs.shape[1:]), str(entry.inputs.dtype)))
    assert symbolic.shape == (None, *native.shape[1:])


@pytest.mark.trains
@pytest.mark.parametrize("name", rows(ZOO, QUICK, EVERYWHERE))
def test_three_steps_of_training_are_the_native_ones(name):
    """Values by the losses, gradients by what SGD makes of them, and new state."""
    entry = ZOO[name]
    layer = entry.make(seed=5)
    inputs = keras.Input(entry.inputs.shape[1:], dtype=str(entry.inputs.dtype))
    model = keras.Model(inputs, layer(inputs))
    targets = (
        np.random.default_rng(2).standard_normal((4, *model.output_shape[1:])).astype("float32")
    )
    losses, expected = train_natively(entry, as_jax(layer.get_variables()), targets, 0)
    model.compile(keras.optimizers.SGD(entry.rate), "mse")
    history = model.fit(
        entry.inputs, targets, batch_size=4, epochs=3, shuffle=False, verbose=0
    ).history
    np.testing.assert_allclose(history["loss"], losses, entry.tolerance)
    assert_close(layer.get_variables(), jax.device_get(expected), entry.tolerance, "variables")
