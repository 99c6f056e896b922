"""Python code that needs the value of a traced array: the error says where, on what it depends, what to write."""

import flax.linen as nn
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from models import x

import jaxwrap
from jaxwrap import FlaxLayer, JaxLayer

pytestmark = [pytest.mark.quick, pytest.mark.each_jax]


def deciding(inputs):
    if inputs.sum() > 0:
        return inputs
    return -inputs


def to_float(inputs):
    return inputs * float(inputs.max())


def with_numpy(inputs):
    return jnp.asarray(np.sort(inputs))


def indexing(inputs):
    return inputs[: int(inputs.sum())]


def masking(inputs):
    return inputs[inputs > 0]


CASES = [
    (deciding, r"`if inputs.sum\(\) > 0:`.*depends on `inputs`.*`jnp.where\(condition, a, b\)`"),
    (to_float, r"float\(inputs.max\(\)\).*go on with the array"),
    (with_numpy, r"np.sort.*In place of `np` functions"),
    (indexing, r"int\(inputs.sum\(\)\).*array"),
    (masking, r"inputs > 0.*`jnp.where\(mask, x, 0\)`"),
]


@pytest.mark.parametrize(("fn", "message"), CASES, ids=lambda part: getattr(part, "__name__", ""))
def test_layers(fn, message):
    layer = JaxLayer(fn, name="traced")
    where = rf"(?s)JaxLayer 'traced': `{fn.__name__}` \(.*test_tracing.py, line \d+, "
    with pytest.raises(TypeError, match=where + f".*{message}"):
        layer(x(3))
    with pytest.raises(TypeError, match=where):
        JaxLayer(fn, name="traced")(keras.Input((4,)))


@pytest.mark.parametrize(("fn", "message"), CASES, ids=lambda part: getattr(part, "__name__", ""))
def test_functions(fn, message):
    with pytest.raises(TypeError, match=rf"(?s)`{fn.__name__}` \(.*test_tracing.py"):
        jaxwrap.wrap_function(fn)(keras.ops.convert_to_tensor(x(3)))


class Deciding(nn.Module):
    @nn.compact
    def __call__(self, inputs):
        scale = self.param("scale", nn.initializers.ones, (1,))
        if scale[0] > 0:
            return inputs * scale
        return inputs


def test_what_it_depends_on():
    layer = FlaxLayer(Deciding(), name="net")
    with pytest.raises(TypeError, match=r"(?s)`Deciding.__call__`.*depends on `params/scale`"):
        layer(x(3))


def test_init():
    def init(rng, inputs):
        return {"w": jnp.ones(int(rng[0]))}

    layer = JaxLayer(lambda params, inputs: inputs, init, name="traced")
    with pytest.raises(TypeError, match=r"JaxLayer 'traced': `test_init.<locals>.init` \("):
        layer.compute_output_shape((None, 3))


@pytest.mark.trains
def test_in_fit():
    inputs = keras.Input((4,))
    layer = JaxLayer(lambda inputs, training: deciding(inputs) if training else inputs)
    model = keras.Model(inputs, keras.layers.Dense(1)(layer(inputs)))
    model.compile("sgd", "mse")
    with pytest.raises(TypeError, match=r"(?s)`deciding` \(.*test_tracing.py, line"):
        model.fit(x(4, 4), x(4, 1), verbose=0)
