"""Which name in a file goes to which weight."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxwrap._dtypes import can_hold
from jaxwrap._weights._patterns import compile_pattern
from jaxwrap._weights._table import format_table

Names = Mapping[str, str | None] | Iterable[tuple[str, str | None]]


class Entry(NamedTuple):
    """The shape of an array, and the name of its dtype."""

    shape: tuple[int, ...]
    dtype: str


class Row(NamedTuple):
    """One array of a file, or one weight that the file lacks.

    Attributes:
        name: The name in the file. Empty for a missing weight.
        target: The path of the weight below the layer. None if `names` leaves the array out.
        status: "match", "cast", "left out", "missing", "unexpected", "shape" or "dtype".
        detail: The difference between file and weight.
    """

    name: str
    target: str | None
    status: str
    detail: str = ""


class Plan(tuple[Row, ...]):
    """The assignments of `load`, done or planned: a tuple of rows that prints as a table."""

    __slots__ = ()

    def __str__(self) -> str:
        return format_table([Row._fields, *([cell or "" for cell in row] for row in self)])

    def check(self, path: pathlib.Path) -> None:
        """Raise ValueError if the file does not fit the weights, with a line for each difference."""
        problems = [
            f"  {row.status}: {row.target} {row.detail}".rstrip()
            for row in self
            if row.status in ("missing", "unexpected", "shape", "dtype")
        ]
        if problems:
            raise ValueError(
                f"the weights in {path} are not those of the layer. No weight has been changed. Rename arrays of the "
                "file with `names`, and see with `dry_run=True` what goes where.\n"
                + "\n".join(problems)
            )


def rename(names: Sequence[str], patterns: Names) -> dict[str, str | None]:
    """Return the new name of each name. The first pattern that matches a whole name decides. Other names stay.

    Raises:
        TypeError: If `patterns` does not map strings to strings or None.
        ValueError: If a pattern is not a regular expression, or is never the first to match. If a replacement names a
            group that its pattern lacks. Or if two names become one.
    """
    pairs: list[Any] = list(patterns.items() if isinstance(patterns, Mapping) else patterns)
    compiled = [(_compile(pair), pair[1]) for pair in pairs]
    used, renamed = set(), {}
    for name in names:
        renamed[name] = name
        for index, (pattern, replacement) in enumerate(compiled):
            if match := pattern.fullmatch(name):
                used.add(index)
                renamed[name] = None if replacement is None else _expand(match, replacement)
                break
    unused = [pairs[index][0] for index in range(len(pairs)) if index not in used]
    if unused:
        raise ValueError(
            f"these patterns in `names` are not the first to match any of the names: {unused}. The names are "
            f"{', '.join(names[:10])}{', ...' if len(names) > 10 else ''}"
        )
    _check_unique(renamed)
    return renamed


def make_plan(
    entries: Mapping[str, Entry],
    targets: Mapping[str, str | None],
    weights: Mapping[str, Entry],
) -> Plan:
    """Compare the arrays of a file with the weights.

    Args:
        entries: The arrays, by their names in the file.
        targets: The path of the weight for each of these names, or None.
        weights: The weights, by path.
    """
    rows = [_row(name, entry, targets[name], weights) for name, entry in entries.items()]
    there = set(targets.values())
    rows += [Row("", path, "missing") for path in weights if path not in there]
    return Plan(rows)


def _row(name: str, entry: Entry, target: str | None, weights: Mapping[str, Entry]) -> Row:
    if target is None:
        return Row(name, None, "left out")
    if target not in weights:
        return Row(name, target, "unexpected")
    weight = weights[target]
    if entry.shape != weight.shape:
        return Row(name, target, "shape", f"is {weight.shape}, in the file {entry.shape}")
    if not can_hold(weight.dtype, entry.dtype):
        return Row(name, target, "dtype", f"is {weight.dtype}, in the file {entry.dtype}")
    if entry.dtype != weight.dtype:
        return Row(name, target, "cast", f"{entry.dtype} to {weight.dtype}")
    return Row(name, target, "match")


def _compile(pair: Any) -> Any:
    pattern, replacement = pair
    if not isinstance(pattern, str) or not isinstance(replacement, (str, type(None))):
        raise TypeError(
            f"`names` must map patterns to names or None; received {pattern!r}: {replacement!r}."
        )
    return compile_pattern(pattern, "in `names`, the pattern")


def _expand(match: Any, replacement: str) -> str:
    try:
        return match.expand(replacement)
    except (IndexError, ValueError) as error:
        raise ValueError(
            f"in `names`, {replacement!r} does not fit its pattern {match.re.pattern!r}: {error}."
        ) from error


def _check_unique(renamed: Mapping[str, str | None]) -> None:
    by_target: dict[str, str] = {}
    for name, target in renamed.items():
        if target is not None and by_target.setdefault(target, name) != name:
            raise ValueError(
                f"`names` turns both {by_target[target]!r} and {name!r} into {target!r}. Give them different names."
            )
