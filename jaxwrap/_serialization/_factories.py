"""Closures that a library's factory returned, such as initializers: a file holds the call of the factory."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable
from typing import Any

from jaxwrap._serialization._allowed import FACTORIES
from jaxwrap._serialization._names import load


def factory_name(obj: Any) -> str | None:
    """Return the name of the allowed factory that made a function, or None."""
    code = getattr(getattr(obj, "__code__", None), "co_qualname", "")
    maker, _, inner = code.partition(".<locals>.")
    if not inner:
        return None
    for full, (module, name) in FACTORIES.items():
        factory = getattr(sys.modules.get(module), name, None)
        # A function of the user may have the same qualified name, but not the same globals.
        if name == maker and getattr(factory, "__globals__", None) is obj.__globals__:
            return full
    return None


def find_factory(name: Any) -> Callable[..., Any]:
    """Return the factory with this name.

    Raises:
        ValueError: If a file may not name it.
    """
    if isinstance(name, str) and name in FACTORIES:
        return load(*FACTORIES[name])
    raise ValueError(
        f"a file may not call the factory {name!r}. The allowed ones are {', '.join(FACTORIES)}."
    )


def arguments_of_maker(fn: Callable[..., Any], factory: Callable[..., Any]) -> dict[str, Any]:
    """Recover the arguments with which a factory made a function, from its closure and its defaults."""
    cells = {}
    for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # a variable that the factory has not set
            cells[name] = cell.cell_contents
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(fn, follow_wrapped=False).parameters.items()
        if parameter.default is not parameter.empty
    }
    known = {**defaults, **cells}
    return {name: known[name] for name in inspect.signature(factory).parameters if name in known}
