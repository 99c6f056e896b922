"""Leaves with a norm of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxwrap._serialization import register_serializable
from jaxwrap._typing import Array
from jaxwrap._weights._reparametrization import Reparametrization

_EPSILON = 1e-12


@register_serializable("jaxwrap")
@dataclasses.dataclass(frozen=True)
class WeightNorm(Reparametrization):
    """A direction and a length for each index of the last axis, both trained.

    The leaf is `scale * direction / norm(direction)`, and starts as it was. Source: Salimans and Kingma, "Weight
    Normalization", 2016, arXiv:1602.07868.

    Example:
        >>> import flax.linen as nn, numpy as np, jaxwrap
        >>> rule = jaxwrap.Rule(reparametrize=jaxwrap.reparametrizations.WeightNorm())
        >>> layer = jaxwrap.FlaxLayer(nn.Dense(4, use_bias=False), rules={".*": rule})
        >>> _ = layer(np.ones((1, 3), "float32"))
        >>> [(weight.name, tuple(weight.shape)) for weight in layer.trainable_weights]
        [('direction', (3, 4)), ('scale', (4,))]
    """

    def init(self, leaf: Array, key: Array) -> Mapping[str, Array]:
        """Take the leaf for the direction, and its norm for the scale."""
        return {"direction": leaf, "scale": _norm(leaf)}

    def apply(self, parts: Mapping[str, Array], shape: tuple[int, ...]) -> Array:
        """Scale the direction to the length."""
        length = _norm(parts["direction"])
        ratio = jnp.where(
            length > _EPSILON, parts["scale"] / jnp.where(length > _EPSILON, length, 1), 1
        )
        # XLA may sum up the norm in another order than `init` did. So near 1 means 1, and the gradient stays.
        near = jnp.abs(ratio - 1) < 8 * jnp.finfo(ratio.dtype).eps
        ratio = ratio + jax.lax.stop_gradient(jnp.where(near, 1 - ratio, 0))
        return parts["direction"] * ratio


@register_serializable("jaxwrap")
@dataclasses.dataclass(frozen=True)
class SpectralNorm(Reparametrization):
    """A leaf divided by its largest singular value, as a matrix of all axes but the last, and the last.

    The value is estimated from two vectors that are kept. Each training call improves them by power iteration, and
    inference takes them as they are, as `torch.nn.utils.parametrizations.spectral_norm` does. Source: Miyato et al.,
    "Spectral Normalization for Generative Adversarial Networks", 2018, arXiv:1802.05957.

    Attributes:
        steps: The iterations in each training call. The first vectors come from 15.

    Raises:
        ValueError: For `steps` below 1; when a layer is built, for a leaf with fewer than two axes.

    Example:
        >>> import flax.linen as nn, numpy as np, jaxwrap
        >>> rule = jaxwrap.Rule(reparametrize=jaxwrap.reparametrizations.SpectralNorm())
        >>> layer = jaxwrap.FlaxLayer(nn.Dense(4), rules={".*/kernel": rule})
        >>> _ = layer(np.ones((1, 3), "float32"))
        >>> kernel = layer.get_variables()["params"]["kernel"]
        >>> bool(abs(np.linalg.norm(kernel, 2) - 1) < 0.01)
        True
    """

    steps: int = 1

    frozen = ("left", "right")

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or not 1 <= self.steps <= 1000:
            raise ValueError(
                f"SpectralNorm: `steps` must be an integer from 1 to 1000; received {self.steps!r}."
            )

    def init(self, leaf: Array, key: Array) -> Mapping[str, Array]:
        """Keep the leaf, and find the first vectors."""
        if leaf.ndim < 2:
            raise ValueError(
                f"SpectralNorm needs a leaf of two axes or more; received {leaf.ndim}."
            )
        vector = jax.random.normal(key, (leaf.shape[-1],), leaf.dtype)
        left, right = _iterate(_matrix(leaf), vector, 15)
        return {"weight": leaf, "left": left, "right": right}

    def apply(self, parts: Mapping[str, Array], shape: tuple[int, ...]) -> Array:
        """Divide by the largest singular value, as the vectors have it."""
        sigma = parts["left"] @ _matrix(parts["weight"]) @ parts["right"]
        return parts["weight"] / jnp.where(sigma > _EPSILON, sigma, 1)

    def apply_training(
        self, parts: Mapping[str, Array], shape: tuple[int, ...], key: Array
    ) -> tuple[Array, Mapping[str, Array]]:
        """Improve the vectors, then divide. No gradient flows through them."""
        matrix = jax.lax.stop_gradient(_matrix(parts["weight"]))
        left, right = _iterate(matrix, parts["right"], self.steps)
        new = {"left": left, "right": right}
        return self.apply({**parts, **new}, shape), new


def _norm(leaf: Array) -> Array:
    squares = jnp.sum(leaf * leaf, axis=tuple(range(leaf.ndim - 1)))
    # The gradient of a root at zero is infinite.
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)


def _matrix(leaf: Array) -> Array:
    return leaf.reshape(-1, leaf.shape[-1])


def _iterate(matrix: Array, right: Array, steps: int) -> tuple[Array, Array]:
    def unit(vector: Array) -> Array:
        return vector / jnp.maximum(jnp.linalg.norm(vector), _EPSILON)

    left = unit(matrix @ right)
    for _ in range(steps - 1):
        left = unit(matrix @ unit(matrix.T @ left))
    return left, unit(matrix.T @ left)
