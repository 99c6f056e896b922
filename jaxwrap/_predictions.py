"""Functions of labels and predictions: which argument is which, and how they are called on tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from jaxwrap._function import PytreeFunction
from jaxwrap._typing import PyTree, Tensor

# What the functions of Optax, and of others, call them.
_LABELS = frozenset(["y_true", "label", "labels", "target", "targets", "log_targets"])
_PREDICTIONS = frozenset(
    [
        "y_pred",
        "prediction",
        "predictions",
        "logits",
        "log_predictions",
        "predictor_outputs",
        "scores",
    ]
)


class PairFunction:
    """A JAX function of labels and predictions, as a function of tensors in Keras's order.

    The first two arguments go by name where they have names that say which is which, as those of `optax.losses` have;
    else they come in Keras's order, labels first.

    Args:
        fn: The function.
        owner: What errors begin with.

    Raises:
        TypeError: If it is no function, or does not take two arguments.
    """

    def __init__(self, fn: Callable[..., PyTree], owner: str):
        swapped = predictions_first(fn, owner)

        def call(given: PyTree, _: PyTree, __: PyTree) -> tuple[PyTree, PyTree]:
            y_true, y_pred = given
            return (fn(y_pred, y_true) if swapped else fn(y_true, y_pred)), ()

        self._call = PytreeFunction(call, owner)

    def __call__(self, y_true: PyTree, y_pred: PyTree) -> Tensor:
        """What the function returns, as tensors, differentiable in both arguments."""
        return self._call((y_true, y_pred), (), ())[0]


def predictions_first(fn: Any, owner: str, before: tuple[str, ...] = ()) -> bool:
    """Whether a function takes predictions before labels, by the names of its arguments.

    Args:
        fn: The function.
        owner: What errors begin with.
        before: The arguments that come before these two.

    Raises:
        TypeError: If it is no function, does not take these arguments, or names both alike.
    """
    expected = ", ".join([*before, "y_true", "y_pred"])
    advice = f"Pass a function `fn({expected})`; fix other arguments with `functools.partial`."
    if isinstance(fn, type) or not callable(fn):
        raise TypeError(f"{owner}: expected a function, received {fn!r}. {advice}")
    try:
        signature = inspect.signature(fn)
        signature.bind(*before, None, None)
    except TypeError as error:
        raise TypeError(f"{owner}: {fn!r} cannot be called so: {error}. {advice}") from None
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [name for name, p in signature.parameters.items() if p.kind in positional]
    first, second = (*names[len(before) :], "", "")[:2]
    for known in (_LABELS, _PREDICTIONS):
        if first in known and second in known:
            raise TypeError(
                f"{owner}: the arguments of {fn!r} are called {first!r} and {second!r}, so it cannot be told which are "
                f"the labels. {advice}"
            )
    return first in _PREDICTIONS or second in _LABELS
