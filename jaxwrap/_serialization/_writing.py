"""Modules, functions and pytrees → configs."""

from __future__ import annotations

import base64
import enum
import functools
import inspect
import json
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import keras
import numpy as np

from jaxwrap._serialization._factories import arguments_of_maker, factory_name, find_factory
from jaxwrap._serialization._fields import Method, fields_of
from jaxwrap._serialization._names import name_of
from jaxwrap._serialization._nodes import MAX_DEPTH, PLAIN, Weight
from jaxwrap._serialization._reading import Deserializer

_REGISTER = 'Register it: `jaxwrap.register_serializable("my_package")({})`'


def serialize(obj: Any, what: str) -> Any:
    """Make a config from data, modules and functions.

    Args:
        obj: Plain data, tuples, lists, dicts, sets and enums. Dtypes and small arrays. Registered dataclasses, Linen
            and Equinox modules and namedtuples, by their fields. Functions, classes and other objects with a name.
            `functools.partial`, initializers, objects with `get_config`, and `Weight`.
        what: The argument that holds it, for errors. For example "module".

    Raises:
        TypeError: For anything else. The error names the place and the fix.
    """
    return _serialize(obj, _Where(what))


def serialize_callable(obj: Any, what: str) -> Any:
    """Make a config from a layer's function or module. Without a registered name, it is in Keras's own form.

    Such a file loads as a file of Keras's own layers does: with `custom_objects`, or a lambda with `safe_mode=False`.

    Warns:
        UserWarning: For a function that loads only with `custom_objects`.

    Raises:
        TypeError: See `serialize`.
    """
    if inspect.isfunction(obj) and name_of(obj) is None and factory_name(obj) is None:
        name = obj.__name__
        if name != "<lambda>" and keras.saving.get_registered_object(name) is not obj:
            warnings.warn(
                f"`{what}` is the function `{name}`, which has not been registered, so the file loads only with "
                f"`custom_objects={{{name!r}: {name}}}`. {_REGISTER.format(name)}.",
                stacklevel=2,
            )
    elif isinstance(obj, type) or not callable(getattr(obj, "get_config", None)):
        return serialize(obj, what)
    return _keras_form(obj)


def serialize_fields(obj: Any, callables: Collection[str] = ()) -> dict[str, Any]:
    """Make a config from the fields of a dataclass, as its `get_config` may return it.

    Args:
        obj: The dataclass.
        callables: The fields that `serialize_callable` writes, with its concessions. `serialize` writes the others.

    Raises:
        TypeError: See `serialize`.
    """
    config = {}
    for name, (value, default) in (fields_of(obj) or {}).items():
        try:
            config[name] = (serialize_callable if name in callables else serialize)(value, name)
        except TypeError:
            # The class makes its own default again.
            if value is not default:
                raise
    return config


class _Where(NamedTuple):
    """The place of a value, for errors: the path from the argument, and the class whose field it is."""

    path: str
    field_of: str = ""

    def item(self, key: str) -> _Where:
        return _Where(f"{self.path}{key}")

    def field(self, name: str, cls: type) -> _Where:
        return _Where(f"{self.path}.{name}", cls.__name__)

    def __str__(self) -> str:
        return f"`{self.path}`" + (f", a field of {self.field_of}," if self.field_of else "")


def _serialize(obj: Any, where: _Where, depth: int = 0) -> Any:
    if depth > MAX_DEPTH:
        raise _problem(obj, where, f"is nested deeper than {MAX_DEPTH}")
    # Exactly these types: a subclass, such as an enum of strings, would come back as its base.
    if type(obj) in PLAIN:
        return obj
    if type(obj) is list:
        return [
            _serialize(item, where.item(f"[{index}]"), depth + 1) for index, item in enumerate(obj)
        ]
    if type(obj) is tuple:
        return {"kind": "tuple", "items": _serialize(list(obj), where, depth)}
    if isinstance(obj, Weight):
        return {"kind": "weight", **obj._asdict(), "shape": list(obj.shape)}
    if isinstance(obj, Method):
        return {"kind": "method", **obj._asdict()}
    if (name := name_of(obj)) is not None:
        return {"kind": "name", "name": name}
    for write in (_data, _array, _function, _object):
        if (config := write(obj, where, depth + 1)) is not None:
            return config
    raise _problem(obj, where, "is not data", _REGISTER.format("it"))


def _data(obj: Any, where: _Where, depth: int) -> Any:
    if isinstance(obj, Mapping):
        kind = {} if type(obj) is dict else {"class": _class_name(obj, where)}
        # As pairs, since the keys of a JSON object are strings only.
        items = [
            [_serialize(key, where, depth), _serialize(value, where.item(f"[{key!r}]"), depth)]
            for key, value in obj.items()
        ]
        return {"kind": "dict", "items": items, **kind}
    if type(obj) in (set, frozenset):
        members = [_serialize(item, where.item(f"[{item!r}]"), depth) for item in obj]
        # The order of a set changes from process to process.
        members.sort(key=json.dumps)
        return {"kind": "set", "items": members, "frozen": type(obj) is frozenset}
    if isinstance(obj, enum.Enum):
        return {"kind": "enum", "class": _class_name(obj, where), "member": obj.name}
    if isinstance(obj, np.dtype):
        return {"kind": "dtype", "name": obj.name}
    return None


def _array(obj: Any, where: _Where, depth: int) -> Any:
    if not isinstance(obj, (np.ndarray, np.generic, jax.Array)):
        return None
    if jax.dtypes.issubdtype(obj.dtype, jax.dtypes.prng_key):
        raise _problem(obj, where, "is a PRNG key outside of the weights")
    # V is the kind of bfloat16 and float8.
    if obj.dtype.kind not in "biufcV":
        raise _problem(obj, where, f"is an array of dtype {obj.dtype}")
    array = np.asarray(obj)
    return {
        "kind": "array",
        "library": "jax" if isinstance(obj, jax.Array) else "numpy",
        "dtype": array.dtype.name,
        "shape": list(array.shape),
        "data": base64.b64encode(np.ascontiguousarray(array).tobytes()).decode(),
    }


def _function(obj: Any, where: _Where, depth: int) -> Any:
    if isinstance(obj, functools.partial):
        parts = {"fn": obj.func, "args": list(obj.args), "kwargs": dict(obj.keywords)}
        written = {
            name: _serialize(part, where.item(f".{name}"), depth) for name, part in parts.items()
        }
        return {"kind": "partial", **written}
    if isinstance(obj, type):
        problem = "is a class that has not been registered"
        raise _problem(obj, where, problem, _REGISTER.format(obj.__name__))
    if inspect.ismethod(obj):
        advice = "Pass a registered function that takes the object as its first argument"
        raise _problem(obj, where, "is a method that a file cannot name", advice)
    if not inspect.isfunction(obj):
        return None
    if (name := factory_name(obj)) is not None:
        return _call(obj, name, where, depth)
    if obj.__name__ == "<lambda>":
        advice = 'Write a function with a name, and register it: `@jaxwrap.register_serializable("my_package")`'
        raise _problem(obj, where, "is a lambda", advice)
    problem = "is a function that has not been registered"
    raise _problem(obj, where, problem, _REGISTER.format(obj.__name__))


def _call(obj: Any, name: str, where: _Where, depth: int) -> Any:
    """Write the call of the factory that made a function, if the same call makes the same function again."""
    factory = find_factory(name)

    def arguments(fn: Callable[..., Any]) -> dict[str, Any]:
        return {
            argument: _serialize(value, where.item(f"({argument}=)"), depth)
            for argument, value in arguments_of_maker(fn, factory).items()
        }

    first = arguments(obj)
    again = factory(**Deserializer(where.path).deserialize_all(first, depth))
    if arguments(again) != first:
        raise _problem(obj, where, f"is not what `{name}` makes")
    return {"kind": "call", "name": name, "arguments": first}


def _object(obj: Any, where: _Where, depth: int) -> Any:
    cls = type(obj)
    if callable(getattr(obj, "get_config", None)):
        _class_name(obj, where)
        return _keras_form(obj)
    fields = fields_of(obj)
    if fields is None:
        return None
    config = {}
    for name, (value, default) in fields.items():
        try:
            config[name] = _serialize(value, where.field(name, cls), depth)
        except TypeError:
            # The class makes its own default again.
            if value is not default:
                raise
    return {"kind": "object", "class": _class_name(obj, where), "fields": config}


def _keras_form(obj: Any) -> dict[str, Any]:
    """Write a function or an object as Keras does, with the name under which we find its class."""
    config: Any = keras.saving.serialize_keras_object(obj)
    name = None if inspect.isfunction(obj) else name_of(type(obj))
    return config if name is None else {**config, "registered_name": name}


def _class_name(obj: Any, where: _Where) -> str:
    if (name := name_of(type(obj))) is not None:
        return name
    cls = type(obj).__name__
    raise _problem(
        obj,
        where,
        f"is an object of the class {cls}, which has not been registered",
        f'Register it: `@jaxwrap.register_serializable("my_package")` above `class {cls}`',
    )


def _problem(obj: Any, where: _Where, what: str, advice: str = "") -> TypeError:
    shown = repr(obj)
    shown = shown if len(shown) < 200 else f"{shown[:200]}…"
    return TypeError(f"cannot be saved: {where} {what}: {shown}. {advice}".strip())
