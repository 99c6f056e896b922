"""NumPy: jitted JAX, NumPy arrays out; no gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxwrap._bridge._base import BridgedFunction, check_dtype
from jaxwrap._typing import FlatFunction, FlatResult, Role, Tensor


class NumpyBridge:
    """The bridge of Keras's inference-only backend."""

    name = "numpy"

    def is_tensor(self, leaf: Any) -> bool:
        return isinstance(leaf, (jax.Array, np.ndarray, np.generic))

    def spec(self, tensor: Tensor) -> tuple[tuple[int | None, ...], str]:
        check_dtype(str(tensor.dtype))
        return tuple(tensor.shape), str(tensor.dtype)

    def opaque(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        return fn

    def wrap(
        self,
        fn: FlatFunction,
        roles: tuple[Role, ...],
        platforms: tuple[str, ...] | None,
    ) -> BridgedFunction:
        jitted = jax.jit(fn)

        def call(*tensors: Tensor) -> FlatResult:
            # JAX may read an aliased array after the call returns, while NumPy code is free to overwrite it.
            outputs, aux, static = jax.block_until_ready(jitted(*tensors))
            return FlatResult(_to_numpy(outputs), _to_numpy(aux), static)

        return call


def _to_numpy(arrays: tuple[jax.Array, ...]) -> tuple[Tensor, ...]:
    # A copy, since a view of a JAX array is read-only; typed PRNG keys have no NumPy form and stay what they are.
    return tuple(
        array if jax.dtypes.issubdtype(array.dtype, jax.dtypes.extended) else np.array(array)
        for array in arrays
    )
