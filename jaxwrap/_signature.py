"""Which argument of a function gets what."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

_VARIADIC = {
    inspect.Parameter.VAR_POSITIONAL: "*",
    inspect.Parameter.VAR_KEYWORD: "**",
}


class Signature:
    """The arguments that a function asks for, by name, in its own order.

    Attributes:
        names: The names, in the order of the function's signature.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        role: str,
        allowed: Collection[str],
        required: Collection[str],
        owner: str,
    ):
        """Reads and checks the signature of `fn`.

        Args:
            fn: The function.
            role: What the function is to its owner: "call_fn", say.
            allowed: The names it may use.
            required: The names it must use.
            owner: What errors begin with.

        Raises:
            TypeError: If `fn` is not callable.
            ValueError: If an argument is missing, unknown or variadic.
        """
        if not callable(fn):
            raise TypeError(f"{owner}: `{role}` must be a function; received {fn!r}.")
        parameters = inspect.signature(fn).parameters
        called = f"`{role}` ({getattr(fn, '__qualname__', repr(fn))})"
        listed = ", ".join(f"`{name}`" for name in allowed)
        for parameter in parameters.values():
            if parameter.kind in _VARIADIC:
                stars = _VARIADIC[parameter.kind]
                raise ValueError(
                    f"{owner}: unsupported argument in {called}: `{stars}{parameter.name}`. Arguments are passed by "
                    f"name, so write out those that it takes of {listed}; wrap it in a function that does."
                )
            if parameter.name not in allowed:
                raise ValueError(
                    f"{owner}: unsupported argument in {called}: `{parameter.name}`. Supported arguments are {listed}."
                )
        for name in required:
            if name not in parameters:
                raise ValueError(
                    f"{owner}: missing required argument in {called}: `{name}`. It has "
                    f"{', '.join(f'`{name}`' for name in parameters) or 'no arguments'}."
                )
        self.names = tuple(parameters)
        self._positional = tuple(
            name
            for name, parameter in parameters.items()
            if parameter.kind is not inspect.Parameter.KEYWORD_ONLY
        )
        self._keywords = tuple(name for name in self.names if name not in self._positional)

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def call(self, fn: Callable[..., Any], values: Mapping[str, Any]) -> Any:
        """Calls `fn` with those of `values` that it asks for."""
        return fn(
            *(values[name] for name in self._positional),
            **{name: values[name] for name in self._keywords},
        )
