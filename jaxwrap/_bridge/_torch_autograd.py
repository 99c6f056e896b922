"""Flat functions on torch's tape: forward and backward, each jitted."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import torch
from torch._utils import _unflatten_dense_tensors

from jaxwrap._bridge._packing import pack
from jaxwrap._bridge._residuals import Linearized, Pullback
from jaxwrap._bridge._torch_func import (
    check_untraced,
    is_batched,
    is_transforming,
    jvp,
    transformed,
    vmap,
    vmap_roles,
)
from jaxwrap._bridge._torch_tape import note_outputs, received, returned
from jaxwrap._bridge._torch_tensors import Reader, as_tensor, check_devices, to_jax, to_torch
from jaxwrap._bridge._vjp import own_outputs, vjp, vjp_roles
from jaxwrap._typing import Array, FlatFunction, FlatResult, Role, Static, Tensor


class Function:
    """A flat function on torch tensors, with its derivatives, each made when first needed."""

    def __init__(self, fn: FlatFunction, roles: tuple[Role, ...]):
        self._fn = fn
        self._roles = roles
        self._arity = len(roles)
        self._inputs = [i for i, role in enumerate(roles) if not role.held]
        self._seen = [*self._inputs, *[i for i, role in enumerate(roles) if role.held][:1]]
        self._read = Reader(roles, range(len(roles)))
        self._differentiable = [i for i, role in enumerate(roles) if role.differentiable]
        self._states = [i for i, role in enumerate(roles) if role is Role.STATE]
        self._plain = jax.jit(_with_packed_aux(own_outputs(fn)))
        self._linearized: dict[tuple[int, ...], tuple[Callable[..., Any], list[Pullback]]] = {}
        self._readers: dict[Pullback, Reader] = {}
        self._derived: dict[tuple[Any, ...], Function] = {}

    def __call__(self, *tensors: Tensor) -> FlatResult:
        for index in self._inputs:
            if not isinstance(tensors[index], torch.Tensor):
                tensors = (*tensors[:index], as_tensor(tensors[index]), *tensors[index + 1 :])
        # One tensor stands for all variables. `Reader` looks at the others when they are new.
        if not all(tensors[index].is_cpu for index in self._seen):
            # Keras infers shapes on torch by calling a layer on `meta` tensors.
            if any(tensor.is_meta for tensor in tensors):
                return self._infer(tensors)
            check_devices(tensors)
        check_untraced()
        if is_transforming():
            return transformed(self, self.kept(tensors))
        if torch.is_grad_enabled():
            wrt = tuple([i for i in self._differentiable if tensors[i].requires_grad])
            if wrt:
                return self._call_recorded(wrt, tensors)
        return self.compute(tensors)

    def compute(self, tensors: Sequence[Tensor]) -> FlatResult:
        """Call the function on tensors with data. Nothing is recorded."""
        outputs, vectors, others, static = self._plain(*self.arrays(tensors))
        outputs, vectors, others = to_torch(outputs, vectors, others)
        static, (groups, alone), shapes = static.value
        if not groups:
            return FlatResult(outputs, others, static)
        aux: list[Any] = [None] * len(shapes)
        _unpack(aux, groups, vectors, _templates(shapes))
        for index, array in zip(alone, others, strict=True):
            aux[index] = array
        return FlatResult(outputs, tuple(aux), static)

    def arrays(self, tensors: Sequence[Tensor]) -> list[Array]:
        """Convert the arguments to what JAX takes."""
        return self._read(tensors)

    def arrays_for(self, pullback: Pullback, tensors: Sequence[Tensor]) -> list[Array]:
        """Convert the arguments that a pullback needs."""
        reader = self._readers.get(pullback)
        if reader is None:
            reader = self._readers[pullback] = Reader(self._roles, pullback.arguments)
        return reader(tensors)

    def vjp(self, wrt: tuple[int, ...], cotangents: int) -> Function:
        """Return the vjp with respect to the arguments `wrt`, itself on tensors and differentiable."""
        roles = vjp_roles(self._roles, cotangents)
        return self._derive(
            ("vjp", wrt, cotangents), lambda: vjp(self._fn, wrt, self._arity), roles
        )

    def jvp(self, wrt: tuple[int, ...]) -> Function:
        """Return the jvp with respect to the arguments `wrt`, itself on tensors and differentiable."""
        roles = vjp_roles(self._roles, len(wrt))
        return self._derive(("jvp", wrt), lambda: jvp(self._fn, wrt, self._arity), roles)

    def vmap(self, axes: tuple[int | None, ...]) -> Function:
        """Return the function over these axes of its arguments, itself on tensors and differentiable."""
        roles = vmap_roles(self._roles, axes)
        return self._derive(("vmap", axes), lambda: vmap(self._fn, axes), roles)

    def _derive(
        self, key: tuple[Any, ...], make: Callable[[], FlatFunction], roles: tuple[Role, ...]
    ) -> Function:
        if key not in self._derived:
            self._derived[key] = Function(make(), roles)
        return self._derived[key]

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
    """Puts one call of a `Function` on torch's tape."""

    @staticmethod
    def forward(ctx, function: Function, wrt, counted, *tensors):  # type: ignore[override]
        (outputs, aux, static), residuals, ctx.pullback = function.linearize(wrt, tensors)
        counted += [len(outputs), static]
        outputs, aux = to_torch(outputs, aux)
        # Torch raises when they are read back in `backward` if one was changed in place, as for its own layers.
        # It frees after `backward` what was saved so, and nothing else on `ctx`: a kept loss would keep the residuals.
        # They are JAX arrays, so an empty tensor carries them.
        carrier: Any = torch.empty(0)
        carrier.residuals = residuals
        ctx.save_for_backward(*function.kept(tensors), carrier)
        ctx.function, ctx.wrt = function, wrt
        note_outputs(ctx, outputs, aux)
        return (*outputs, *aux)

    @staticmethod
    @torch.compiler.disable  # a compiled training step would trace it
    def backward(ctx, *cotangents):  # type: ignore[override]
        *tensors, carrier = ctx.saved_tensors
        # Hooks of saved tensors, such as those of `torch.utils.checkpoint`, return another tensor, without them.
        residuals = getattr(carrier, "residuals", None)
        cotangents = received(ctx, cotangents)
        if is_batched(cotangents):
            pullback = ctx.function.vjp(ctx.wrt, len(cotangents))
            gradients = transformed(pullback, [*tensors, *cotangents]).outputs
        elif torch.is_grad_enabled() or residuals is None:
            # backward(create_graph=True): the gradient must be differentiable as well
            pullback = ctx.function.vjp(ctx.wrt, len(cotangents))
            gradients = pullback(*tensors, *cotangents).outputs
        else:
            arguments = ctx.function.arrays_for(ctx.pullback, tensors)
            arrays = ctx.pullback.packed(*arguments, *residuals, *map(to_jax, cotangents))
            gradients = _gradients([tensors[index] for index in ctx.wrt], *arrays)
        # `forward` takes three arguments before the tensors.
        return returned(gradients, ctx.wrt, tensors, 3)


def _gradients(
    tensors: Sequence[Tensor], vectors: dict[tuple[int, ...], Array], others: dict[int, Array]
) -> list[Tensor]:
    """Return the gradients for tensors, from the result of a `Pullback`."""
    gradients: list[Any] = [None] * len(tensors)
    flat, alone = to_torch(vectors.values(), others.values())
    _unpack(gradients, vectors, flat, tensors)
    for index, gradient in zip(others, alone, strict=True):
        gradients[index] = gradient
    return gradients


def _with_packed_aux(fn: FlatFunction) -> Callable[..., Any]:
    """Pack the small auxiliary arrays of a function: new state, which is copied into variables right after."""

    def packing(*arrays: Array) -> tuple[Any, list[Array], list[Array], Static]:
        outputs, aux, static = fn(*arrays)
        vectors, others, places = pack(aux)
        shapes = tuple(tuple(array.shape) for array in aux)
        return outputs, vectors, others, Static((static, places.value, shapes))

    return packing


@functools.lru_cache(512)
def _templates(shapes: tuple[tuple[int, ...], ...]) -> list[Tensor]:
    """Return tensors of these shapes, without data."""
    return [torch.empty(shape, device="meta") for shape in shapes]


def _unpack(
    into: list[Any],
    groups: Iterable[Sequence[int]],
    vectors: Iterable[Tensor],
    templates: Sequence[Tensor],
) -> None:
    """Put the parts of vectors into their places, in the shapes of the templates there."""
    for group, vector in zip(groups, vectors, strict=True):
        parts = _unflatten_dense_tensors(vector, [templates[index] for index in group])
        for index, part in zip(group, parts, strict=True):
            into[index] = part


def _to_meta(spec: jax.ShapeDtypeStruct) -> Tensor:
    return torch.empty(spec.shape, dtype=getattr(torch, spec.dtype.name), device="meta")
