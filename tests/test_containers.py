"""Containers that JAX knows, as outputs and as arguments: eagerly, on `keras.Input`, and from a file."""

import collections
import dataclasses
import json

import flax.linen as nn
import flax.struct
import jax
import keras
import numpy as np
import pytest
from backends import to_numpy
from models import x

import jaxwrap
from jaxwrap import FlaxLayer, JaxLayer

pytestmark = pytest.mark.each_jax


@flax.struct.dataclass
class Normal:
    mean: jax.Array
    scale: jax.Array
    sample: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Split:
    left: jax.Array
    rest: dict


@jaxwrap.register_serializable("containers")
class Pair(collections.namedtuple("Pair", ["left", "right"])):
    __slots__ = ()


@jaxwrap.register_serializable("containers")
def normal(inputs):
    return Normal(inputs[:, :2], jax.nn.softplus(inputs[:, 2:]))


def split(inputs):
    return Split(inputs[:, :1], {"b": (inputs[:, 1:], Normal(inputs, inputs * 2))})


@pytest.mark.parametrize("fn", [normal, split])
def test_outputs_of_any_class_on_symbolic_inputs(fn):
    given = x(5, 4)
    eager = JaxLayer(fn)(given)
    inputs = keras.Input((4,))
    symbols = JaxLayer(fn)(inputs)
    assert type(symbols) is type(eager)
    assert jax.tree.structure(symbols) == jax.tree.structure(eager)
    model = keras.Model(inputs, jax.tree.leaves(symbols))
    expected = jax.tree.leaves(fn(given))
    for one, two in zip(model.predict(given, verbose=0), expected, strict=True):
        np.testing.assert_allclose(one, two, 1e-5)
    for one, two in zip(jax.tree.leaves(to_numpy(eager)), expected, strict=True):
        np.testing.assert_allclose(one, two, 1e-5)


def test_a_module_that_returns_a_dataclass_is_saved(tmp_path):
    inputs = keras.Input((4,))
    outputs = JaxLayer(normal)(inputs)
    model = keras.Model(inputs, [outputs.scale, outputs.mean])
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    given = x(3, 4)
    for one, two in zip(
        loaded.predict(given, verbose=0), model.predict(given, verbose=0), strict=True
    ):
        np.testing.assert_allclose(one, two, 1e-6)


def test_a_class_that_refuses_symbolic_tensors():
    class Strict:
        def __init__(self, value):
            if isinstance(value, keras.KerasTensor):
                raise RuntimeError("numbers only")
            self.value = value

    jax.tree_util.register_pytree_node(
        Strict, lambda node: ((node.value,), None), lambda _, values: Strict(*values)
    )
    layer = JaxLayer(lambda inputs: Strict(inputs * 2), name="strict")
    assert layer(x(2)).value.shape == (2,)
    with pytest.raises(
        TypeError, match=r"JaxLayer 'strict': .*Strict, which cannot hold.*numbers only.*output="
    ):
        layer(keras.Input((2,)))


class Two(nn.Module):
    @nn.compact
    def __call__(self, inputs):
        hidden = nn.Dense(3)(inputs)
        return Normal(hidden, hidden * 2)


@pytest.mark.parametrize("output", ["scale", "missing"])
def test_one_output_of_a_module(output):
    layer = FlaxLayer(Two(), output=output, name="two")
    if output == "missing":
        with pytest.raises(ValueError, match=r"FlaxLayer 'two': .*`output='missing'`.*mean, scale"):
            layer(x(2, 4))
        return
    symbol = layer(keras.Input((4,)))
    assert symbol.shape == (None, 3)
    whole = FlaxLayer(Two(), variables=layer.get_variables())(x(2, 4))
    np.testing.assert_allclose(to_numpy(layer(x(2, 4))), to_numpy(whole.scale), 1e-6)


# Arguments.


@jaxwrap.register_serializable("containers")
def named(inputs, params):
    return inputs.left * params["w"] - inputs.right


@jaxwrap.register_serializable("containers")
def named_init(rng, inputs):
    return {"w": jax.random.normal(rng, inputs.left.shape[1:])}


@jaxwrap.register_serializable("containers")
def tuples(inputs):
    assert isinstance(inputs, tuple)
    first, (second, third) = inputs
    return first + second * third["a"]


def pair_of(make):
    return Pair(make(), make())


def nest_of(make):
    return (make(), (make(), {"a": make()}))


@pytest.mark.parametrize(
    ("fn", "init", "nest"), [(named, named_init, pair_of), (tuples, None, nest_of)]
)
def test_containers_among_arguments_survive_saving(fn, init, nest, tmp_path):
    inputs = nest(lambda: keras.Input((4,)))
    model = keras.Model(inputs, JaxLayer(fn, init, seed=1)(inputs))
    given = nest(lambda: x(3, 4))
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    leaves = jax.tree.leaves(given)
    flat = keras.Model(model.inputs, model.outputs)
    again = keras.Model(loaded.inputs, loaded.outputs)
    np.testing.assert_allclose(
        again.predict(leaves, verbose=0)[0], flat.predict(leaves, verbose=0)[0], 1e-6
    )


@jaxwrap.register_serializable("tests_containers")
def left_of(inputs):
    return inputs.left


def test_a_container_that_is_not_registered_is_named_when_saving(tmp_path):
    Other = collections.namedtuple("Other", ["left", "right"])
    layer = JaxLayer(left_of, name="other")
    model = keras.Sequential([layer])
    layer(Other(x(2), x(2)))
    message = r"^JaxLayer 'other': cannot be saved:\n  `inputs` is an object of the class Other, which has"
    with pytest.raises(TypeError, match=message):
        model.save(tmp_path / "model.keras")
    # A copy needs no name.
    again = JaxLayer.from_config(layer.get_config())
    again.build_from_config(json.loads(json.dumps(layer.get_build_config())))
    assert type(again._engine.specs["inputs"]) is Other
