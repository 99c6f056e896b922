"""JAX: jitted when called eagerly, transparent inside a trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from jaxwrap._bridge._base import BridgedFunction, check_dtype
from jaxwrap._typing import FlatFunction, FlatResult, Role, Tensor


class JaxBridge:
    """The bridge of a backend that already is JAX."""

    name = "jax"

    def is_tensor(self, leaf: Any) -> bool:
        return isinstance(leaf, (jax.Array, np.ndarray, np.generic))

    def is_concrete(self, leaf: Any) -> bool:
        return isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer)

    def spec(self, tensor: Tensor) -> tuple[tuple[int | None, ...], str]:
        if not isinstance(tensor, jax.Array):
            check_dtype(str(tensor.dtype))
        return tuple(tensor.shape), str(tensor.dtype)

    def opaque(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        return fn

    def adopt(self, array: np.ndarray) -> Any:
        return array

    def wrap(
        self,
        fn: FlatFunction,
        roles: tuple[Role, ...],
        platforms: tuple[str, ...] | None,
    ) -> BridgedFunction:
        jitted = jax.jit(fn)

        def call(*tensors: Tensor) -> FlatResult:
            # Inside a trace the caller's own jit compiles the whole; a nested one would only hide the function.
            if any(issubclass(kind, Tracer) for kind in set(map(type, tensors))):
                return fn(*tensors)
            return jitted(*tensors)

        return call
