"""Leaves that are something else underneath: adapters of low rank, integers, norms, masks.

Put one in the place of the leaves that a pattern matches by `jaxwrap.Rule(reparametrize=...)`, or later by
`layer.reparametrize(pattern, ...)`. See `jaxwrap.Reparametrization` to write your own.
"""

from jaxwrap._weights._reparametrization import RealImaginary, Tied
from jaxwrap.reparametrizations._lora import LoRA
from jaxwrap.reparametrizations._masked import Masked
from jaxwrap.reparametrizations._norms import SpectralNorm, WeightNorm
from jaxwrap.reparametrizations._quantized import Float8, Int4, Int8

__all__ = [
    "Float8",
    "Int4",
    "Int8",
    "LoRA",
    "Masked",
    "RealImaginary",
    "SpectralNorm",
    "Tied",
    "WeightNorm",
]
