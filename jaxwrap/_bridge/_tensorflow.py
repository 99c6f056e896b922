"""TensorFlow: views of memory when eager, an exported StableHLO module in a graph, a custom gradient in both."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import tensorflow as tf
from tensorflow.python.eager import context, execute, record
from tensorflow.python.framework.ops import EagerTensor
from tensorflow.python.ops.resource_variable_ops import ResourceVariable

from jaxwrap._bridge import _tf_replicas
from jaxwrap._bridge._base import Bridge, BridgedFunction
from jaxwrap._bridge._memory import host_copies
from jaxwrap._bridge._stablehlo import Artifact, Shape, export
from jaxwrap._bridge._tf_gradients import custom_gradient
from jaxwrap._bridge._tf_graph import (
    STABLEHLO_VERSION,
    Halves,
    Spec,
    call_module,
    canonical,
    export_halves,
    spec_of,
)
from jaxwrap._bridge._tf_pfor import register_converter
from jaxwrap._bridge._vjp import vjp, vjp_roles
from jaxwrap._dtypes import check_dtype
from jaxwrap._typing import Array, FlatFunction, FlatResult, Role, Tensor


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

    def copies(
        self, arrays: Sequence[Array | np.ndarray], shardings: Sequence[Any]
    ) -> Iterator[Any]:
        return host_copies(arrays)

    def lifted(self) -> contextlib.AbstractContextManager[Any]:
        return tf.init_scope()

    def dense(self, gradient: Any) -> Tensor:
        return tf.convert_to_tensor(gradient)  # the gradient of an embedding comes in slices

    def is_replica(self) -> bool:
        return _tf_replicas.context() is not None

    def for_replica(self, seeds: Sequence[Tensor], distinct: bool | None) -> Sequence[Tensor]:
        # The batches of replicas are parts of one batch, in which each example has a mask of its own.
        return seeds if distinct is False else _tf_replicas.numbered(seeds)

    def summed(self, gradients: list[Tensor]) -> list[Tensor]:
        return _tf_replicas.summed(gradients)

    def gathered(self, tensor: Tensor) -> Tensor:
        return _tf_replicas.gathered(tensor)

    def agreed(self, tensors: Sequence[Tensor], mean: bool) -> Sequence[Tensor] | None:
        return _tf_replicas.agreed(tensors, mean)

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
        self._halves: dict[Any, Halves | None] = {}
        self._vjps: dict[tuple[tuple[int, ...], int], _Function] = {}

    def __call__(self, *tensors: Tensor) -> FlatResult:
        # Nothing can be recorded. JAX then reads the memory of the tensors, and nothing has to be converted.
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
        # `tf.custom_gradient` lets nothing but tensors out. The structure takes this way.
        known: list[Any] = []

        @custom_gradient
        def recorded(*chosen: Tensor) -> tuple[list[Tensor], Any]:
            merged = list(tensors)
            for index, tensor in zip(wrt, chosen, strict=True):
                merged[index] = tensor
            (outputs, aux, static), pull_back = self._record(wrt, tuple(merged))
            known[:] = [len(outputs), static]

            def gradient(*cotangents: Tensor) -> list[Tensor]:
                # The cotangents of `aux` come last, and JAX takes none of integers.
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
        tensors = tuple(map(canonical, tensors))
        specs = tuple(map(spec_of, tensors))
        # Kept by shapes and dtypes. A `tf.function` may trace the same call many times.
        if specs not in self._artifacts:
            self._artifacts[specs] = export(self._jitted, specs, self._platforms, STABLEHLO_VERSION)
        return call_module(self._artifacts[specs], tensors)

    def _record(
        self, wrt: tuple[int, ...], tensors: tuple[Tensor, ...]
    ) -> tuple[FlatResult, Callable[[list[Tensor]], Sequence[Tensor]]]:
        """Return the result, and a function from the cotangents of its float outputs to the gradients."""
        # Without a tape the graph may be for inference, where residuals are only a burden.
        if not tf.executing_eagerly() and record.could_possibly_record():
            converted = tuple(map(canonical, tensors))
            halves = self._halve(wrt, tuple(map(spec_of, converted)))
            if halves is not None:
                return self._call_halves(halves, wrt, converted)

        def pull_back(received: list[Tensor]) -> Sequence[Tensor]:
            return self._vjp(wrt, len(received))(*tensors, *received).outputs

        return self._run(tensors), pull_back

    def _halve(self, wrt: tuple[int, ...], specs: tuple[Spec, ...]) -> Halves | None:
        key = (wrt, specs)
        # None is kept as well: to find out that there are no halves takes an export.
        if key not in self._halves:
            self._halves[key] = export_halves(self._fn, wrt, specs, self._platforms)
        return self._halves[key]

    def _call_halves(
        self, halves: Halves, wrt: tuple[int, ...], tensors: tuple[Tensor, ...]
    ) -> tuple[FlatResult, Callable[[list[Tensor]], Sequence[Tensor]]]:
        result, residuals, _ = call_module(halves.forward, tensors)

        @custom_gradient
        def pulled(*parts: Tensor) -> tuple[Sequence[Tensor], Any]:
            received = parts[len(wrt) :]
            arguments = [tensors[index] for index in halves.arguments]
            gradients = call_module(halves.backward, (*arguments, *residuals, *received))

            def derivative(*cotangents: Tensor) -> Sequence[Tensor]:
                # Residuals are results, not variables: a second derivative has to compute all of it again.
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
        # Of exactly this class: a variable of a `tf.distribute` strategy has several handles.
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


@register_converter
def _wrap_vectorized(fn: FlatFunction, arity: int, platforms: tuple[str, ...]) -> _Function:
    return _Function(fn, (Role.INPUT,) * arity, platforms)


def _as_tensor(value: Any) -> Tensor:
    if isinstance(value, jax.Array):
        return _from_jax(value)
    return tf.convert_to_tensor(value)


def _is_inexact(tensor: Tensor) -> bool:
    return tensor.dtype.is_floating or tensor.dtype.is_complex


def _read(variables: list[Tensor]) -> list[Tensor]:
    """Read variables by one operation, since to start an operation takes longer than the reading."""
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
    """Convert a tensor to what JAX takes.

    On the CPU that is a NumPy view. TensorFlow does not write to memory that is in use elsewhere, and aligns it so
    that JAX does not copy it.
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
    if _is_float8(array):  # TensorFlow does not pass it over dlpack
        return tf.constant(np.asarray(array))
    return tf.experimental.dlpack.from_dlpack(array.__dlpack__())


def _to_tensorflow(arrays: Iterable[jax.Array]) -> tuple[Tensor, ...]:
    return tuple(map(_from_jax, arrays))
