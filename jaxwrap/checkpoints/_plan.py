"""Which name in a file goes to which weight."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import keras

from jaxwrap._rules import SECONDS, compile_pattern
from jaxwrap._tables import format_table
from jaxwrap._variables import can_hold

Names = Mapping[str, str | None] | Iterable[tuple[str, str | None]]

if TYPE_CHECKING:
    import regex


class Entry(NamedTuple):
    """What is known of an array in a file before it is read: its shape and the name of its dtype."""

    shape: tuple[int, ...]
    dtype: str


class Row(NamedTuple):
    """One array of a file, or one weight that the file does not have.

    Attributes:
        name: The name in the file; empty for a weight that is missing.
        target: The path of the weight below the layer; None for a name that is left out.
        status: "match", "cast", "left out", "missing", "unexpected", "shape" or "dtype".
        detail: What differs.
    """

    name: str
    target: str | None
    status: str
    detail: str = ""


class Plan(tuple[Row, ...]):
    """What `load` does, or would do: a tuple of rows that prints as a table."""

    __slots__ = ()

    def __str__(self) -> str:
        return format_table([Row._fields, *([cell or "" for cell in row] for row in self)])

    def check(self, owner: str, path: pathlib.Path) -> None:
        """Raises ValueError, with a line for each row that forbids to load the file."""
        problems = [
            f"  {row.status}: {row.target} {row.detail}".rstrip()
            for row in self
            if row.status in ("missing", "unexpected", "shape", "dtype")
        ]
        if problems:
            raise ValueError(
                f"{owner}: the weights in {path} are not those of the layer. None has been changed. `names` says what "
                "names in the file are to be called, and `dry_run=True` shows what goes where.\n"
                + "\n".join(problems)
            )


def rename(names: Sequence[str], patterns: Names, owner: str) -> dict[str, str | None]:
    """The new name of each name: that of the first pattern that matches the whole of it, or its own.

    Raises:
        TypeError: For patterns of another form.
        ValueError: If a pattern is no regular expression or matches nothing, or two names become one.
    """
    pairs: list[Any] = list(patterns.items() if isinstance(patterns, Mapping) else patterns)
    compiled = [(_compile(pair, owner), pair[1]) for pair in pairs]
    used, renamed = set(), {}
    for name in names:
        renamed[name] = name
        for index, (pattern, replacement) in enumerate(compiled):
            if match := pattern.fullmatch(name, timeout=SECONDS):
                used.add(index)
                renamed[name] = None if replacement is None else match.expand(replacement)
                break
    unused = [pairs[index][0] for index in range(len(pairs)) if index not in used]
    if unused:
        raise ValueError(
            f"{owner}: these patterns of `names` are the first to match none of the names: {unused}. There are "
            f"{', '.join(names[:10])}{', ...' if len(names) > 10 else ''}"
        )
    by_target: dict[str, str] = {}
    for name, target in renamed.items():
        if target is not None and by_target.setdefault(target, name) != name:
            raise ValueError(
                f"{owner}: by `names`, both {by_target[target]!r} and {name!r} become {target!r}."
            )
    return renamed


def make_plan(
    entries: Mapping[str, Entry],
    targets: Mapping[str, str | None],
    variables: Mapping[str, keras.Variable],
) -> Plan:
    """Compares what a file holds, by the names that its arrays are to have, with the weights."""
    rows = []
    for name, entry in entries.items():
        target = targets[name]
        variable = None if target is None else variables.get(target)
        if target is None:
            rows.append(Row(name, None, "left out"))
        elif variable is None:
            rows.append(Row(name, target, "unexpected"))
        elif entry.shape != tuple(variable.shape):
            rows.append(
                Row(name, target, "shape", f"is {tuple(variable.shape)}, in the file {entry.shape}")
            )
        elif not can_hold(variable.dtype, entry.dtype):
            rows.append(
                Row(name, target, "dtype", f"is {variable.dtype}, in the file {entry.dtype}")
            )
        elif entry.dtype != variable.dtype:
            rows.append(Row(name, target, "cast", f"{entry.dtype} to {variable.dtype}"))
        else:
            rows.append(Row(name, target, "match"))
    there = set(targets.values())
    rows += [Row("", path, "missing") for path in variables if path not in there]
    return Plan(rows)


def _compile(pair: Any, owner: str) -> regex.Pattern[str]:
    pattern, replacement = pair
    if not isinstance(pattern, str) or not isinstance(replacement, (str, type(None))):
        raise TypeError(
            f"{owner}: `names` must map patterns to names or None; received {pattern!r}: {replacement!r}."
        )
    return compile_pattern(pattern, f"{owner}: the pattern {pattern!r} in `names`")
