"""`register_serializable`: one object under a name, or all that a module, a layer or a model is made of."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import keras

from jaxwrap._serialization._fields import fields_of
from jaxwrap._serialization._local import own_name
from jaxwrap._serialization._missing import dry_config, listed
from jaxwrap._serialization._names import register, registered
from jaxwrap._serialization._nodes import PLAIN
from jaxwrap._serialization._writing import serialize

Registered = TypeVar("Registered")


def register_serializable(
    package: str, name: str | None = None
) -> Callable[[Registered], Registered]:
    """Give an object a name by which files may refer to it: a function, a class, a Haiku transform, an enum.

    Loading looks names up and never imports anything. So register an object before you write a file, and under the same
    name before you read it. A class needs no `get_config`: of a dataclass (a Linen or an Equinox module is one), a
    namedtuple or an enum, the file holds the fields. jaxwrap also finds what
    `keras.saving.register_keras_serializable` has registered.

    Of a module, a layer or a model, without `name`, all functions and classes that it is made of are registered, each
    under its own name.

    Args:
        package: A prefix that keeps equal names apart, such as the name of your package.
        name: The name. By default the object's own.

    Returns:
        A decorator, which returns the object unchanged. Call it with an object that exists already, as in
        `register_serializable("mine", "encoder")(encoder)`.

    Raises:
        TypeError: If `package` or `name` is not a string, or if you pass no name and the object has none of its own.
            Also for an object that no file refers to by a name: data, a method, a Keras layer.
        ValueError: If two parts of a module have the same name.

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
    if not isinstance(package, str) or not package:
        raise TypeError(
            f"register_serializable: expected a string for `package`, received {package!r}. Write "
            '`@jaxwrap.register_serializable("my_package")`.'
        )
    if name is not None and (not isinstance(name, str) or not name):
        raise TypeError(f"register_serializable: expected a string for `name`, received {name!r}.")

    def decorate(obj: Registered) -> Registered:
        if (problem := _useless(obj, name)) is not None:
            raise TypeError(f"register_serializable: {obj!r} {problem}.")
        if name is None and not own_name(obj) and _has_parts(obj):
            _register_parts(package, obj)
            return obj
        own = name or own_name(obj)
        if not own:
            raise TypeError(
                f"register_serializable: expected a string for `name`, received None, for {obj!r}, which has no name "
                f'of its own: `register_serializable({package!r}, "my_name")(...)`.'
            )
        register(f"{package}>{own}", obj)
        return obj

    return decorate


def _useless(obj: Any, name: str | None) -> str | None:
    """Return why no file would refer to an object by this name, or None."""
    if type(obj) in (*PLAIN, list, tuple, set, frozenset):
        return "is data, which a file holds as it is"
    if inspect.ismethod(obj):
        return "is a method, which is a new object at each access. Register a function"
    if name is None and own_name(obj) == "<lambda>":
        return "is a lambda. All lambdas have the same name, so pass one: `name=`"
    objects_of_keras = (
        keras.layers.Layer,
        keras.optimizers.Optimizer,
        keras.losses.Loss,
        keras.metrics.Metric,
    )
    if name is not None and isinstance(obj, objects_of_keras):
        return f"is a {type(obj).__name__}, which a file holds by its class. Register the class"
    return None


def _has_parts(obj: Any) -> bool:
    if callable(getattr(obj, "get_config", None)) or isinstance(obj, functools.partial):
        return True
    # A transform of Haiku is a pair of functions that have the same names in each.
    return not isinstance(obj, tuple) and fields_of(obj) is not None


def _register_parts(package: str, obj: Any) -> None:
    """Register the functions and classes that an object is made of. All or none."""
    with dry_config() as config:
        if callable(getattr(obj, "get_config", None)):
            keras.saving.serialize_keras_object(obj)
        else:
            serialize(obj, type(obj).__name__)
    # Without those that a file holds in Keras's form.
    if nameless := [one for one in config.missing if one.key is None and one.warning is None]:
        raise TypeError(
            f"register_serializable: not everything that the {type(obj).__name__} is made of has a name:\n"
            + listed(nameless)
        )
    parts: dict[str, Any] = {}
    for key in (one.key for one in config.missing if one.key is not None):
        own = f"{package}>{key.__name__}"
        other = parts.get(own) or registered(own) or key
        # A notebook defines the same class again and again.
        if other is not key and (own in parts or _origin(other) != _origin(key)):
            raise ValueError(
                f"register_serializable: {key!r} and {other!r} would both be {own!r}. Register one of them under "
                f"another name: `register_serializable({package!r}, name)`."
            )
        parts[own] = key
    for own, key in parts.items():
        register(own, key)


def _origin(obj: Any) -> tuple[Any, ...]:
    return getattr(obj, "__module__", None), getattr(obj, "__qualname__", None)
