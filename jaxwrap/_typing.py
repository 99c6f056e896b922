"""Types shared by all of jaxwrap."""

from __future__ import annotations

import enum
from typing import Any, NamedTuple, Protocol

import jax

Array = Any  # a jax.Array or, while JAX traces, a tracer
Tensor = Any  # a tensor of the current Keras backend
PyTree = Any


@jax.tree_util.register_static
class Static:
    """A pytree without leaves that carries `value` through JAX's transformations.

    What a flat function knows only once it has been traced (the structure of its outputs) thus comes out of `jax.jit`,
    `jax.vjp` and `jax.export` beside the arrays, and is right for each cached trace. The value must be hashable.
    """

    __slots__ = ("value",)

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Static) and self.value == other.value

    def __hash__(self) -> int:
        return hash(self.value)


class Role(enum.Enum):
    """What an argument of a flat function is to its gradient."""

    DIFFERENTIABLE = "a gradient may be asked for, if its dtype has one"
    CONSTANT = "no gradient"
    STATE = "no gradient, and the caller may overwrite it in place as soon as the call has returned"


class FlatResult(NamedTuple):
    """What a flat function returns.

    Attributes:
        outputs: Arrays, differentiable where their dtype is.
        aux: Arrays no gradient flows through, such as new state.
        static: What is no array: how to rebuild the pytrees.
    """

    outputs: tuple[Array, ...]
    aux: tuple[Array, ...]
    static: Static


class FlatFunction(Protocol):
    """A pure JAX function of arrays only. It may be traced at any time, any number of times."""

    def __call__(self, *arrays: Array) -> FlatResult: ...
