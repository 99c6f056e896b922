"""The trained variables ⇄ a nested dict by their paths, as Optax sees them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import keras
from keras.src.utils.naming import to_snake_case

from jaxwrap._layer._layer import JaxLayer
from jaxwrap._typing import PyTree
from jaxwrap._weights._names import unique_names

_SHOWN = 8


class Params:
    """The trained variables by name: `{"dense": {"kernel": ..., "bias": ...}}`.

    Where all are under one name that Keras has numbered, such as `sequential_3`, the number is left out: it depends on
    what the process made before.

    Attributes:
        variables: The variables, in the order in which the optimizer was built with them.
    """

    def __init__(self, variables: Sequence[keras.Variable]):
        self.variables = list(variables)
        paths = [tuple(getattr(v, "path", v.name).split("/")) for v in variables]
        self._names = unique_names(_without_counter(paths))
        self._index = {names: index for index, names in enumerate(self._names)}

    def tree(self, values: Sequence[Any]) -> PyTree:
        """Return the nested dict with `values`, in the order of the variables."""
        root: dict[str, Any] = {}
        for (*scopes, name), value in zip(self._names, values, strict=True):
            place = root
            for scope in scopes:
                place = place.setdefault(scope, {})
            place[name] = value
        return root

    def top(self) -> str:
        """Print the first two levels of the nested dict, for errors."""

        def listed(names: Sequence[str]) -> str:
            more = [f"... {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
            return "{" + ", ".join([*names[:_SHOWN], *more]) + "}"

        def entry(name: str, below: PyTree) -> str:
            if not isinstance(below, dict):
                return repr(name)
            return f"{name!r}: {listed([repr(key) for key in sorted(below)])}"

        tree = self.tree([None] * len(self._names))
        return listed([entry(name, tree[name]) for name in sorted(tree)])

    def values(self, tree: PyTree) -> list[Any]:
        """Return the values of a nested dict, in the order of the variables."""
        values = []
        for names in self._names:
            value = tree
            for name in names:
                value = value[name]
            values.append(value)
        return values

    def index(self, path: tuple[str, ...]) -> tuple[tuple[str, ...], int]:
        """Split the path of a leaf of the state into the path around a parameter, and its index, or -1."""
        # Longest first: there may be a `kernel` next to `dense/kernel`.
        for length in range(len(path), 0, -1):
            for start in range(len(path) - length + 1):
                index = self._index.get(path[start : start + length])
                if index is not None:
                    return (*path[:start], *path[start + length :]), index
        return path, -1


def _without_counter(paths: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    roots = {path[0] for path in paths if len(path) > 1}
    if len(roots) != 1 or any(len(path) == 1 for path in paths):
        return paths
    name, _, counter = roots.pop().rpartition("_")
    if not counter.isdecimal() or name not in _automatic_names():
        return paths
    return [(name, *path[1:]) for path in paths]


def _automatic_names() -> set[str]:
    """Return the names, without numbers, that Keras gives to models and to the layers of this library."""
    # Not of other layers: `Dense(name="dense_2")` is too common a name of somebody's own.
    return {to_snake_case(cls.__name__) for cls in _with_subclasses((keras.Model, JaxLayer))}


def _with_subclasses(classes: Sequence[type]) -> Iterator[type]:
    below = (_with_subclasses(cls.__subclasses__()) for cls in classes)
    return itertools.chain(classes, *below)
