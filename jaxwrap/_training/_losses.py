"""`JaxLoss`."""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from typing import Any

import jax
import keras

from jaxwrap._errors import describe, door, naming
from jaxwrap._serialization import deserialize, one_config, serialize_callable
from jaxwrap._training._predictions import PairFunction
from jaxwrap._training._printing import name_of
from jaxwrap._typing import PyTree, Tensor

# The loss that is being called, and its labels. Each thread has its own.
_LABELS: contextvars.ContextVar[tuple[Any, PyTree]] = contextvars.ContextVar(
    "labels", default=(None, None)
)


@keras.saving.register_keras_serializable(package="jaxwrap")
class JaxLoss(keras.losses.Loss):
    """A pure JAX function as a Keras loss, on every backend.

    Sample weights, masks and reductions work as for every Keras loss. Gradients are those of the function.

    Args:
        fn: A function of labels and predictions that returns the loss of each example, as an array whose first axes are
            those of the examples. Its first two arguments go by name: `labels`, `targets` or `y_true` are the labels,
            and `logits`, `predictions`, `scores` or `y_pred` the predictions, as in `optax.losses`. If the names do not
            say, labels come first, as in Keras. Fix other arguments by `functools.partial`. Labels and predictions may
            be nested. Where the function returns a number for each number of the predictions, as
            `optax.losses.squared_error` does, the last axis is averaged, as by Keras's losses.
        reduction: As in Keras: `"sum_over_batch_size"`, `"sum"`, `"mean"`, `"mean_with_sample_weight"`, or None.
        name: The name of the loss.
        dtype: The dtype to compute in. By default `keras.config.floatx()`. Predictions and float labels are cast to it.
            Integer labels reach the function as they are.

    Raises:
        TypeError: If `fn` is not a function of two arguments, or their names contradict each other.

    Example:
        >>> import keras, numpy as np, optax, jaxwrap
        >>> loss = jaxwrap.JaxLoss(optax.losses.softmax_cross_entropy_with_integer_labels)
        >>> value = loss(np.array([0, 1]), np.zeros((2, 4), "float32"))
        >>> print(f"{float(value):.4f}")
        1.3863
    """

    def __init__(
        self,
        fn: Callable[[PyTree, PyTree], Any],
        reduction: str | None = "sum_over_batch_size",
        name: str | None = None,
        dtype: Any = None,
    ):
        super().__init__(name=name, reduction=reduction, dtype=dtype)  # pyright: ignore[reportArgumentType]
        self.fn = fn
        with naming(describe(self)):
            self._on_tensors = PairFunction(fn)

    @door
    def __call__(self, y_true: PyTree, y_pred: PyTree, sample_weight: Any = None) -> Tensor:
        """Return the reduced loss.

        Args:
            y_true: The labels.
            y_pred: The predictions, with Keras's mask if they have one.
            sample_weight: Weights of the examples.
        """
        # Keras casts labels to the dtype of the loss, so that integers become floats. `call` takes the originals.
        token = _LABELS.set((self, y_true))
        try:
            return super().__call__(y_true, y_pred, sample_weight)
        finally:
            _LABELS.reset(token)

    def call(self, y_true: PyTree, y_pred: PyTree) -> Tensor:
        """Return the loss of each example."""
        owner, labels = _LABELS.get()
        if owner is not self:  # called by itself
            labels = y_true
        loss = self._on_tensors(jax.tree.map(_uncast, y_true, labels), y_pred)
        shape = tuple(getattr(y_pred, "shape", ()))
        is_elementwise = len(shape) > 1 and tuple(loss.shape) == shape
        return keras.ops.mean(loss, axis=-1) if is_elementwise else loss

    def get_config(self) -> dict[str, Any]:
        """Return the configuration as JSON, with registered names.

        Raises:
            TypeError: If the function cannot be saved. The error names the fix.
        """
        with naming(describe(self)), one_config("loss", describe(self)):
            fn = serialize_callable(self.fn, "fn")
        return {**super().get_config(), "fn": fn, "dtype": self.dtype}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> JaxLoss:
        """Make a loss from the result of `get_config`. Resolve only registered or allowed names.

        Raises:
            ValueError: If the config has a name that is not registered, or `get_config` cannot have returned it.
        """
        config = dict(config)
        with naming(f"{cls.__name__} {config.get('name')!r}"):
            fn = deserialize(config.pop("fn", None), "fn")
        return cls(fn, **config)

    def __repr__(self) -> str:
        return f"<{describe(self)}: {name_of(self.fn)}>"


def _uncast(cast: Tensor, original: Any) -> Tensor:
    """Return the original labels if they are not floats."""
    original = keras.ops.convert_to_tensor(original)
    is_float = keras.backend.is_float_dtype(keras.backend.standardize_dtype(original.dtype))
    return cast if is_float else original
