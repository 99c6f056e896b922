"""One bridge per Keras backend: pure JAX functions on that backend's tensors."""

from __future__ import annotations

import functools
import importlib

import keras

from jaxwrap._bridge._base import Bridge, BridgedFunction, inexact

__all__ = ["Bridge", "BridgedFunction", "get_bridge", "inexact"]

_BRIDGES = {
    "jax": ("_jax", "JaxBridge"),
    "numpy": ("_numpy", "NumpyBridge"),
    "tensorflow": ("_tensorflow", "TensorFlowBridge"),
    "torch": ("_torch", "TorchBridge"),
}


def get_bridge() -> Bridge:
    """The bridge of the current Keras backend.

    Raises:
        ValueError: If there is none for that backend.
        ImportError: If the backend's library is not installed.
    """
    return _load(keras.config.backend())


@functools.cache
def _load(backend: str) -> Bridge:
    if backend not in _BRIDGES:
        raise ValueError(
            f"jaxwrap has no bridge for the Keras backend {backend!r}; it has bridges for "
            f"{', '.join(map(repr, _BRIDGES))}. Set the environment variable KERAS_BACKEND to one of these."
        )
    module, name = _BRIDGES[backend]
    try:
        return getattr(importlib.import_module(f"jaxwrap._bridge.{module}"), name)()
    except ModuleNotFoundError as error:
        raise ImportError(
            f"the Keras backend is {backend!r}, but {error.name!r} is not installed. Install it with "
            f"`pip install jaxwrap[{backend}]`, or set KERAS_BACKEND to an installed backend."
        ) from error
