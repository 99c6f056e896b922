"""The trained variables ⇄ a nested dict by their paths, as Optax sees them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from jaxwrap._typing import PyTree
from jaxwrap._weights._names import unique_names


class Params:
    """The trained variables by name: `{"dense": {"kernel": ..., "bias": ...}}`.

    Attributes:
        variables: The variables, in the order in which the optimizer was built with them.
    """

    def __init__(self, variables: Sequence[keras.Variable]):
        self.variables = list(variables)
        paths = [tuple(getattr(v, "path", v.name).split("/")) for v in variables]
        self._names = unique_names(paths)
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
