"""Which name in a file goes to which weight."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxwrap._dtypes import can_hold
from jaxwrap._weights._patterns import compile_pattern, match, pairs_of
from jaxwrap._weights._table import format_table

Names = (
    Mapping[str, str | None] | Iterable[tuple[str, str | None]] | Callable[[str], str | None] | None
)


class Entry(NamedTuple):
    """The shape of an array, and the name of its dtype."""

    shape: tuple[int, ...]
    dtype: str


class Row(NamedTuple):
    """One array of a file, or one weight that the file lacks.

    Attributes:
        name: The name in the file. Empty if the file does not have the weight.
        target: The path of the weight below the layer. None if `names` or `only` leaves the array out.
        status: "match", "cast", "left out", "left alone" (by `only`), "missing", "unexpected", "shape" or "dtype".
        detail: The difference between file and weight.
    """

    name: str
    target: str | None
    status: str
    detail: str = ""

    @property
    def is_loaded(self) -> bool:
        """Whether the weight gets the value in the file."""
        return self.status in ("match", "cast")


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
        TypeError: If `patterns` does not map strings to strings or None, or is a function that does not.
        ValueError: If a pattern is not a regular expression, or is never the first to match. If a replacement names a
            group that its pattern lacks. Or if two names become one.
    """
    if callable(patterns):
        renamed = {name: _checked(name, patterns(name)) for name in names}
        _check_unique(renamed)
        return renamed
    pairs = pairs_of(patterns, "names", "names")
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


def resolve(
    targets: Mapping[str, str | None], weights: Mapping[str, Any], spellings: Mapping[str, str]
) -> dict[str, str | None]:
    """Return the path of a weight for each other spelling of it.

    Raises:
        ValueError: If two names in the file stand for one weight.
    """
    resolved = {
        name: target if target is None or target in weights else spellings.get(target, target)
        for name, target in targets.items()
    }
    _check_unique(resolved)
    return resolved


def make_plan(
    entries: Mapping[str, Entry],
    targets: Mapping[str, str | None],
    weights: Mapping[str, Entry],
    only: str | None = None,
) -> Plan:
    """Compare the arrays of a file with the weights.

    Args:
        entries: The arrays, by their names in the file.
        targets: The path of the weight for each of these names, or None.
        weights: The weights, by path.
        only: A pattern of the paths of those to load, or None for all.

    Raises:
        ValueError: If `only` matches no weight.
    """
    paths = list(weights)
    wanted = set(paths) if only is None else {paths[index] for index in match(only, paths)}
    rows = [
        _row(name, entry, targets[name], weights, wanted, only) for name, entry in entries.items()
    ]
    there = set(targets.values())
    rows += [
        Row("", path, "missing" if path in wanted else "left alone")
        for path in weights
        if path not in there
    ]
    return Plan(rows)


def _row(
    name: str,
    entry: Entry,
    target: str | None,
    weights: Mapping[str, Entry],
    wanted: Collection[str],
    only: str | None,
) -> Row:
    if target is None:
        return Row(name, None, "left out")
    if target not in weights:
        if only is not None and not compile_pattern(only).fullmatch(target):
            return Row(name, None, "left out")
        return Row(name, target, "unexpected")
    if target not in wanted:
        return Row(name, target, "left alone")
    weight = weights[target]
    if entry.shape != weight.shape:
        return Row(name, target, "shape", f"is {weight.shape}, in the file {entry.shape}")
    if not can_hold(weight.dtype, entry.dtype):
        return Row(name, target, "dtype", f"is {weight.dtype}, in the file {entry.dtype}")
    if entry.dtype != weight.dtype:
        return Row(name, target, "cast", f"{entry.dtype} to {weight.dtype}")
    return Row(name, target, "match")


def _checked(name: str, renamed: Any) -> str | None:
    if not isinstance(renamed, (str, type(None))):
        raise TypeError(
            f"`names` must return a name or None; it returned {renamed!r} for {name!r}."
        )
    return renamed


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
                f"both {by_target[target]!r} and {name!r} turn into {target!r}. Give them different names by `names`."
            )
