"""The interface of a bridge, with defaults for backends whose tensors are immutable arrays."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Protocol

import jax
import numpy as np

from jaxwrap._dtypes import check_dtype
from jaxwrap._typing import Array, FlatFunction, FlatResult, Role, Tensor


class BridgedFunction(Protocol):
    """A flat function made callable, and differentiable, on one backend's tensors."""

    def __call__(self, *tensors: Tensor) -> FlatResult:
        """Take and return tensors where the flat function takes and returns arrays."""
        ...


class Bridge(abc.ABC):
    """One backend. A bridge knows arrays and tensors, but not Keras, layers or pytrees.

    Attributes:
        name: The name of the Keras backend.
        shards: Whether Keras divides variables over devices.
    """

    name: ClassVar[str]
    shards: ClassVar[bool] = False

    def is_tensor(self, leaf: Any) -> bool:
        """Whether the functions of `wrap` take `leaf`: a tensor, or a JAX or NumPy array."""
        return isinstance(leaf, (jax.Array, np.ndarray, np.generic))

    @abc.abstractmethod
    def is_concrete(self, leaf: Any) -> bool:
        """Whether `leaf` is a tensor of the backend that holds data, and not a tracer."""

    def spec(self, tensor: Tensor) -> tuple[tuple[int | None, ...], str]:
        """Return the shape, with None for a size unknown while tracing, and the name of the dtype.

        Raises:
            TypeError: For a dtype that JAX does not have.
            ValueError: For a tensor of unknown rank.
        """
        check_dtype(str(tensor.dtype))
        return tuple(tensor.shape), str(tensor.dtype)

    def opaque(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Keep the backend's own compiler from rewriting the Python code of `fn` and of what it calls."""
        return fn

    @abc.abstractmethod
    def copies(
        self, arrays: Sequence[Array | np.ndarray], shardings: Sequence[Any]
    ) -> Iterator[Any]:
        """Yield a copy of each array, which Keras makes the value of a variable without another copy.

        Where Keras always copies, drop each before asking for the next, so that memory holds one of them at a time.

        Args:
            arrays: The arrays.
            shardings: For each the sharding of JAX that its copy gets, or None. All None unless `shards`.
        """

    def write(self, tensors: Sequence[Tensor], values: Sequence[Tensor]) -> bool:
        """Write values over tensors of the same shapes and dtypes, all by one call, if tensors can change.

        Returns:
            Whether they can. If not, nothing has been done.
        """
        return False

    def register_node(
        self,
        cls: type,
        flatten: Callable[[Any], tuple[list[Any], Any]],
        unflatten: Callable[[Any, Any], Any],
    ) -> None:
        """Make a class of containers known to the trees that Keras uses on this backend.

        Args:
            cls: The class.
            flatten: Returns the children of a node, and metadata.
            unflatten: Takes metadata and children, and returns the node.
        """
        import optree

        optree.register_pytree_node(cls, flatten, unflatten, namespace="keras")  # type: ignore[arg-type]

    def register(self, layer: Any) -> None:  # noqa: B027 (most backends have nothing to do)
        """Register the variables that a layer has now with the backend's own module, if it has one."""

    def check_draws(self) -> None:  # noqa: B027 (most backends have nothing to refuse)
        """Raise RuntimeError if the backend transforms what is called now, and its user allows no random numbers."""

    def misses_optimizer(self, layer: Any) -> bool:
        """Return whether an optimizer of the backend most likely misses the variables that a layer just got."""
        return False

    def lifted(self) -> contextlib.AbstractContextManager[Any]:
        """Enter a scope in which variables can be read and made while a training step is traced around it."""
        return contextlib.nullcontext()

    def dense(self, gradient: Any) -> Tensor:
        """Turn a gradient into a tensor, where the backend has other kinds of gradients too."""
        return gradient

    def is_replica(self) -> bool:
        """Whether what is called now is the step of one of several replicas of the backend."""
        return False

    def for_replica(self, seeds: Sequence[Tensor], distinct: bool | None) -> Sequence[Tensor]:
        """Return the seeds of this replica, among several that draw numbers of their own.

        Args:
            seeds: Integer tensors of shape (2,).
            distinct: Whether replicas draw different numbers. None for what the backend does by default.

        Returns:
            The seeds, or tensors of shape (3,) with the number of the replica at the end.
        """
        return seeds

    def summed(self, gradients: list[Tensor]) -> list[Tensor]:
        """Return the sums over all replicas that run the present training step."""
        return gradients

    def gathered(self, tensor: Tensor) -> Tensor:
        """Return the batches of all replicas that run the present step, one after the other."""
        return tensor

    def agreed(self, tensors: Sequence[Tensor], mean: bool) -> Sequence[Tensor] | None:
        """Return one value for the copies that replicas have of each tensor, their mean or that of the first replica.

        Returns:
            The values. None if there is only one copy.

        Raises:
            RuntimeError: If there are several copies, and this process cannot know the others.
        """
        return None

    def check_whole(self, layer: Any, variables: Sequence[Any]) -> None:  # noqa: B027 (nothing to refuse)
        """Raise RuntimeError if the backend has put other parameters around a layer than its variables."""

    def mesh(self) -> jax.sharding.Mesh | None:
        """Return the devices of the distribution that is set now, if the backend's tensors are arrays on them."""
        return None

    def on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        """Enter a scope in which JAX functions see the mesh of `mesh`, if there is one."""
        return contextlib.nullcontext()

    @abc.abstractmethod
    def wrap(
        self,
        fn: FlatFunction,
        roles: tuple[Role, ...],
        platforms: tuple[str, ...] | None,
    ) -> BridgedFunction:
        """Make `fn` callable on tensors.

        Args:
            fn: The flat function.
            roles: The role of each argument.
            platforms: The platforms to compile for where the function goes into a graph that outlives the process.
                None means the present one.
        """
