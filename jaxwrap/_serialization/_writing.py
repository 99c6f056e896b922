"""Modules, functions and pytrees → configs."""

from __future__ import annotations

import base64
import contextlib
import enum
import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import keras
import numpy as np

from jaxwrap._serialization._names import factory_name, find_factory, name_of
from jaxwrap._serialization._nodes import MAX_DEPTH, PLAIN, Weight, fields_of
from jaxwrap._serialization._reading import Deserializer

_REGISTER = 'Register it: `jaxwrap.register_serializable("my_package")({})`'


def serialize(obj: Any, what: str, owner: str) -> Any:
    """Makes a config of data, modules and functions.

    Args:
        obj: Plain data; tuples, lists, dicts and enums of such; dtypes and small arrays; dataclasses, among them Linen
            and Equinox modules, and namedtuples, by their fields; functions, classes and other objects that have a
            name; `functools.partial`; initializers; objects with `get_config`; and `Weight`.
        what: What it is to its owner, for errors: "module", say.
        owner: What errors begin with.

    Raises:
        TypeError: For anything else. The error says where it is, and what to do.
    """
    return _Serializer(owner).serialize(obj, _Where(what))


def serialize_callable(obj: Any, what: str, owner: str) -> Any:
    """Makes a config of a layer's function or module, in Keras's own form if it has no registered name.

    Such a file can be loaded as one of Keras's own layers can: with `custom_objects`, or a lambda with
    `safe_mode=False`.

    Warns:
        UserWarning: For a function that can be loaded with `custom_objects` only.

    Raises:
        TypeError: As `serialize`.
    """
    if inspect.isfunction(obj) and name_of(obj) is None and factory_name(obj) is None:
        name = obj.__name__
        if name != "<lambda>" and keras.saving.get_registered_object(name) is not obj:
            warnings.warn(
                f"{owner}: `{what}` is the function `{name}`, which has not been registered, so the file can be loaded "
                f"with `custom_objects={{{name!r}: {name}}}` only. {_REGISTER.format(name)}.",
                stacklevel=2,
            )
    elif isinstance(obj, type) or not callable(getattr(obj, "get_config", None)):
        return serialize(obj, what, owner)
    return keras.saving.serialize_keras_object(obj)


class _Where(NamedTuple):
    """Where something stands, for errors: the path from what is saved, and the class it is a field of."""

    path: str
    field_of: str = ""

    def item(self, key: str) -> _Where:
        return _Where(f"{self.path}{key}")

    def field(self, name: str, cls: type) -> _Where:
        return _Where(f"{self.path}.{name}", cls.__name__)

    def __str__(self) -> str:
        return f"`{self.path}`" + (f", a field of {self.field_of}," if self.field_of else "")


class _Serializer:
    def __init__(self, owner: str):
        self._owner = owner

    def serialize(self, obj: Any, where: _Where, depth: int = 0) -> Any:
        if depth > MAX_DEPTH:
            raise self._problem(obj, where, f"is nested deeper than {MAX_DEPTH}")
        if type(obj) in PLAIN:
            return obj
        if type(obj) is list:
            return [
                self.serialize(item, where.item(f"[{index}]"), depth + 1)
                for index, item in enumerate(obj)
            ]
        if type(obj) is tuple:
            items = self.serialize(list(obj), where, depth)
            return {"kind": "tuple", "items": items}
        if isinstance(obj, Weight):
            return {"kind": "weight", **obj._asdict(), "shape": list(obj.shape)}
        if (name := name_of(obj)) is not None:
            return {"kind": "name", "name": name}
        for make in (self._data, self._function, self._object):
            if (config := make(obj, where, depth + 1)) is not None:
                return config
        raise self._problem(obj, where, "is no data", _REGISTER.format("it"))

    def _data(self, obj: Any, where: _Where, depth: int) -> Any:
        if isinstance(obj, Mapping):
            kind = {} if type(obj) is dict else {"class": self._class_name(obj, where)}
            items = [
                [
                    self.serialize(key, where, depth),
                    self.serialize(value, where.item(f"[{key!r}]"), depth),
                ]
                for key, value in obj.items()
            ]
            return {"kind": "dict", "items": items, **kind}
        if isinstance(obj, enum.Enum):
            return {"kind": "enum", "class": self._class_name(obj, where), "member": obj.name}
        if isinstance(obj, np.dtype):
            return {"kind": "dtype", "name": obj.name}
        if isinstance(obj, (np.ndarray, np.generic, jax.Array)):
            if jax.dtypes.issubdtype(obj.dtype, jax.dtypes.prng_key):
                raise self._problem(obj, where, "is a PRNG key outside of the weights")
            if obj.dtype.kind not in "biufcV":
                raise self._problem(obj, where, f"is an array of dtype {obj.dtype}")
            array = np.asarray(obj)
            return {
                "kind": "array",
                "library": "jax" if isinstance(obj, jax.Array) else "numpy",
                "dtype": array.dtype.name,
                "shape": list(array.shape),
                "data": base64.b64encode(np.ascontiguousarray(array).tobytes()).decode(),
            }
        return None

    def _function(self, obj: Any, where: _Where, depth: int) -> Any:
        if isinstance(obj, functools.partial):
            parts = {"fn": obj.func, "args": list(obj.args), "kwargs": dict(obj.keywords)}
            return {
                "kind": "partial",
                **{
                    name: self.serialize(part, where.item(f".{name}"), depth)
                    for name, part in parts.items()
                },
            }
        if isinstance(obj, type):
            raise self._problem(
                obj,
                where,
                "is a class that has not been registered",
                _REGISTER.format(obj.__name__),
            )
        if not inspect.isfunction(obj):
            return None
        if (name := factory_name(obj)) is not None:
            factory = find_factory(name)
            given = self._arguments(obj, factory, where, depth)
            made = factory(**Deserializer(where.path, self._owner).deserialize_all(given, depth))
            if self._arguments(made, factory, where, depth) != given:
                raise self._problem(obj, where, f"is not what `{name}` makes")
            return {"kind": "call", "name": name, "arguments": given}
        if obj.__name__ == "<lambda>":
            raise self._problem(
                obj, where, "is a lambda", "Write a function with a name, and register it: "
                '`@jaxwrap.register_serializable("my_package")`'
            )  # fmt: skip
        raise self._problem(
            obj, where, "is a function that has not been registered", _REGISTER.format(obj.__name__)
        )

    def _arguments(
        self, fn: Any, factory: Callable[..., Any], where: _Where, depth: int
    ) -> dict[str, Any]:
        return {
            name: self.serialize(value, where.item(f"({name}=)"), depth)
            for name, value in _arguments_of_maker(fn, factory).items()
        }

    def _object(self, obj: Any, where: _Where, depth: int) -> Any:
        cls = type(obj)
        if callable(getattr(obj, "get_config", None)):
            if name_of(cls) is None:
                raise self._unregistered(obj, where)
            return keras.saving.serialize_keras_object(obj)
        fields = fields_of(obj)
        if fields is None:
            return None
        config = {}
        for name, (value, default) in fields.items():
            try:
                config[name] = self.serialize(value, where.field(name, cls), depth)
            except TypeError:
                # The class itself says what cannot be saved.
                if value is not default:
                    raise
        return {"kind": "object", "class": self._class_name(obj, where), "fields": config}

    def _class_name(self, obj: Any, where: _Where) -> str:
        name = name_of(type(obj))
        if name is None:
            raise self._unregistered(obj, where)
        return name

    def _unregistered(self, obj: Any, where: _Where) -> TypeError:
        name = type(obj).__name__
        return self._problem(
            obj,
            where,
            f"is an object of the class {name}, which has not been registered",
            f'Register it: `@jaxwrap.register_serializable("my_package")` above `class {name}`',
        )

    def _problem(self, obj: Any, where: _Where, what: str, advice: str = "") -> TypeError:
        shown = repr(obj)
        shown = shown if len(shown) < 200 else f"{shown[:200]}…"
        return TypeError(
            f"{self._owner} cannot be saved: {where} {what}: {shown}. {advice}".strip()
        )


def _arguments_of_maker(fn: Callable[..., Any], factory: Callable[..., Any]) -> dict[str, Any]:
    """The arguments with which a factory has made a function: what it closes over, and its defaults."""
    cells = {}
    for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # a variable that the factory has not set
            cells[name] = cell.cell_contents
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(fn, follow_wrapped=False).parameters.items()
        if parameter.default is not parameter.empty
    }
    known = {**defaults, **cells}
    return {name: known[name] for name in inspect.signature(factory).parameters if name in known}
