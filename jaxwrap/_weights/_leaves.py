"""Ordered leaves ⇄ the pytree that they make."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import keras
import numpy as np

from jaxwrap._pytree import Structure, describe_difference, is_leaf_array, partition
from jaxwrap._typing import Array, PyTree
from jaxwrap._weights._leaf import Leaf, LeafPath
from jaxwrap._weights._reparametrization import Tied
from jaxwrap._weights._variables import Initial, Source, as_copies, create_variables


class Leaves:
    """The leaves of one pytree, and their variables in the order in which they are passed on.

    Attributes:
        structure: The structure of the user's pytree.
        leaves: The leaves, in leaf order.
        variables: The variables of all leaves.
        tree: The user's pytree, with the variable of a leaf in its place.
        draws: Whether leaves need a key in a training call.
        updated: The indices of the variables of parts that get new values in a training call.
    """

    def __init__(self, structure: Structure, leaves: Sequence[Leaf], order: Iterable[int] = ()):
        """Take leaves whose variables exist.

        Args:
            structure: The structure of the pytree.
            leaves: The leaves.
            order: The places of the leaves in the order of the variables. By default leaf order.
        """
        self.structure = structure
        self.leaves = tuple(leaves)
        self._order = tuple(order) or tuple(range(len(self.leaves)))
        counts = [len(self.leaves[place].variables) for place in self._order]
        ends = list(itertools.accumulate(counts, initial=0))
        self._slices = {
            place: slice(start, end)
            for place, (start, end) in zip(self._order, itertools.pairwise(ends), strict=True)
        }
        self.variables: list[keras.Variable] = [
            variable for place in self._order for variable in self.leaves[place].variables
        ]
        self.tree = structure.unflatten(leaf.tree() for leaf in self.leaves)
        layouts = [(place, leaf.layout) for place, leaf in enumerate(self.leaves) if leaf.layout]
        self.draws = any(layout.draws for _, layout in layouts)
        self.updated = frozenset(
            self._slices[place].start + n for place, layout in layouts for n in layout.updated
        )
        places = {leaf.path: place for place, leaf in enumerate(self.leaves)}
        # Leaves without variables, which have the value of another one.
        self._tied = {
            place: (leaf.form, places[leaf.form.path])
            for place, leaf in enumerate(self.leaves)
            if isinstance(leaf.form, Tied)
        }

    @classmethod
    def create(
        cls,
        owner: Any,
        structure: Structure,
        leaves: Sequence[Leaf],
        values: Sequence[Any],
        order: Iterable[int] = (),
        source: Source = as_copies,
    ) -> Leaves:
        """Make the variables of `values`. The owner must still track them. See `create_variables`."""
        places = tuple(order) or tuple(range(len(leaves)))
        ordered = (values[place] for place in places)
        fill(owner, [leaves[place] for place in places], ordered, source=source)
        return cls(structure, leaves, places)

    def copied(self, find: Callable[[keras.Variable], keras.Variable]) -> Leaves:
        """Return the same leaves, with the variables that `find` returns."""
        leaves = [
            dataclasses.replace(leaf, variables=tuple(map(find, leaf.variables)))
            for leaf in self.leaves
        ]
        return Leaves(self.structure, leaves, self._order)

    def decode(self, arrays: Sequence[Array]) -> PyTree:
        """Return the user's pytree, as JAX functions take it, from the values of the variables."""
        return self.structure.unflatten(self.decode_leaves(arrays))

    def decode_leaves(self, arrays: Sequence[Array]) -> list[Array]:
        """Return the leaves alone, as JAX functions take them."""
        return self._tie(
            None if n in self._tied else leaf.decode(arrays[self._slices[n]])
            for n, leaf in enumerate(self.leaves)
        )

    def decode_training(
        self, arrays: Sequence[Array], key: Array | None
    ) -> tuple[PyTree, dict[int, Array]]:
        """Return the user's pytree in a training call, and new values of parts by the index of the variable.

        Args:
            arrays: The values of the variables.
            key: The key of the call. None if no leaf draws.
        """
        decoded: list[Any] = []
        updates: dict[int, Array] = {}
        for place, leaf in enumerate(self.leaves):
            where = self._slices[place]
            array, new = (
                (None, {}) if place in self._tied else leaf.decode_training(arrays[where], key)
            )
            decoded.append(array)
            updates |= {where.start + n: value for n, value in new.items()}
        return self.structure.unflatten(self._tie(decoded)), updates

    def _tie(self, leaves: Iterable[Any]) -> list[Array]:
        decoded = list(leaves)
        for place, (form, source) in self._tied.items():
            decoded[place] = form.apply({"source": decoded[source]}, self.leaves[place].shape)
        return decoded

    def structs(self) -> list[jax.ShapeDtypeStruct]:
        """Return the shape and dtype of each array that `decode` takes."""
        return [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in self.variables]

    def encode(
        self, tree: PyTree, problem: str, old: Sequence[Array] | None = None
    ) -> dict[int, Array]:
        """Compute the values of the variables from a new pytree, the inverse of `decode`.

        Args:
            tree: The new pytree.
            problem: The first line of an error.
            old: The result of `decode_leaves`. A leaf that is the same object in both has not changed.

        Returns:
            The new values, by the index of the variable. Without `old`, all of them.

        Raises:
            ValueError: If structure or shapes differ, with a line for each path where they do.
        """
        values, received = partition(tree, is_leaf_array)
        if difference := describe_difference(self.structure, received):
            raise ValueError(f"{problem}\n{difference}")
        before = [None] * len(values) if old is None else old
        encoded, lines = {}, []
        for place, (leaf, value) in enumerate(zip(self.leaves, values, strict=True)):
            if value is before[place]:
                continue
            arrays = leaf.encode(value)
            where = range(*self._slices[place].indices(len(self.variables)))
            for index, array, variable in zip(where, arrays, leaf.variables, strict=True):
                encoded[index] = array
                if array.shape != (shape := tuple(variable.shape)):
                    lines.append(f"  shape: {leaf.path} was {shape}, is {array.shape}")
        if lines:
            raise ValueError("\n".join([problem, *lines]))
        return encoded

    def source(self, place: int) -> str | None:
        """Return the path of the leaf that one is tied to, or None."""
        return self._tied[place][0].path if place in self._tied else None

    def read_leaf(self, place: int) -> Any:
        """Return one leaf as a NumPy array. A PRNG key is a JAX array."""
        leaf = self.leaves[place]
        if place not in self._tied:
            return leaf.read()
        form, source = self._tied[place]
        return form.apply({"source": self.leaves[source].read()}, leaf.shape)

    def read(self, merged: bool = True) -> PyTree:
        """Return the user's pytree with NumPy arrays. PRNG keys are JAX arrays.

        Args:
            merged: Whether a leaf of parts is one array. Otherwise it is a dict of its parts.
        """
        if not merged:
            return self.structure.unflatten(leaf.read_parts() for leaf in self.leaves)
        return self.structure.unflatten(map(self.read_leaf, range(len(self.leaves))))

    def paths(self) -> PyTree:
        """Return the user's pytree with a `LeafPath` for each array or number."""
        return self.structure.unflatten(LeafPath(leaf.path) for leaf in self.leaves)

    def placeholders(self) -> PyTree:
        """Return the user's pytree with a `Weight` for each array or number."""
        return self.structure.unflatten(
            leaf.placeholder(place) for place, leaf in enumerate(self.leaves)
        )

    def check(self, tree: PyTree) -> tuple[list[np.ndarray], list[str]]:
        """Prepare a pytree of values to be assigned.

        Returns:
            An array for each variable of the leaves, in leaf order, and a line for each reason not to assign them.
        """
        values, received = partition(tree, is_leaf_array)
        if difference := describe_difference(self.structure, received):
            return [], [difference]
        pairs = list(enumerate(zip(self.leaves, values, strict=True)))
        checked = [leaf.check(value) for n, (leaf, value) in pairs if n not in self._tied]
        lines = [line for _, lines in checked for line in lines]
        if not lines:
            lines = self.check_tied(
                dict(zip((leaf.path for leaf in self.leaves), values, strict=True))
            )
        return [array for arrays, _ in checked for array in arrays], lines

    def check_tied(self, values: Mapping[str, Any]) -> list[str]:
        """Return a line for each tied leaf whose value is not that of its source.

        Args:
            values: The values by path. Paths may be missing.
        """
        lines = []
        for place, (form, source) in self._tied.items():
            leaf, other = self.leaves[place], self.leaves[source]
            if leaf.path not in values:
                continue
            of_source = values[other.path] if other.path in values else other.read()
            expected = form.apply({"source": np.asarray(of_source)}, leaf.shape)
            if not np.array_equal(expected, np.asarray(values[leaf.path])):
                lines.append(f"  tied: {leaf.path} must be equal to {other.path}")
        return lines


def fill(
    owner: Any,
    leaves: Sequence[Leaf],
    values: Iterable[Any],
    outer: Sequence[str] | None = None,
    source: Source = as_copies,
) -> None:
    """Make the variables of leaves: see `create_variables`. The owner knows none of them before all are made.

    Raises:
        ValueError: If a leaf cannot be computed from parts as its rule says.
    """
    initials = [leaf.initials(value) for leaf, value in zip(leaves, values, strict=True)]
    fill_with(owner, leaves, initials, outer, source)


def fill_with(
    owner: Any,
    leaves: Sequence[Leaf],
    initials: Sequence[Sequence[Initial]],
    outer: Sequence[str] | None = None,
    source: Source = as_copies,
) -> None:
    """Make the variables of leaves as they are described: see `create_variables`."""
    flat = [one for part in initials for one in part]
    made = iter(create_variables(owner, flat, outer, source))
    for leaf, part in zip(leaves, initials, strict=True):
        leaf.variables = tuple(itertools.islice(made, len(part)))
