"""One bridge per Keras backend: pure JAX functions on that backend's tensors."""

from __future__ import annotations

import functools
import importlib

from jaxwrap._bridge._base import Bridge, BridgedFunction

__all__ = ["Bridge", "BridgedFunction", "get_bridge"]

# By name, since each module imports its backend, and seldom are all of them installed.
_BRIDGES = {
    "jax": ("_jax", "JaxBridge"),
    "numpy": ("_numpy", "NumpyBridge"),
    "tensorflow": ("_tensorflow", "TensorFlowBridge"),
    "torch": ("_torch", "TorchBridge"),
}
_NAMES = ", ".join(map(repr, _BRIDGES))


def _not_installed(error: ModuleNotFoundError) -> ImportError:
    library = (error.name or str(error)).partition(".")[0]
    if library not in _BRIDGES:
        return ImportError(
            f"{library!r}, which the Keras backend needs, is not installed. jaxwrap runs on the backends "
            f"{_NAMES}: set the environment variable KERAS_BACKEND to one of these."
        )
    return ImportError(
        f"the Keras backend needs {library!r}, which is not installed. Install it with "
        f"`pip install jaxwrap[{library}]`, or set the environment variable KERAS_BACKEND to one of {_NAMES}."
    )


try:
    import keras
except ModuleNotFoundError as error:  # Keras imports its backend, and its error does not say why
    raise _not_installed(error) from error


def get_bridge(backend: str | None = None) -> Bridge:
    """Return the bridge of a backend, by default of the current Keras backend.

    Raises:
        ValueError: If there is none for that backend.
        ImportError: If the backend's library is not installed.
    """
    return _load(backend or keras.config.backend())


# One bridge for each backend and process: it keeps aliases of tensors, which layers share.
@functools.cache
def _load(backend: str) -> Bridge:
    if backend not in _BRIDGES:
        raise ValueError(
            f"jaxwrap has no bridge for the Keras backend {backend!r}; it has bridges for {_NAMES}. Set the "
            "environment variable KERAS_BACKEND to one of these."
        )
    module, name = _BRIDGES[backend]
    try:
        return getattr(importlib.import_module(f"jaxwrap._bridge.{module}"), name)()
    except ModuleNotFoundError as error:
        raise _not_installed(error) from error
