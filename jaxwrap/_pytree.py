"""A pytree ⇄ its arrays in order, and the structure that holds all other leaves."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from jaxwrap._typing import PyTree

KeyPath = tuple[Any, ...]


class _Array:
    """Stands for an array in the place of its leaf."""

    def __repr__(self) -> str:
        return "<array>"


ARRAY = _Array()


def is_leaf_array(leaf: Any) -> bool:
    """Whether a leaf is data: an array or tensor of any library, or a number."""
    return isinstance(leaf, (bool, int, float, complex, np.generic)) or (
        hasattr(leaf, "shape") and hasattr(leaf, "dtype") and not isinstance(leaf, type)
    )


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array of JAX or NumPy, as a traced function sees them. Python numbers are none."""
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic))


def path_str(path: KeyPath) -> str:
    """Return a key path as people read it: `params/Dense_0/kernel`. The root is `<root>`."""
    return "/".join(key_name(key) for key in path) or "<root>"


def key_name(key: Any) -> str:
    """Return the bare name of one step of a key path: the dict key, the index or the attribute."""
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


class Structure:
    """The shape of a pytree without its arrays: the treedef, and the leaves that are not arrays.

    Structures are equal, and hash alike, when their treedefs are equal and so are their static leaves, in type and
    value: `True`, `1` and `1.0` differ. A static leaf that cannot be hashed equals itself only.

    Attributes:
        treedef: The `jax.tree_util` treedef.
        leaves: One entry per leaf: `ARRAY`, or the static leaf itself.
    """

    __slots__ = ("_arrays_only", "_hash", "_key", "leaves", "treedef")

    def __init__(self, treedef: Any, leaves: Sequence[Any]):
        self.treedef = treedef
        self.leaves = tuple(leaves)
        self._arrays_only = all(leaf is ARRAY for leaf in self.leaves)
        self._key = tuple(static_key(leaf) for leaf in self.leaves)
        # Computed once, as structures are keys of caches that each call asks.
        self._hash = hash((treedef, self._key))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Structure)
            and self._hash == other._hash
            and self.treedef == other.treedef
            and self._key == other._key
        )

    def __hash__(self) -> int:
        return self._hash

    def unflatten(self, arrays: Iterable[Any]) -> PyTree:
        """Rebuild the pytree with the first of `arrays`, in leaf order, where the arrays were."""
        if self._arrays_only:
            return self.treedef.unflatten(itertools.islice(arrays, len(self.leaves)))
        arrays = iter(arrays)
        return self.treedef.unflatten(
            [next(arrays) if leaf is ARRAY else leaf for leaf in self.leaves]
        )

    def key_paths(self) -> list[KeyPath]:
        """Return the key path of every leaf, static ones included, in leaf order."""
        tree = self.treedef.unflatten(range(self.treedef.num_leaves))
        return [path for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]

    def array_count(self) -> int:
        """Return the number of arrays."""
        return sum(leaf is ARRAY for leaf in self.leaves)

    def array_paths(self, printed: Callable[[KeyPath], str] = path_str) -> list[str]:
        """Return the path of every array as `printed` prints it, in leaf order."""
        paths = self.key_paths()
        return [
            printed(path) for path, leaf in zip(paths, self.leaves, strict=True) if leaf is ARRAY
        ]


def partition(tree: PyTree, is_array: Callable[[Any], bool]) -> tuple[list[Any], Structure]:
    """Split a pytree into its arrays, in leaf order, and the `Structure` that rebuilds it."""
    leaves, treedef = jax.tree_util.tree_flatten(tree)
    arrays = [leaf for leaf in leaves if is_array(leaf)]
    if len(arrays) == len(leaves):
        return arrays, _of_arrays(treedef)
    return arrays, Structure(treedef, [ARRAY if is_array(leaf) else leaf for leaf in leaves])


# In most calls all leaves are arrays, and the treedef alone finds the structure.
@functools.lru_cache(maxsize=4096)
def _of_arrays(treedef: Any) -> Structure:
    return Structure(treedef, [ARRAY] * treedef.num_leaves)


def describe_difference(expected: Structure, received: Structure) -> str | None:
    """Say in which paths two structures differ.

    Containers of other types with the same paths (a `dict` for a `FrozenDict`, a list for a tuple) do not count.

    Returns:
        None if the leaves stand at the same paths, with equal static leaves, in the same order. Else one line for
        each path that is missing, unexpected or different.
    """
    if expected == received:
        return None
    before = dict(zip(map(path_str, expected.key_paths()), expected.leaves, strict=True))
    after = dict(zip(map(path_str, received.key_paths()), received.leaves, strict=True))
    lines = [f"  missing: {path}" for path in before if path not in after]
    lines += [f"  unexpected: {path}" for path in after if path not in before]
    lines += [
        f"  changed: {path} was {before[path]!r}, is {after[path]!r}"
        for path in before
        if path in after and static_key(before[path]) != static_key(after[path])
    ]
    if not lines and list(before) != list(after):
        lines = [f"  order: {list(before)} became {list(after)}"]
    return "\n".join(lines) or None


class _Identity:
    """Makes a static leaf that cannot be hashed equal to itself only, and keeps it alive."""

    __slots__ = ("leaf",)

    def __init__(self, leaf: Any):
        self.leaf = leaf

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.leaf is other.leaf

    def __hash__(self) -> int:
        return id(self.leaf)


def static_key(leaf: Any) -> Any:
    """Return a key that is equal for leaves of the same static value and type."""
    if leaf is ARRAY:
        return ARRAY
    try:
        hash(leaf)
    except TypeError:
        leaf = _Identity(leaf)
    # `True == 1 == 1.0`, but a function may treat them differently.
    return (type(leaf), leaf)
