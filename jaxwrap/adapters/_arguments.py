"""The arguments of a module: which ones the caller passes, and which one is the train flag."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from jaxwrap._layer._signature import call_by_name, call_by_position, find_train_flag
from jaxwrap._typing import PyTree


def select_output(outputs: PyTree, output: str | int | None) -> PyTree:
    """Pick one of the outputs of a module, by attribute, key or index. None picks all.

    Raises:
        ValueError: If there is no such output.
    """
    if output is None:
        return outputs
    if isinstance(output, str) and hasattr(outputs, output):
        return getattr(outputs, output)
    try:
        return outputs[output]
    except (KeyError, IndexError, TypeError):
        names = [jax.tree_util.keystr(path[:1], simple=True) for path, _ in _paths(outputs)]
        raise ValueError(
            f"the module returns a {type(outputs).__name__}, which does not have `output={output!r}`. It has "
            f"{', '.join(dict.fromkeys(names)) or 'one output'}."
        ) from None


def _paths(tree: PyTree) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree)[0]


class ModuleArguments:
    """What a method of a module takes.

    Args:
        parameters: The parameters of the method, without the module.
        training_argument: See `FlaxLayer`.
        own: The names of arguments that the adapter passes, not the caller.
        by_position: Whether to pass arguments by position, since the library has arguments of the same names.

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
        by_position: bool = False,
    ):
        self._parameters = parameters
        self._call = call_by_position if by_position else call_by_name
        self._flag = find_train_flag(parameters, training_argument)
        skipped = {"training", *own, *([self._flag.name] if self._flag else [])}
        fed = [
            parameter
            for name, parameter in parameters.items()
            if name not in skipped
            and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        ]
        # A function of `*args` does not tell how many it takes, so the layer takes one.
        positional = [p for p in fed if p.kind is not p.KEYWORD_ONLY]
        if not positional and any(p.kind is p.VAR_POSITIONAL for p in parameters.values()):
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
        return self._call(fn, self._parameters, {**inputs, **own})
