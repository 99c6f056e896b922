"""Names for variables that every backend accepts."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence


@functools.cache
def clean(name: str) -> str:
    """Replace every character that a backend refuses in the name of a variable by `_`."""
    # Keras refuses `/` and PyTorch `.`, and a name must be the same on all backends.
    return re.sub(r"[^A-Za-z0-9_-]", "_", name) or "_"


def unique_names(paths: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Turn key paths into paths of names that every backend accepts, a different one for each, in order.

    Characters other than letters, digits, `_` and `-` become `_`. Where two paths collide, or one is the beginning of
    another, the later one gets a number.
    """
    taken: set[tuple[str, ...]] = set()
    groups: set[tuple[str, ...]] = set()
    result = []
    for path in paths:
        names = tuple(map(clean, path))
        above = [names[:end] for end in range(1, len(names))]
        blocked = not taken.isdisjoint(above)
        candidate, count = names, 0
        # In a file, one path cannot be both an array and a group of arrays.
        while candidate in taken or candidate in groups or blocked:
            count += 1
            if not taken.isdisjoint(above):
                candidate = (f"{names[0]}_{count}", *names[1:])
                blocked = any(candidate[:end] in taken for end in range(1, len(candidate)))
            else:
                candidate = (*names[:-1], f"{names[-1]}_{count}")
        taken.add(candidate)
        groups.update(candidate[:end] for end in range(1, len(candidate)))
        result.append(candidate)
    return result
