"""The arguments of functions: which are allowed, which one is the train flag, and calls by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from jaxwrap._typing import PyTree

AUTO = "auto"

_VARIADIC = {
    inspect.Parameter.VAR_POSITIONAL: "*",
    inspect.Parameter.VAR_KEYWORD: "**",
}
# The usual names of the train flag. Those with "!" are True in inference.
_TRAIN_FLAGS = (
    "training",
    "train",
    "is_training",
    "!deterministic",
    "!inference",
    "!use_running_average",
    "update_stats",
)


class TrainFlag(NamedTuple):
    """The argument of a function that is True in training, or in inference.

    Attributes:
        name: Its name.
        inverted: Whether it is True in inference.
    """

    name: str
    inverted: bool

    def value(self, training: bool) -> bool:
        """Return the value of the argument."""
        return training is not self.inverted


def find_train_flag(names: Collection[str], argument: str | None) -> TrainFlag | None:
    """Find the train flag among a function's arguments.

    Args:
        names: The function's arguments.
        argument: "auto" to look for the usual names, or a name, after "!" if it is inverted, or None for no flag.

    Raises:
        ValueError: If the function has no argument of that name.
    """
    if argument is None:
        return None
    # The first usual name that the function has, in the order of the list.
    if argument == AUTO:
        usual = (flag for flag in _TRAIN_FLAGS if flag.removeprefix("!") in names)
        if (argument := next(usual, None)) is None:
            return None
    name = argument.removeprefix("!")
    if name not in names:
        raise ValueError(
            f"`training_argument` is {argument!r}, but the function that is called has no argument "
            f"`{name}`; it has {listed(names)}. Name one of these, or pass None."
        )
    return TrainFlag(name, argument.startswith("!"))


class Signature:
    """The arguments that a function takes, by name.

    Attributes:
        names: The names, in the order of the function's signature.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        role: str,
        allowed: Collection[str],
        required: Collection[str],
    ):
        """Read and check the signature of `fn`.

        Args:
            fn: The function.
            role: The name of the function in errors: "call_fn".
            allowed: The names it may use.
            required: The names it must use.

        Raises:
            TypeError: If `fn` is not callable.
            ValueError: If an argument is missing, unknown or variadic.
        """
        parameters = parameters_of(fn, role)
        called = f"`{role}` ({getattr(fn, '__qualname__', None) or repr(fn)})"
        for parameter in parameters.values():
            if parameter.kind in _VARIADIC:
                stars = _VARIADIC[parameter.kind]
                raise ValueError(
                    f"unsupported argument in {called}: `{stars}{parameter.name}`. Arguments are passed by "
                    f"name, so write out those that it takes of {listed(allowed)}; wrap it in a function that does."
                )
            if parameter.name not in allowed:
                raise ValueError(
                    f"unsupported argument in {called}: `{parameter.name}`. Supported arguments are "
                    f"{listed(allowed)}. `call_arguments` names what the caller passes."
                )
        for name in required:
            if name not in parameters:
                raise ValueError(
                    f"missing required argument in {called}: `{name}`. It has {listed(parameters)}."
                )
        self._parameters = parameters
        self.names = tuple(parameters)

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def call(self, fn: Callable[..., Any], values: Mapping[str, Any]) -> Any:
        """Call `fn` with those of `values` that it takes."""
        return call_by_name(fn, self._parameters, values)


def parameters_of(fn: Callable[..., Any], role: str) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a function.

    Raises:
        TypeError: If `fn` is not callable.
    """
    if not callable(fn):
        raise TypeError(f"`{role}` must be a function; received {fn!r}.")
    return inspect.signature(fn).parameters


def call_by_name(
    fn: Callable[..., Any],
    parameters: Mapping[str, inspect.Parameter],
    values: Mapping[str, PyTree],
) -> Any:
    """Call `fn` with those of `values` that its parameters name, by position where it must be."""
    positional = []
    keywords = {}
    for name, parameter in parameters.items():
        if name not in values:
            continue
        if parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
            positional.append(values[name])
        else:
            keywords[name] = values[name]
    return fn(*positional, **keywords)


def call_by_position(
    fn: Callable[..., Any],
    parameters: Mapping[str, inspect.Parameter],
    values: Mapping[str, PyTree],
) -> Any:
    """Call `fn` with `values` by position as far as possible: its names may be taken by what calls it."""
    positional, keywords, has_gap = [], {}, False
    for name, parameter in parameters.items():
        if name not in values:
            has_gap = True
        elif parameter.kind is parameter.KEYWORD_ONLY or has_gap:
            keywords[name] = values[name]
        else:
            positional.append(values[name])
    return fn(*positional, **keywords)


def listed(names: Collection[str]) -> str:
    """List names in an error."""
    return ", ".join(f"`{name}`" for name in names) or "no arguments"
