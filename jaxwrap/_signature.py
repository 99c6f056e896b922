"""Which argument of a function gets what."""

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
# What the field calls the argument that says whether a call is one of training; those marked say the opposite.
_TRAIN_FLAGS = (
    "training",
    "train",
    "is_training",
    "!deterministic",
    "!inference",
    "!use_running_average",
)


# What an argument may be, in the words of errors.
_TYPES: dict[str, Callable[[Any], bool]] = {
    "a bool": lambda value: isinstance(value, bool),
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


def check_types(owner: str, **arguments: tuple[Any, str]) -> None:
    """Raises ValueError for the first of a constructor's arguments that is not what it must be.

    Args:
        owner: What errors begin with.
        **arguments: For each name, the value and what it must be.
    """
    for name, (value, expected) in arguments.items():
        if not _TYPES[expected](value):
            raise ValueError(f"{owner}: `{name}` must be {expected}; received {value!r}.")


def _are_names(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and all(isinstance(name, str) for name in value)


class TrainFlag(NamedTuple):
    """The argument of a function that says whether a call is one of training.

    Attributes:
        name: Its name.
        inverted: Whether it is True in inference.
    """

    name: str
    inverted: bool

    def value(self, training: bool) -> bool:
        """What the argument gets."""
        return training is not self.inverted


def find_train_flag(names: Collection[str], argument: str | None, owner: str) -> TrainFlag | None:
    """Which of a function's arguments is the train flag.

    Args:
        names: The function's arguments.
        argument: "auto" to look for the usual names; a name, after "!" if it is inverted; None for no flag.
        owner: What errors begin with.

    Raises:
        ValueError: If the function has no argument of the name given.
    """
    if argument is None:
        return None
    if argument == AUTO:
        usual = (flag for flag in _TRAIN_FLAGS if flag.removeprefix("!") in names)
        if (argument := next(usual, None)) is None:
            return None
    name = argument.removeprefix("!")
    if name not in names:
        raise ValueError(
            f"{owner}: `training_argument` is {argument!r}, but the function that is called has no argument "
            f"`{name}`; it has {listed(names)}. Name one of these, or pass None."
        )
    return TrainFlag(name, argument.startswith("!"))


class Signature:
    """The arguments that a function asks for, by name.

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
        parameters = parameters_of(fn, role, owner)
        called = f"`{role}` ({getattr(fn, '__qualname__', None) or repr(fn)})"
        for parameter in parameters.values():
            if parameter.kind in _VARIADIC:
                stars = _VARIADIC[parameter.kind]
                raise ValueError(
                    f"{owner}: unsupported argument in {called}: `{stars}{parameter.name}`. Arguments are passed by "
                    f"name, so write out those that it takes of {listed(allowed)}; wrap it in a function that does."
                )
            if parameter.name not in allowed:
                raise ValueError(
                    f"{owner}: unsupported argument in {called}: `{parameter.name}`. Supported arguments are "
                    f"{listed(allowed)}; what the caller feeds is named with `call_arguments`."
                )
        for name in required:
            if name not in parameters:
                raise ValueError(
                    f"{owner}: missing required argument in {called}: `{name}`. It has {listed(parameters)}."
                )
        self._parameters = parameters
        self.names = tuple(parameters)

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def call(self, fn: Callable[..., Any], values: Mapping[str, Any]) -> Any:
        """Calls `fn` with those of `values` that it asks for."""
        return call_by_name(fn, self._parameters, values)


def parameters_of(fn: Callable[..., Any], role: str, owner: str) -> Mapping[str, inspect.Parameter]:
    """The parameters of a function.

    Raises:
        TypeError: If `fn` is not callable.
    """
    if not callable(fn):
        raise TypeError(f"{owner}: `{role}` must be a function; received {fn!r}.")
    return inspect.signature(fn).parameters


def call_by_name(
    fn: Callable[..., Any],
    parameters: Mapping[str, inspect.Parameter],
    values: Mapping[str, PyTree],
) -> Any:
    """Calls `fn` with those of `values` that its parameters name, each in the way its kind asks for."""
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


def listed(names: Collection[str]) -> str:
    """Names as an error lists them."""
    return ", ".join(f"`{name}`" for name in names) or "no arguments"
