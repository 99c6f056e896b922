"""What a file is read into, and written from: a variable, or a leaf of parts as a whole."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import keras
import numpy as np
from jax.sharding import NamedSharding

from jaxwrap._weights._leaves import Leaves
from jaxwrap._weights._variables import assign, mesh_sharding, to_host


class Target(NamedTuple):
    """A weight as a file has it.

    Attributes:
        shape: Its shape.
        dtype: The name of its dtype.
        read: Returns the value.
        look: Raises ValueError if a value of this shape and dtype cannot be assigned. Assigns nothing.
        write: Assigns a value of this shape and dtype. An array of JAX lies as `sharding` says.
        variables: The variables that hold it.
        shards: Returns the value as an array of JAX if it lies on a mesh. Otherwise as `read` does.
        sharding: Returns how the value lies on a mesh, or None.
        tie: For a leaf whose value is that of another one, the path of the other, and what compares the two.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Any]
    look: Callable[[np.ndarray], Any]
    write: Callable[[Any], None]
    variables: tuple[keras.Variable, ...]
    shards: Callable[[], Any]
    sharding: Callable[[], NamedSharding | None]
    tie: tuple[str, Callable[[Mapping[str, Any]], list[str]]] | None = None


def of_variable(variable: keras.Variable) -> Target:
    """Return the target of one variable."""

    def write(array: Any) -> None:
        assign(variable, array)
        # JAX copies in the background, and keeps each array until then.
        jax.block_until_ready(variable.value)

    def sharding() -> NamedSharding | None:
        return mesh_sharding(variable.value)

    def shards() -> Any:
        return to_host(variable) if sharding() is None else variable.value

    return Target(
        shape=tuple(variable.shape),
        dtype=variable.dtype,
        read=functools.partial(to_host, variable),
        look=lambda _: None,
        write=write,
        variables=(variable,),
        shards=shards,
        sharding=sharding,
    )


def of_leaf(leaves: Leaves, place: int) -> Target:
    """Return the target of a whole leaf."""
    leaf = leaves.leaves[place]
    if leaf.layout is None:
        return of_variable(leaf.variables[0])
    read, source = functools.partial(leaves.read_leaf, place), leaves.source(place)
    return Target(
        shape=leaf.shape,
        dtype=leaf.stored,
        read=read,
        look=leaf.split,
        write=leaf.write,
        variables=leaf.variables,
        shards=read,
        sharding=lambda: None,
        tie=None if source is None else (source, leaves.check_tied),
    )


def untied(targets: Mapping[str, Target], values: Mapping[str, Any]) -> list[str]:
    """Return a line for each weight that must be equal to another one and is not.

    Args:
        targets: The targets by path.
        values: The values to assign, by path. Paths may be missing.
    """
    ties = [target.tie[1] for target in targets.values() if target.tie]
    return [line for compare in ties for line in compare(values)]
