"""TensorFlow: dlpack when eager, an exported StableHLO module in a graph; a custom gradient in both."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import tensorflow as tf
from tensorflow.compiler.tf2xla.python import xla as tfxla
from tensorflow.python.eager import context, execute, record
from tensorflow.python.framework.ops import EagerTensor
from tensorflow.python.ops.resource_variable_ops import ResourceVariable

from jaxwrap._bridge._base import Bridge, BridgedFunction, check_dtype, host_copies, vjp, vjp_roles
from jaxwrap._bridge._stablehlo import Artifact, Shape, export
from jaxwrap._typing import Array, FlatFunction, FlatResult, Role, Tensor

# The newest StableHLO that TensorFlow 2.21 reads is 1.13.7.
_STABLEHLO_VERSION = "1.13.0"


class TensorFlowBridge(Bridge):
    """The bridge of TensorFlow: eager or in a `tf.function`, differentiable by `tf.GradientTape`."""

    name = "tensorflow"

    def is_tensor(self, leaf: Any) -> bool:
        return isinstance(leaf, (tf.Tensor, tf.Variable, jax.Array, np.ndarray, np.generic))

    def is_concrete(self, leaf: Any) -> bool:
        return isinstance(leaf, EagerTensor)

    def spec(self, tensor: Tensor) -> tuple[Shape, str]:
        name = tf.as_dtype(tensor.dtype).name
        check_dtype(name)
        if isinstance(tensor, tf.Tensor) and tensor.shape.rank is None:
            raise ValueError(
                "received a tensor of unknown rank; JAX needs to know how many dimensions there are. "
                "Say so with `tensor.set_shape([None, ...])` or an `input_signature`."
            )
        return tuple(tensor.shape), name

    def opaque(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        return tf.autograph.experimental.do_not_convert(fn)

    def copies(self, arrays: Sequence[Array | np.ndarray]) -> Iterator[Any]:
        return host_copies(arrays)

    def lifted(self) -> contextlib.AbstractContextManager[Any]:
        return tf.init_scope()

    def dense(self, gradient: Any) -> Tensor:
        return tf.convert_to_tensor(gradient)  # of slices, which an embedding has

    def replicas(self) -> int:
        return tf.distribute.get_strategy().num_replicas_in_sync

    def wrap(
        self,
        fn: FlatFunction,
        roles: tuple[Role, ...],
        platforms: tuple[str, ...] | None,
    ) -> BridgedFunction:
        return _Function(fn, roles, platforms)


class _Function:
    """A flat function on TensorFlow's tensors, with its vjps, each made when first needed."""

    def __init__(
        self,
        fn: FlatFunction,
        roles: tuple[Role, ...],
        platforms: tuple[str, ...] | None,
    ):
        self._fn = fn
        self._roles = roles
        self._platforms = platforms
        self._held = [index for index, role in enumerate(roles) if role.held]
        self._jitted = jax.jit(fn)
        self._artifacts: dict[Any, Artifact] = {}
        self._vjps: dict[tuple[tuple[int, ...], int], _Function] = {}

    def __call__(self, *tensors: Tensor) -> FlatResult:
        if tf.executing_eagerly() and not record.could_possibly_record():
            return self._run_eagerly(tensors)
        tensors = tuple(map(_as_tensor, tensors))
        wrt = tuple(
            index
            for index, (tensor, role) in enumerate(zip(tensors, self._roles, strict=True))
            if role.differentiable and _is_inexact(tensor)
        )
        if not wrt:
            return self._run(tensors)
        known: list[Any] = []

        @tf.custom_gradient
        def recorded(*chosen: Tensor) -> tuple[list[Tensor], Any]:
            merged = list(tensors)
            for index, tensor in zip(wrt, chosen, strict=True):
                merged[index] = tensor
            outputs, aux, static = self._run(tuple(merged))
            known[:] = [len(outputs), static]

            def gradient(*cotangents: Tensor) -> list[Tensor]:
                received = [
                    cotangent
                    for cotangent, output in zip(cotangents, outputs, strict=False)
                    if _is_inexact(output)
                ]
                pullback = self._vjp(wrt, len(received))
                gradients = pullback(*merged, *received).outputs
                return [
                    tf.cast(gradient, tensor.dtype)
                    for gradient, tensor in zip(gradients, chosen, strict=True)
                ]

            return [*outputs, *aux], gradient

        flat = tuple(recorded(*(tensors[index] for index in wrt)))
        count, static = known
        return FlatResult(flat[:count], flat[count:], static)

    def _run(self, tensors: tuple[Tensor, ...]) -> FlatResult:
        if tf.executing_eagerly():
            return self._run_eagerly(tensors)
        return self._call_module(tensors)

    def _run_eagerly(self, tensors: Sequence[Tensor]) -> FlatResult:
        arrays = list(tensors)
        variables = [index for index in self._held if type(arrays[index]) is ResourceVariable]
        values = _read([arrays[index] for index in variables])
        for index, value in zip(variables, values, strict=True):
            arrays[index] = value
        outputs, aux, static = self._jitted(*map(_to_jax, arrays))
        return FlatResult(_to_tensorflow(outputs), _to_tensorflow(aux), static)

    def _call_module(self, tensors: tuple[Tensor, ...]) -> FlatResult:
        tensors = tuple(map(_canonical, tensors))
        specs = tuple((tuple(tensor.shape), tensor.dtype.name) for tensor in tensors)
        if specs not in self._artifacts:
            self._artifacts[specs] = export(
                self._jitted, specs, self._platforms, _STABLEHLO_VERSION
            )
        module, exported = self._artifacts[specs]
        flat: Any = tfxla.call_module(
            [tensors[index] for index in exported.module_kept_var_idx],
            version=exported.calling_convention_version,
            module=module,
            Tout=[tf.as_dtype(aval.dtype) for aval in exported.out_avals],
            Sout=[
                tf.TensorShape([size if isinstance(size, int) else None for size in aval.shape])
                for aval in exported.out_avals
            ],
            platforms=[platform.upper() for platform in exported.platforms],
            use_shardy_partitioner=True,
        )
        return jax.tree_util.tree_unflatten(exported.out_tree, flat)

    def _vjp(self, wrt: tuple[int, ...], cotangents: int) -> _Function:
        key = (wrt, cotangents)
        if key not in self._vjps:
            pullback = vjp(self._fn, wrt, len(self._roles))
            self._vjps[key] = _Function(
                pullback, vjp_roles(self._roles, cotangents), self._platforms
            )
        return self._vjps[key]


def _as_tensor(value: Any) -> Tensor:
    if isinstance(value, jax.Array):
        return _from_jax(value)
    return tf.convert_to_tensor(value)


def _is_inexact(tensor: Tensor) -> bool:
    return tensor.dtype.is_floating or tensor.dtype.is_complex


def _canonical(tensor: Tensor) -> Tensor:
    """The tensor in the dtype JAX gives it: 32 bits for 64 unless `jax_enable_x64` is set."""
    return tf.cast(tensor, jax.dtypes.canonicalize_dtype(tensor.dtype.as_numpy_dtype).name)


def _read(variables: list[Tensor]) -> list[Tensor]:
    """The values of variables, read by one operation: what it takes to start one is most of what it takes."""
    if not variables:
        return []
    dtypes = [variable.dtype for variable in variables]
    return execute.execute(
        b"_ReadVariablesOp",
        len(variables),
        inputs=[variable.handle for variable in variables],
        attrs=("N", len(variables), "dtypes", dtypes),
        ctx=context.context(),
    )


def _to_jax(tensor: Tensor) -> Array:
    """A tensor as JAX takes it.

    On the CPU that is a NumPy view: TensorFlow writes to no memory that is in use elsewhere, and aligns it so that JAX
    does not copy it.
    """
    if isinstance(tensor, EagerTensor):
        return jax.dlpack.from_dlpack(tensor) if _has_gpu() else tensor._numpy_internal()
    if isinstance(tensor, tf.Variable):
        return _to_jax(tensor.read_value())
    return tensor


@functools.cache
def _has_gpu() -> bool:
    return bool(tf.config.list_physical_devices("GPU"))


def _is_float8(array: jax.Array) -> bool:
    return array.dtype.name.startswith("float8")


def _from_jax(array: jax.Array) -> Tensor:
    if _is_float8(array):  # which TensorFlow does not pass over dlpack
        return tf.constant(np.asarray(array))
    return tf.experimental.dlpack.from_dlpack(array.__dlpack__())


def _to_tensorflow(arrays: Iterable[jax.Array]) -> tuple[Tensor, ...]:
    return tuple(map(_from_jax, arrays))
