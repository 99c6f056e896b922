"""One layer per JAX library."""

from jaxwrap.adapters._equinox import EquinoxLayer
from jaxwrap.adapters._haiku import HaikuLayer
from jaxwrap.adapters._linen import FlaxLayer
from jaxwrap.adapters._nnx import NNXLayer
from jaxwrap.adapters._registry import register_adapter, wrap

__all__ = ["EquinoxLayer", "FlaxLayer", "HaikuLayer", "NNXLayer", "register_adapter", "wrap"]
