"""`torch.func` and forward-mode AD: JAX transforms the flat function where torch transforms its call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import torch
from jax.interpreters.partial_eval import dce_jaxpr
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad

from jaxwrap._bridge._torch_tape import note_outputs, received, returned
from jaxwrap._bridge._vjp import restrict
from jaxwrap._typing import Array, FlatFunction, FlatResult, Role, Static, Tensor

_transforms_active = torch._C._are_functorch_transforms_active
_is_tracing = torch._C._is_tracing
_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # from PyTorch 2.7 on


def check_untraced() -> None:
    """Raise NotImplementedError in a trace of PyTorch, which would keep the results of a call as constants."""
    if _is_tracing() or _is_exporting():
        raise NotImplementedError(
            "PyTorch cannot trace or export what JAX computes. Write it by `jaxwrap.export(model, path, format=...)`, "
            "as StableHLO, a SavedModel, LiteRT or ONNX."
        )


def is_transforming() -> bool:
    """Whether torch transforms what is called now: by `torch.func`, or in `forward_ad.dual_level()`."""
    return _transforms_active() or forward_ad._current_level >= 0


def transformed(function: Any, tensors: Sequence[Tensor]) -> FlatResult:
    """Call a `Function` so that torch can transform the call, to any depth."""
    if is_batched(tensors):
        return _over_batch(function, tensors)
    outcome = _Outcome()
    flat = _Transformed.apply(function, outcome, *tensors)
    return FlatResult(flat[: outcome.count], flat[outcome.count :], outcome.static)


def is_batched(tensors: Sequence[Tensor]) -> bool:
    """Whether there are tensors of the older `vmap` that `torch.autograd.grad(is_grads_batched=True)` uses."""
    return any(map(torch._C._functorch.is_legacy_batchedtensor, tensors))


def check_unmapped(values: Sequence[Tensor]) -> None:
    """Raise RuntimeError for new values of variables of which `torch.vmap` has one for each example."""
    if _transforms_active() and any(map(_is_mapped, values)):
        raise RuntimeError(
            "under `torch.vmap` the new state depends on the examples that are mapped, and a variable holds one value. "
            "Call the layer by `layer.stateless_call(...)`, which returns the state of each example."
        )


def _is_mapped(tensor: Tensor) -> bool:
    while not torch._C._functorch.is_batchedtensor(tensor):
        if not torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return False
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return True


def check_randomness() -> None:
    """Raise RuntimeError inside a `torch.vmap` whose `randomness` is not "same", for a call that draws."""
    for level in torch._C._functorch.get_interpreter_stack() or ():
        if level.key() != torch._C._functorch.TransformType.Vmap:
            continue
        randomness = torch._C._functorch.CVmapInterpreterPtr(level).randomness()
        if randomness != torch._C._functorch.RandomnessType.Same:
            name = randomness.name.lower()
            raise RuntimeError(
                f'the call draws random numbers under `torch.vmap(randomness="{name}")`, and all examples get the '
                'same. Allow that with `randomness="same"`, call the layer with `training=False`, or pass a key for '
                "each example to a function."
            )


def _over_batch(function: Any, tensors: Sequence[Tensor]) -> FlatResult:
    # It has no rules for functions of Python. Its levels count from 1.
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    axes = tuple(0 if is_batched([tensor]) else None for tensor in tensors)
    whole = (
        # The size is for tensors that are not batched.
        tensor if axis is None else torch._remove_batch_dim(tensor, level, 0, 0)
        for tensor, axis in zip(tensors, axes, strict=True)
    )
    result = function.vmap(axes)(*whole)
    static, is_mapped = result.static.value
    outputs = [torch._add_batch_dim(output, 0, level) for output in result.outputs]
    aux = [
        torch._add_batch_dim(array, 0, level) if each else array
        for array, each in zip(result.aux, is_mapped, strict=True)
    ]
    return FlatResult(tuple(outputs), tuple(aux), static)


class _Outcome:
    """The result of a call besides its tensors. Not a container, which torch would copy on the way."""

    count: int
    static: Static

    def note(self, result: FlatResult, static: Static) -> None:
        """Fill it in."""
        self.count, self.static = len(result.outputs), static


class _Transformed(torch.autograd.Function):
    """One call of a `Function`, with the rules by which torch transforms it.

    `torch.func` calls it once for each transformation around it, from the inner one outwards, with the tensors of that
    level. A rule makes another `Function`, by a transformation of JAX, and calls that: for the levels further out it
    comes back here. Nothing passes from forward to backward but arguments, since residuals of JAX have no levels.
    """

    @staticmethod
    def forward(function, outcome, *tensors):  # type: ignore[override]
        result = function.compute(tensors)
        outcome.note(result, result.static)
        return (*result.outputs, *result.aux)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[override]
        function, outcome, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.function, ctx.total = function, len(output)
        note_outputs(ctx, output[: outcome.count], output[outcome.count :])

    @staticmethod
    @torch.compiler.disable
    def backward(ctx, *cotangents):  # type: ignore[override]
        # The function of `torch.func.vjp` is called when the level of these tensors is gone.
        tensors = unwrap_dead_wrappers(ctx.saved_tensors)
        cotangents = received(ctx, cotangents)
        wrt = tuple(i for i in range(len(tensors)) if ctx.needs_input_grad[2 + i])
        gradients = ctx.function.vjp(wrt, len(cotangents))(*tensors, *cotangents).outputs
        return returned(gradients, wrt, tensors, 2)

    @staticmethod
    def jvp(ctx, _function, _outcome, *tangents):  # type: ignore[override]
        tensors = ctx.saved_tensors
        wrt = tuple(i for i, tangent in enumerate(tangents) if tangent is not None)
        chosen = [tangents[i] for i in wrt]
        derivatives = ctx.function.jvp(wrt)(*tensors, *chosen).outputs
        result: list[Any] = [None] * ctx.total
        for (index, *_), derivative in zip(ctx.floats, derivatives, strict=True):
            result[index] = derivative
        return tuple(result)

    @staticmethod
    def vmap(info, in_dims, function, outcome, *tensors):  # type: ignore[override]
        result = function.vmap(in_dims[2:])(*tensors)
        static, is_mapped = result.static.value
        outcome.note(result, static)
        dims = [0] * len(result.outputs) + [0 if each else None for each in is_mapped]
        return (*result.outputs, *result.aux), tuple(dims)


def jvp(fn: FlatFunction, wrt: tuple[int, ...], arity: int) -> FlatFunction:
    """Return the jvp of a flat function as a flat function, to be bridged, and differentiated, in its turn.

    It takes the `arity` arguments of `fn` and then a tangent for each argument in `wrt`, and returns a tangent for each
    float output.
    """

    def jvp_fn(*arrays: Array) -> FlatResult:
        restricted, primals = restrict(fn, wrt, arrays[:arity])
        _, tangents, _ = jax.jvp(restricted, primals, list(arrays[arity:]), has_aux=True)
        return FlatResult(tuple(tangents), (), Static(None))

    return jvp_fn


def vmap(fn: FlatFunction, axes: tuple[int | None, ...]) -> FlatFunction:
    """Return a flat function over a new axis of some arguments, to be bridged, and differentiated, in its turn.

    Its outputs have the axis in front, and so have those of its auxiliary arrays that depend on such an argument:
    `static` is that of `fn`, and a flag for each. New state that does not depend on them stays one state.
    """

    def mapped(*arrays: Array) -> FlatResult:
        outputs, aux, static = jax.vmap(fn, axes)(*arrays)
        flags = _mapped_aux(fn, axes, arrays) if aux else ()
        aux = tuple(array if flag else array[0] for array, flag in zip(aux, flags, strict=True))
        return FlatResult(outputs, aux, Static((static, flags)))

    return mapped


def _mapped_aux(
    fn: FlatFunction, axes: Sequence[int | None], arrays: Sequence[Array]
) -> tuple[bool, ...]:
    examples = [
        array if axis is None else jax.eval_shape(lambda a, axis=axis: a.take(0, axis), array)
        for array, axis in zip(arrays, axes, strict=True)
    ]
    jaxpr = jax.make_jaxpr(lambda *arrays: fn(*arrays).aux)(*examples).jaxpr
    flags = []
    for place in range(len(jaxpr.outvars)):
        used = dce_jaxpr(jaxpr, [other == place for other in range(len(jaxpr.outvars))])[1]
        flags.append(any(use and axis is not None for use, axis in zip(used, axes, strict=True)))
    return tuple(flags)


def vmap_roles(roles: Sequence[Role], axes: Sequence[int | None]) -> tuple[Role, ...]:
    """Return the roles of the arguments of `vmap`'s function. What is mapped is no variable."""
    return tuple(
        role if axis is None else Role.INPUT if role.differentiable else Role.CONSTANT
        for role, axis in zip(roles, axes, strict=True)
    )
