"""Regular expressions for paths. They come from files too, so time and memory are bounded."""

from __future__ import annotations

import difflib
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_SECONDS = 5
# The most bytes that one expression takes, compiled and while it is matched.
_MEMORY = 2**21
# The most characters. The memory that RE2 takes to parse is not limited.
_LONGEST = 2000


def compile_pattern(pattern: str, what: str = "the pattern") -> Any:
    """Compile a regular expression of RE2, whose objects have the methods of those of `re`.

    Args:
        pattern: The expression.
        what: How errors call it.

    Raises:
        TypeError: If it is not a string.
        ValueError: If it is not a regular expression, or too large.
    """
    if not isinstance(pattern, str):
        raise TypeError(
            f"{what} must be a string, a regular expression such as '.*/kernel'; received {pattern!r}. Join several by "
            "`|`."
        )
    # Expressions of `re` and `regex` can take forever to match, and gigabytes to compile.
    import re2

    if len(pattern) > _LONGEST:
        raise ValueError(
            f"{what} {pattern[:200]!r}... has {len(pattern):,} characters; at most {_LONGEST:,} are allowed. Write "
            "several patterns."
        )
    options = re2.Options()
    options.max_mem = _MEMORY
    options.log_errors = False
    try:
        return re2.compile(pattern, options)
    except (re2.error, UnicodeError) as error:
        reason = error.args[0] if isinstance(error, re2.error) else error
        reason = reason.decode() if isinstance(reason, bytes) else reason
        raise ValueError(
            f"{what} {pattern[:200]!r} is not a regular expression: {reason}. The syntax is that of RE2: as in Python, "
            "but without lookaround and backreferences, and with at most 1000 repetitions in braces."
        ) from error


def pairs_of(patterns: Any, name: str, values: str) -> list[Any]:
    """Return the pairs of a dict by pattern, or of an iterable of pairs. None has no pairs.

    Args:
        patterns: The argument.
        name: How errors call it.
        values: Likewise what patterns are mapped to.

    Raises:
        TypeError: If it is something else.
    """
    if isinstance(patterns, Mapping):
        return list(patterns.items())
    is_iterable = isinstance(patterns, Iterable) and not isinstance(patterns, str)
    pairs = list(patterns) if is_iterable else [patterns] * (patterns is not None)
    if not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in pairs):
        raise TypeError(
            f"`{name}` must be a dict from patterns to {values}, or pairs of both; received {patterns!r}."
        )
    return pairs


def match(pattern: str, paths: Sequence[str], example: str = ".*/kernel") -> list[int]:
    """Find the paths that a pattern matches as a whole.

    Args:
        pattern: The expression.
        paths: The paths.
        example: A pattern for such paths, for the error.

    Returns:
        Their indices.

    Raises:
        ValueError: If no path matches, or matching takes longer than 5 s.
    """
    compiled = compile_pattern(pattern)
    end = time.monotonic() + _SECONDS
    found = []
    for index, path in enumerate(paths):
        if compiled.fullmatch(path):
            found.append(index)
        # One path takes a moment at most, but a file may hold thousands.
        if time.monotonic() > end:
            raise ValueError(
                f"it takes longer than {_SECONDS} s to match the pattern {pattern[:200]!r} with {len(paths)} paths. "
                "Write a shorter one."
            )
    if not found:
        raise ValueError(
            f"the pattern {pattern!r} does not match any of the {len(paths)} paths below the layer. A pattern is a "
            f"regular expression for the whole path, such as {example!r}. "
            f"Near it: {', '.join(_near(pattern, paths)) or 'nothing'}."
        )
    return found


def _near(pattern: str, paths: Sequence[str]) -> list[str]:
    literal = re.sub(r"\.\*|[\\^$()\[\]?+*|]", "", pattern)
    last = literal.rpartition("/")[2]
    containing = [path for path in paths if last and last in path]
    alike = difflib.get_close_matches(literal, paths, n=5, cutoff=0.3)
    by_name = [
        path
        for path in paths
        if difflib.SequenceMatcher(None, last, path.rpartition("/")[2]).ratio() > 0.6
    ]
    return (list(dict.fromkeys([*containing, *by_name, *alike])) or list(paths))[:5]
