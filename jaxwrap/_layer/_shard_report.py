"""What a layer costs on a mesh, without data: bytes, operations and what devices exchange."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxwrap._layer._costs import Costs, Counter, all_reduced, gathered
from jaxwrap._layer._program import call_adapter
from jaxwrap._layer._seeds import Generator, drawing
from jaxwrap._layer._sharding import Placement, checked, placement
from jaxwrap._layer._spreading import Spread, parts
from jaxwrap._specs import partition_specs
from jaxwrap._typing import PyTree
from jaxwrap._weights._axes import Axes, is_spread
from jaxwrap._weights._devices import mesh_sizes
from jaxwrap._weights._table import format_table

if TYPE_CHECKING:
    from jaxwrap._layer._engine import Engine


class ShardRow(NamedTuple):
    """One weight on a mesh.

    Attributes:
        path: The path of the variable.
        shape: Its shape.
        dtype: The name of its dtype.
        layout: For each axis None, an axis of the mesh, or several.
        bytes: Its bytes.
        bytes_per_device: Those on one device.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    layout: Axes
    bytes: int
    bytes_per_device: int


class ShardReport(NamedTuple):
    """The plan of a layer on a mesh, which prints as a table. See `layer.shard_report`.

    Attributes:
        rows: A `ShardRow` for each weight.
        mesh: The sizes of the axes of the mesh.
        batch: The shape of the first input that operations are counted for.
        flops: The operations of the products in a forward pass.
        flops_per_device: Those of one device.
        gradients: Bytes that a device sends in a step to add up gradients over the data axes.
        gathered: Bytes that it sends in a step so that all have the weights that the data axes divide.
        partial_sums: Bytes that it sends in a step to add up partial sums over the other axes.
    """

    rows: tuple[ShardRow, ...]
    mesh: dict[str, int]
    batch: tuple[int, ...]
    flops: float
    flops_per_device: float
    gradients: float
    gathered: float
    partial_sums: float

    @property
    def bytes(self) -> int:
        """The bytes of all weights."""
        return sum(row.bytes for row in self.rows)

    @property
    def bytes_per_device(self) -> int:
        """The bytes of the weights on one device."""
        return sum(row.bytes_per_device for row in self.rows)

    def __str__(self) -> str:
        rows = [
            (
                row.path,
                str(row.shape),
                row.dtype,
                str(row.layout) if is_spread(row.layout) else "",
                _short(row.bytes, "B"),
                _short(row.bytes_per_device, "B"),
            )
            for row in self.rows
        ]
        total = ("total", "", "", "", _short(self.bytes, "B"), _short(self.bytes_per_device, "B"))
        mesh = ", ".join(f"{name}={size}" for name, size in self.mesh.items())
        lines = [
            format_table(
                [("path", "shape", "dtype", "layout", "bytes", "per device"), *rows, total]
            ),
            f"mesh: {mesh} ({math.prod(self.mesh.values())} devices); inputs: {self.batch}",
            f"forward: {_short(self.flops, 'FLOP')}, {_short(self.flops_per_device, 'FLOP')} per device",
            f"sent by a device in a step: {_short(self.gradients, 'B')} for gradients, "
            f"{_short(self.gathered, 'B')} for divided weights, "
            f"{_short(self.partial_sums, 'B')} for partial sums",
        ]
        return "\n".join(lines)


def shard_report(engine: Engine, mesh: Any, input_shape: Any, meanings: Any) -> ShardReport:
    """Return the plan of a layer: see `layer.shard_report`."""
    sizes, meanings = mesh_sizes(mesh), checked(meanings)
    placed = placement(engine, sizes, input_shape, meanings, with_inputs=True)
    data = _data_axes(sizes, meanings)
    rows, gradients, collected = [], 0.0, 0.0
    for one in placed.variables():
        size = math.prod(one.shape) * jnp.dtype(one.dtype).itemsize
        above = {name for part in _spread(one.axes, ()) for name in part}
        rows.append(
            ShardRow(one.path, one.shape, one.dtype, one.axes, size, size // parts(above, sizes))
        )
        # The part that a device computes with: gathered over the data axes, if they divide the weight.
        used = size / parts(above - set(data), sizes)
        held = parts(above & set(data), sizes)
        rest = parts(set(data) - above, sizes)
        if one.trainable:
            gradients += gathered(used, held) + all_reduced(used / held, rest)
        # Forward, and again for the gradients.
        collected += (2 if one.trainable else 1) * gathered(used, held)
    batch, costs = _forward(engine, placed, sizes, data)
    return ShardReport(
        tuple(rows),
        sizes,
        batch,
        costs.flops,
        costs.flops_per_device,
        gradients,
        collected,
        costs.partial_sums,
    )


def _data_axes(sizes: Mapping[str, int], meanings: Any) -> tuple[str, ...]:
    """Return the axes of the mesh that divide the batch: what "batch" means, or else the first axis."""
    for name, target in meanings:
        axes = (target,) if isinstance(target, str) else tuple(target or ())
        if name == "batch" and all(axis in sizes for axis in axes):
            return axes
    return tuple(sizes)[:1]


def _spread(axes: Axes, without: tuple[str, ...]) -> Spread:
    split = [(one,) if isinstance(one, str) else one or () for one in axes]
    return tuple(tuple(name for name in names if name not in without) for names in split)


def _forward(
    engine: Engine, placed: Placement, sizes: Mapping[str, int], data: tuple[str, ...]
) -> tuple[tuple[int, ...], Costs]:
    """Count the costs of a forward pass in training."""
    known, structure = partition_specs(placed.specs)
    count = parts(data, sizes)
    shapes = [
        tuple((1 if axis else count) if size is None else size for axis, size in enumerate(s.shape))
        for s in known
    ]
    inputs = [
        jax.ShapeDtypeStruct(shape, jax.dtypes.canonicalize_dtype(spec.dtype))
        for shape, spec in zip(shapes, known, strict=True)
    ]
    leaves = [leaf for leaf, _, _ in placed.leaves]
    weights = [jax.ShapeDtypeStruct(leaf.shape, leaf.cast or leaf.stored) for leaf in leaves]
    generators: list[Generator] = list(engine.seeds.generators.values())

    def call(weights: list[Any], inputs: list[Any]) -> PyTree:
        values = iter(
            value if leaf.impl is None else jax.random.wrap_key_data(value, impl=leaf.impl)
            for leaf, value in zip(leaves, weights, strict=True)
        )
        params, state = (part.unflatten(values) for part in placed.structures)
        with drawing(generators, [jnp.zeros(2, jnp.uint32) for _ in generators]):
            keys = engine.draw_keys(True)
        arguments = engine.inputs.for_adapter(structure.unflatten(inputs))
        return call_adapter(engine.adapter, params, state, keys, arguments, True).outputs

    with engine.lock:
        jaxpr = jax.make_jaxpr(call)(weights, inputs).jaxpr
    counter = Counter(sizes, data)
    spreads = [_spread(axes, data) for _, axes, _ in placed.leaves]
    spreads += [(data, *((),) * (len(shape) - 1)) if shape else () for shape in shapes]
    counter.walk(jaxpr, spreads)
    return (shapes[0] if shapes else ()), counter.costs


def _short(number: float, unit: str) -> str:
    """Return a number with three digits and a prefix."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if number < 999.5:
            return f"{number:.3g} {prefix}{unit}"
        number /= 1000
    return f"{number:.3g} E{unit}"
