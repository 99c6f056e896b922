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
    """What an argument of a flat function is: to its gradient, and to the caller who holds it.

    Attributes:
        differentiable: Whether a gradient may be asked for, if the argument's dtype has one.
        held: Whether it is the value of a variable: the same tensor call after call, written to in between. What a
            bridge makes of it is worth keeping, as long as the tensor is the same.
    """

    INPUT = ("a gradient may be asked for", True, False)
    CONSTANT = ("no gradient", False, False)
    PARAMETER = ("a gradient may be asked for; the value of a variable", True, True)
    FROZEN = ("no gradient; the value of a variable", False, True)
    STATE = (
        "as FROZEN, and the caller may overwrite it as soon as the call has returned",
        False,
        True,
    )

    def __init__(self, meaning: str, differentiable: bool, held: bool):
        self.meaning = meaning
        self.differentiable = differentiable
        self.held = held


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
