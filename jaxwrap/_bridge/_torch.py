"""PyTorch: an autograd function over dlpack, forward and backward both jitted."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
from keras.src.backend.common.stateless_scope import in_stateless_scope
from torch._utils import _unflatten_dense_tensors
from torch.utils import _pytree

from jaxwrap._bridge._base import Bridge, BridgedFunction
from jaxwrap._bridge._memory import ALIGNMENT, Kept, host_copies
from jaxwrap._bridge._residuals import Linearized, Pullback
from jaxwrap._bridge._vjp import own_outputs, vjp, vjp_roles
from jaxwrap._dense import check_dense
from jaxwrap._dtypes import check_dtype
from jaxwrap._typing import Array, FlatFunction, FlatResult, Role, Tensor

# The dtypes that NumPy has as well.
_NUMPY_DTYPES = {
    getattr(torch, name): name
    for name in (
        *("float16", "float32", "float64", "complex64", "complex128", "bool"),
        *("int8", "int16", "int32", "int64", "uint8"),
    )
}


class TorchBridge(Bridge):
    """The bridge of PyTorch: ordinary tensors in and out, differentiable by `torch.autograd`."""

    name = "torch"

    def __init__(self):
        self._aliases = _Aliases()

    def is_tensor(self, leaf: Any) -> bool:
        return isinstance(leaf, (torch.Tensor, jax.Array, np.ndarray, np.generic))

    def is_concrete(self, leaf: Any) -> bool:
        return isinstance(leaf, torch.Tensor)

    def spec(self, tensor: Tensor) -> tuple[tuple[int | None, ...], str]:
        strided = not isinstance(tensor, torch.Tensor) or tensor.layout is torch.strided
        if not strided or getattr(tensor, "is_nested", False):
            check_dense(tensor)
        name = str(tensor.dtype).removeprefix("torch.")
        check_dtype(name)
        return tuple(tensor.shape), name

    def opaque(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compiler.disable(fn)

    def copies(self, arrays: Sequence[Array | np.ndarray]) -> Iterator[Any]:
        for copy in host_copies(arrays):
            # The tensor shares the memory of the copy, which is aligned so that JAX can alias it in its turn.
            yield torch.from_numpy(copy) if copy.dtype.name in _NUMPY_DTYPES.values() else copy

    def register_node(
        self,
        cls: type,
        flatten: Callable[[Any], tuple[list[Any], Any]],
        unflatten: Callable[[Any, Any], Any],
    ) -> None:
        _pytree.register_pytree_node(
            cls,
            flatten,
            lambda children, metadata: unflatten(metadata, children),
            serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
        )

    def register(self, layer: Any) -> None:
        # Keras does so after `build` only, too late for `Adam(net.parameters())`.
        if not in_stateless_scope():
            layer._track_variables()

    def write(self, tensors: Sequence[Tensor], values: Sequence[Tensor]) -> bool:
        # Torch refuses to change a leaf that requires gradients in place, unless nothing is recorded. One call for all,
        # since to start an operation takes longer than to copy a small tensor.
        with torch.no_grad():
            torch._foreach_copy_(list(tensors), list(values))
        return True

    def wrap(
        self,
        fn: FlatFunction,
        roles: tuple[Role, ...],
        platforms: tuple[str, ...] | None,
    ) -> BridgedFunction:
        return _Function(fn, roles, self._aliases)


class _Alias(NamedTuple):
    """The memory of a tensor as a JAX array, and the signs by which the tensor still is that memory."""

    array: jax.Array
    pointer: int
    shape: torch.Size
    dtype: torch.dtype


class _Aliases:
    """JAX arrays that alias the tensors of variables.

    Torch writes to tensors in place, so one alias serves every call. JAX takes it for immutable: wait for the result
    of a call before torch goes on.
    """

    def __init__(self):
        self._kept = Kept()

    def array(self, tensor: Tensor) -> Array:
        """Return the tensor as a JAX array."""
        alias = self._kept.get(tensor)
        # `from_dlpack` costs about 35 µs. These checks cost little, and notice `tensor.data = other` and a cast.
        if (
            alias is not None
            and alias.pointer == tensor.data_ptr()
            and alias.shape == tensor.shape
            and alias.dtype is tensor.dtype
            and tensor.is_contiguous()
        ):
            return alias.array
        pointer = tensor.data_ptr()
        if pointer % ALIGNMENT or not tensor.is_contiguous():
            return _to_jax(tensor)  # JAX copies it anyway
        array = _from_dlpack(tensor)
        # If JAX has copied all the same, the array would not follow what torch writes.
        if array.unsafe_buffer_pointer() == pointer:
            self._kept.put(tensor, _Alias(array, pointer, tensor.shape, tensor.dtype))
        return array


class _Function:
    """A flat function on torch tensors, with its vjps, each made when first needed."""

    def __init__(self, fn: FlatFunction, roles: tuple[Role, ...], aliases: _Aliases):
        self._fn = fn
        self._roles = roles
        self._aliases = aliases
        self._converters = [aliases.array if role.held else _to_jax for role in roles]
        self._differentiable = [i for i, role in enumerate(roles) if role.differentiable]
        self._states = [i for i, role in enumerate(roles) if role is Role.STATE]
        self._plain = jax.jit(own_outputs(fn))
        self._linearized: dict[tuple[int, ...], tuple[Callable[..., Any], list[Pullback]]] = {}
        self._vjps: dict[tuple[tuple[int, ...], int], _Function] = {}

    def __call__(self, *tensors: Tensor) -> FlatResult:
        tensors = tuple([t if isinstance(t, torch.Tensor) else _as_tensor(t) for t in tensors])
        if not all(tensor.is_cpu for tensor in tensors):
            # Keras infers shapes on torch by calling a layer on `meta` tensors.
            if any(tensor.is_meta for tensor in tensors):
                return self._infer(tensors)
            _check_devices(tensors)
        if torch.is_grad_enabled():
            wrt = tuple([i for i in self._differentiable if tensors[i].requires_grad])
            if wrt:
                return self._call_recorded(wrt, tensors)
        outputs, aux, static = self._plain(*self.arrays(tensors))
        outputs, aux = _to_torch(outputs, aux)
        return FlatResult(outputs, aux, static)

    def arrays(self, tensors: Sequence[Tensor]) -> list[Array]:
        """Convert the arguments to what JAX takes."""
        return [convert(t) for convert, t in zip(self._converters, tensors, strict=True)]

    def array(self, tensors: Sequence[Tensor], index: int) -> Array:
        """Convert one of the arguments."""
        return self._converters[index](tensors[index])

    def vjp(self, wrt: tuple[int, ...], cotangents: int) -> _Function:
        """Return the vjp with respect to the arguments `wrt`, itself on tensors and differentiable."""
        key = (wrt, cotangents)
        if key not in self._vjps:
            pullback = vjp(self._fn, wrt, len(self._roles))
            roles = vjp_roles(self._roles, cotangents)
            self._vjps[key] = _Function(pullback, roles, self._aliases)
        return self._vjps[key]

    def kept(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the arguments for `backward`, with a copy of those that are overwritten until then."""
        kept = list(tensors)
        for index in self._states:
            kept[index] = tensors[index].clone()
        return kept

    def linearize(self, wrt: tuple[int, ...], tensors: Sequence[Tensor]) -> tuple[Any, Any, Any]:
        """Return the result as JAX arrays, the residuals, and their `Pullback`."""
        if wrt not in self._linearized:
            linearized = Linearized(own_outputs(self._fn), wrt, self._states)
            self._linearized[wrt] = (jax.jit(linearized), linearized.pullbacks)
        jitted, pullbacks = self._linearized[wrt]
        result, residuals, static = jitted(*self.arrays(tensors))
        return result, residuals, pullbacks[static.value]

    def _call_recorded(self, wrt: tuple[int, ...], tensors: tuple[Tensor, ...]) -> FlatResult:
        counted: list[Any] = []
        flat = _Record.apply(self, wrt, counted, *tensors)
        count, static = counted
        return FlatResult(flat[:count], flat[count:], static)

    def _infer(self, tensors: Iterable[Tensor]) -> FlatResult:
        specs = [
            jax.ShapeDtypeStruct(tensor.shape, str(tensor.dtype).removeprefix("torch."))
            for tensor in tensors
        ]
        outputs, aux, static = jax.eval_shape(self._fn, *specs)
        return FlatResult(tuple(map(_to_meta, outputs)), tuple(map(_to_meta, aux)), static)


class _Record(torch.autograd.Function):
    """Puts one call of a `_Function` on torch's tape."""

    @staticmethod
    def forward(ctx, function: _Function, wrt, counted, *tensors):  # type: ignore[override]
        (outputs, aux, static), residuals, ctx.pullback = function.linearize(wrt, tensors)
        counted += [len(outputs), static]
        outputs, aux = _to_torch(outputs, aux)
        # Torch raises when they are read back in `backward` if one was changed in place, as for its own layers.
        # It frees after `backward` what was saved so, and nothing else on `ctx`: a kept loss would keep the residuals.
        # They are JAX arrays, so an empty tensor carries them.
        carrier: Any = torch.empty(0)
        carrier.residuals = residuals
        ctx.save_for_backward(*function.kept(tensors), carrier)
        # Else torch would make zeros for `aux` and for integers, which nothing reads.
        ctx.set_materialize_grads(False)
        ctx.function, ctx.wrt = function, wrt
        floats = [output.is_floating_point() or output.is_complex() for output in outputs]
        ctx.floats = [
            (index, output.shape, output.dtype, output.device)
            for index, output in enumerate(outputs)
            if floats[index]
        ]
        ctx.mark_non_differentiable(
            *(output for output, is_float in zip(outputs, floats, strict=True) if not is_float),
            *aux,
        )
        return (*outputs, *aux)

    @staticmethod
    @torch.compiler.disable  # a compiled training step would trace it
    def backward(ctx, *cotangents):  # type: ignore[override]
        *tensors, carrier = ctx.saved_tensors
        # Hooks of saved tensors, such as those of `torch.utils.checkpoint`, return another tensor, without them.
        residuals = getattr(carrier, "residuals", None)
        received = [
            torch.zeros(shape, dtype=dtype, device=device)
            if cotangents[index] is None
            else cotangents[index]
            for index, shape, dtype, device in ctx.floats
        ]
        if torch.is_grad_enabled() or residuals is None:
            # backward(create_graph=True): the gradient must be differentiable as well
            pullback = ctx.function.vjp(ctx.wrt, len(received))
            gradients = pullback(*tensors, *received).outputs
        else:
            arguments = [ctx.function.array(tensors, index) for index in ctx.pullback.arguments]
            arrays = ctx.pullback.packed(*arguments, *residuals, *map(_to_jax, received))
            gradients = _gradients([tensors[index] for index in ctx.wrt], *arrays)
        # `forward` takes three arguments before the tensors.
        result: list[Any] = [None] * (3 + len(tensors))
        for index, gradient in zip(ctx.wrt, gradients, strict=True):
            # JAX computes in 32 bits for 64, and torch demands the dtype of the tensor.
            dtype = tensors[index].dtype
            result[3 + index] = gradient if gradient.dtype is dtype else gradient.to(dtype)
        return tuple(result)


def _gradients(
    tensors: Sequence[Tensor], vectors: dict[tuple[int, ...], Array], others: dict[int, Array]
) -> list[Tensor]:
    """Return the gradients for tensors, from the result of a `Pullback`."""
    gradients: list[Any] = [None] * len(tensors)
    flat, alone = _to_torch(vectors.values(), others.values())
    for group, vector in zip(vectors, flat, strict=True):
        parts = _unflatten_dense_tensors(vector, [tensors[index] for index in group])
        for index, part in zip(group, parts, strict=True):
            gradients[index] = part
    for index, gradient in zip(others, alone, strict=True):
        gradients[index] = gradient
    return gradients


def _as_tensor(value: Any) -> Tensor:
    if isinstance(value, jax.Array):
        return torch.from_dlpack(value)
    # A copy, since torch would share the memory of an array that may be read-only.
    return torch.from_numpy(np.array(value))


def _to_jax(tensor: Tensor) -> Array:
    """Convert a tensor to a NumPy view where JAX can read that, since it takes less time than dlpack."""
    if tensor.is_cpu and tensor.dtype in _NUMPY_DTYPES and _jax_is_on_cpu():
        # A tensor may be the conjugate or the negative of its memory: a bit says so, which JAX does not see.
        return tensor.detach().resolve_conj().resolve_neg().numpy()
    return _from_dlpack(tensor)


def _from_dlpack(tensor: Tensor) -> jax.Array:
    return jax.dlpack.from_dlpack(tensor.detach().contiguous().resolve_conj().resolve_neg())


@functools.cache
def _jax_is_on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def _check_devices(tensors: Sequence[Tensor]) -> None:
    """Raise RuntimeError for tensors on several devices, or on one that JAX does not have."""
    devices = sorted({str(tensor.device) for tensor in tensors})
    if len(devices) > 1:
        raise RuntimeError(
            f"the tensors are on several devices: {', '.join(devices)}. JAX computes on one; move them with "
            "`tensor.to(device)`, and the layers with `keras.device(...)` around what makes them."
        )
    if not tensors[0].is_cuda or not _jax_has_cuda():
        raise RuntimeError(
            f"the tensors are on {devices[0]}, and JAX has {', '.join(map(str, jax.devices()))} only. Install JAX for "
            'that device (`pip install "jax[cuda12]"`), or keep the model on the CPU: `keras.device("cpu:0")`, and '
            "`tensor.cpu()` for a copy."
        )
    # A kept alias does not wait for what torch still has to write.
    torch.cuda.current_stream(tensors[0].device).synchronize()


@functools.cache
def _jax_has_cuda() -> bool:
    try:
        return bool(jax.devices("cuda"))
    except RuntimeError:
        return False


def _to_torch(*groups: Collection[jax.Array]) -> tuple[tuple[Tensor, ...], ...]:
    # Once these are ready, JAX has read its inputs, whose memory torch may now overwrite.
    for group in groups:
        for array in group:
            array.block_until_ready()
    return tuple(
        tuple([torch.from_dlpack(array.__dlpack__()) for array in group]) for group in groups
    )


def _to_meta(spec: jax.ShapeDtypeStruct) -> Tensor:
    return torch.empty(spec.shape, dtype=getattr(torch, spec.dtype.name), device="meta")
