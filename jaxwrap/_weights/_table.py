"""Tables to print: rows of strings, and the weights of a layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class WeightRow(NamedTuple):
    """One weight.

    Attributes:
        path: The path of the variable, with the name of the layer.
        shape: Its shape.
        dtype: The name of its dtype.
        trainable: Whether it is trained.
        size: The number of its elements.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    trainable: bool
    size: int


class WeightTable(tuple[WeightRow, ...]):
    """The weights of a layer, a tuple of `WeightRow` that prints as a table."""

    __slots__ = ()

    def __str__(self) -> str:
        rows = [
            (row.path, str(row.shape), row.dtype, "yes" if row.trainable else "no", f"{row.size:,}")
            for row in self
        ]
        total = ("total", "", "", "", f"{sum(row.size for row in self):,}")
        return format_table([WeightRow._fields, *rows, total], numbers=True)


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
