"""One table of models. Every test that wants "any model" draws from it, over every backend."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest

import jaxwrap

Pair = collections.namedtuple("Pair", ["left", "right"])


@dataclasses.dataclass(frozen=True)
class Model:
    """A way to make a layer, and inputs for it.

    Attributes:
        name: The name of the row.
        make: Makes the layer.
        inputs: Makes the inputs, a nest of NumPy arrays, for a generator and a batch size.
        tolerance: The relative and absolute error that a gradient may have in float32.
    """

    name: str
    make: Callable[..., Any]
    inputs: Callable[[np.random.Generator, int], Any]
    tolerance: float = 1e-5


def x(*shape, seed=0):
    """An input: normal numbers, the same at each call."""
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def floats(*shape, dtype="float32"):
    return lambda rng, batch: rng.standard_normal((batch, *shape)).astype(dtype)


def ints(*shape, high=7):
    return lambda rng, batch: rng.integers(0, high, (batch, *shape)).astype("int32")


def once_except(names, everywhere):
    """Parameters of a test that all run on the first backend, and those of `everywhere` on the others too."""
    return rows(names, (), everywhere)


def rows(table, quick, everywhere=None):
    """The names of the rows of a table, for `parametrize`; those in `quick` have the marker.

    The first backend runs all, the others those of `everywhere`.
    """
    everywhere = table if everywhere is None else everywhere
    assert {*quick, *everywhere} <= set(table)
    return [
        pytest.param(
            name,
            marks=[pytest.mark.quick] * (name in quick)
            + [pytest.mark.once] * (name not in everywhere),
        )
        for name in table
    ]


# Pure functions.


def mlp_init(rng, inputs):
    sizes = [inputs.shape[-1], 8, 3]
    keys = jax.random.split(rng, 2)
    return [
        {"w": jax.random.normal(key, (m, n)) / m**0.5, "b": jnp.zeros(n)}
        for key, m, n in zip(keys, sizes, sizes[1:], strict=False)
    ]


def mlp_call(params, inputs):
    first, second = params
    hidden = jnp.tanh(inputs @ first["w"] + first["b"])
    return hidden @ second["w"] + second["b"]


def gelu_call(inputs, params):
    return jax.nn.gelu(mlp_call(params, inputs), approximate=False)


def function_call(inputs):
    return jnp.sin(inputs) * 2


def pair_init(rng, inputs):
    return jax.random.normal(rng, (inputs[0].shape[-1],))


def pair_call(params, inputs):
    left, right = inputs
    return {"sum": left * params + right, "product": (left * right).sum(-1)}


def dict_init(rng, inputs):
    return Pair(jax.random.normal(rng, inputs["x"].shape[1:]), jnp.float32(2.0))


def dict_call(params, inputs):
    masked = jnp.where(inputs["mask"], inputs["x"] * params.left, 0)
    return (masked * params.right, {"count": inputs["mask"].sum(-1), "constant": jnp.ones(3)})


def named_call(inputs):
    return Pair(inputs.left + 1, inputs.left * inputs.right)


def embed_init(rng, inputs):
    assert inputs.dtype == jnp.int32, inputs.dtype
    return {"table": jax.random.normal(rng, (7, 4))}


def embed_call(params, inputs):
    return params["table"][inputs].mean(1)


def norm_init(rng, inputs):
    size = inputs.shape[-1]
    params = {"scale": jnp.ones(size), "bias": jnp.zeros(size)}
    state = {"mean": jnp.zeros(size), "var": jnp.ones(size), "count": jnp.int32(0)}
    return params, state


def norm_call(state, params, training, inputs):
    if training:
        mean, var = inputs.mean(0), inputs.var(0)
        state = {
            "mean": 0.9 * state["mean"] + 0.1 * mean,
            "var": 0.9 * state["var"] + 0.1 * var,
            "count": state["count"] + 1,
        }
    else:
        mean, var = state["mean"], state["var"]
    normal = (inputs - mean) / jnp.sqrt(var + 1e-3)
    return normal * params["scale"] + params["bias"], state


def dropout_call(inputs, rng, *, training):
    if not training:
        assert rng is None
        return inputs
    return jnp.where(jax.random.bernoulli(rng, 0.5, inputs.shape), inputs * 2, 0)


def static_call(params, inputs):
    assert params["none"] is None
    assert params["name"] == "double"
    return params["activation"](inputs * params["scale"]) + params["offset"]


def scan_init(rng, inputs):
    one, two = jax.random.split(rng)
    size = inputs.shape[-1]
    return {
        "w": jax.random.normal(one, (size, size)) / 2,
        "u": jax.random.normal(two, (size, size)) / 2,
    }


def scan_call(params, inputs):
    def step(carry, x):
        carry = jnp.tanh(x @ params["w"] + carry @ params["u"])
        return carry, carry

    steps = jnp.swapaxes(inputs, 0, 1)
    last, every = jax.lax.scan(step, jnp.zeros_like(steps[0]), steps)
    return last, jnp.swapaxes(every, 0, 1)


def half_call(params, inputs):
    return inputs.astype(params["w"].dtype) @ params["w"] + params["b"]


def empty_call(params, inputs):
    return inputs * params["scale"], jnp.concatenate([params["empty"], params["scale"][None]])


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Affine:
    weight: Any
    bias: Any


def affine_init(rng, inputs):
    return Affine(jax.random.normal(rng, (inputs.shape[-1], 2)), jnp.zeros(2))


def affine_call(params, inputs):
    return inputs @ params.weight + params.bias


def counter_call(params, state, inputs):
    return inputs * params["w"] * (state + 1), state + 1


def reshape_call(inputs):
    return inputs.reshape(inputs.shape[0], -1)


# Linen modules.


class Cnn(nn.Module):
    features: int = 4

    @nn.compact
    def __call__(self, inputs, training=False):
        x = nn.Conv(self.features, (3, 3))(inputs)
        x = nn.BatchNorm(use_running_average=not training, momentum=0.9)(x)
        x = nn.avg_pool(nn.relu(x), (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        x = nn.Dropout(0.4, deterministic=not training)(x)
        return nn.Dense(3)(x)


class Sowing(nn.Module):
    @nn.compact
    def __call__(self, inputs):
        hidden = nn.Dense(5)(inputs)
        self.sow("intermediates", "hidden", hidden)
        return nn.relu(hidden)


class Tokens(nn.Module):
    @nn.compact
    def __call__(self, inputs):
        return nn.LayerNorm()(nn.Embed(7, 6)(inputs)).mean(1)


class Noisy(nn.Module):
    @nn.compact
    def __call__(self, inputs, training):
        x = nn.Dense(4)(inputs)
        if training:
            x = x + jax.random.normal(self.make_rng("noise"), x.shape)
            x = x * jax.random.uniform(self.make_rng("scale"), x.shape)
        return x


class Sampling(nn.Module):
    """Draws in inference too, and sows a loss and a metric."""

    @nn.compact
    def __call__(self, inputs):
        mean = nn.Dense(3)(inputs)
        self.sow("losses", "size", (mean**2).mean())
        self.sow("metrics", "size", jnp.abs(mean))
        return mean + jax.random.normal(self.make_rng("sample"), mean.shape)


class Two(nn.Module):
    def setup(self):
        self.dense = nn.Dense(3)

    def __call__(self, inputs):
        return self.encode(inputs)

    def encode(self, inputs):
        left, right = inputs
        return self.dense(left) - self.dense(right)


def two_encode(module, inputs, training):
    outputs = module.encode((inputs["a"], inputs["b"]))
    return outputs * 2 if training else outputs


@keras.saving.register_keras_serializable(package="tests")
class Saved(Cnn):
    """A module that can be saved as Keras asks."""

    def get_config(self):
        return {"features": self.features}

    @classmethod
    def from_config(cls, config):
        return cls(**config)


for function in (
    mlp_init,
    mlp_call,
    embed_init,
    embed_call,
    norm_init,
    norm_call,
    dropout_call,
    function_call,
    two_encode,
):
    keras.saving.register_keras_serializable(package="tests")(function)


def layer(call_fn, init_fn=None, **kwargs):
    return lambda **more: jaxwrap.JaxLayer(call_fn, init_fn, **kwargs, **more)


def linen(module, **kwargs):
    return lambda **more: jaxwrap.FlaxLayer(module, **kwargs, **more)


static_params = {
    "none": None,
    "name": "double",
    "activation": jnp.tanh,
    "scale": 2.0,
    "offset": np.arange(3.0, dtype="float32"),
}
bfloat16_params = {"w": jnp.ones((4, 2), jnp.bfloat16) / 3, "b": jnp.zeros(2, jnp.bfloat16)}
float16_params = {"w": np.ones((4, 2), "float16") / 3, "b": np.zeros(2, "float16")}
empty_params = {
    "empty": np.zeros((0,), "float32"),
    "scale": np.float32(1.5),
    "unused": np.ones(3, "float32"),
}

MODELS = {
    model.name: model
    for model in (
        Model("mlp", layer(mlp_call, mlp_init), floats(5)),
        Model("exact gelu", layer(gelu_call, mlp_init), floats(5)),
        Model("function", layer(function_call), floats(4)),
        Model(
            "tuple of inputs",
            layer(pair_call, pair_init),
            lambda rng, batch: (floats(4)(rng, batch), floats(4)(rng, batch)),
        ),
        Model(
            "dict of inputs, int and constant outputs",
            layer(dict_call, dict_init),
            lambda rng, batch: {"x": floats(4)(rng, batch), "mask": rng.random((batch, 4)) > 0.5},
        ),
        Model(
            "namedtuple",
            layer(named_call),
            lambda rng, batch: Pair(floats(4)(rng, batch), floats(4)(rng, batch)),
        ),
        Model("int tokens", layer(embed_call, embed_init), ints(6)),
        Model("batch norm", layer(norm_call, norm_init), floats(4)),
        Model("dropout", layer(dropout_call), floats(16)),
        Model("static leaves", layer(static_call, params=static_params), floats(3)),
        Model("scan", layer(scan_call, scan_init), floats(5, 4)),
        Model(
            "bfloat16 params", layer(half_call, params=bfloat16_params), floats(4), tolerance=3e-2
        ),
        Model("float16 params", layer(half_call, params=float16_params), floats(4), tolerance=4e-3),
        Model(
            "zero-size, 0-d and unused params", layer(empty_call, params=empty_params), floats(2)
        ),
        Model("registered class", layer(affine_call, affine_init), floats(4)),
        Model(
            "bare leaves",
            layer(counter_call, params={"w": 3.0}, state=0),
            floats(2),
        ),
        Model("reshape", layer(reshape_call), floats(2, 3)),
        Model("linen dense", linen(nn.Dense(3)), floats(4)),
        Model("linen cnn", linen(Cnn()), floats(6, 6, 2)),
        Model("linen sow", linen(Sowing()), floats(4)),
        Model("linen embed", linen(Tokens()), ints(5)),
        Model("linen streams", linen(Noisy()), floats(4)),
        Model("linen sampling in inference", linen(Sampling()), floats(4)),
        Model("linen dropout by itself", linen(nn.Dropout(0.5)), floats(9)),
        Model("linen batch norm by itself", linen(nn.BatchNorm()), floats(4)),
        Model(
            "linen method",
            linen(Two(), method="encode"),
            lambda rng, batch: (floats(4)(rng, batch), floats(4)(rng, batch)),
        ),
        Model(
            "linen function as method",
            linen(Two(), method=two_encode),
            lambda rng, batch: {"a": floats(4)(rng, batch), "b": floats(4)(rng, batch)},
        ),
    )
}

# A row for each subject, of those that compile soon.
QUICK = (
    "mlp",
    "int tokens",
    "batch norm",
    "bfloat16 params",
    "linen streams",
    "linen method",
)
