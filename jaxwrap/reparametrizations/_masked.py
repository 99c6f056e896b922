"""Pruned leaves."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jaxwrap._serialization import register_serializable
from jaxwrap._typing import Array
from jaxwrap._weights._reparametrization import Reparametrization


@register_serializable("jaxwrap")
@dataclasses.dataclass(frozen=True)
class Masked(Reparametrization):
    """A leaf that is zero for good where its mask is false. The mask is a part, so it is saved with the weights.

    Attributes:
        mask: A bool array of the leaf's shape; or a function from the leaf's initial value to one, such as one that
            keeps the largest numbers. To be saved, the function must be registered.

    Raises:
        ValueError: When a layer is built, for a mask of another shape.

    Example:
        >>> import numpy as np, jaxwrap
        >>> rule = jaxwrap.Rule(reparametrize=jaxwrap.reparametrizations.Masked(lambda leaf: abs(leaf) > 1))
        >>> layer = jaxwrap.JaxLayer(lambda params, x: x * params, params=np.float32([1, 2, 3]), rules={".*": rule})
        >>> print(layer(np.ones(3, "float32")))  # doctest: +SKIP
        [0. 2. 3.]
    """

    mask: Any

    frozen = ("mask",)

    def init(self, leaf: Array, key: Array) -> Mapping[str, Array]:
        """Compute the mask of the leaf."""
        mask = jnp.asarray(self.mask(leaf) if callable(self.mask) else self.mask, bool)
        if mask.shape != leaf.shape:
            raise ValueError(
                f"Masked: the mask must have the leaf's shape, {leaf.shape}; received {mask.shape}."
            )
        return {"weight": jnp.where(mask, leaf, 0), "mask": mask}

    def apply(self, parts: Mapping[str, Array], shape: tuple[int, ...]) -> Array:
        """Put zeros where the mask is false."""
        return jnp.where(parts["mask"], parts["weight"], 0)

    def assign(self, leaf: Array, parts: Mapping[str, Array], key: Array) -> Mapping[str, Array]:
        """Keep the present mask."""
        return {"weight": jnp.where(parts["mask"], leaf, 0), "mask": parts["mask"]}
