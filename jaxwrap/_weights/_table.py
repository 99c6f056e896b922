"""Tables to print: rows of strings, and the weights of a layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

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
        return format_table([[*header, "size"], *rows, whole], numbers=True)


def format_table(rows: Iterable[Sequence[str]], numbers: bool = False) -> str:
    """Line up the columns of rows, the last one at its right side if it holds numbers."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        if numbers:
            cells[-1] = row[-1].rjust(widths[-1])
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
