"""What the products in a jaxpr cost on a mesh: operations, and bytes of partial sums."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxwrap._layer._spreading import Spread, names_in, once, parts, spread_of, whole


@dataclasses.dataclass
class Costs:
    """The sums over all products, those in a loop as often as it runs.

    Attributes:
        flops: Operations, two for each multiplication.
        flops_per_device: Those of one device.
        partial_sums: Bytes that a device exchanges to add up partial sums, of the forward pass and the gradients.
    """

    flops: float = 0
    flops_per_device: float = 0
    partial_sums: float = 0

    def plus(self, other: Costs) -> Costs:
        """Return the sums of both."""
        return Costs(
            self.flops + other.flops,
            self.flops_per_device + other.flops_per_device,
            self.partial_sums + other.partial_sums,
        )


class Counter:
    """Counts the costs of jaxprs.

    Args:
        sizes: The sizes of the axes of the mesh.
        data: The axes that divide the batch.

    Attributes:
        costs: The sums so far.
    """

    def __init__(self, sizes: Mapping[str, int], data: Sequence[str]):
        self._sizes = sizes
        self._data = set(data)
        self.costs = Costs()

    def walk(self, jaxpr: Any, spreads: Sequence[Spread], times: int = 1) -> list[Spread]:
        """Add the costs of a jaxpr. Return the spreads of its results."""
        known = dict(zip(jaxpr.invars, spreads, strict=True))

        def look_up(var: Any) -> Spread:
            shape = getattr(var.aval, "shape", ())
            return whole(shape) if hasattr(var, "val") else known.get(var, whole(shape))

        for eqn in jaxpr.eqns:
            found = self._eqn(eqn, [look_up(var) for var in eqn.invars], times)
            known.update(zip(eqn.outvars, found, strict=True))
        return [look_up(var) for var in jaxpr.outvars]

    def _eqn(self, eqn: Any, spreads: list[Spread], times: int) -> list[Spread]:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            return [self._dot(eqn, spreads, times)]
        if name == "conv_general_dilated":
            return [self._conv(eqn, spreads, times)]
        if name == "scan":
            body = params["jaxpr"].jaxpr
            # By shapes, since JAX 0.12 has other parameters than 0.10.
            below = [
                spread[1:] if _is_stacked(outer, inner) else spread
                for spread, outer, inner in zip(spreads, eqn.invars, body.invars, strict=True)
            ]
            found = self.walk(body, below, times * params["length"])
            return [
                ((), *spread) if _is_stacked(outer, inner) else spread
                for spread, outer, inner in zip(found, eqn.outvars, body.outvars, strict=True)
            ]
        if name == "cond":
            return self._dearest(params["branches"], spreads[1:], times)
        inner = next((params[key] for key in _INNER if key in params), None)
        inner = getattr(inner, "jaxpr", inner)
        if inner is not None and len(inner.invars) == len(spreads):
            return self.walk(inner, spreads, times)
        return spread_of(eqn, spreads, self._sizes)

    def _dearest(self, branches: Sequence[Any], spreads: list[Spread], times: int) -> list[Spread]:
        """Add the costs of the branch with the most operations."""
        counters = [Counter(self._sizes, tuple(self._data)) for _ in branches]
        found = [
            one.walk(branch.jaxpr, spreads, times)
            for one, branch in zip(counters, branches, strict=True)
        ]
        most = max(range(len(branches)), key=lambda place: counters[place].costs.flops)
        self.costs = self.costs.plus(counters[most].costs)
        return found[most]

    def _dot(self, eqn: Any, spreads: list[Spread], times: int) -> Spread:
        (left_sum, right_sum), (left_batch, right_batch) = eqn.params["dimension_numbers"]
        left, right = spreads
        shape = eqn.invars[0].aval.shape
        batch = [
            a or b
            for a, b in zip(
                *(
                    [own[axis] for axis in axes]
                    for own, axes in ((left, left_batch), (right, right_batch))
                ),
                strict=True,
            )
        ]
        frees = [
            [names for axis, names in enumerate(own) if axis not in (*summed, *batched)]
            for own, summed, batched in (
                (left, left_sum, left_batch),
                (right, right_sum, right_batch),
            )
        ]
        out = once([*batch, *frees[0], *frees[1]])
        summed = {n for a in left_sum for n in left[a]} | {n for a in right_sum for n in right[a]}
        inner = math.prod(shape[axis] for axis in left_sum)
        self._product(eqn, spreads, frees, out, summed - names_in(out), inner, times)
        return out

    def _conv(self, eqn: Any, spreads: list[Spread], times: int) -> Spread:
        numbers = eqn.params["dimension_numbers"]
        left, right = spreads
        (batch, inputs), (outputs, channels) = numbers.lhs_spec[:2], numbers.rhs_spec[:2]
        found: list[tuple[str, ...]] = list(whole(eqn.outvars[0].aval.shape))
        found[numbers.out_spec[0]], found[numbers.out_spec[1]] = left[batch], right[outputs]
        out = once(found)
        summed = {*left[inputs], *right[channels]} - names_in(out)
        kernel = eqn.invars[1].aval.shape
        inner = math.prod(kernel) // kernel[outputs]
        frees = [[left[batch]], [right[outputs]]]
        self._product(eqn, spreads, frees, out, summed, inner, times)
        return out

    def _product(
        self,
        eqn: Any,
        spreads: list[Spread],
        frees: list[list[tuple[str, ...]]],
        out: Spread,
        summed: set[str],
        inner: int,
        times: int,
    ) -> None:
        result = eqn.outvars[0].aval
        flops = 2 * result.size * inner * times
        self.costs.flops += flops
        self.costs.flops_per_device += flops / parts(names_in(out) | summed, self._sizes)
        self._add_up(result, names_in(out), summed, times)
        # The gradient of each factor sums over what the other one has and it has not.
        for place, factor in enumerate(eqn.invars):
            own = names_in(spreads[place])
            other = {name for names in frees[1 - place] for name in names}
            self._add_up(factor.aval, own, other - own - self._data, times)

    def _add_up(self, aval: Any, own: set[str], summed: set[str], times: int) -> None:
        count = parts(summed, self._sizes)
        size = aval.size * aval.dtype.itemsize / parts(own, self._sizes)
        self.costs.partial_sums += all_reduced(size, count) * times


_INNER = ("jaxpr", "call_jaxpr", "fun_jaxpr", "body_jaxpr")


def all_reduced(size: float, count: int) -> float:
    """Return the bytes that each of `count` devices sends to add up arrays of `size` bytes, around a ring."""
    return 2 * gathered(size, count)


def gathered(size: float, count: int) -> float:
    """Return the bytes that each of `count` devices sends so that all have an array of `size` bytes, or one sum."""
    return size * (count - 1) / count


def _is_stacked(outer: Any, inner: Any) -> bool:
    """Whether a loop takes or makes one slice of an array in each run."""
    return len(outer.aval.shape) > len(inner.aval.shape)
