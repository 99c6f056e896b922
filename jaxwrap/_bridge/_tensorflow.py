"""TensorFlow: dlpack when eager, an exported StableHLO module in a graph; a custom gradient in both."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import tensorflow as tf
from tensorflow.compiler.tf2xla.python import xla as tfxla
from tensorflow.python.eager import context, execute, record
from tensorflow.python.framework.ops import EagerTensor
from tensorflow.python.ops.resource_variable_ops import ResourceVariable

from jaxwrap._bridge._base import (
    Bridge,
    BridgedFunction,
    check_dtype,
    host_copies,
    inexact,
    vjp,
    vjp_roles,
)
from jaxwrap._bridge._residuals import Linearized
from jaxwrap._bridge._stablehlo import Artifact, Shape, export, export_for
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
        self._halves: dict[Any, _Halves | None] = {}
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
            (outputs, aux, static), pull_back = self._record(wrt, tuple(merged))
            known[:] = [len(outputs), static]

            def gradient(*cotangents: Tensor) -> list[Tensor]:
                received = [
                    cotangent
                    for cotangent, output in zip(cotangents, outputs, strict=False)
                    if _is_inexact(output)
                ]
                return [
                    tf.cast(gradient, tensor.dtype)
                    for gradient, tensor in zip(pull_back(received), chosen, strict=True)
                ]

            return [*outputs, *aux], gradient

        flat = tuple(recorded(*(tensors[index] for index in wrt)))
        count, static = known
        return FlatResult(flat[:count], flat[count:], static)

    def _run(self, tensors: tuple[Tensor, ...]) -> FlatResult:
        if tf.executing_eagerly():
            return self._run_eagerly(tensors)
        tensors = tuple(map(_canonical, tensors))
        specs = tuple(map(_spec, tensors))
        if specs not in self._artifacts:
            self._artifacts[specs] = export(
                self._jitted, specs, self._platforms, _STABLEHLO_VERSION
            )
        return _call_module(self._artifacts[specs], tensors)

    def _record(
        self, wrt: tuple[int, ...], tensors: tuple[Tensor, ...]
    ) -> tuple[FlatResult, Callable[[list[Tensor]], Sequence[Tensor]]]:
        """The result, and what makes gradients of the cotangents of its float outputs."""
        # A graph into which no tape looks may be for inference, which residuals would only be a burden to.
        if not tf.executing_eagerly() and record.could_possibly_record():
            canonical = tuple(map(_canonical, tensors))
            halves = self._halve(wrt, tuple(map(_spec, canonical)))
            if halves is not None:
                return self._call_halves(halves, wrt, canonical)

        def pull_back(received: list[Tensor]) -> Sequence[Tensor]:
            return self._vjp(wrt, len(received))(*tensors, *received).outputs

        return self._run(tensors), pull_back

    def _halve(self, wrt: tuple[int, ...], specs: tuple[tuple[Shape, str], ...]) -> _Halves | None:
        key = (wrt, specs)
        if key not in self._halves:
            linearized = jax.jit(Linearized(self._fn, wrt, ()))
            forward = export(linearized, specs, self._platforms, _STABLEHLO_VERSION)
            _, exported = forward
            result, residuals, static = jax.tree_util.tree_unflatten(
                exported.out_tree, exported.out_avals
            )
            pullback = static.value
            arguments = [
                *(exported.in_avals[index] for index in pullback.arguments),
                *residuals,
                *(output for output in result.outputs if inexact(output.dtype)),
            ]
            try:
                backward = export_for(
                    jax.jit(pullback.gradients), arguments, self._platforms, _STABLEHLO_VERSION
                )
            except ValueError:  # their sizes do not tell what the unknown ones are
                self._halves[key] = None
            else:
                self._halves[key] = _Halves(forward, backward, pullback.arguments)
        return self._halves[key]

    def _call_halves(
        self, halves: _Halves, wrt: tuple[int, ...], tensors: tuple[Tensor, ...]
    ) -> tuple[FlatResult, Callable[[list[Tensor]], Sequence[Tensor]]]:
        result, residuals, _ = _call_module(halves.forward, tensors)

        @tf.custom_gradient
        def pulled(*parts: Tensor) -> tuple[Sequence[Tensor], Any]:
            received = parts[len(wrt) :]
            arguments = [tensors[index] for index in halves.arguments]
            gradients = _call_module(halves.backward, (*arguments, *residuals, *received))

            def derivative(*cotangents: Tensor) -> Sequence[Tensor]:
                # Residuals are results, not variables, so here all is computed again.
                arity = len(self._roles)
                places = (*wrt, *range(arity, arity + len(received)))
                second = self._vjp(wrt, len(received))._vjp(places, len(cotangents))
                return second(*tensors, *received, *cotangents).outputs

            return gradients, derivative

        def pull_back(received: list[Tensor]) -> Sequence[Tensor]:
            return pulled(*(tensors[index] for index in wrt), *received)

        return result, pull_back

    def _run_eagerly(self, tensors: Sequence[Tensor]) -> FlatResult:
        arrays = list(tensors)
        variables = [index for index in self._held if type(arrays[index]) is ResourceVariable]
        values = _read([arrays[index] for index in variables])
        for index, value in zip(variables, values, strict=True):
            arrays[index] = value
        outputs, aux, static = self._jitted(*map(_to_jax, arrays))
        return FlatResult(_to_tensorflow(outputs), _to_tensorflow(aux), static)

    def _vjp(self, wrt: tuple[int, ...], cotangents: int) -> _Function:
        key = (wrt, cotangents)
        if key not in self._vjps:
            pullback = vjp(self._fn, wrt, len(self._roles))
            self._vjps[key] = _Function(
                pullback, vjp_roles(self._roles, cotangents), self._platforms
            )
        return self._vjps[key]


class _Halves(NamedTuple):
    """A function that returns residuals too, and its vjp, which takes them; see `Linearized`.

    Attributes:
        forward: The function.
        backward: Takes some of its arguments, the residuals, and a cotangent for each float output.
        arguments: Which arguments.
    """

    forward: Artifact
    backward: Artifact
    arguments: Sequence[int]


def _call_module(artifact: Artifact, tensors: Sequence[Tensor]) -> Any:
    """Puts a call of an exported function into the graph; returns the pytree that it returns."""
    module, exported = artifact
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


def _spec(tensor: Tensor) -> tuple[Shape, str]:
    return tuple(tensor.shape), tensor.dtype.name


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
