"""The axes of leaves: their names, and the axes of a mesh that they are spread over."""

from __future__ import annotations

from typing import Any

import jax

from jaxwrap._pytree import is_leaf_array
from jaxwrap._typing import PyTree

# For each axis of a leaf None, a name, or several names.
Axes = tuple[str | tuple[str, ...] | None, ...]


def names_of_axes(trees: tuple[PyTree, PyTree], specs: Any) -> list[Axes | None]:
    """Return the names of the axes of each array or number in two pytrees, None for one without names.

    Args:
        trees: The pytrees.
        specs: None, or for each pytree one with a `jax.sharding.PartitionSpec` for every leaf, or for all leaves
            below it.
    """
    found: list[Axes | None] = []
    for tree, part in zip(trees, specs or (None, None), strict=True):
        leaves, treedef = jax.tree_util.tree_flatten(tree)
        if part is None:
            of_leaves = [None] * len(leaves)
        else:
            spread = jax.tree_util.tree_map(
                lambda spec, below: jax.tree_util.tree_map(lambda _: spec, below), part, tree
            )
            of_leaves = treedef.flatten_up_to(spread)
        found += [
            _names(spec)
            for spec, leaf in zip(of_leaves, leaves, strict=True)
            if is_leaf_array(leaf)
        ]
    return found


def _names(spec: Any) -> Axes | None:
    names = tuple(name if isinstance(name, (str, tuple)) else None for name in spec or ())
    return names if any(names) else None
