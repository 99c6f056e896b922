"""The axes of leaves: their names, and the axes of a mesh that they are spread over."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from jaxwrap._pytree import is_leaf_array
from jaxwrap._typing import PyTree

# For each axis of a leaf None, a name, or several names.
Axes = tuple[str | tuple[str, ...] | None, ...]
# What names mean on a mesh, in order: a name, and None, an axis of the mesh, or several.
Meanings = Iterable[tuple[str, str | tuple[str, ...] | None]]


def check_axes(value: Any, what: str) -> Axes:
    """Return the layout of a leaf as a tuple.

    Raises:
        TypeError: If it is something else.
    """
    ok = isinstance(value, (tuple, list)) and all(
        isinstance(one, (str, type(None)))
        or (isinstance(one, (tuple, list)) and all(isinstance(name, str) for name in one))
        for one in value
    )
    if not ok:
        raise TypeError(
            f"{what} must be a tuple with None, the name of an axis of the mesh, or a tuple of such names for each "
            f'axis of the leaf, such as (None, "model"); received {value!r}.'
        )
    return tuple(tuple(one) if isinstance(one, list) else one for one in value)


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
                lambda spec, below: jax.tree_util.tree_map(lambda _, spec=spec: spec, below),
                part,
                tree,
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


def check_rank(path: str, shape: tuple[int, ...], axes: Axes, where: str = "") -> None:
    """Raise ValueError if a layout is not for a leaf of this shape. `where` goes into the error."""
    if len(axes) != len(shape):
        raise ValueError(
            f"{path}, of shape {shape}, has the layout {axes}{where}: expected an entry for each of its {len(shape)} "
            f"axes, received {len(axes)}."
        )


def on_mesh(
    path: str, shape: tuple[int, ...], names: Axes, meanings: Meanings, sizes: Mapping[str, int]
) -> Axes:
    """Return the axes of the mesh for each axis of a leaf.

    Args:
        path: The path of the leaf, for errors.
        shape: Its shape.
        names: The names of its axes.
        meanings: What names mean. The first meaning whose axes no other axis of the leaf has counts. A name without
            a meaning is that of an axis of the mesh.
        sizes: The sizes of the axes of the mesh.

    Raises:
        ValueError: If the names do not fit the leaf or the mesh.
    """
    where = f" on a mesh of {', '.join(f'{name}={size}' for name, size in sizes.items())}"
    check_rank(path, shape, names, where)
    split = [(one,) if isinstance(one, str) else one or () for one in names]
    try:
        found = _translated(split, list(meanings), sizes)
        for size, above in zip(shape, found, strict=True):
            parts = math.prod(sizes[name] for name in above)
            if size % parts:
                raise ValueError(f"{size} does not divide by the {parts} devices along {above}")
    except ValueError as error:
        raise ValueError(
            f"{path}, of shape {shape}, has the layout {names}{where}: {error}."
        ) from None
    return tuple(above[0] if len(above) == 1 else above or None for above in found)


def _translated(
    split: list[tuple[str, ...]], meanings: list[Any], sizes: Mapping[str, int]
) -> list[tuple[str, ...]]:
    known = {name for name, _ in meanings}
    places = [(axis, name) for axis, names in enumerate(split) for name in names]
    found: dict[int, tuple[str, ...]] = {
        place: (name,) for place, (_, name) in enumerate(places) if name not in known
    }
    # In the order of the meanings, as Flax assigns them, and not in that of the axes.
    for name, target in meanings:
        above = (target,) if isinstance(target, str) else tuple(target or ())
        for place, (_, own) in enumerate(places):
            taken = {axis for names in found.values() for axis in names}
            if own == name and place not in found and taken.isdisjoint(above):
                found[place] = above
    for place, (_, name) in enumerate(places):
        if place not in found:
            raise ValueError(
                f"all axes of the mesh that {name!r} may have are those of other axes of the leaf; add "
                f"({name!r}, None) to `axes` at the end"
            )
        if unknown := [axis for axis in found[place] if axis not in sizes]:
            meant = "" if name not in known else f", which `axes` gives for {name!r}"
            raise ValueError(
                f"the mesh has no axis {unknown[0]!r}{meant}; rename it, or give it a meaning: "
                f"`axes=(({name!r}, None), ...)`"
            )
    used = [axis for place in range(len(places)) for axis in found[place]]
    if twice := [axis for axis in used if used.count(axis) > 1]:
        raise ValueError(f"it has {twice[0]!r} twice, and one axis of the mesh divides one axis")
    return [
        tuple(one for place, (own, _) in enumerate(places) if own == axis for one in found[place])
        for axis in range(len(split))
    ]


def of_part(axes: Axes, shape: tuple[int, ...], part: tuple[int, ...]) -> Axes:
    """Return the layout of a part of a leaf: that of the leaf along each axis that the part has as well."""
    # A layout of another rank than the leaf is refused elsewhere.
    if not len(axes) == len(shape) == len(part):
        return (None,) * len(part)
    sizes = zip(axes, shape, part, strict=True)
    return tuple(name if own == size else None for name, size, own in sizes)


def is_spread(axes: Axes | None) -> bool:
    """Whether a layout divides a leaf at all."""
    return any(axes or ())
