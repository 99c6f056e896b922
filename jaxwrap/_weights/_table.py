"""Tables to print: rows of strings, the weights of a layer, and their sums by module."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax.numpy as jnp

from jaxwrap._weights._axes import Axes


class WeightRow(NamedTuple):
    """One weight.

    Attributes:
        path: The path of the variable, with the name of the layer.
        shape: Its shape.
        dtype: The name of its dtype.
        trainable: Whether it is trained.
        size: The number of its elements.
        layout: For each axis None, or what it is divided by: axes of the mesh that a distribution or a rule sets, or
            else the names that the model has for its axes. None for one that is not divided.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    trainable: bool
    size: int
    layout: Axes | None = None


class WeightTable(tuple[WeightRow, ...]):
    """The weights of a layer, a tuple of `WeightRow` that prints as a table."""

    __slots__ = ()

    def __str__(self) -> str:
        header = ["path", "shape", "dtype", "trainable"]
        rows = [
            [row.path, str(row.shape), row.dtype, "yes" if row.trainable else "no"] for row in self
        ]
        total = ["total", "", "", ""]
        if any(row.layout for row in self):
            header, total = [*header, "layout"], [*total, ""]
            rows = [[*cells, str(row.layout or "")] for cells, row in zip(rows, self, strict=True)]
        sizes = [f"{row.size:,}" for row in self]
        rows = [[*cells, size] for cells, size in zip(rows, sizes, strict=True)]
        whole = [*total, f"{sum(row.size for row in self):,}"]
        return format_table([[*header, "size"], *rows, whole], numbers=1)


class ModuleRow(NamedTuple):
    """The weights below one path.

    Attributes:
        path: The path, with the name of the layer.
        weights: The number of variables.
        size: The number of their elements.
        bytes: The memory that they take.
        trained: The number of elements that are trained.
    """

    path: str
    weights: int
    size: int
    bytes: int
    trained: int


class ModuleTable(tuple[ModuleRow, ...]):
    """Sums by module, a tuple of `ModuleRow` that prints as a table."""

    __slots__ = ()

    @classmethod
    def of(cls, groups: Iterable[tuple[str, WeightRow]]) -> ModuleTable:
        """Sum up weights, each of which comes with the path of its group."""
        sums: dict[str, ModuleRow] = {}
        for path, row in groups:
            numbers = (
                1,
                row.size,
                row.size * jnp.dtype(row.dtype).itemsize,
                row.size * row.trainable,
            )
            _, *before = sums.get(path, (path, 0, 0, 0, 0))
            sums[path] = ModuleRow(path, *map(sum, zip(before, numbers, strict=True)))
        return cls(sums.values())

    def __str__(self) -> str:
        total = ModuleRow(
            "total",
            sum(row.weights for row in self),
            sum(row.size for row in self),
            sum(row.bytes for row in self),
            sum(row.trained for row in self),
        )
        rows = [(path, *(f"{number:,}" for number in numbers)) for path, *numbers in [*self, total]]
        return format_table([ModuleRow._fields, *rows], numbers=4)


def format_table(rows: Iterable[Sequence[str]], numbers: int = 0) -> str:
    """Line up the columns of rows, the last `numbers` of them at their right sides."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    words = len(widths) - numbers
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if place < words else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
