"""Configs → modules, functions and pytrees."""

from __future__ import annotations

import base64
import enum
import functools
import os
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import keras
import numpy as np

from jaxwrap._serialization._names import find, find_factory
from jaxwrap._serialization._nodes import MAX_DEPTH, PLAIN, Weight, from_fields


def deserialize(config: Any, what: str, owner: str) -> Any:
    """The inverse of `serialize`. Resolves only names that are registered, or that `_names` lists.

    Args:
        config: What `serialize` returned.
        what: What it is to its owner, for errors.
        owner: What errors begin with.

    Raises:
        ValueError: For a config that `serialize` cannot have made, or a name that is not known.
    """
    return Deserializer(what, owner).deserialize(config, 0)


class Deserializer:
    def __init__(self, what: str, owner: str):
        self._what = what
        self._owner = owner
        self._weights: dict[int, tuple[Weight, Any]] = {}

    def deserialize(self, config: Any, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise self._problem(f"it is nested deeper than {MAX_DEPTH}")
        if type(config) in PLAIN:
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
        return from_fields(cls, self.deserialize_all(config["fields"], depth))

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
