"""An adapter and a layer for each JAX library, and the registry of adapters."""

from jaxwrap.adapters._equinox import Equinox, EquinoxLayer
from jaxwrap.adapters._haiku import Haiku, HaikuLayer
from jaxwrap.adapters._linen import FlaxLayer, Linen
from jaxwrap.adapters._nnx import NNX, NNXLayer
from jaxwrap.adapters._registry import register_adapter, wrap

__all__ = [
    "NNX",
    "Equinox",
    "EquinoxLayer",
    "FlaxLayer",
    "Haiku",
    "HaikuLayer",
    "Linen",
    "NNXLayer",
    "register_adapter",
    "wrap",
]
