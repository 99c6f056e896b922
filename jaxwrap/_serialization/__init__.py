"""Modules, functions and pytrees ⇄ configs: data, and names that loading looks up and never imports."""

from jaxwrap._serialization._names import name_of, register_serializable
from jaxwrap._serialization._nodes import Weight, check_size
from jaxwrap._serialization._reading import deserialize, deserialize_fields
from jaxwrap._serialization._writing import serialize, serialize_callable, serialize_fields

__all__ = [
    "Weight",
    "check_size",
    "deserialize",
    "deserialize_fields",
    "name_of",
    "register_serializable",
    "serialize",
    "serialize_callable",
    "serialize_fields",
]
