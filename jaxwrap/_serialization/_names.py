"""Objects ⇄ the names that files hold for them. Loading looks a name up here, and never imports it."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import keras

from jaxwrap._serialization._allowed import NAMES
from jaxwrap._serialization._local import find_local, is_local, own_name_in

# Keras's own registry takes only functions, and classes with `get_config`.
_OBJECTS: dict[str, Any] = {}


def register(name: str, obj: Any) -> None:
    """Register an object under a name, which has a package in front: "package>name"."""
    _OBJECTS[name] = obj
    # Keras looks its own layers up in its own registry.
    if isinstance(obj, type) and callable(getattr(obj, "get_config", None)):
        package, _, own = name.rpartition(">")
        keras.saving.register_keras_serializable(package, own)(obj)


def registered(name: str) -> Any:
    """Return what is registered under a name, or None."""
    return _OBJECTS.get(name)


def registered_objects() -> dict[str, Any]:
    """Return all that is registered, by name, in Keras's registry too."""
    return {**keras.saving.get_custom_objects(), **_OBJECTS}


def name_of(obj: Any) -> str | None:
    """Return the name by which a file may refer to an object, or None."""
    for name, known in (*_OBJECTS.items(), *keras.saving.get_custom_objects().items()):
        if known is obj:
            return name
    for full, (module, name) in NAMES.items():
        # `obj` cannot come from a library that nobody has imported.
        if getattr(sys.modules.get(module), name, None) is obj:
            return full
    return None


def find(name: Any) -> Any:
    """Return the object with this name.

    Raises:
        ValueError: If the name is neither registered nor in the list of allowed names.
    """
    if (local := find_local(name)) is not None:
        return local
    if is_local(name):
        # Another process made the config. `custom_objects` may have what it means.
        name = own_name_in(name)
        if not name:
            raise ValueError(
                "this config refers to an object that is not registered, in the process that made the config. Register "
                'it there and here: `jaxwrap.register_serializable("my_package", "my_name")(...)`.'
            )
    if isinstance(name, str):
        if name in _OBJECTS:
            return _OBJECTS[name]
        if (known := keras.saving.get_registered_object(name)) is not None:
            return known
        # The name is a key of our list, and never a path to import: that was CVE-2025-1550.
        if name in NAMES:
            return load(*NAMES[name])
    raise ValueError(
        f"the name {name!r} is not registered. Before loading, import the code that registers it, with "
        "`jaxwrap.register_serializable(package, name)` for example. jaxwrap never imports a name from a file."
    )


def load(module: str, name: str) -> Any:
    """Import an allowed name.

    Raises:
        ValueError: If its library is not installed.
    """
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise ValueError(
            f"{module}.{name} needs {error.name!r}, which is not installed."
        ) from error
