"""The living instances of a class, which Python lists nowhere."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterable, Iterator
from typing import Any


def instances(*classes: type) -> list[Any]:
    """Return the living instances of a few classes, not those of their subclasses.

    Not by `gc.get_objects()`: its list also holds the tuples that other threads are making, and Python then raises
    SystemError in those threads. Instances refer to their class.
    """
    # Not `isinstance`, which asks proxies for their `__class__`.
    return (
        [found for found in gc.get_referrers(*classes) if type(found) in classes] if classes else []
    )


def with_instances(classes: Iterable[type]) -> list[type]:
    """Return those of many classes that have living instances: `instances` compares each reference with each class."""
    # The list of all objects, which no other thread sees, as a single call into C makes it and drops it.
    objects = itertools.chain.from_iterable(map(gc.get_objects, [None]))
    found = set(map(id, map(type, objects)))
    return [cls for cls in classes if id(cls) in found]


def with_subclasses(cls: type) -> Iterator[type]:
    """Yield a class and all that are derived from it."""
    yield cls
    for subclass in cls.__subclasses__():
        yield from with_subclasses(subclass)
