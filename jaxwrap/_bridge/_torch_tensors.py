"""Tensors of PyTorch as JAX arrays, and back."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from typing import Any

import jax
import numpy as np
import torch
from torch._C._dynamo.guards import TensorGuards

from jaxwrap._bridge._memory import ALIGNMENT, held_runs
from jaxwrap._bridge._torch_distributed import check_plain
from jaxwrap._dtypes import warn_if_narrowed
from jaxwrap._typing import Array, Role, Tensor

# The dtypes that NumPy has as well.
NUMPY_DTYPES = {
    getattr(torch, name): name
    for name in (
        *("float16", "float32", "float64", "complex64", "complex128", "bool"),
        *("int8", "int16", "int32", "int64", "uint8"),
    )
}


class Reader:
    """Converts some of the arguments of a function to JAX arrays."""

    def __init__(self, roles: Sequence[Role], places: Sequence[int]):
        self._places = places
        chosen = [roles[place] for place in places]
        self._runs = [(run, _Held()) for run in held_runs(chosen)]
        self._inputs = [index for index, role in enumerate(chosen) if not role.held]

    def __call__(self, tensors: Sequence[Tensor]) -> list[Array]:
        """Take all arguments, and return an array for each that was chosen."""
        arrays: list[Any] = [tensors[place] for place in self._places]
        for run, held in self._runs:
            arrays[run] = held.arrays(arrays[run])
        for index in self._inputs:
            arrays[index] = to_jax(arrays[index])
        return arrays


class _Held:
    """JAX arrays that alias the tensors of variables, for as long as those lie where they lay.

    Torch writes to tensors in place, so one alias serves every call. JAX takes it for immutable: wait for the result
    of a call before torch goes on.
    """

    def __init__(self):
        self._last = _Aliased([], [])

    def arrays(self, tensors: list[Tensor]) -> list[Array]:
        """Return a JAX array for each tensor."""
        # Read once, since another thread may write.
        last = self._last
        if last.holds(tensors):
            return last.arrays
        if not all(tensor.is_cpu for tensor in tensors):
            check_devices(tensors)
        arrays = list(map(_alias, tensors))
        # A copy would not follow what torch writes.
        if None not in arrays:
            self._last = _Aliased(tensors, arrays)
            return arrays
        return [
            to_jax(tensor) if array is None else array
            for tensor, array in zip(tensors, arrays, strict=True)
        ]


class _Aliased:
    """Aliases of tensors, and the signs by which tensors still are that memory.

    An alias keeps its memory, so whatever lies at its pointer with its dtype, sizes and strides is that memory.
    """

    def __init__(self, tensors: list[Tensor], arrays: list[Array]):
        self.arrays = arrays
        self._pointers = list(map(_pointer, tensors))
        self._guards = _Guards(tensors)

    def holds(self, tensors: list[Tensor]) -> bool:
        """Return whether the aliases are those of these tensors."""
        # Pointers notice `tensor.data = other`. Each loop runs in C: 0.15 µs a tensor, where `from_dlpack` takes 35.
        return list(map(_pointer, tensors)) == self._pointers and self._guards.hold(tensors)


class _Guards:
    """Whether tensors have the types, dtypes, sizes and strides, and bits such as `is_neg`, that others had.

    Torch compares all of them in one call, for `torch.compile`. It takes autocast, and what requires gradients, for
    differences too. Then the others are compared one by one, once for each such setting.
    """

    def __init__(self, tensors: list[Tensor]):
        self._signs = _signs(tensors)
        self._torch = _torch_guards(tensors)

    def hold(self, tensors: list[Tensor]) -> bool:
        """Return whether these tensors have them."""
        if self._torch.check(*tensors):
            return True
        if _signs(tensors) != self._signs:
            return False
        self._torch = _torch_guards(tensors)
        return True


def _signs(tensors: list[Tensor]) -> list[Any]:
    return [
        (type(t), t.dtype, t.size(), t.stride(), t.device, t.is_neg(), t.is_conj()) for t in tensors
    ]


def _torch_guards(tensors: list[Tensor]) -> TensorGuards:
    # None for the sizes and strides that may vary: none of them.
    return TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)


_pointer = torch.Tensor.data_ptr


def _alias(tensor: Tensor) -> Array | None:
    """Return the memory of a tensor as a JAX array, or None if JAX would copy it."""
    check_plain(tensor)
    # After `module.double()`, for example.
    warn_if_narrowed([str(tensor.dtype).removeprefix("torch.")])
    pointer = tensor.data_ptr()
    if pointer % ALIGNMENT or not tensor.is_contiguous() or tensor.is_neg() or tensor.is_conj():
        return None
    array = _from_dlpack(tensor)
    return array if array.unsafe_buffer_pointer() == pointer else None


def as_tensor(value: Any) -> Tensor:
    if isinstance(value, jax.Array):
        return torch.from_dlpack(value)
    # A copy, since torch would share the memory of an array that may be read-only.
    return torch.from_numpy(np.array(value))


def to_jax(tensor: Tensor) -> Array:
    """Convert a tensor to a NumPy view where JAX can read that, since it takes less time than dlpack."""
    check_plain(tensor)
    if tensor.is_cpu and tensor.dtype in NUMPY_DTYPES and _jax_is_on_cpu():
        # With `force`, without its gradient, and resolved: a tensor may be the conjugate or the negative of its memory,
        # and a bit says so, which JAX does not see.
        return tensor.numpy(force=True)
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
