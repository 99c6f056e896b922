"""Who an error is about: functions raise plain errors, and the door of a layer puts the layer's name in front, once.

A door is a public method of a layer, an optimizer, a loss or a metric, or a public function. Errors that the user's
own functions raise, or JAX, pass as they are.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar

_Method = TypeVar("_Method", bound=Callable[..., Any])

_KINDS = (ValueError, TypeError, ImportError, NotImplementedError, RuntimeError)
_NAMED = "_jaxwrap_named"

# The checks of arguments, by the words for them in errors.
_TYPES: dict[str, Callable[[Any], bool]] = {
    "a bool": lambda value: isinstance(value, bool),
    "a bool or None": lambda value: isinstance(value, (bool, type(None))),
    "an integer or None": lambda value: value is None or isinstance(value, int),
    "a name or None": lambda value: value is None or isinstance(value, str),
    "names, with integers or None for seeds, or None": lambda value: (
        value is None
        or _are_names(value)
        or (
            isinstance(value, Mapping)
            and _are_names(list(value))
            and all(seed is None or isinstance(seed, int) for seed in value.values())
        )
    ),
    "a tuple of names": lambda value: _are_names(value),
    "a tuple of names or None": lambda value: value is None or _are_names(value),
}


def describe(obj: Any, name: str | None = None) -> str:
    """Return the class and the name of a layer, an optimizer, a loss or a metric, as errors begin."""
    name = name or getattr(obj, "name", None)
    return f"{type(obj).__name__} {name!r}" if name else type(obj).__name__


def door(method: _Method) -> _Method:
    """Decorate a method: errors that our code raises inside it name the object."""

    @functools.wraps(method)
    def named(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Not `with naming(...)`: a context manager costs more than `try` at each call.
        try:
            return method(self, *args, **kwargs)
        except _KINDS as error:
            raise_named(error, describe(self))

    return named  # type: ignore[return-value]


@contextlib.contextmanager
def naming(owner: str) -> Iterator[None]:
    """Put `owner` in front of errors that our code raises in this scope."""
    try:
        yield
    except _KINDS as error:
        raise_named(error, owner)


def raise_named(error: Exception, owner: str) -> NoReturn:
    """Raise an error again, with `owner` in front if our code raised it and no inner door has named it."""
    if not is_ours(error) or hasattr(error, _NAMED):
        raise error
    # Our own errors take a message alone. JAX's errors of tracers do not, and have passed above.
    named = type(error)(f"{owner}: {error}")
    setattr(named, _NAMED, True)
    raise named.with_traceback(error.__traceback__) from error.__cause__


def is_ours(error: Exception) -> bool:
    """Whether the statement that raised the error is in this package."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    # Keras raises errors again, with the arguments of the call in the message.
    if trace is None or hasattr(error, "_keras_call_info_injected"):
        return False
    return trace.tb_frame.f_globals.get("__name__", "").partition(".")[0] == "jaxwrap"


def check_types(**arguments: tuple[Any, str]) -> None:
    """Raise ValueError for the first argument of a constructor that is of a wrong type.

    Args:
        **arguments: For each name, the value and what it must be.
    """
    for name, (value, expected) in arguments.items():
        if not _TYPES[expected](value):
            raise ValueError(f"`{name}` must be {expected}; received {value!r}.")


def _are_names(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and all(isinstance(name, str) for name in value)
