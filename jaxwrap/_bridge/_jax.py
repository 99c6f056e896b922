"""JAX: jitted when called eagerly, transparent inside a trace."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from jaxwrap._bridge._base import Bridge, BridgedFunction
from jaxwrap._bridge._memory import host_copies
from jaxwrap._typing import Array, FlatFunction, FlatResult, Role, Tensor


class JaxBridge(Bridge):
    """The bridge of JAX, which jits eager calls and stays out of traces."""

    name = "jax"
    shards = True

    def is_concrete(self, leaf: Any) -> bool:
        return isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer)

    def spec(self, tensor: Tensor) -> tuple[tuple[int | None, ...], str]:
        if isinstance(tensor, jax.Array):  # a PRNG key has a dtype of its own
            return tuple(tensor.shape), str(tensor.dtype)
        return super().spec(tensor)

    def copies(
        self, arrays: Sequence[Array | np.ndarray], shardings: Sequence[Any]
    ) -> Iterator[Any]:
        # One call for all copies is several times faster. Arrays that the user has put on a device go through the host.
        pairs = list(zip(arrays, shardings, strict=True))
        together = [array for array, to in pairs if to is None and _is_anywhere(array)]
        # `fit` donates the buffers of variables: without `may_alias=False` the arrays of the user would be deleted.
        with _outside_traces():
            copied = iter(jax.device_put(together, may_alias=False))
        for array, to in pairs:
            if to is not None:
                # Straight to where it belongs: the whole may fit on no device.
                with _outside_traces():
                    yield jax.device_put(array, to, may_alias=False)
            else:
                yield next(copied) if _is_anywhere(array) else next(host_copies([array]))

    def wrap(
        self,
        fn: FlatFunction,
        roles: tuple[Role, ...],
        platforms: tuple[str, ...] | None,
    ) -> BridgedFunction:
        jitted = jax.jit(fn)

        def call(*tensors: Tensor) -> FlatResult:
            # Inside a trace the caller's own jit compiles the whole. A nested one would only hide the function.
            if any(issubclass(kind, Tracer) for kind in set(map(type, tensors))):
                return fn(*tensors)
            return jitted(*tensors)

        return call


def _outside_traces() -> contextlib.AbstractContextManager[Any]:
    """Compute eagerly. Keras may build a layer inside a trace, and a variable must not hold a tracer."""
    return jax.core.eval_context()


def _is_anywhere(array: Array | np.ndarray) -> bool:
    """Whether an array is one of JAX that the user has not put on a device, with a dtype of its own."""
    return isinstance(array, jax.Array) and not array.committed and not array.weak_type
