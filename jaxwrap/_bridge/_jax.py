"""JAX: jitted when called eagerly, transparent inside a trace."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax.core import Tracer

from jaxwrap._bridge._base import Bridge, BridgedFunction
from jaxwrap._bridge._memory import host_copies
from jaxwrap._tracing import outside_traces
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
        pairs = list(zip(arrays, shardings, strict=True))
        # Keras may build a layer inside a trace, and a variable must not hold a tracer. One call for all copies is
        # several times faster. `fit` donates the buffers of variables: without `may_alias=False` the arrays of the
        # user would be deleted.
        with outside_traces():
            copied = iter(
                jax.device_put(
                    [array for array, to in pairs if to is None and _is_anywhere(array)],
                    may_alias=False,
                )
            )
        for array, to in pairs:
            if to is not None:
                with outside_traces():
                    copy = _spread_copy(array, to)
                yield copy
            elif _is_anywhere(array):
                yield next(copied)
            else:
                # Arrays that the user has put on a device go through the host.
                yield next(host_copies([array]))

    def agreed(self, tensors: Sequence[Tensor], mean: bool) -> Sequence[Tensor] | None:
        # Arrays of a distribution span all processes, and have one value.
        if jax.process_count() > 1 and any(tensor.is_fully_addressable for tensor in tensors):
            raise RuntimeError(
                f"each of the {jax.process_count()} processes of JAX has this state for itself. Set a distribution "
                "before the model is made (`keras.distribution.set_distribution`): then all of them share one state."
            )
        return None

    def mesh(self) -> jax.sharding.Mesh | None:
        distribution = keras.distribution.distribution()
        return None if distribution is None else distribution.device_mesh.backend_mesh

    def on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        if (mesh := self.mesh()) is None:
            return contextlib.nullcontext()
        try:
            # With its devices: a function of arrays on one device, or of none, runs on the mesh too.
            return jax.set_mesh(mesh)
        except ValueError:
            # Inside a trace, which has devices of its own.
            return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)

    def wrap(
        self,
        fn: FlatFunction,
        roles: tuple[Role, ...],
        platforms: tuple[str, ...] | None,
    ) -> BridgedFunction:
        jitted = jax.jit(fn)

        def call(*tensors: Tensor) -> FlatResult:
            # Inside a trace the caller's own jit compiles the whole. A nested one would only hide the function.
            is_traced = any(issubclass(kind, Tracer) for kind in set(map(type, tensors)))
            run = fn if is_traced else jitted
            if self.mesh() is None:
                return run(*tensors)
            with self.on_mesh():
                return run(*tensors)

        return call


def _spread_copy(array: Array | np.ndarray, sharding: Any) -> Array:
    """Copy an array to devices, each part straight to its own: the whole may fit on no device."""
    # `may_alias=False` does not hold for what `device_put` divides: it aliases NumPy's memory, and shards of JAX.
    if isinstance(array, jax.Array):
        return jnp.array(jax.device_put(array, sharding), dtype=array.dtype, copy=True)
    dtype = jax.dtypes.canonicalize_dtype(array.dtype)
    return jax.make_array_from_callback(
        array.shape, sharding, lambda index: np.array(array[index], dtype)
    )


def _is_anywhere(array: Array | np.ndarray) -> bool:
    """Whether an array is one of JAX that the user has not put on a device, with a dtype of its own."""
    return isinstance(array, jax.Array) and not array.committed and not array.weak_type
