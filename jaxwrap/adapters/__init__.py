"""An adapter and a layer for each JAX library, and the registry of adapters."""

from jaxwrap.adapters._equinox import Equinox, EquinoxLayer
from jaxwrap.adapters._haiku import Haiku, HaikuLayer
from jaxwrap.adapters._linen import FlaxLayer, Linen
from jaxwrap.adapters._nnx import NNX, NNXLayer
from jaxwrap.adapters._registry import register_adapter, wrap
from jaxwrap.adapters._transformers import Transformers, from_transformers

__all__ = [
    "NNX",
    "Equinox",
    "EquinoxLayer",
    "FlaxLayer",
    "Haiku",
    "HaikuLayer",
    "Linen",
    "NNXLayer",
    "Transformers",
    "from_transformers",
    "register_adapter",
    "wrap",
]
