"""Objects ⇄ the names that files hold for them. Loading looks a name up here, and never imports it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import keras

from jaxwrap._serialization._allowed import NAMES

_Registered = TypeVar("_Registered")

# Keras's own registry takes only functions, and classes with `get_config`.
_OBJECTS: dict[str, Any] = {}


def register_serializable(
    package: str, name: str | None = None
) -> Callable[[_Registered], _Registered]:
    """Give an object a name by which files may refer to it: a function, a class, a Haiku transform, an enum.

    Loading looks names up and never imports anything. So register an object before you write a file, and under the same
    name before you read it. A class needs no `get_config`: of a dataclass (a Linen or an Equinox module is one), a
    namedtuple or an enum, the file holds the fields. jaxwrap also finds what
    `keras.saving.register_keras_serializable` has registered.

    Args:
        package: A prefix that keeps equal names apart, such as the name of your package.
        name: The name. By default the object's own.

    Returns:
        A decorator, which returns the object unchanged. For an object that exists already, call it:
        `register_serializable("mine", "encoder")(encoder)`.

    Raises:
        TypeError: If `package` or `name` is not a string, or if you pass no name and the object has none of its own.

    Example:
        >>> import flax.linen as nn, jaxwrap
        >>> @jaxwrap.register_serializable("docs")
        ... class Net(nn.Module):
        ...     width: int = 8
        ...     @nn.compact
        ...     def __call__(self, x):
        ...         return nn.Dense(self.width)(x)
        >>> layer = jaxwrap.FlaxLayer(Net(width=3))
        >>> jaxwrap.FlaxLayer.from_config(layer.get_config()).module.width
        3
    """

    def register(obj: _Registered) -> _Registered:
        own = name if name is not None else getattr(obj, "__name__", None)
        for argument, value in (("package", package), ("name", own)):
            if not isinstance(value, str) or not value:
                raise TypeError(
                    f"register_serializable: expected a string for `{argument}`, received {value!r}, for {obj!r}."
                )
        _OBJECTS[f"{package}>{own}"] = obj
        # Keras looks its own layers up in its own registry.
        if isinstance(obj, type) and callable(getattr(obj, "get_config", None)):
            keras.saving.register_keras_serializable(package, own)(obj)
        return obj

    return register


def name_of(obj: Any) -> str | None:
    """Return the name by which a file may refer to an object, or None."""
    for name, registered in (*_OBJECTS.items(), *keras.saving.get_custom_objects().items()):
        if registered is obj:
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
    if isinstance(name, str):
        if name in _OBJECTS:
            return _OBJECTS[name]
        if (registered := keras.saving.get_registered_object(name)) is not None:
            return registered
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
