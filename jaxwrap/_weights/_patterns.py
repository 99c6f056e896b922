"""Regular expressions for paths. They come from files too, so matching has a time limit."""

from __future__ import annotations

import difflib
import re
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import regex

SECONDS = 5


def compile_pattern(pattern: str, what: str = "the pattern") -> regex.Pattern[str]:
    """Compile a regular expression, whose searches take a `timeout`.

    Args:
        pattern: The expression.
        what: How errors call it.

    Raises:
        ValueError: If it is not a regular expression.
    """
    import regex  # slow to load, but searches of `re` cannot be stopped

    try:
        # The time limit is for searches. To compile nested bounded repetitions may take gigabytes, as opposed to `re`.
        return regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"{what} {pattern!r} is not a regular expression: {error}.") from error


def match(pattern: str, paths: Sequence[str]) -> list[int]:
    """Find the paths that a pattern matches as a whole.

    Returns:
        Their indices.

    Raises:
        ValueError: If no path matches, or matching takes longer than `SECONDS`.
    """
    compiled = compile_pattern(pattern)
    end = time.monotonic() + SECONDS
    try:
        found = [
            index
            for index, path in enumerate(paths)
            # One limit for all paths together: a file may hold thousands.
            if compiled.fullmatch(path, timeout=max(end - time.monotonic(), 1e-3))
        ]
    except TimeoutError:
        raise ValueError(
            f"it takes longer than {SECONDS} s to match the pattern {pattern!r} with {len(paths)} paths. Write it "
            "without repetitions inside repetitions."
        ) from None
    if not found:
        raise ValueError(
            f"the pattern {pattern!r} does not match any of the {len(paths)} paths below the layer. A pattern is a "
            "regular expression for the whole path, such as '.*/kernel'. "
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
