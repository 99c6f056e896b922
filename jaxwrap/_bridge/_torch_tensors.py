"""Tensors of PyTorch as JAX arrays, and back."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import torch

from jaxwrap._bridge._memory import ALIGNMENT, Kept
from jaxwrap._bridge._torch_distributed import check_plain
from jaxwrap._dtypes import warn_if_narrowed
from jaxwrap._typing import Array, Tensor

# The dtypes that NumPy has as well.
NUMPY_DTYPES = {
    getattr(torch, name): name
    for name in (
        *("float16", "float32", "float64", "complex64", "complex128", "bool"),
        *("int8", "int16", "int32", "int64", "uint8"),
    )
}


class _Alias(NamedTuple):
    """The memory of a tensor as a JAX array, and the signs by which the tensor still is that memory."""

    array: jax.Array
    pointer: int
    shape: torch.Size
    dtype: torch.dtype
    is_real: bool


class Aliases:
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
            and not tensor.is_neg()
            and (alias.is_real or not tensor.is_conj())
        ):
            return alias.array
        check_plain(tensor)
        # After `module.double()`, for example.
        warn_if_narrowed([str(tensor.dtype).removeprefix("torch.")])
        pointer = tensor.data_ptr()
        if pointer % ALIGNMENT or not tensor.is_contiguous():
            return to_jax(tensor)  # JAX copies it anyway
        array = _from_dlpack(tensor)
        # If JAX has copied all the same, the array would not follow what torch writes.
        if array.unsafe_buffer_pointer() == pointer:
            is_real = not tensor.is_complex()
            alias = _Alias(array, pointer, tensor.shape, tensor.dtype, is_real)
            self._kept.put(tensor, alias)
        return array


def as_tensor(value: Any) -> Tensor:
    if isinstance(value, jax.Array):
        return torch.from_dlpack(value)
    # A copy, since torch would share the memory of an array that may be read-only.
    return torch.from_numpy(np.array(value))


def to_jax(tensor: Tensor) -> Array:
    """Convert a tensor to a NumPy view where JAX can read that, since it takes less time than dlpack."""
    check_plain(tensor)
    if tensor.is_cpu and tensor.dtype in NUMPY_DTYPES and _jax_is_on_cpu():
        # A tensor may be the conjugate or the negative of its memory: a bit says so, which JAX does not see.
        return tensor.detach().resolve_conj().resolve_neg().numpy()
    return _from_dlpack(tensor)


def _from_dlpack(tensor: Tensor) -> jax.Array:
    return jax.dlpack.from_dlpack(tensor.detach().contiguous().resolve_conj().resolve_neg())


@functools.cache
def _jax_is_on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def check_devices(tensors: Sequence[Tensor]) -> None:
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


def to_torch(*groups: Collection[jax.Array]) -> tuple[tuple[Tensor, ...], ...]:
    # Once these are ready, JAX has read its inputs, whose memory torch may now overwrite.
    for group in groups:
        for array in group:
            array.block_until_ready()
    return tuple(
        tuple([torch.from_dlpack(array.__dlpack__()) for array in group]) for group in groups
    )
