"""`check_adapter` over our own adapters and one of a stranger, and what it finds wrong."""

import dataclasses

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from backends import to_numpy
from flax import nnx
from jax.example_libraries import stax

import jaxwrap
from jaxwrap.adapters import NNX, Equinox, Haiku, Linen
from jaxwrap.testing import check_adapter


@jaxwrap.register_serializable("contract")
def make_nnx(rngs):
    return nnx.Sequential(
        nnx.Linear(4, 6, rngs=rngs), nnx.BatchNorm(6, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
    )


@jaxwrap.register_serializable("contract")
class Encoder(eqx.Module):
    linear: eqx.nn.Linear
    dropout: eqx.nn.Dropout

    def __init__(self, key):
        self.linear = eqx.nn.Linear(4, 3, key=key)
        self.dropout = eqx.nn.Dropout(0.5)

    def __call__(self, x, key=None):
        return self.dropout(self.encode(x), key=key)

    def encode(self, x):
        return jnp.tanh(self.linear(x))


def haiku_net(x, is_training):
    x = hk.BatchNorm(True, True, 0.9)(hk.Linear(5)(x), is_training)
    return hk.dropout(hk.next_rng_key(), 0.3, x) if is_training else x


net = jaxwrap.register_serializable("contract", "net")(hk.transform_with_state(haiku_net))


@jaxwrap.register_serializable("contract")
def affine_init(rng, inputs):
    return {"w": jax.random.normal(rng, (inputs.shape[-1], 3)), "b": jnp.zeros(3)}


@jaxwrap.register_serializable("contract")
def affine_call(params, inputs):
    return inputs @ params["w"] + params["b"]


@jaxwrap.register_serializable("contract")
@dataclasses.dataclass(frozen=True)
class Stax(jaxwrap.Adapter):
    """Models of `jax.example_libraries.stax`, by the sizes of their dense layers."""

    sizes: tuple[int, ...]
    scale: float = 1.0

    def _model(self):
        layers = [part for size in self.sizes for part in (stax.Dense(size), stax.Tanh)]
        return stax.serial(*layers)

    def init(self, keys, inputs):
        return self._model()[0](keys, inputs.shape)[1], None

    def call(self, params, state, keys, inputs, training):
        return jaxwrap.CallResult(self.scale * self._model()[1](params, inputs))


def linen_native(variables, x):
    return models.Cnn().apply(variables, x)


def stax_native(variables, x):
    (w, b), _ = variables["params"]
    return jnp.tanh(x @ w + b)


FLOATS = models.floats
CASES = {
    "functions": (
        lambda: jaxwrap.JaxLayer(models.norm_call, models.norm_init, seed=1),
        FLOATS(4),
        None,
    ),
    "plain functions": (
        lambda: jaxwrap.JaxLayer(affine_call, affine_init, seed=1),
        FLOATS(4),
        lambda variables, x: affine_call(variables["params"], x),
    ),
    "linen": (
        lambda: Linen(jaxwrap.register_serializable("contract", "Cnn")(models.Cnn)()),
        FLOATS(6, 6, 2),
        linen_native,
    ),
    "linen streams": (
        lambda: Linen(nn.Dropout(0.5, deterministic=False), rngs={"dropout": 5}),
        FLOATS(8),
        None,
    ),
    "nnx": (lambda: NNX(None, factory=make_nnx), FLOATS(4), None),
    "haiku": (lambda: Haiku(net), FLOATS(4), None),
    "equinox": (lambda: Equinox(Encoder(jax.random.key(0)), batch=True), FLOATS(4), None),
    "equinox method": (
        lambda: Equinox(Encoder(jax.random.key(0)), method="encode", batch=True),
        FLOATS(4),
        lambda variables, x: jax.vmap(variables["params"].encode)(x),
    ),
    "stax": (lambda: Stax((3,)), FLOATS(4), stax_native),
}


@pytest.mark.parametrize("name", models.once_except(CASES, ["linen", "nnx", "stax"]))
def test_adapters_keep_the_contract(name):
    make, inputs, native = CASES[name]
    check_adapter(make, inputs(np.random.default_rng(0), 6), native=native)


def broken(**methods):
    """Makes a faulty adapter."""
    cls = dataclasses.dataclass(frozen=True)(type("Broken", (Stax,), methods))
    jaxwrap.register_serializable("contract")(cls)
    return lambda: cls((3,))


def forgets_the_key(self, keys, inputs):
    return Stax.init(self, np.random.default_rng().integers(0, 9, 2).astype("uint32"), inputs)


@pytest.mark.once
@pytest.mark.parametrize(
    ("methods", "error", "message"),
    [
        ({"init": forgets_the_key}, AssertionError, "initial values"),
        ({"join": lambda self, params, state: {}}, ValueError, "`join` of the adapter drops"),
        (
            {"split": lambda self, v: (jax.tree.map(lambda x: x * 2, v["params"]), None)},
            AssertionError,
            "variables that were set",
        ),
        ({"call": lambda self, p, s, k, x, t: x}, TypeError, "must return a `jaxwrap.CallResult`"),
        ({"init": lambda self, keys, x: None}, TypeError, r"must return `\(params, state\)`"),
    ],
)
def test_what_breaks_the_contract_is_found(methods, error, message):
    with pytest.raises(error, match=message):
        check_adapter(broken(**methods), np.ones((5, 4), "float32"))


@pytest.mark.once
def test_a_native_call_that_differs_is_found():
    with pytest.raises(AssertionError, match="the native outputs"):
        check_adapter(
            lambda: Stax((3,)),
            np.ones((5, 4), "float32"),
            native=lambda variables, x: stax_native(variables, x) + 1,
        )


@pytest.mark.once
def test_wrap_makes_registered_adapters(tmp_path):
    class Sizes(tuple):
        __slots__ = ()

    jaxwrap.register_adapter(lambda obj: isinstance(obj, Sizes), Stax)
    layer = jaxwrap.wrap(Sizes((3,)), scale=2.0, name="mlp", seed=1)
    given = np.ones((2, 4), "float32")
    plain = jaxwrap.JaxLayer(Stax((3,)), seed=1)
    np.testing.assert_allclose(to_numpy(layer(given)), 2 * to_numpy(plain(given)), 1e-6)
    assert repr(plain).startswith("<JaxLayer 'jax_layer")
    assert layer.name == "mlp"


# Layers of classes with a constructor of their own.


@jaxwrap.register_serializable("contract")
class Scaled(jaxwrap.JaxLayer):
    def __init__(self, factor, width=3, **kwargs):
        def call(params, inputs):
            return factor * (inputs @ params)

        def init(rng, inputs):
            return jax.random.normal(rng, (inputs.shape[-1], width))

        super().__init__(call, init, **kwargs)


@jaxwrap.register_serializable("contract")
class AlwaysNoisy(jaxwrap.FlaxLayer):
    """A layer that has keys in inference too."""

    def _get_call_rng(self, training):
        return {"dropout": self._get_call_seed()}


@pytest.mark.once
def test_a_class_with_keys_of_its_own_is_saved():
    module = nn.Dropout(0.5, deterministic=False)
    again = AlwaysNoisy.from_config(AlwaysNoisy(module, seed=3).get_config())
    first, second = (to_numpy(again(np.ones(50, "float32"))) for _ in range(2))
    assert (first != second).any()


@pytest.mark.once
def test_a_class_with_its_own_constructor_is_saved_by_its_arguments():
    check_adapter(lambda: Scaled(2.0, width=2, seed=3), np.ones((5, 4), "float32"))
    layer = Scaled(2.0, width=2, seed=3, name="scaled")
    again = Scaled.from_config(layer.get_config())
    assert again.name == "scaled"
    assert again.get_config() == layer.get_config()
