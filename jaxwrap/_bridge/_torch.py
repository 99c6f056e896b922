"""PyTorch: tensors over dlpack, and an autograd function for each flat function."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import torch
import torch.distributed as dist
from keras.src.backend.common.stateless_scope import in_stateless_scope
from torch.utils import _pytree

from jaxwrap._bridge._base import Bridge, BridgedFunction
from jaxwrap._bridge._memory import host_copies
from jaxwrap._bridge._torch_autograd import Function
from jaxwrap._bridge._torch_distributed import agreed, check_whole, world_size
from jaxwrap._bridge._torch_func import check_randomness, check_unmapped
from jaxwrap._bridge._torch_modules import misses_optimizer, register
from jaxwrap._bridge._torch_tensors import NUMPY_DTYPES
from jaxwrap._dense import check_dense
from jaxwrap._dtypes import check_dtype
from jaxwrap._typing import Array, FlatFunction, Role, Tensor


class TorchBridge(Bridge):
    """The bridge of PyTorch: ordinary tensors in and out, differentiable by `torch.autograd`."""

    name = "torch"

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

    def copies(
        self, arrays: Sequence[Array | np.ndarray], shardings: Sequence[Any]
    ) -> Iterator[Any]:
        for copy in host_copies(arrays):
            # The tensor shares the memory of the copy, which is aligned so that JAX can alias it in its turn.
            yield torch.from_numpy(copy) if copy.dtype.name in NUMPY_DTYPES.values() else copy

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
            register(layer)

    def check_draws(self) -> None:
        check_randomness()

    def misses_optimizer(self, layer: Any) -> bool:
        return misses_optimizer(layer)

    def for_replica(self, seeds: Sequence[Tensor], distinct: bool | None) -> Sequence[Tensor]:
        # Processes may share the work of one model in any way. So draw other numbers only for who asks for it.
        if not distinct or world_size() == 1:
            return seeds
        return [torch.cat([seed, seed.new_tensor([dist.get_rank()])]) for seed in seeds]

    def agreed(self, tensors: Sequence[Tensor], mean: bool) -> Sequence[Tensor] | None:
        return agreed(tensors, mean)

    def check_whole(self, layer: Any, variables: Sequence[Any]) -> None:
        check_whole(layer, variables)

    def write(self, tensors: Sequence[Tensor], values: Sequence[Tensor]) -> bool:
        check_unmapped(values)
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
        return Function(fn, roles)
