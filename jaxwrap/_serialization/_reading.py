"""Configs → modules, functions and pytrees."""

from __future__ import annotations

import base64
import enum
import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import keras
import numpy as np

from jaxwrap._serialization._factories import find_factory
from jaxwrap._serialization._fields import Method, from_fields
from jaxwrap._serialization._local import find_local
from jaxwrap._serialization._loops import check_loops
from jaxwrap._serialization._names import find
from jaxwrap._serialization._nodes import MAX_DEPTH, PLAIN, Total, Weight


def deserialize(config: Any, what: str) -> Any:
    """Make an object from the result of `serialize`. Resolve only registered or allowed names.

    Args:
        config: The result of `serialize`.
        what: The argument that holds it, for errors.

    Raises:
        ValueError: If `serialize` cannot have made the config, or a name is unknown.
    """
    return Deserializer(what).deserialize(config, 0)


def deserialize_fields(cls: type, config: Mapping[str, Any]) -> Any:
    """Make a dataclass from the result of `serialize_fields`.

    Raises:
        TypeError: If the class has no such fields.
        ValueError: See `deserialize`.
    """
    return from_fields(cls, {name: Deserializer(name).field(config[name], 0) for name in config})


class Deserializer:
    """Reads one config. Weights with the same place in it become the same array."""

    def __init__(self, what: str):
        self._what = what
        self._weights: dict[int, tuple[Weight, Any]] = {}
        self._total = Total.of_file()

    def deserialize(self, config: Any, depth: int) -> Any:
        """Read a node, `depth` nodes below the first."""
        if depth > MAX_DEPTH:
            raise self._problem(f"the config is nested deeper than {MAX_DEPTH}")
        if type(config) in PLAIN:
            return config
        if isinstance(config, (list, tuple)):  # Keras may turn lists into tuples
            return [self.deserialize(item, depth + 1) for item in config]
        if not isinstance(config, dict):
            raise self._problem(f"expected JSON; received a {type(config).__name__}")
        if "class_name" in config:
            return self._keras(config)
        kind = config.get("kind")
        read = _KINDS.get(kind) if isinstance(kind, str) else None
        if read is None:
            raise self._problem(f"{kind!r} is not a kind of node")
        try:
            return read(self, config, depth + 1)
        except (KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            raise self._problem(
                f"a node of the kind {kind!r} is malformed: {type(error).__name__}: {error}"
            ) from error

    def field(self, config: Any, depth: int) -> Any:
        """Read the field of an object. Only there, a config may hold a `Method`."""
        if not isinstance(config, dict) or config.get("kind") != "method":
            return self.deserialize(config, depth)
        parts: list[Any] = [config.get(name) for name in Method._fields]
        if [type(part) for part in parts] != [str, str, bool]:
            raise self._problem(f"expected a method; received {config!r}")
        return Method(*parts)

    def deserialize_all(self, configs: dict[str, Any], depth: int) -> dict[str, Any]:
        """Read the values of a dict."""
        return {name: self.deserialize(value, depth) for name, value in configs.items()}

    def _tuple(self, config: dict[str, Any], depth: int) -> Any:
        return tuple(self.deserialize(_list(config["items"]), depth))

    def _weight(self, config: dict[str, Any], depth: int) -> Any:
        fields = {name: config[name] for name in Weight._fields}
        weight = Weight(**{**fields, "shape": _shape(config["shape"])})
        if weight.place not in self._weights:
            # First, since a shape in a file is short however much memory it asks for.
            self._total.add(weight.size)
            self._weights[weight.place] = weight, weight.zeros()
        known, array = self._weights[weight.place]
        if known != weight:
            raise TypeError(f"place {weight.place} holds {known} already")
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

    def _set(self, config: dict[str, Any], depth: int) -> Any:
        items = self.deserialize(_list(config["items"]), depth)
        return frozenset(items) if config.get("frozen") else set(items)

    def _enum(self, config: dict[str, Any], depth: int) -> Any:
        return self._class(config, enum.Enum)[config["member"]]

    def _dtype(self, config: dict[str, Any], depth: int) -> Any:
        return _dtype(config["name"])

    def _array(self, config: dict[str, Any], depth: int) -> Any:
        data = base64.b64decode(config["data"], validate=True)
        array = np.frombuffer(data, _dtype(config["dtype"])).reshape(_shape(config["shape"]))
        # A copy, because `frombuffer` returns a view that is read-only.
        return jnp.asarray(array) if config["library"] == "jax" else array.copy()

    def _partial(self, config: dict[str, Any], depth: int) -> Any:
        fn, args, kwargs = (self.deserialize(config[n], depth) for n in ("fn", "args", "kwargs"))
        check_loops(fn, args, kwargs)
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
        fields = {name: self.field(value, depth) for name, value in config["fields"].items()}
        check_loops(cls, (), fields)
        return from_fields(cls, fields)

    def _class(self, config: dict[str, Any], base: type) -> Any:
        cls = self._find(config["class"])
        if not (isinstance(cls, type) and issubclass(cls, base)):
            raise self._problem(f"{config['class']!r} is not a class of the right kind: {cls!r}")
        return cls

    def _keras(self, config: dict[str, Any]) -> Any:
        """Read Keras's own form, but find its classes and functions by their registered names only."""
        name, inner = config.get("class_name"), config.get("config")
        if name == "__lambda__":
            if (own := find_local(config.get("registered_name"))) is not None:
                return own
            # Keras refuses, unless `safe_mode=False`.
            return keras.saving.deserialize_keras_object(config)
        own = inner if name == "function" else f"{config.get('module')}.{name}"
        names = [n for n in (config.get("registered_name"), own) if n not in ("function", None)]
        found = self._find_any(names)
        if name == "function":
            if not callable(found):
                raise self._problem(f"{own!r} is not a function: {found!r}")
            return found
        if not (isinstance(found, type) and hasattr(found, "from_config")):
            raise self._problem(f"{own!r} is not a class with `from_config`: {found!r}")
        if not isinstance(inner, dict):
            raise self._problem(f"the config of a {name!r} must be a dict; received {inner!r}")
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
        return ValueError(f"cannot be made from this config: in `{self._what}`, {problem}")


_KINDS = {
    read.__name__.removeprefix("_"): read
    for read in (
        Deserializer._tuple,
        Deserializer._weight,
        Deserializer._name,
        Deserializer._dict,
        Deserializer._set,
        Deserializer._enum,
        Deserializer._dtype,
        Deserializer._array,
        Deserializer._partial,
        Deserializer._call,
        Deserializer._object,
    )
}


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
        raise TypeError(f"{name!r} is not a dtype of numbers")
    return dtype
