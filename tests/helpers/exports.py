"""Models to export, each with its native run. Another process can load them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import keras
import numpy as np

import jaxwrap


@dataclasses.dataclass(frozen=True)
class Exported:
    """A model to export.

    Attributes:
        make: Makes the model.
        native: `native(model, inputs)` gives the outputs by JAX alone.
        inputs: Makes inputs for a batch size.
    """

    make: Callable[[], Any]
    native: Callable[[Any, Any], Any]
    inputs: Callable[[int], np.ndarray]


@jaxwrap.register_serializable("exports")
class Pooled(nn.Module):
    """A CNN with batch norm, max pooling and dropout."""

    @nn.compact
    def __call__(self, image, training=False):
        x = nn.Conv(4, (3, 3))(image)
        x = nn.BatchNorm(use_running_average=not training)(x)
        x = nn.max_pool(nn.relu(x), (2, 2), (2, 2))
        x = nn.Dropout(0.4, deterministic=not training)(x)
        return nn.Dense(3)(x.reshape(x.shape[0], -1))


@jaxwrap.register_serializable("exports")
class Block(nn.Module):
    """A transformer block on tokens, with dropout."""

    @nn.compact
    def __call__(self, tokens, training=False):
        x = nn.Embed(11, 8)(tokens)
        attention = nn.MultiHeadDotProductAttention(
            num_heads=2, dropout_rate=0.1, deterministic=not training
        )
        x = x + attention(nn.LayerNorm()(x))
        return x + nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(x))))


@jaxwrap.register_serializable("exports", "mlp")
def mlp():
    return eqx.nn.MLP(4, 3, 8, 2, key=jax.random.key(0))


def floats(*shape):
    return lambda batch: (
        np.random.default_rng(batch).standard_normal((batch, *shape)).astype("float32")
    )


def tokens(batch):
    return np.random.default_rng(batch).integers(0, 11, (batch, 5)).astype("int32")


def one_layer(layer, name, shape, dtype="float32"):
    inputs = keras.Input(shape, dtype=dtype, name=name)
    return keras.Model(inputs, layer(inputs))


def mixed():
    inputs = keras.Input((4,), name="rows")
    hidden = keras.layers.Dense(6, activation="relu", bias_initializer="ones")(inputs)
    return keras.Model(inputs, jaxwrap.FlaxLayer(nn.Dense(3), name="wrapped")(hidden))


def mixed_native(model, inputs):
    kernel, bias = (
        keras.ops.convert_to_numpy(v)
        for v in next(x for x in model.layers if isinstance(x, keras.layers.Dense)).weights
    )
    variables = model.get_layer("wrapped").get_variables()
    return nn.Dense(3).apply(variables, jax.nn.relu(inputs @ kernel + bias))


def linen(module):
    return lambda model, inputs: module.apply(model.layers[-1].get_variables(), jnp.asarray(inputs))


MODELS = {
    "linen cnn": Exported(
        lambda: one_layer(jaxwrap.FlaxLayer(Pooled()), "image", (8, 8, 2)),
        linen(Pooled()),
        floats(8, 8, 2),
    ),
    "transformer block": Exported(
        lambda: one_layer(jaxwrap.FlaxLayer(Block()), "tokens", (None,), "int32"),
        linen(Block()),
        tokens,
    ),
    "equinox mlp": Exported(
        lambda: one_layer(jaxwrap.EquinoxLayer(mlp(), batch=True), "rows", (4,)),
        lambda model, inputs: jax.vmap(mlp())(jnp.asarray(inputs)),
        floats(4),
    ),
    "mixed": Exported(mixed, mixed_native, floats(4)),
}


@jaxwrap.register_serializable("exports")
def with_callback(inputs):
    shape = jax.ShapeDtypeStruct(inputs.shape, inputs.dtype)
    return jax.pure_callback(lambda value: value, shape, inputs)


# Registered here, and defined elsewhere.
jaxwrap.register_serializable("exports", "i0e")(jax.scipy.special.i0e)
