"""What a file is read into, and written from: a variable, or a leaf of parts as a whole."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import keras
import numpy as np

from jaxwrap._weights._leaves import Leaves
from jaxwrap._weights._variables import assign, to_host


class Target(NamedTuple):
    """A weight as a file has it.

    Attributes:
        shape: Its shape.
        dtype: The name of its dtype.
        read: Returns the value.
        look: Raises ValueError if a value of this shape and dtype cannot be assigned. Assigns nothing.
        write: Assigns a value of this shape and dtype.
        variables: The variables that hold it.
        tie: For a leaf whose value is that of another one, the path of the other, and what compares the two.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Any]
    look: Callable[[np.ndarray], Any]
    write: Callable[[np.ndarray], None]
    variables: tuple[keras.Variable, ...]
    tie: tuple[str, Callable[[Mapping[str, Any]], list[str]]] | None = None


def of_variable(variable: keras.Variable) -> Target:
    """Return the target of one variable."""

    def write(array: np.ndarray) -> None:
        assign(variable, array)
        # JAX copies in the background, and keeps each array until then.
        jax.block_until_ready(variable.value)

    read = functools.partial(to_host, variable)
    return Target(tuple(variable.shape), variable.dtype, read, _accept, write, (variable,))


def of_leaf(leaves: Leaves, place: int) -> Target:
    """Return the target of a whole leaf."""
    leaf = leaves.leaves[place]
    if leaf.layout is None:
        return of_variable(leaf.variables[0])
    read, source = functools.partial(leaves.read_leaf, place), leaves.source(place)
    tie = None if source is None else (source, leaves.check_tied)
    return Target(leaf.shape, leaf.stored, read, leaf.split, leaf.write, leaf.variables, tie)


def untied(targets: Mapping[str, Target], values: Mapping[str, Any]) -> list[str]:
    """Return a line for each weight that must be equal to another one and is not.

    Args:
        targets: The targets by path.
        values: The values to assign, by path. Paths may be missing.
    """
    ties = [target.tie[1] for target in targets.values() if target.tie]
    return [line for compare in ties for line in compare(values)]


def _accept(array: np.ndarray) -> None:
    pass
