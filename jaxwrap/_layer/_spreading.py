"""How the arrays in a jaxpr are divided over a mesh, given how its inputs are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# For each axis of an array the axes of the mesh that divide it.
Spread = tuple[tuple[str, ...], ...]


def parts(names: Iterable[str], sizes: Mapping[str, int]) -> int:
    """Return the number of parts into which axes of a mesh divide something."""
    return math.prod(sizes[name] for name in set(names))


def names_in(spread: Spread) -> set[str]:
    """Return all axes of the mesh that divide an array."""
    return {name for names in spread for name in names}


def whole(shape: Sequence[int]) -> Spread:
    """Return the spread of an array that is not divided."""
    return ((),) * len(shape)


def once(spread: Iterable[Sequence[str]]) -> Spread:
    """Let each axis of the mesh divide the first axis that it divides only."""
    seen: set[str] = set()
    kept = []
    for names in spread:
        kept.append(tuple(name for name in names if name not in seen))
        seen.update(names)
    return tuple(kept)


def spread_of(eqn: Any, spreads: Sequence[Spread], sizes: Mapping[str, int]) -> list[Spread]:
    """Return the spreads of the results of an equation that is no product and no loop."""
    name, params = eqn.primitive.name, eqn.params
    out = tuple(eqn.outvars[0].aval.shape) if eqn.outvars else ()
    if name == "transpose":
        return [tuple(spreads[0][axis] for axis in params["permutation"])]
    if name == "squeeze":
        return [_without(spreads[0], params["dimensions"])]
    if name.startswith(("reduce_", "arg")) and "axes" in params:
        return [_without(spreads[0], params["axes"]) for _ in eqn.outvars]
    if name == "broadcast_in_dim":
        found = list(whole(out))
        for axis, to in enumerate(params["broadcast_dimensions"]):
            if eqn.invars[0].aval.shape[axis] == out[to]:
                found[to] = spreads[0][axis]
        return [tuple(found)]
    if name == "reshape":
        return [_reshaped(tuple(eqn.invars[0].aval.shape), out, spreads[0], sizes)]
    if name == "gather":
        return [_gathered(eqn, spreads)]
    # Element by element, and all that keeps some axes: along each axis the first argument that is divided there.
    return [_like(tuple(var.aval.shape), eqn.invars, spreads) for var in eqn.outvars]


def _without(spread: Spread, axes: Sequence[int]) -> Spread:
    return tuple(names for axis, names in enumerate(spread) if axis not in axes)


def _like(shape: tuple[int, ...], invars: Sequence[Any], spreads: Sequence[Spread]) -> Spread:
    alike = [
        (tuple(var.aval.shape), spread)
        for var, spread in zip(invars, spreads, strict=True)
        if len(getattr(var.aval, "shape", ())) == len(shape)
    ]
    return once(
        next((own[axis] for sizes, own in alike if own[axis] and sizes[axis] == size), ())
        for axis, size in enumerate(shape)
    )


def _reshaped(
    before: tuple[int, ...], after: tuple[int, ...], spread: Spread, sizes: Mapping[str, int]
) -> Spread:
    """Keep the division of the first axis in each group of axes that become a group of the same size."""
    found: list[tuple[str, ...]] = list(whole(after))
    one, two = 0, 0
    while one < len(before) and two < len(after):
        left, right = before[one], after[two]
        names, first = spread[one], two
        one, two = one + 1, two + 1
        while left != right:
            if left < right and one < len(before):
                left, one = left * before[one], one + 1
            elif two < len(after):
                right, two = right * after[two], two + 1
            else:
                return tuple(found)
        place = next((n for n in range(first, two) if after[n] > 1), first)
        if after[place] % parts(names, sizes) == 0:
            found[place] = names
    return tuple(found)


def _gathered(eqn: Any, spreads: Sequence[Spread]) -> Spread:
    """Divide rows that are looked up as their numbers are, and their columns as those of the table."""
    numbers = eqn.params["dimension_numbers"]
    table, rows = spreads[:2]
    shape, slices = eqn.invars[0].aval.shape, eqn.params["slice_sizes"]
    kept = [axis for axis in range(len(shape)) if axis not in numbers.collapsed_slice_dims]
    columns = iter(table[axis] if slices[axis] == shape[axis] else () for axis in kept)
    above = iter(rows[:-1])
    return once(
        next(columns if axis in numbers.offset_dims else above, ())
        for axis in range(len(eqn.outvars[0].aval.shape))
    )
