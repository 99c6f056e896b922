"""Modules, functions and pytrees ⇄ what a config can hold: data, and names that are looked up, never imported."""

from jaxwrap._serialization._names import name_of, register_serializable
from jaxwrap._serialization._nodes import Weight
from jaxwrap._serialization._reading import check_size, deserialize
from jaxwrap._serialization._writing import serialize, serialize_callable

__all__ = [
    "Weight",
    "check_size",
    "deserialize",
    "name_of",
    "register_serializable",
    "serialize",
    "serialize_callable",
]
