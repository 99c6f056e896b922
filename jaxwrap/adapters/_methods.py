"""The method of a module that a layer calls: by name, bound, or as a function of the module."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, TypeGuard

Method = str | Callable[..., Any] | None


def method_parameters(module: Any, method: Method) -> dict[str, inspect.Parameter]:
    """Return the parameters of a method, without the module."""
    bound = getattr(module, method) if isinstance(method, str) else method or module.__call__
    parameters = dict(inspect.signature(bound).parameters)
    if method is not None and not isinstance(method, str) and not _is_bound(method):
        del parameters[next(iter(parameters))]  # the module
    return parameters


def bind_method(module: Any, method: Method) -> Callable[..., Any]:
    """Return the method of another instance of the module."""
    if _is_bound(method):
        method = method.__func__.__name__
    if isinstance(method, str):
        return getattr(module, method)
    return module if method is None else functools.partial(method, module)


def method_for_config(module: Any, method: Method, library_base: type) -> Method:
    """Return a method as a config has it: a bound method by its name.

    Raises:
        ValueError: If the name is not that of a public function of the module's class.
    """
    if _is_bound(method) and _is_same(method.__self__, module):
        method = method.__func__.__name__
    check_method(module, method, library_base)
    return method


def _is_bound(method: Any) -> TypeGuard[types.MethodType]:
    # Equinox has a class of its own for bound methods.
    return hasattr(method, "__self__") and hasattr(method, "__func__")


def _is_same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    try:
        return bool(one == other)
    except Exception:  # modules that hold arrays may not know
        return False


def check_method(module: Any, method: Any, library_base: type) -> None:
    """Raise ValueError unless a method that a config names is a public function of the module's own class.

    Args:
        module: The module.
        method: The name. Anything else passes.
        library_base: The library's class of all modules, whose own functions a config may not name.
    """
    if not isinstance(method, str):
        return
    # The library's base classes have functions such as `Module.clone`, which a file must not call.
    own = [cls for cls in type(module).__mro__ if not issubclass(library_base, cls)]
    found = next((vars(cls)[method] for cls in own if method in vars(cls)), None)
    # Equinox wraps the functions of a module's class.
    found = getattr(found, "method", found)
    if (method.startswith("_") and method != "__call__") or not inspect.isfunction(found):
        public = [
            name
            for name in dict.fromkeys(name for cls in own for name in vars(cls))
            if not name.startswith("_") and inspect.isfunction(vars(type(module)).get(name))
        ]
        raise ValueError(
            "a config may name as `method` a public function that the class of the module defines; "
            f"{type(module).__name__} has {', '.join([*public, '__call__'])}. Received {method!r}."
        )
