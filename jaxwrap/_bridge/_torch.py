"""PyTorch: an autograd function over dlpack, forward and backward both jitted."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
import torch

from jaxwrap._bridge._base import (
    BridgedFunction,
    check_dtype,
    conjugate,
    restrict,
    vjp,
    vjp_roles,
)
from jaxwrap._typing import Array, FlatFunction, FlatResult, Role, Tensor


class TorchBridge:
    """The bridge of PyTorch: ordinary tensors in and out, differentiable by `torch.autograd`."""

    name = "torch"

    def is_tensor(self, leaf: Any) -> bool:
        return isinstance(leaf, (torch.Tensor, jax.Array, np.ndarray, np.generic))

    def spec(self, tensor: Tensor) -> tuple[tuple[int | None, ...], str]:
        name = str(tensor.dtype).removeprefix("torch.")
        check_dtype(name)
        return tuple(tensor.shape), name

    def opaque(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compiler.disable(fn)

    def wrap(
        self,
        fn: FlatFunction,
        roles: tuple[Role, ...],
        platforms: tuple[str, ...] | None,
    ) -> BridgedFunction:
        return _Function(fn, roles)


class _Function:
    """A flat function on torch tensors, with its vjps, each made when first needed."""

    def __init__(self, fn: FlatFunction, roles: tuple[Role, ...]):
        self._fn = fn
        self._roles = roles
        self._vjps: dict[tuple[tuple[int, ...], int], _Function] = {}
        self._plain = jax.jit(fn)
        self._linearized = jax.jit(self._linearize, static_argnums=0)
        self.pull_back = jax.jit(_pull_back)

    def __call__(self, *tensors: Tensor) -> FlatResult:
        tensors = tuple(map(_as_tensor, tensors))
        if any(tensor.is_meta for tensor in tensors):
            return self._infer(tensors)
        if torch.is_grad_enabled():
            wrt = tuple(
                index
                for index, (tensor, role) in enumerate(zip(tensors, self._roles, strict=True))
                if role is Role.DIFFERENTIABLE and tensor.requires_grad
            )
            if wrt:
                return self._call_recorded(wrt, tensors)
        outputs, aux, static = self._plain(*map(_to_jax, tensors))
        return FlatResult(_to_torch(outputs), _to_torch(aux), static)

    def vjp(self, wrt: tuple[int, ...], cotangents: int) -> _Function:
        """The vjp with respect to the arguments `wrt`, itself on tensors and differentiable."""
        key = (wrt, cotangents)
        if key not in self._vjps:
            pullback = vjp(self._fn, wrt, len(self._roles))
            self._vjps[key] = _Function(pullback, vjp_roles(self._roles, cotangents))
        return self._vjps[key]

    def kept(self, tensors: tuple[Tensor, ...]) -> list[Tensor]:
        """What `backward` may need of the arguments: themselves, or a copy of what will be overwritten."""
        return [
            tensor.clone() if role is Role.STATE else tensor
            for tensor, role in zip(tensors, self._roles, strict=True)
        ]

    def linearize(self, wrt: tuple[int, ...], tensors: Iterable[Tensor]) -> tuple[FlatResult, Any]:
        """The result as JAX arrays, and the pullback that holds the residuals."""
        return self._linearized(wrt, *map(_to_jax, tensors))

    def _linearize(self, wrt: tuple[int, ...], *arrays: Array) -> tuple[FlatResult, Any]:
        restricted, primals = restrict(self._fn, wrt, arrays)
        floats, pullback, (others, aux, static) = jax.vjp(restricted, *primals, has_aux=True)
        remaining = iter(floats)
        outputs = tuple(next(remaining) if other is None else other for other in others)
        return FlatResult(outputs, aux, static), pullback

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
        (outputs, aux, static), ctx.pullback = function.linearize(wrt, tensors)
        counted += [len(outputs), static]
        outputs, aux = _to_torch(outputs), _to_torch(aux)
        # Reading them back in `backward` makes torch raise, as for its own layers, if one was changed in place.
        ctx.save_for_backward(*function.kept(tensors))
        ctx.set_materialize_grads(False)
        ctx.function, ctx.wrt = function, wrt
        ctx.floats = [
            (index, output.shape, output.dtype)
            for index, output in enumerate(outputs)
            if output.is_floating_point() or output.is_complex()
        ]
        differentiable = {index for index, _, _ in ctx.floats}
        ctx.mark_non_differentiable(
            *(output for index, output in enumerate(outputs) if index not in differentiable), *aux
        )
        return (*outputs, *aux)

    @staticmethod
    @torch.compiler.disable  # inside a compiled training step `loss.backward()` would have it traced
    def backward(ctx, *cotangents):  # type: ignore[override]
        tensors = ctx.saved_tensors
        received = [
            torch.zeros(shape, dtype=dtype) if cotangents[index] is None else cotangents[index]
            for index, shape, dtype in ctx.floats
        ]
        if (
            torch.is_grad_enabled()
        ):  # backward(create_graph=True): its own derivative will be asked for
            pullback = ctx.function.vjp(ctx.wrt, len(received))
            gradients = pullback(*tensors, *received).outputs
        else:
            gradients = _to_torch(ctx.function.pull_back(ctx.pullback, *map(_to_jax, received)))
        result: list[Any] = [None] * len(tensors)
        for index, gradient in zip(ctx.wrt, gradients, strict=True):
            result[index] = gradient.to(tensors[index].dtype)
        return (None, None, None, *result)


def _pull_back(pullback: Any, *cotangents: Array) -> tuple[Array, ...]:
    gradients = pullback([conjugate(cotangent) for cotangent in cotangents])
    return tuple(conjugate(gradient) for gradient in gradients)


def _as_tensor(value: Any) -> Tensor:
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, jax.Array):
        return torch.from_dlpack(value)
    return torch.from_numpy(np.array(value))


def _to_jax(tensor: Tensor) -> jax.Array:
    return jax.dlpack.from_dlpack(tensor.detach().contiguous().resolve_conj().resolve_neg())


def _to_torch(arrays: Iterable[jax.Array]) -> tuple[Tensor, ...]:
    # Once these are ready, JAX has read its inputs, which alias tensors that torch may now write to.
    return tuple(map(torch.from_dlpack, jax.block_until_ready(tuple(arrays))))


def _to_meta(spec: jax.ShapeDtypeStruct) -> Tensor:
    return torch.empty(spec.shape, dtype=getattr(torch, spec.dtype.name), device="meta")
