"""jaxwrap: any pure JAX function, and any module of a JAX library, as a real Keras 3 layer on every Keras backend."""

from importlib import import_module as _import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING

# First, since it says what to install when Keras cannot import its backend.
from jaxwrap import _bridge as _bridge
from jaxwrap import reparametrizations as reparametrizations
from jaxwrap._bridge._compilations import cache_compilations
from jaxwrap._function import wrap_function
from jaxwrap._layer import Adapter, CallResult, JaxLayer, follow_torch_mode
from jaxwrap._serialization import register_serializable
from jaxwrap._training import JaxLoss, JaxMetric, OptaxOptimizer, PaddedBatches, SyncState
from jaxwrap._weights import Reparametrization, Rule
from jaxwrap.adapters import (
    EquinoxLayer,
    FlaxLayer,
    HaikuLayer,
    NNXLayer,
    from_transformers,
    register_adapter,
    wrap,
)

if TYPE_CHECKING:
    from jaxwrap import checkpoints as checkpoints
    from jaxwrap._export import export

__all__ = [
    "Adapter",
    "CallResult",
    "EquinoxLayer",
    "FlaxLayer",
    "HaikuLayer",
    "JaxLayer",
    "JaxLoss",
    "JaxMetric",
    "NNXLayer",
    "OptaxOptimizer",
    "PaddedBatches",
    "Reparametrization",
    "Rule",
    "SyncState",
    "cache_compilations",
    "export",
    "follow_torch_mode",
    "from_transformers",
    "register_adapter",
    "register_serializable",
    "wrap",
    "wrap_function",
]
__version__ = _version("jaxwrap")


def __getattr__(name: str) -> object:
    """Import what few programs use, when one does. No file names a class in there."""
    if name == "checkpoints":
        return _import_module("jaxwrap.checkpoints")
    if name == "export":
        return _import_module("jaxwrap._export").export
    raise AttributeError(f"module 'jaxwrap' has no attribute {name!r}")
