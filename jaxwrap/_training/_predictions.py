"""Functions of labels and predictions, called on tensors in Keras's order."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from jaxwrap._function import PytreeFunction
from jaxwrap._typing import PyTree, Tensor

# The names in the functions of Optax, and those that people use.
_LABELS = frozenset(
    [
        "y_true",
        "label",
        "labels",
        "target",
        "targets",
        "log_targets",
        "ground_truth",
        "truth",
        "gt",
        "expected",
        "actual",
    ]
)
_PREDICTIONS = frozenset(
    [
        "y_pred",
        "y_hat",
        "yhat",
        "pred",
        "preds",
        "predicted",
        "prediction",
        "predictions",
        "logits",
        "log_predictions",
        "predictor_outputs",
        "scores",
        "output",
        "outputs",
    ]
)
# Usually labels, but also a name for anything.
_PERHAPS_LABELS = frozenset(["y", "t"])


class PairFunction:
    """A JAX function of labels and predictions, as a function of tensors in Keras's order.

    The names of the first two arguments say which is which, as those of `optax.losses` do. If they do not, labels come
    first, as in Keras.

    Args:
        fn: The function.

    Raises:
        TypeError: If it is not a function of two arguments.
    """

    def __init__(self, fn: Callable[..., PyTree]):
        swapped = predictions_first(fn)

        def call(pair: PyTree, _: PyTree, __: PyTree) -> tuple[PyTree, PyTree]:
            y_true, y_pred = pair
            return (fn(y_pred, y_true) if swapped else fn(y_true, y_pred)), ()

        self._call = PytreeFunction(call)

    def __call__(self, y_true: PyTree, y_pred: PyTree) -> Tensor:
        """Return the result of the function, as tensors, differentiable in both arguments."""
        return self._call((y_true, y_pred), (), ())[0]


def predictions_first(fn: Any, before: tuple[str, ...] = ()) -> bool:
    """Whether a function takes predictions before labels, by the names of its arguments.

    Args:
        fn: The function.
        before: The arguments that come before these two.

    Raises:
        TypeError: If it is not a function of these arguments, names both alike, or hints at the other order.
    """
    expected = ", ".join([*before, "y_true", "y_pred"])
    advice = f"Pass a function `fn({expected})`; fix other arguments with `functools.partial`."
    if isinstance(fn, type) or not callable(fn):
        raise TypeError(f"expected a function, received {fn!r}. {advice}")
    try:
        signature = inspect.signature(fn)
        signature.bind(*before, None, None)
    except TypeError as error:
        raise TypeError(f"{fn!r} cannot be called so: {error}. {advice}") from None
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [name for name, p in signature.parameters.items() if p.kind in positional]
    first, second = (*names[len(before) :], "", "")[:2]
    for known in (_LABELS, _PREDICTIONS):
        if first in known and second in known:
            raise TypeError(
                f"the arguments of {fn!r} are called {first!r} and {second!r}, which does not say which ones are the "
                f"labels. {advice}"
            )
    if first in _PREDICTIONS or second in _LABELS:
        return True
    # In `lambda p, y: ...` the labels seem to come second, and in Keras they come first. To guess is to swap them.
    if second in _PERHAPS_LABELS and first not in _LABELS:
        raise TypeError(
            f"the arguments of {fn!r} are called {first!r} and {second!r}. If {second!r} is the labels, call the other "
            f"one `y_pred`. If {first!r} is, call it `y_true`. {advice}"
        )
    return False
