"""How optimizers, losses and metrics are printed: names of functions, and numbers in variables."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import keras

from jaxwrap._bridge import get_bridge
from jaxwrap._weights._variables import read


def name_of(obj: Any) -> str:
    """Return the name by which users import a function, or the class of another object."""
    while isinstance(obj, functools.partial):
        obj = obj.func
    named = obj if hasattr(obj, "__qualname__") else type(obj)
    module = getattr(named, "__module__", None) or "__main__"
    modules = list(itertools.takewhile(lambda part: part[0] != "_", module.split(".")))
    scopes = named.__qualname__.split(".<locals>.")
    # The schedules of Optax are closures, all of them called `schedule` or alike.
    name = scopes[0 if modules[:1] == ["optax"] else -1]
    return name if name == "<lambda>" else ".".join([*modules, name])


def number_in(variable: keras.Variable, form: str) -> str:
    """Return the number in a variable, or "unknown" where it cannot be read."""
    try:
        with get_bridge().lifted():
            number = read(variable.value).item()
    except (TypeError, RuntimeError):  # a tracer of JAX, or a buffer that was donated
        return "unknown"
    return format(number, form)
