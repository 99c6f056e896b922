"""What optimizers need to know of a backend, beside its tensors."""

from __future__ import annotations

import contextlib
from typing import Any

import keras


def lifted() -> contextlib.AbstractContextManager[Any]:
    """A scope in which variables can be read and made although a `tf.function` is being traced around it.

    Other backends need none: what JAX traces has no values anywhere, and PyTorch traces no training step of Keras.
    """
    if keras.config.backend() != "tensorflow":
        return contextlib.nullcontext()
    import tensorflow as tf

    return tf.init_scope()


def dense(gradient: Any) -> Any:
    """A gradient that is no tensor, made one if it is TensorFlow's own kind: slices, for an embedding."""
    if keras.config.backend() != "tensorflow":
        return gradient
    import tensorflow as tf

    return tf.convert_to_tensor(gradient)


def replicas() -> int:
    """On how many devices `tf.distribute` runs the same step; elsewhere it is not the optimizer that would know."""
    if keras.config.backend() != "tensorflow":
        return 1
    import tensorflow as tf

    return tf.distribute.get_strategy().num_replicas_in_sync
