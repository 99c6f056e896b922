"""What a bridge is, and what all bridges share."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxwrap._typing import Array, FlatFunction, FlatResult, Role, Static, Tensor

# JAX reads memory of others where it lies if it begins at a multiple of so many bytes; else it copies it.
ALIGNMENT = 64


class BridgedFunction(Protocol):
    """A flat function made callable, and differentiable, on one backend's tensors."""

    def __call__(self, *tensors: Tensor) -> FlatResult:
        """Takes and returns tensors where the flat function takes and returns arrays."""
        ...


class Bridge(Protocol):
    """One backend, as jaxwrap sees it.

    A bridge knows arrays and tensors. It knows nothing of Keras, of layers, or of pytrees.
    """

    name: str

    def is_tensor(self, leaf: Any) -> bool:
        """Whether `leaf` is data that `wrap`'s functions take: a tensor, or a JAX or NumPy array."""
        ...

    def is_concrete(self, leaf: Any) -> bool:
        """Whether `leaf` is a tensor of the backend that holds data, and does not stand for some in a trace."""
        ...

    def spec(self, tensor: Tensor) -> tuple[tuple[int | None, ...], str]:
        """The shape (None for a dimension unknown while tracing) and the dtype's name."""
        ...

    def opaque(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Keeps the backend's own compiler from rewriting the Python code of `fn`, and of what it calls."""
        ...

    def copies(self, arrays: Sequence[Array | np.ndarray]) -> Iterator[Any]:
        """What Keras is to make the values of variables of: a copy of each array, which Keras does not copy again.

        Where Keras always copies, each is to be dropped before the next one is asked for.
        """
        ...

    def write(self, tensors: Sequence[Tensor], values: Sequence[Tensor]) -> bool:
        """Writes values over those of tensors of the same shapes and dtypes, all by one call, if tensors can change.

        Returns:
            Whether they can. If not, nothing has been done.
        """
        return False

    def lifted(self) -> contextlib.AbstractContextManager[Any]:
        """A scope in which variables can be read and made although a training step is being traced around it."""
        return contextlib.nullcontext()

    def dense(self, gradient: Any) -> Tensor:
        """A gradient as a tensor, if the backend has other kinds of gradients, too."""
        return gradient

    def replicas(self) -> int:
        """On how many devices the backend runs the same training step, if it is the backend that does so."""
        return 1

    def wrap(
        self,
        fn: FlatFunction,
        roles: tuple[Role, ...],
        platforms: tuple[str, ...] | None,
    ) -> BridgedFunction:
        """Makes `fn` callable on tensors.

        Args:
            fn: The flat function.
            roles: The role of each argument.
            platforms: The platforms to compile for where the function is put into a graph that outlives the process;
                None means the one it runs on.
        """
        ...


class Kept:
    """What has been made of tensors, for as long as these live."""

    def __init__(self):
        self._made: dict[int, tuple[weakref.ref[Any], Any]] = {}

    def get(self, tensor: Tensor) -> Any:
        """What has been put for that very tensor, or None."""
        entry = self._made.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else None

    def put(self, tensor: Tensor, made: Any) -> None:
        """Keeps what has been made of a tensor."""
        key = id(tensor)
        self._made[key] = weakref.ref(tensor, lambda _: self._made.pop(key, None)), made


def host_copies(arrays: Iterable[Array | np.ndarray]) -> Iterator[np.ndarray]:
    """Copies of arrays on the host, each made when asked for, that JAX can read in place through any alias."""
    for given in arrays:
        array = np.asarray(given)
        dtype = np.dtype(jax.dtypes.canonicalize_dtype(array.dtype))
        size = array.size * dtype.itemsize
        memory = np.empty(size + ALIGNMENT, "uint8")
        start = -memory.ctypes.data % ALIGNMENT
        copy = memory[start : start + size].view(dtype).reshape(array.shape)
        np.copyto(copy, array, casting="unsafe")
        yield copy


@functools.cache
def inexact(dtype: Any) -> bool:
    """Whether values of `dtype` have gradients."""
    return jnp.issubdtype(dtype, jnp.inexact)


def check_dtype(name: str) -> None:
    """Raises TypeError for the name of a dtype that JAX does not have."""
    try:
        dtype = jnp.dtype(name)
        known = jnp.issubdtype(dtype, jnp.number) or dtype == jnp.bool
    except TypeError:
        known = False
    if not known:
        raise TypeError(
            f"JAX has no dtype {name!r}; it has bool, integers, floats (bfloat16 and float8 included) and complex "
            "numbers. Encode such data as numbers first."
        )


def restrict(
    fn: FlatFunction, wrt: tuple[int, ...], arrays: tuple[Array, ...]
) -> tuple[Any, list[Array]]:
    """`fn` as a function of the arguments `wrt` alone, returning (float outputs, (other outputs, aux, static)).

    That is the form `jax.vjp(..., has_aux=True)` takes, without a `float0` anywhere: outputs that are no floats are
    moved to the auxiliary part, with None in the place of each float.
    """

    def restricted(*chosen: Array) -> tuple[list[Array], tuple[Any, ...]]:
        merged = list(arrays)
        for index, array in zip(wrt, chosen, strict=True):
            merged[index] = array
        outputs, aux, static = fn(*merged)
        floats = [output for output in outputs if inexact(output.dtype)]
        others = tuple(None if inexact(output.dtype) else output for output in outputs)
        return floats, (others, aux, static)

    return restricted, [arrays[index] for index in wrt]


def vjp(fn: FlatFunction, wrt: tuple[int, ...], arity: int) -> FlatFunction:
    """The vjp of a flat function as a flat function, so that it can be bridged, and differentiated, in its turn.

    It takes the `arity` arguments of `fn` and then one cotangent for each float output, and returns one cotangent for
    each argument in `wrt`. Complex cotangents follow the convention of TensorFlow and PyTorch, the conjugate of JAX's.
    """

    def vjp_fn(*arrays: Array) -> FlatResult:
        restricted, primals = restrict(fn, wrt, arrays[:arity])
        _, pullback, _ = jax.vjp(restricted, *primals, has_aux=True)
        gradients = pullback([conjugate(cotangent) for cotangent in arrays[arity:]])
        return FlatResult(tuple(conjugate(gradient) for gradient in gradients), (), Static(None))

    return vjp_fn


def vjp_roles(roles: tuple[Role, ...], cotangents: int) -> tuple[Role, ...]:
    """The roles of the arguments of `vjp`'s function. What was state is kept by the tape and changes no more."""
    kept = (Role.CONSTANT if role is Role.STATE else role for role in roles)
    return (*kept, *(Role.INPUT,) * cotangents)


def own_outputs(fn: FlatFunction) -> FlatFunction:
    """`fn`, with a copy of each argument that it returns as it is.

    JAX returns the same buffer for such an argument, and on some backends that is a tensor of the caller's, which the
    caller may overwrite.
    """

    def owning(*arrays: Array) -> FlatResult:
        arguments = set(map(id, arrays))
        outputs, aux, static = fn(*arrays)
        outputs, aux = (
            tuple(jnp.copy(array) if id(array) in arguments else array for array in part)
            for part in (outputs, aux)
        )
        return FlatResult(outputs, aux, static)

    return owning


def conjugate(array: Array) -> Array:
    """`array`, conjugated if complex."""
    return jnp.conj(array) if jnp.issubdtype(array.dtype, jnp.complexfloating) else array
