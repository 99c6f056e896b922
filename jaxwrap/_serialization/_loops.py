"""Numbers in a file that say how often something is done: a short file could keep a machine busy for years."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxwrap._serialization._allowed import NAMES
from jaxwrap._serialization._names import name_of

# The arguments of the libraries' names in `_allowed.py` that count repetitions.
_COUNTS = ("depth", "n_steps", "ns_steps", "num_power_iterations", "n_iter", "num_iters")
_MOST = 1000


def check_loops(fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise ValueError if a file has a function or a class of a library repeat something too often.

    What users register is theirs: it may count as far as it likes.
    """
    if name_of(fn) not in NAMES:
        return
    given = dict(kwargs)
    if args:
        names = list(inspect.signature(fn).parameters)
        given |= dict(zip(names, args, strict=False))
    for name in _COUNTS:
        count = given.get(name)
        if isinstance(count, (int, float)) and count > _MOST:
            raise ValueError(
                f"this config has {name}={count!r} for {name_of(fn)}; expected at most {_MOST}. Register a function of "
                "your own that makes it."
            )
