"""The living instances of a class, which Python lists nowhere."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any


def instances(cls: type) -> list[Any]:
    """Return the living instances of a class with few subclasses, and of those.

    Not by `gc.get_objects()`: its list also holds the tuples that other threads are making, and Python then raises
    SystemError in those threads. Instances refer to their class.
    """
    classes = [*_with_subclasses(cls)]
    # Not `isinstance`, which asks proxies for their `__class__`.
    return [found for found in gc.get_referrers(*classes) if issubclass(type(found), cls)]


def _with_subclasses(cls: type) -> Iterator[type]:
    yield cls
    for subclass in cls.__subclasses__():
        yield from _with_subclasses(subclass)
