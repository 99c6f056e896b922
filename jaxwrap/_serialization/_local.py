"""Names that hold in this process alone: a copy of a layer needs nothing to be registered."""

from __future__ import annotations

import secrets
import threading
import weakref
from typing import Any

_PREFIX = "unregistered>"
# Weak, so that a config keeps nothing alive.
_OBJECTS: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
_LOCK = threading.Lock()


def own_name(obj: Any) -> str:
    """Return the name that a function or a class has by itself, or an empty string."""
    name = getattr(obj, "__name__", "")
    return name if isinstance(name, str) else ""


def local_name(obj: Any) -> str | None:
    """Name an object for configs that stay in this process. None if there can be no weak reference to it."""
    with _LOCK:
        for name, known in _OBJECTS.items():
            if known is obj:
                return name
        # No file can guess it.
        name = f"{_PREFIX}{own_name(obj)}>{secrets.token_hex(16)}"
        try:
            _OBJECTS[name] = obj
        except TypeError:
            return None
        return name


def is_local(name: Any) -> bool:
    """Whether `local_name` made a name, in this process or in another one."""
    return isinstance(name, str) and name.startswith(_PREFIX)


def find_local(name: Any) -> Any:
    """Return the object with this name, or None if it belongs to another process, or is gone."""
    return _OBJECTS.get(name) if is_local(name) else None


def has_local_name(obj: Any) -> bool:
    """Whether `local_name` has named an object."""
    with _LOCK:
        return any(known is obj for known in _OBJECTS.values())


def own_name_in(name: str) -> str:
    """Return the object's own name in a local name."""
    return name.removeprefix(_PREFIX).rpartition(">")[0]
