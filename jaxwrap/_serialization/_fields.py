"""Objects ⇄ their fields: dataclasses, namedtuples, Linen and Equinox modules."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxwrap._serialization._local import has_local_name
from jaxwrap._serialization._names import name_of


class Method(NamedTuple):
    """Stands for a method of an object in another field.

    Attributes:
        field: The field with the object.
        name: The name of the method.
        bound: True for `module.encode`, False for `Module.encode`.
    """

    field: str
    name: str
    bound: bool


def fields_of(obj: Any) -> dict[str, tuple[Any, Any]] | None:
    """Return the fields from which `from_fields` makes an object again, with their defaults. None if it has no fields.

    A field that holds a method of the object in another field has a `Method` for its value.
    """
    if isinstance(obj, tuple) and (names := getattr(obj, "_fields", None)):
        return {name: (getattr(obj, name), dataclasses.MISSING) for name in names}
    if not dataclasses.is_dataclass(obj) or isinstance(obj, type):
        return None
    cls = type(obj)
    if _is_equinox(cls):
        defaults = _constructor_defaults(cls)
        return {
            field.name: (getattr(obj, field.name), defaults.get(field.name, field.default))
            for field in dataclasses.fields(obj)
            if field.name in vars(obj)
        }
    fields = {
        field.name: (getattr(obj, field.name), field.default)
        for field in dataclasses.fields(obj)
        # A Linen module's `parent` belongs to the module around it.
        if field.init and not (_is_linen(cls) and field.name == "parent")
    }
    values = {name: value for name, (value, _) in fields.items()}
    return {
        name: (_method(value, values) or value, default)
        for name, (value, default) in fields.items()
    }


def from_fields(cls: type, fields: Mapping[str, Any]) -> Any:
    """Make an object from its fields.

    Raises:
        TypeError: If the class has no such fields, or a `Method` is not one that a file may name.
    """
    is_tuple = issubclass(cls, tuple) and hasattr(cls, "_fields")
    if not is_tuple and not dataclasses.is_dataclass(cls):
        raise TypeError(f"{cls.__name__} is neither a dataclass nor a namedtuple")
    if not is_tuple and not _is_equinox(cls):
        return cls(**{name: _resolve(value, fields) for name, value in fields.items()})
    if any(isinstance(value, Method) for value in fields.values()):
        raise TypeError(f"{cls.__name__} cannot hold methods of its fields")
    if is_tuple:
        return cls(**fields)
    # The constructor of an Equinox module need not take its fields.
    known = {field.name for field in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    if unknown := set(fields) - known:
        raise TypeError(f"{cls.__name__} has no fields {sorted(unknown)}")
    module = object.__new__(cls)
    for name, value in {**_constructor_defaults(cls), **fields}.items():
        if name in known:
            object.__setattr__(module, name, value)
    return module


def _method(value: Any, values: Mapping[str, Any]) -> Method | None:
    """Return a `Method` for a method of one of the values, if a file may name it."""
    bound = inspect.ismethod(value)
    function = value.__func__ if bound else value
    if not inspect.isfunction(function) or name_of(function) is not None:
        return None
    for field, other in values.items():
        if _public_function(type(other), function.__name__, type(other)) is function and (
            not bound or _equal(other, value.__self__)
        ):
            return Method(field, function.__name__, bound)
    return None


def _equal(one: Any, two: Any) -> bool:
    try:
        return one is two or bool(one == two)
    except ValueError:  # arrays in fields
        return False


def _resolve(value: Any, fields: Mapping[str, Any]) -> Any:
    """Return the method that a `Method` stands for."""
    if not isinstance(value, Method):
        return value
    owner = fields.get(value.field)
    function = _public_function(type(owner), value.name)
    if function is None:
        raise TypeError(
            f"expected a public function that a registered class defines; received {value.name!r} of "
            f"{type(owner).__name__}"
        )
    return function.__get__(owner) if value.bound else function


def _public_function(cls: type, name: str, also: type | None = None) -> Any:
    """Return a function that a class defines. None if it is private, or if a config may not name the class.

    Args:
        cls: The class.
        name: The name of the function.
        also: A class whose functions count without a registered name.
    """
    if name.startswith("_") and name != "__call__":
        return None
    defining = next((base for base in cls.__mro__ if name in vars(base)), None)
    if defining is None:
        return None
    if defining is not also and name_of(defining) is None and not has_local_name(defining):
        return None
    function = vars(defining)[name]
    return function if inspect.isfunction(function) else None


def _constructor_defaults(cls: type) -> dict[str, Any]:
    return {
        name: parameter.default
        for name, parameter in inspect.signature(cls).parameters.items()
        if parameter.default is not parameter.empty
    }


def _is_linen(cls: type) -> bool:
    return _descends(cls, "flax.linen", "Module")


def _is_equinox(cls: type) -> bool:
    return _descends(cls, "equinox", "Module")


def _descends(cls: type, library: str, name: str) -> bool:
    # A library that nobody has imported cannot have made the class.
    base = getattr(sys.modules.get(library), name, None)
    return base is not None and issubclass(cls, base)
