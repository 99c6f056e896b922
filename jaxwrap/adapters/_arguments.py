"""The arguments of a module: which ones the caller passes, and which one is the train flag."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jaxwrap._layer._signature import call_by_name, find_train_flag
from jaxwrap._typing import PyTree


class ModuleArguments:
    """What a method of a module takes.

    Args:
        parameters: The parameters of the method, without the module.
        training_argument: See `FlaxLayer`.
        own: The names of arguments that the adapter passes, not the caller.

    Attributes:
        signature: The arguments that the caller passes.

    Raises:
        ValueError: If the method does not have the train flag that `training_argument` names.
    """

    def __init__(
        self,
        parameters: Mapping[str, inspect.Parameter],
        training_argument: str | None,
        own: Iterable[str] = (),
    ):
        self._parameters = parameters
        self._flag = find_train_flag(parameters, training_argument)
        skipped = {"training", *own, *([self._flag.name] if self._flag else [])}
        fed = [
            parameter
            for name, parameter in parameters.items()
            if name not in skipped
            and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        ]
        by_position = [p for p in fed if p.kind is not p.KEYWORD_ONLY]
        if not by_position and any(p.kind is p.VAR_POSITIONAL for p in parameters.values()):
            fed.insert(0, inspect.Parameter("inputs", inspect.Parameter.POSITIONAL_ONLY))
        self.signature = inspect.Signature(fed)

    def call(
        self, fn: Callable[..., Any], inputs: Mapping[str, PyTree], training: bool, **own: Any
    ) -> Any:
        """Call the method with what the caller and the adapter pass, and the train flag."""
        if self._flag:
            own[self._flag.name] = self._flag.value(training)
        if "inputs" in inputs and "inputs" not in self._parameters:  # a function of any arguments
            inputs = dict(inputs)
            return fn(inputs.pop("inputs"), **inputs, **own)
        return call_by_name(fn, self._parameters, {**inputs, **own})
