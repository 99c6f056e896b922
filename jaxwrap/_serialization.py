"""Modules, functions and pytrees ⇄ what a config can hold: data, and names that are looked up, never imported."""

from __future__ import annotations

import base64
import dataclasses
import enum
import functools
import inspect
import math
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import keras
import numpy as np

from jaxwrap._names import factory_name, find, find_factory, name_of

# Data that JSON holds as it is. Of all else, "kind" says what it is, or "class_name", in Keras's own way.
_PLAIN = (bool, int, float, str, type(None))
_MAX_DEPTH = 100
_REGISTER = 'Register it: `jaxwrap.register_serializable("my_package")({})`'


class Weight(NamedTuple):
    """Stands for an array whose value is saved with the weights.

    Attributes:
        shape: Its shape.
        dtype: The name of its dtype; of a PRNG key, that of the key data.
        impl: The implementation of a PRNG key, or None.
        place: Which array it is: those of the same place are the same array.
        is_numpy: Whether it is an array of NumPy, and not of JAX.
    """

    shape: tuple[int, ...]
    dtype: str
    impl: str | None
    place: int
    is_numpy: bool = False

    def zeros(self) -> Any:
        """An array like it."""
        if self.impl is not None:
            return jax.random.wrap_key_data(jnp.zeros(self.shape, self.dtype), impl=self.impl)
        return (np if self.is_numpy else jnp).zeros(self.shape, self.dtype)

    @property
    def size(self) -> int:
        """How many bytes it takes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


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


def deserialize(config: Any, what: str, owner: str) -> Any:
    """The inverse of `serialize`. Resolves only names that are registered, or that `_names` lists.

    Args:
        config: What `serialize` returned.
        what: What it is to its owner, for errors.
        owner: What errors begin with.

    Raises:
        ValueError: For a config that `serialize` cannot have made, or a name that is not known.
    """
    return _Deserializer(what, owner).deserialize(config, 0)


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
        if depth > _MAX_DEPTH:
            raise self._problem(obj, where, f"is nested deeper than {_MAX_DEPTH}")
        if type(obj) in _PLAIN:
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
            made = factory(**_Deserializer(where.path, self._owner).deserialize_all(given, depth))
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
        fields = _fields(obj)
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


class _Deserializer:
    def __init__(self, what: str, owner: str):
        self._what = what
        self._owner = owner
        self._weights: dict[int, tuple[Weight, Any]] = {}

    def deserialize(self, config: Any, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise self._problem(f"it is nested deeper than {_MAX_DEPTH}")
        if type(config) in _PLAIN:
            return config
        if isinstance(config, (list, tuple)):  # Keras may have made tuples of lists
            return [self.deserialize(item, depth + 1) for item in config]
        if not isinstance(config, dict):
            raise self._problem(f"a {type(config).__name__} stands in it")
        if "class_name" in config:
            return self._keras(config)
        kind = config.get("kind")
        make = getattr(self, f"_{kind}", None) if kind in _KINDS else None
        if make is None:
            raise self._problem(f"it holds a dict of the kind {kind!r}")
        try:
            return make(config, depth + 1)
        except (KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            raise self._problem(
                f"what it says of a {kind} makes none: {type(error).__name__}: {error}"
            ) from error

    def deserialize_all(self, configs: dict[str, Any], depth: int) -> dict[str, Any]:
        return {name: self.deserialize(value, depth) for name, value in configs.items()}

    def _tuple(self, config: dict[str, Any], depth: int) -> Any:
        return tuple(self.deserialize(_list(config["items"]), depth))

    def _weight(self, config: dict[str, Any], depth: int) -> Any:
        fields = {name: config[name] for name in Weight._fields}
        weight = Weight(**{**fields, "shape": _shape(config["shape"])})
        check_size(weight.size, self._owner)
        known, array = self._weights.get(weight.place) or (weight, weight.zeros())
        if known != weight:
            raise TypeError(f"place {weight.place} is taken by {known}")
        self._weights[weight.place] = known, array
        return array

    def _name(self, config: dict[str, Any], depth: int) -> Any:
        return self._find(config["name"])

    def _dict(self, config: dict[str, Any], depth: int) -> Any:
        pairs = [
            (self.deserialize(key, depth), self.deserialize(value, depth))
            for key, value in _list(config["items"])
        ]
        if "class" not in config:
            return dict(pairs)
        return self._class(config, Mapping)(pairs)

    def _enum(self, config: dict[str, Any], depth: int) -> Any:
        return self._class(config, enum.Enum)[config["member"]]

    def _dtype(self, config: dict[str, Any], depth: int) -> Any:
        return _dtype(config["name"])

    def _array(self, config: dict[str, Any], depth: int) -> Any:
        data = base64.b64decode(config["data"], validate=True)
        array = np.frombuffer(data, _dtype(config["dtype"])).reshape(_shape(config["shape"]))
        return jnp.asarray(array) if config["library"] == "jax" else array.copy()

    def _partial(self, config: dict[str, Any], depth: int) -> Any:
        fn, args, kwargs = (self.deserialize(config[n], depth) for n in ("fn", "args", "kwargs"))
        return functools.partial(fn, *args, **kwargs)

    def _call(self, config: dict[str, Any], depth: int) -> Any:
        arguments = self.deserialize_all(config["arguments"], depth)
        try:
            factory = find_factory(config["name"])
        except ValueError as error:
            raise self._problem(str(error)) from None
        return factory(**arguments)

    def _object(self, config: dict[str, Any], depth: int) -> Any:
        cls = self._class(config, object)
        return _from_fields(cls, self.deserialize_all(config["fields"], depth))

    def _class(self, config: dict[str, Any], base: type) -> Any:
        cls = self._find(config["class"])
        if not (isinstance(cls, type) and issubclass(cls, base)):
            raise self._problem(f"{config['class']!r} is no class of the right kind: {cls!r}")
        return cls

    def _keras(self, config: dict[str, Any]) -> Any:
        """Functions and objects as Keras saves them; but found by their registered names only."""
        name, inner = config.get("class_name"), config.get("config")
        if name == "__lambda__":
            return keras.saving.deserialize_keras_object(config)  # which asks for `safe_mode=False`
        own = inner if name == "function" else f"{config.get('module')}.{name}"
        names = [n for n in (config.get("registered_name"), own) if n not in ("function", None)]
        found = self._find_any(names)
        if name == "function":
            if not callable(found):
                raise self._problem(f"{own!r} is no function: {found!r}")
            return found
        if not (isinstance(found, type) and hasattr(found, "from_config")):
            raise self._problem(f"{own!r} is no class with `from_config`: {found!r}")
        if not isinstance(inner, dict):
            raise self._problem(f"the config of a {name!r} is no dict: {inner!r}")
        return found.from_config(inner)

    def _find_any(self, names: list[Any]) -> Any:
        for name in names[:-1]:
            try:
                return find(name)
            except ValueError:
                continue
        return self._find(names[-1] if names else None)

    def _find(self, name: Any) -> Any:
        try:
            return find(name)
        except ValueError as error:
            raise self._problem(str(error)) from None

    def _problem(self, problem: str) -> ValueError:
        return ValueError(
            f"{self._owner} cannot be made from this config: in `{self._what}`, {problem}"
        )


_KINDS = tuple(
    name.removeprefix("_")
    for name in (
        *("_tuple", "_weight", "_name", "_dict", "_enum", "_dtype"),
        *("_array", "_partial", "_call", "_object"),
    )
)


def check_size(size: int, owner: str) -> None:
    """Raises ValueError if that many bytes do not fit into memory: better than to fill it and be killed."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        raise ValueError(
            f"{owner}: this config asks for arrays of {size:,} bytes; the machine has {memory:,} bytes of memory."
        )


def _arguments_of_maker(fn: Callable[..., Any], factory: Callable[..., Any]) -> dict[str, Any]:
    """The arguments with which a factory has made a function: what it closes over, and its defaults."""
    cells = dict(
        zip(fn.__code__.co_freevars, (c.cell_contents for c in fn.__closure__ or ()), strict=True)
    )
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(fn, follow_wrapped=False).parameters.items()
        if parameter.default is not parameter.empty
    }
    known = {**defaults, **cells}
    return {name: known[name] for name in inspect.signature(factory).parameters if name in known}


def _fields(obj: Any) -> dict[str, tuple[Any, Any]] | None:
    """The fields of an object from which it can be made again, with their defaults; None if it has no fields."""
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
    return {
        field.name: (getattr(obj, field.name), field.default)
        for field in dataclasses.fields(obj)
        # What a Linen module stands in is not the module's own.
        if field.init and not (_is_linen(cls) and field.name == "parent")
    }


def _from_fields(cls: type, fields: dict[str, Any]) -> Any:
    """The inverse of `_fields`."""
    if issubclass(cls, tuple) and hasattr(cls, "_fields"):
        return cls(**fields)
    if not dataclasses.is_dataclass(cls):
        raise TypeError(f"{cls.__name__} is neither a dataclass nor a namedtuple")
    if not _is_equinox(cls):
        return cls(**fields)
    # The constructor of an Equinox module takes other things than its fields.
    known = {field.name for field in dataclasses.fields(cls)}
    if unknown := set(fields) - known:
        raise TypeError(f"{cls.__name__} has no fields {sorted(unknown)}")
    module = object.__new__(cls)
    for name, value in {**_constructor_defaults(cls), **fields}.items():
        if name in known:
            object.__setattr__(module, name, value)
    return module


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
    base = getattr(sys.modules.get(library), name, None)
    return base is not None and issubclass(cls, base)


def _list(value: Any) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"expected a list; received {value!r}")
    return list(value)


def _shape(value: Any) -> tuple[int, ...]:
    if not all(type(size) is int and size >= 0 for size in _list(value)):
        raise TypeError(f"expected a shape; received {value!r}")
    return tuple(value)


def _dtype(name: Any) -> np.dtype:
    if not isinstance(name, str):
        raise TypeError(f"expected the name of a dtype; received {name!r}")
    dtype = jnp.dtype(name)
    if dtype.hasobject:
        raise TypeError(f"{name!r} is no dtype of numbers")
    return dtype
