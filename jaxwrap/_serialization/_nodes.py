"""What both directions know: weights that a config stands for, and the fields of objects."""

from __future__ import annotations

import dataclasses
import inspect
import math
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Data that JSON holds as it is. Of all else, "kind" says what it is, or "class_name", in Keras's own way.
PLAIN = (bool, int, float, str, type(None))
MAX_DEPTH = 100


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


def fields_of(obj: Any) -> dict[str, tuple[Any, Any]] | None:
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


def from_fields(cls: type, fields: dict[str, Any]) -> Any:
    """The inverse of `fields_of`."""
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
