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

    A flat function learns the structure of its outputs only when it is traced. In a `Static`, the structure comes out
    of `jax.jit`, `jax.vjp` and `jax.export` with the arrays, and is right for each cached trace. The value must be
    hashable.
    """

    # JAX's caches keep treedefs, so what the value refers to lives as long as they do.
    __slots__ = ("value",)

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Static) and self.value == other.value

    def __hash__(self) -> int:
        return hash(self.value)


class Role(enum.Enum):
    """The role of an argument of a flat function: whether it has a gradient, and who holds it.

    Attributes:
        differentiable: Whether a gradient may be asked for, if the argument's dtype has one.
        held: Whether it is the value of a variable: the same tensor call after call, written to in between. A
            bridge may keep what it makes of it, as long as the tensor is the same.
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
    """The result of a flat function.

    Attributes:
        outputs: Arrays, differentiable where their dtype is.
        aux: Arrays that no gradient flows through, such as new state.
        static: The structures of the pytrees, to rebuild them.
    """

    outputs: tuple[Array, ...]
    aux: tuple[Array, ...]
    static: Static


class FlatFunction(Protocol):
    """A pure JAX function of arrays only. It may be traced at any time, any number of times."""

    def __call__(self, *arrays: Array) -> FlatResult: ...
