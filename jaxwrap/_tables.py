"""Rows of strings as a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def format_table(rows: Iterable[Sequence[str]], numbers: bool = False) -> str:
    """Lines the columns of rows up, the last one at its right side if it holds numbers."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        if numbers:
            cells[-1] = row[-1].rjust(widths[-1])
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
