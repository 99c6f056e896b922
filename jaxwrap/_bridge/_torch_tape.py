"""What autograd functions of torch note of their outputs in forward, and do with cotangents in backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from jaxwrap._typing import Tensor


def note_outputs(ctx: Any, outputs: Sequence[Tensor], aux: Sequence[Tensor]) -> None:
    """Note the float outputs, which alone have cotangents, as `ctx.floats`. No gradient flows through the others."""
    # Else torch would make zeros for `aux` and for integers, which nothing reads.
    ctx.set_materialize_grads(False)
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


def received(ctx: Any, cotangents: Sequence[Tensor | None]) -> list[Tensor]:
    """Return a cotangent for each float output: zeros where torch has none."""
    return [
        torch.zeros(shape, dtype=dtype, device=device)
        if (cotangent := cotangents[index]) is None
        else cotangent
        for index, shape, dtype, device in ctx.floats
    ]


def returned(
    gradients: Sequence[Tensor], wrt: Sequence[int], tensors: Sequence[Tensor], others: int
) -> tuple[Tensor | None, ...]:
    """Return what `backward` returns.

    Args:
        gradients: The gradients.
        wrt: The places of their tensors.
        tensors: The tensors that `forward` took.
        others: The number of arguments of `forward` before them.
    """
    result: list[Tensor | None] = [None] * (others + len(tensors))
    for index, gradient in zip(wrt, gradients, strict=True):
        # JAX computes in 32 bits for 64, and torch demands the dtype of the tensor.
        dtype = tensors[index].dtype
        result[others + index] = gradient if gradient.dtype is dtype else gradient.to(dtype)
    return tuple(result)
