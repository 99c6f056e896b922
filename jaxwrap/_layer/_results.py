"""What one call returns: tensors through which gradients flow, and what the layer assigns."""

from __future__ import annotations

from typing import NamedTuple

from jaxwrap._pytree import Structure
from jaxwrap._typing import Array, PyTree, Tensor


class Flowing(NamedTuple):
    """The results through which gradients flow."""

    outputs: PyTree
    loss: Array | None


class Kept(NamedTuple):
    """The results that the layer assigns: new values of variables by index, and metrics by name."""

    state: dict[int, Array]
    metrics: dict[str, Array]


class Outcome(NamedTuple):
    """What a call returns besides arrays.

    Attributes:
        flowing: The structure of `Flowing`.
        kept: The structure of `Kept`.
        draws: The number of draws from each generator.
    """

    flowing: Structure
    kept: Structure
    draws: tuple[int, ...]


class Result(NamedTuple):
    """The results of a call, in tensors."""

    outputs: PyTree
    loss: Tensor | None
    state: dict[int, Tensor]
    metrics: dict[str, Tensor]
    draws: tuple[int, ...]
