"""The arrays of an Equinox module: divided into parameters and others, and put back."""

from __future__ import annotations

from typing import Any

import jax

from jaxwrap._pytree import is_array
from jaxwrap._serialization import Weight
from jaxwrap._typing import PyTree


class ModuleLeaves:
    """The leaves of a module. An array that stands in several places is one weight, in the first of them."""

    def __init__(self, module: Any):
        self._leaves, self._treedef = jax.tree_util.tree_flatten(module)
        seen: dict[int, int] = {}
        self._first = [
            # By identity: two arrays of equal values are two weights.
            seen.setdefault(id(leaf), place) if is_array(leaf) else place
            for place, leaf in enumerate(self._leaves)
        ]
        self._static = [None if is_array(leaf) else leaf for leaf in self._leaves]

    def divide(self, chosen: Any) -> tuple[PyTree, PyTree]:
        """Return the module with the arrays that stand in `chosen` alone, and with the other arrays alone."""
        marks = self._treedef.flatten_up_to(chosen)
        arrays = {self._first[n] for n, leaf in enumerate(self._leaves) if is_array(leaf)}
        trained = arrays & {self._first[n] for n, leaf in enumerate(marks) if leaf is not None}
        params, rest = (
            self._treedef.unflatten(
                [leaf if n in kept else None for n, leaf in enumerate(self._leaves)]
            )
            for kept in (trained, arrays - trained)
        )
        return params, rest

    def join(self, params: PyTree, rest: PyTree) -> Any:
        """Return the module with these arrays."""
        parts = zip(
            self._treedef.flatten_up_to(params),
            self._treedef.flatten_up_to(rest),
            self._static,
            strict=True,
        )
        leaves = [next((leaf for leaf in part if leaf is not None), None) for part in parts]
        return self._treedef.unflatten([leaves[first] for first in self._first])

    def placeholders(self) -> Any:
        """Return the module with a `Weight` for each array."""
        return self._treedef.unflatten(
            [
                _placeholder(leaf, first) if is_array(leaf) else leaf
                for leaf, first in zip(self._leaves, self._first, strict=True)
            ]
        )


def _placeholder(array: Any, place: int) -> Weight:
    impl = None
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        impl, array = str(jax.random.key_impl(array)), jax.random.key_data(array)
    return Weight(
        tuple(array.shape), array.dtype.name, impl, place, not isinstance(array, jax.Array)
    )
