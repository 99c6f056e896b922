"""The models, as Flax modules; a table of them is at the end.

Each has arguments `inputs` and `training`: `keras.layers.FlaxLayer` takes no others. `native_models.py` has the same
models in the backend's own layers.
"""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


class MLP(nn.Module):
    """9 blocks of 4 leaves and a head of 2: 38 leaves."""

    width: int = 64
    blocks: int = 9

    @nn.compact
    def __call__(self, inputs, training=False):
        x = inputs
        for _ in range(self.blocks):
            x = x + nn.gelu(nn.Dense(self.width)(nn.LayerNorm()(x)))
        return nn.Dense(16)(x)


class Transformer(nn.Module):
    """About 5M params; reads tokens, and predicts 16 numbers for each sequence."""

    vocabulary: int = 8192
    width: int = 256
    blocks: int = 4

    @nn.compact
    def __call__(self, inputs, training=False):
        x = nn.Embed(self.vocabulary, self.width)(inputs)
        x = x + self.param("positions", nn.initializers.normal(0.02), (inputs.shape[1], self.width))
        for _ in range(self.blocks):
            x = x + nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(x))
            hidden = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
            x = x + nn.Dense(self.width)(hidden)
        return nn.Dense(16)(nn.LayerNorm()(x).mean(axis=1))


class ResNet18(nn.Module):
    @nn.compact
    def __call__(self, inputs, training=False):
        def conv(x, width, size, stride):
            x = nn.Conv(width, (size, size), stride, padding=size // 2, use_bias=False)(x)
            return nn.BatchNorm(use_running_average=not training, momentum=0.9)(x)

        x = nn.relu(conv(inputs, 64, 7, 2))
        x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        for width, stride in RESNET_BLOCKS:
            y = conv(nn.relu(conv(x, width, 3, stride)), width, 3, 1)
            x = x if stride == 1 else conv(x, width, 1, stride)
            x = nn.relu(x + y)
        return nn.Dense(16)(x.mean(axis=(1, 2)))


RESNET_BLOCKS = ((64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1))


@dataclasses.dataclass(frozen=True)
class Model:
    """A module with the shape of its inputs, and how many batches make an epoch worth timing."""

    title: str
    make: Callable[[], nn.Module]
    batch: int
    shape: tuple[int, ...]
    steps: int
    dtype: str = "float32"

    def inputs(self, batches=1):
        rng = np.random.default_rng(0)
        shape = (batches * self.batch, *self.shape)
        if self.dtype == "int32":
            return rng.integers(0, 8192, shape, "int32")
        return rng.normal(size=shape).astype("float32")

    def targets(self, batches=1):
        return np.random.default_rng(1).normal(size=(batches * self.batch, 16)).astype("float32")

    def variables(self):
        """The same values at each call, in arrays of its own: training may delete them."""
        return jax.jit(self.make().init)(jax.random.key(0), jnp.asarray(self.inputs()))


MODELS = {
    "mlp": Model("38-leaf MLP", MLP, 32, (64,), 400),
    "transformer": Model("transformer", Transformer, 8, (64,), 10, "int32"),
    "resnet": Model("ResNet-18", ResNet18, 8, (32, 32, 3), 5),
}


def tree(leaves):
    """A tree of small leaves, in nested dicts, and a function of all of them."""
    rng = np.random.default_rng(0)
    groups = {}
    for index in range(leaves):
        group = groups.setdefault(f"group_{index // 10}", {})
        group[f"leaf_{index % 10}"] = jnp.asarray(rng.normal(size=4), "float32")

    def call(params, inputs):
        return inputs + jnp.stack(jax.tree_util.tree_leaves(params)).sum(axis=0)

    return groups, call
