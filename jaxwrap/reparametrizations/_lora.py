"""LoRA: a frozen leaf, and a trained difference of low rank."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import jax.numpy as jnp
from jax import nn, random

from jaxwrap._serialization import register_serializable
from jaxwrap._typing import Array
from jaxwrap._weights._reparametrization import Reparametrization


@register_serializable("jaxwrap")
@dataclasses.dataclass(frozen=True)
class LoRA(Reparametrization):
    """A frozen leaf plus the product of two small matrices, which are trained.

    The leaf is `base + alpha / rank * (a @ b)`, of the base's shape. `a` starts with random numbers and `b` with
    zeros, so the leaf starts as the base, exactly. Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language
    Models", 2021, arXiv:2106.09685.

    Attributes:
        rank: The number of columns of `a` and of rows of `b`.
        alpha: The scale of the difference, times `rank`. None for `rank`, that is, a scale of 1.
        inputs: How many of the first axes of the leaf are inputs, the rows of `a`. None for all but the last. A
            Flax attention kernel of shape (features, heads, size) has one. A negative number counts the last axes: an
            Equinox weight of shape (outputs, inputs) has -1.
        base: The reparametrization of the base. `Int8()` makes it QLoRA.
        dropout: The probability that an input feature, a row of `a`, counts for nothing in a training call. The others
            are scaled up. The leaf is computed once a call, so one draw serves the whole batch, where peft draws for
            each example.

    Raises:
        ValueError: For a rank below 1, or a dropout that is not from 0 to below 1; when a layer is built, for a leaf
            with fewer than two axes, or other inputs.

    Example:
        >>> import flax.linen as nn, numpy as np, jaxwrap
        >>> lora = jaxwrap.reparametrizations.LoRA(rank=2)
        >>> layer = jaxwrap.FlaxLayer(nn.Dense(4), rules={".*/kernel": jaxwrap.Rule(reparametrize=lora)}, name="dense")
        >>> _ = layer(np.ones((1, 3), "float32"))
        >>> print(layer.weight_table())
        path                       shape   dtype    trainable  size
        dense/params/bias          (4,)    float32  yes           4
        dense/params/kernel/base   (3, 4)  float32  no           12
        dense/params/kernel/a      (3, 2)  float32  yes           6
        dense/params/kernel/b      (2, 4)  float32  yes           8
        total                                                    30
    """

    rank: int
    alpha: float | None = None
    inputs: int | None = None
    base: Reparametrization | None = None
    dropout: float = 0.0

    frozen = ("base",)

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"LoRA: `rank` must be an integer from 1; received {self.rank!r}.")
        if not isinstance(self.base, (Reparametrization, type(None))):
            raise ValueError(
                f"LoRA: `base` must be a Reparametrization or None; received {self.base!r}."
            )

        if not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise ValueError(
                f"LoRA: `dropout` must be a number from 0 to below 1; received {self.dropout!r}."
            )

    def init(self, leaf: Array, key: Array) -> Mapping[str, Array]:
        """Make the base of the leaf, random `a` and zero `b`."""
        inputs = leaf.ndim - 1 if self.inputs is None else self.inputs
        if not 0 < abs(inputs) < leaf.ndim:
            raise ValueError(
                f"LoRA needs a leaf of two axes or more, and from 1 to all but one of them as inputs; received "
                f"{leaf.ndim} axes and inputs={self.inputs}. Write a pattern that matches kernels only."
            )
        first, last = math.prod(leaf.shape[:inputs]), math.prod(leaf.shape[inputs:])
        rows, columns = (first, last) if inputs > 0 else (last, first)
        a = nn.initializers.he_uniform()(key, (rows, self.rank), leaf.dtype)
        return {"base": leaf, "a": a, "b": jnp.zeros((self.rank, columns), leaf.dtype)}

    def apply(self, parts: Mapping[str, Array], shape: tuple[int, ...]) -> Array:
        """Add the scaled product to the base."""
        scale = 1.0 if self.alpha is None else self.alpha / self.rank
        product = parts["a"] @ parts["b"]
        if self.inputs is not None and self.inputs < 0:
            product = product.T
        return parts["base"] + (scale * product.reshape(shape)).astype(parts["base"].dtype)

    def apply_training(
        self, parts: Mapping[str, Array], shape: tuple[int, ...], key: Array
    ) -> tuple[Array, Mapping[str, Array]]:
        """Leave out rows of `a`, and scale the others up."""
        if not self.dropout:
            return self.apply(parts, shape), {}
        rows = random.bernoulli(key, 1 - self.dropout, (len(parts["a"]), 1))
        a = jnp.where(rows, parts["a"] / (1 - self.dropout), 0)
        return self.apply({**parts, "a": a}, shape), {}
