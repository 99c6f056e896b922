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
    """

    name: ClassVar[str]

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
    def copies(self, arrays: Sequence[Array | np.ndarray]) -> Iterator[Any]:
        """Yield a copy of each array, which Keras makes the value of a variable without another copy.

        Where Keras always copies, drop each before asking for the next, so that memory holds one of them at a time.
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

    def mesh(self) -> jax.sharding.Mesh | None:
        """Return the devices of the distribution that is set now, if the backend's tensors are arrays on them."""
        return None

    def on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        """Enter a scope in which JAX functions see the mesh of `mesh`, if there is one."""
        return contextlib.nullcontext()

    def replicas(self) -> int:
        """Return the number of devices on which the backend itself runs the same training step."""
        return 1

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
