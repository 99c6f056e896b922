"""Modules, functions and pytrees ⇄ configs: data, and names that loading looks up and never imports."""

from jaxwrap._serialization._missing import one_config
from jaxwrap._serialization._names import name_of, registered_objects
from jaxwrap._serialization._nodes import Weight, check_size
from jaxwrap._serialization._reading import deserialize, deserialize_fields
from jaxwrap._serialization._registering import register_serializable
from jaxwrap._serialization._writing import (
    serialize,
    serialize_by_name,
    serialize_callable,
    serialize_fields,
)

__all__ = [
    "Weight",
    "check_size",
    "deserialize",
    "deserialize_fields",
    "name_of",
    "one_config",
    "register_serializable",
    "registered_objects",
    "serialize",
    "serialize_by_name",
    "serialize_callable",
    "serialize_fields",
]
