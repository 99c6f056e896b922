"""Processes of `torch.distributed`: one value for all of them, and parameters that are split among them."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from keras.src.backend.common.global_state import get_global_attribute

from jaxwrap._typing import Tensor

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_REMEDY = (
    "A JAX function needs whole tensors. Replicate the model by `torch.nn.parallel.DistributedDataParallel`; to split "
    "a model among devices, use the JAX backend and `keras.distribution`."
)


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if _is_initialized() else 1


def _is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def agreed(tensors: Sequence[Tensor], mean: bool) -> Sequence[Tensor] | None:
    """Return the mean of each tensor over all processes, or its value in the first one. See `Bridge.agreed`."""
    if not _is_initialized() and (count := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise RuntimeError(
            f"this is one of {count} processes (WORLD_SIZE), which do not know each other yet. Call "
            "`torch.distributed.init_process_group` before."
        )
    if world_size() == 1:
        return None
    with torch.no_grad():
        return _means(tensors) if mean else _firsts(tensors)


def _firsts(tensors: Sequence[Tensor]) -> list[Tensor]:
    # In one message of bytes, since there are dtypes that not every library sends.
    flat = [tensor.detach().contiguous().reshape(-1) for tensor in tensors]
    message = torch.cat([part.view(torch.uint8) for part in flat])
    dist.broadcast(message, src=0)
    parts = message.split([part.numel() * part.element_size() for part in flat])
    return [
        # A copy begins where any dtype may begin.
        part.clone().view(tensor.dtype).reshape(tensor.shape)
        for part, tensor in zip(parts, tensors, strict=True)
    ]


def _means(tensors: Sequence[Tensor]) -> list[Tensor]:
    # In one message of a dtype that loses nothing.
    wide = torch.float64 if any(tensor.dtype.itemsize >= 8 for tensor in tensors) else torch.float32
    flat = [_real(tensor.detach()).to(wide).reshape(-1) for tensor in tensors]
    message = torch.cat(flat)
    dist.all_reduce(message)
    parts = (message / dist.get_world_size()).split([part.numel() for part in flat])
    return [_shaped(part, tensor) for part, tensor in zip(parts, tensors, strict=True)]


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _shaped(part: Tensor, tensor: Tensor) -> Tensor:
    if not tensor.is_complex():
        return part.to(tensor.dtype).reshape(tensor.shape)
    return torch.view_as_complex(part.reshape(*tensor.shape, 2)).to(tensor.dtype)


def check_plain(tensor: Tensor, name: str = "an argument") -> None:
    """Raise RuntimeError for a tensor of which each process holds a part."""
    if _is_split(tensor):
        raise RuntimeError(
            f"{name} is a DTensor of shape {tuple(tensor.shape)}, {', '.join(map(str, tensor.placements))}, as "
            f"`fully_shard`, `parallelize_module` and `distribute_tensor` make them. {_REMEDY} "
            "`tensor.full_tensor()` makes a whole tensor of one."
        )


def check_whole(layer: Any, variables: Sequence[Any]) -> None:
    """Raise RuntimeError if the Keras model around a layer has parameters that are not those of its layers.

    `fully_shard` puts other ones into a module. A layer follows, but a model of Keras has a list of its own, and its
    layers would go on with their variables, in each process alone.
    """
    if not _is_initialized():
        return
    for variable in variables:
        check_plain(variable._value, variable.path)
    # All of a layer are replaced together, so one of those that are trained is enough.
    variable = next((v for v in variables if v._value.requires_grad), None)
    if variable is None or not torch.is_grad_enabled():
        return
    context = get_global_attribute("current_call_ctx")
    around = layer if context is None else context.entry_layer
    path, value = variable.path, variable._value
    for module in torch.nn.Module.modules(around):
        found = module._parameters.get(path)
        if found is not None and found is not value and (_is_split(found) or _has_sharded()):
            raise RuntimeError(
                f"{path} has other values in {type(around).__name__} {around.name!r} than in its layer, as after "
                f"`fully_shard` or `distribute_module`: each process would train by itself. {_REMEDY}"
            )


def _has_sharded() -> bool:
    """Whether `fully_shard` has been called."""
    # Torch makes a class of each class of modules. Not imported here, since that takes time.
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and bool(fsdp.FSDPModule.__subclasses__())


def _is_split(tensor: Tensor) -> bool:
    # Almost all are of these classes, and to import the other one takes time.
    if type(tensor) in _PLAIN:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)
