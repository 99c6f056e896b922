"""TensorFlow: dlpack when eager, an exported StableHLO module in a graph; a custom gradient in both."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorflow as tf
from tensorflow.compiler.tf2xla.python import xla as tfxla

from jaxwrap._bridge._base import BridgedFunction, check_dtype, vjp, vjp_roles
from jaxwrap._bridge._stablehlo import Artifact, Shape, export
from jaxwrap._typing import FlatFunction, FlatResult, Role, Tensor

# The newest StableHLO that TensorFlow 2.21 reads is 1.13.7.
_STABLEHLO_VERSION = "1.13.0"


class TensorFlowBridge:
    """The bridge of TensorFlow: eager or in a `tf.function`, differentiable by `tf.GradientTape`."""

    name = "tensorflow"

    def is_tensor(self, leaf: Any) -> bool:
        return isinstance(leaf, (tf.Tensor, tf.Variable, jax.Array, np.ndarray, np.generic))

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
        self._jitted = jax.jit(fn)
        self._artifacts: dict[Any, Artifact] = {}
        self._vjps: dict[tuple[tuple[int, ...], int], _Function] = {}

    def __call__(self, *tensors: Tensor) -> FlatResult:
        tensors = tuple(map(_as_tensor, tensors))
        wrt = tuple(
            index
            for index, (tensor, role) in enumerate(zip(tensors, self._roles, strict=True))
            if role is Role.DIFFERENTIABLE and _is_inexact(tensor)
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
            outputs, aux, static = self._jitted(*map(_to_jax, tensors))
            return FlatResult(_to_tensorflow(outputs), _to_tensorflow(aux), static)
        return self._call_module(tensors)

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


def _to_jax(tensor: Tensor) -> jax.Array:
    # TensorFlow passes no floats of 8 bits over dlpack.
    return jnp.asarray(tensor.numpy()) if _is_float8(tensor) else jax.dlpack.from_dlpack(tensor)


def _is_float8(tensor: Any) -> bool:
    return tensor.dtype.name.startswith("float8")


def _from_jax(array: jax.Array) -> Tensor:
    if _is_float8(array):
        return tf.constant(np.asarray(array))
    return tf.experimental.dlpack.from_dlpack(array.__dlpack__())


def _to_tensorflow(arrays: Iterable[jax.Array]) -> tuple[Tensor, ...]:
    return tuple(map(_from_jax, arrays))
