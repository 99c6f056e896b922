"""Modules, functions and pytrees → configs."""

from __future__ import annotations

import base64
import enum
import functools
import inspect
import json
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import keras
import numpy as np

from jaxwrap._serialization._factories import arguments_of_maker, factory_name, find_factory
from jaxwrap._serialization._fields import Method, fields_of
from jaxwrap._serialization._local import local_name, own_name
from jaxwrap._serialization._missing import Config, one_config
from jaxwrap._serialization._names import name_of
from jaxwrap._serialization._nodes import MAX_DEPTH, PLAIN, Weight
from jaxwrap._serialization._reading import Deserializer

_LAMBDA = (
    'Write a function with a name, and register it: `@jaxwrap.register_serializable("my_package")`'
)
_BY_NAME = 'Register it under a name: `jaxwrap.register_serializable("my_package", "my_name")({})`'


def serialize(obj: Any, what: str) -> Any:
    """Make a config from data, modules and functions.

    Args:
        obj: Plain data, tuples, lists, dicts, sets and enums. Dtypes and small arrays. Registered dataclasses, Linen
            and Equinox modules and namedtuples, by their fields. Functions, classes and other objects with a name.
            `functools.partial`, initializers, objects with `get_config`, and `Weight`.
        what: The argument that holds it, for errors. For example "module".

    Raises:
        TypeError: For anything else. While Keras writes a file, also for functions, classes and objects that have no
            registered name. Elsewhere they get one that holds in this process.
    """
    with one_config() as config:
        return _serialize(obj, _Where(what, config))


def serialize_callable(obj: Any, what: str) -> Any:
    """Make a config from a layer's function or module. Without a registered name, it is in Keras's own form.

    Such a file loads as a file of Keras's own layers does: with `custom_objects`, or a lambda with `safe_mode=False`.

    Warns:
        UserWarning: While Keras writes a file, for a function that loads only so.

    Raises:
        TypeError: See `serialize`.
    """
    with one_config() as config:
        where = _Where(what, config)
        if inspect.isfunction(obj) and name_of(obj) is None and factory_name(obj) is None:
            return _keras_function(obj, where)
        if isinstance(obj, type) or not callable(getattr(obj, "get_config", None)):
            return _serialize(obj, where)
        return _keras_form(obj, where)


def serialize_by_name(obj: Any, what: str, problem: str, advice: str) -> Any:
    """Make a config from an object that a file can hold by its registered name only.

    Args:
        obj: The object.
        what: The argument that holds it, for errors.
        problem: What it is, as the rest of a sentence.
        advice: What to do.

    Raises:
        TypeError: While Keras writes a file, if it is not registered.
    """
    with one_config() as config:
        where = _Where(what, config)
        if (name := name_of(obj)) is not None:
            return {"kind": "name", "name": name}
        config.lacks(where, problem, advice)
        if config.is_for_file:
            return None
        name = local_name(obj)
        return {"kind": "name", "name": name} if name is not None else _serialize(obj, where)


def serialize_fields(obj: Any, callables: Collection[str] = ()) -> dict[str, Any]:
    """Make a config from the fields of a dataclass, as its `get_config` may return it.

    Args:
        obj: The dataclass.
        callables: The fields that `serialize_callable` writes, with its concessions. `serialize` writes the others.

    Raises:
        TypeError: See `serialize`.
    """

    def write(name: str, value: Any) -> Any:
        return (serialize_callable if name in callables else serialize)(value, name)

    with one_config() as config:
        return _write_fields(fields_of(obj) or {}, write, config)


def _write_fields(
    fields: dict[str, tuple[Any, Any]], write: Callable[[str, Any], Any], config: Config
) -> dict[str, Any]:
    """Write fields, without defaults that have no names: the class makes its own defaults again."""
    written = {}
    for name, (value, default) in fields.items():
        before = len(config.missing)
        try:
            written[name] = write(name, value)
        except TypeError:
            if value is not default:
                raise
        if value is default and len(config.missing) > before:
            del config.missing[before:]
            written.pop(name, None)
    return written


class _Where(NamedTuple):
    """The place of a value: the path from the argument, the config, and the class whose field it is."""

    path: str
    config: Config
    field_of: str = ""

    def item(self, key: str) -> _Where:
        return _Where(f"{self.path}{key}", self.config)

    def field(self, name: str, cls: type) -> _Where:
        return _Where(f"{self.path}.{name}", self.config, cls.__name__)

    def __str__(self) -> str:
        field = f", a field of {self.field_of}," if self.field_of else ""
        return f"`{self.config.expression}{self.path}`{field}"


def _serialize(obj: Any, where: _Where, depth: int = 0) -> Any:
    if depth > MAX_DEPTH:
        raise TypeError(f"cannot be saved: {where} is nested deeper than {MAX_DEPTH}.")
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
    return _unnamed(obj, where, "is not data", _BY_NAME.format("it"))


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
        return _unnamed(obj, where, "is a PRNG key outside of the weights")
    # V is the kind of bfloat16 and float8.
    if obj.dtype.kind not in "biufcV":
        return _unnamed(obj, where, f"is an array of dtype {obj.dtype}")
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
        return _unnamed(obj, where, "is a class that has not been registered", key=obj)
    if inspect.ismethod(obj):
        advice = "Pass a registered function that takes the object as its first argument"
        return _unnamed(obj, where, "is a method that a file cannot name", advice)
    if inspect.isfunction(obj) and (name := factory_name(obj)) is not None:
        return _call(obj, name, where, depth)
    if own_name(obj) == "<lambda>":
        return _unnamed(obj, where, "is a lambda", _LAMBDA)
    # Jitted functions are objects.
    if callable(obj) and own_name(obj):
        return _unnamed(obj, where, "is a function that has not been registered", key=obj)
    return None


def _call(obj: Any, name: str, where: _Where, depth: int) -> Any:
    """Write the call of the factory that made a function, if the same call makes the same function again."""
    factory = find_factory(name)

    def arguments(fn: Callable[..., Any]) -> dict[str, Any]:
        return {
            argument: _serialize(value, where.item(f"({argument}=)"), depth)
            for argument, value in arguments_of_maker(fn, factory).items()
        }

    before = len(where.config.missing)
    first = arguments(obj)
    if where.config.is_for_file and len(where.config.missing) > before:
        return {"kind": "call"}  # the file is not written
    again = factory(**Deserializer(where.path).deserialize_all(first, depth))
    if arguments(again) != first:
        return _unnamed(obj, where, f"is not what `{name}` makes", _BY_NAME.format("it"))
    return {"kind": "call", "name": name, "arguments": first}


def _object(obj: Any, where: _Where, depth: int) -> Any:
    cls = type(obj)
    if callable(getattr(obj, "get_config", None)):
        _class_name(obj, where)
        return _keras_form(obj, where)
    fields = fields_of(obj)
    if fields is None:
        return None
    name = _class_name(obj, where)

    def write(name: str, value: Any) -> Any:
        return _serialize(value, where.field(name, cls), depth)

    written = _write_fields(fields, write, where.config)
    return {"kind": "object", "class": name, "fields": written}


def _keras_form(obj: Any, where: _Where) -> dict[str, Any]:
    """Write an object as Keras does, with the name under which we find its class."""
    with where.config.inside(where.path):
        config: Any = keras.saving.serialize_keras_object(obj)
    name = name_of(type(obj))
    if name is None and not where.config.is_for_file:
        name = local_name(type(obj))
    return config if name is None else {**config, "registered_name": name}


def _keras_function(obj: Any, where: _Where) -> Any:
    """Write a function that is not registered as Keras does."""
    name = obj.__name__
    if keras.saving.get_registered_object(name) is obj:
        return keras.saving.serialize_keras_object(obj)
    if name == "<lambda>":
        # Not `serialize_keras_object`, which needs the source code and warns.
        written: Any = keras.layers.Lambda(obj, name="lambda").get_config()["function"]
        value = list(written["config"].values())
        try:
            json.dumps(value)
        except TypeError:
            return _unnamed(obj, where, "is a lambda that holds objects", _LAMBDA)
        form = {"class_name": "__lambda__", "config": {"value": value}}
        key, condition = None, "`safe_mode=False`, and then a file can run any code"
        remedy = _LAMBDA
    else:
        form: Any = keras.saving.serialize_keras_object(obj)
        key, condition = obj, f"`custom_objects={{{name!r}: {name}}}`"
        remedy = f'Register it: `jaxwrap.register_serializable("my_package")({name})`'
    kind = "a lambda" if key is None else f"the function `{name}`, which has not been registered"
    warning = f"{where} is {kind}, so the file loads only with {condition}. {remedy}."
    where.config.lacks(where, f"is {kind}", remedy, key, warning)
    if where.config.is_for_file:
        return form
    return {**form, "registered_name": local_name(obj)}


def _class_name(obj: Any, where: _Where) -> str:
    cls = type(obj)
    if (name := name_of(cls)) is not None:
        return name
    problem = f"is an object of the class {cls.__name__}, which has not been registered"
    where.config.lacks(where, problem, "", cls)
    return "" if where.config.is_for_file else str(local_name(cls))


def _unnamed(obj: Any, where: _Where, problem: str, advice: str = "", key: Any = None) -> Any:
    """Write an object that only a name can stand for, and that has none."""
    shown = repr(obj)
    problem = f"{problem}: {shown if len(shown) < 200 else f'{shown[:200]}…'}"
    where.config.lacks(where, problem, advice, key)
    name = None if where.config.is_for_file else local_name(obj)
    if name is None and not where.config.is_for_file:
        raise TypeError(f"cannot be copied: {where} {problem}. {advice}".strip())
    return {"kind": "name", "name": name}
