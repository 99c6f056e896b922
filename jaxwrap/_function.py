"""Any JAX function of pytrees on any backend's tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jaxwrap._bridge import Bridge, BridgedFunction, get_bridge
from jaxwrap._dtypes import warn_if_narrowed
from jaxwrap._pytree import Structure, is_array, partition, path_str
from jaxwrap._tracing import explained
from jaxwrap._typing import Array, FlatFunction, FlatResult, PyTree, Role, Static

# The roles of the arguments of a `PytreeFunction`.
_ROLES = (Role.INPUT, Role.CONSTANT, Role.STATE)


def wrap_function(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Make a pure JAX function callable on the tensors of the current Keras backend.

    The result takes and returns the same pytrees as `fn`, with the backend's tensors for leaves. It may be called
    eagerly or while the backend traces (`jax.jit`, `tf.function`). The backend's own means differentiate
    it, to any order: `jax.grad`, `tf.GradientTape`, `torch.autograd`. On NumPy there are no gradients.

    Leaves that are tensors or arrays are traced. All others (Python numbers, strings, None, callables) are static:
    `fn` sees them as they are and is compiled for each value. They must be hashable.

    Args:
        fn: A pure function of any pytrees that `jax.jit` could compile with its static leaves fixed.

    Returns:
        A function of the signature of `fn`. Its outputs are tensors of the current backend where `fn` returns arrays,
        of the same dtype. Outputs that are not arrays come back as they are.

    Raises:
        TypeError: When called, for a leaf of a dtype that JAX does not have, or a static leaf that cannot be hashed.
        ValueError: When called, for a tensor of unknown rank.

    Example:
        >>> import jax.numpy as jnp, keras, jaxwrap
        >>> @jaxwrap.wrap_function
        ... def normalize(x, axis):
        ...     return x / jnp.linalg.norm(x, axis=axis, keepdims=True)
        >>> y = normalize(keras.ops.convert_to_tensor([[3.0, 4.0]]), axis=-1)
        >>> print(keras.ops.convert_to_numpy(y))
        [[0.6 0.8]]
    """

    def call(arguments: PyTree, *_: PyTree) -> tuple[PyTree, PyTree]:
        args, kwargs = arguments
        return fn(*args, **kwargs), ()

    call_tensors = PytreeFunction(call, name=getattr(fn, "__name__", repr(fn)))

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return call_tensors((args, kwargs), (), ())[0]

    return wrapped


class PytreeFunction:
    """A JAX function of three pytrees, differentiable in the first, as a function of pytrees of tensors.

    Args:
        fn: Takes `(differentiable, constant, state)` and returns `(outputs, aux)`, all pytrees. No gradient flows
            through `aux`.
        name: The name of the function in errors. By default none: the errors of an object name the object.
        platforms: See `Bridge.wrap`.
        bridge: The bridge to use. By default that of the current backend.
    """

    def __init__(
        self,
        fn: Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]],
        name: str | None = None,
        platforms: tuple[str, ...] | None = None,
        bridge: Bridge | None = None,
    ):
        self._fn = fn
        self._prefix = f"{name}: " if name else ""
        self._platforms = platforms
        self._bridge = bridge or get_bridge()
        self._bridged: dict[tuple[Structure, ...], BridgedFunction] = {}
        self._opaque_call = self._bridge.opaque(self._call)

    def __call__(
        self, differentiable: PyTree, constant: PyTree, state: PyTree
    ) -> tuple[PyTree, PyTree]:
        """Call the function on pytrees of tensors. Return `(outputs, aux)`."""
        return self._opaque_call(differentiable, constant, state)

    def _call(self, *trees: PyTree) -> tuple[PyTree, PyTree]:
        parts = [partition(tree, self._bridge.is_tensor) for tree in trees]
        structures = tuple(structure for _, structure in parts)
        bridged = self._bridged.get(structures)
        if bridged is None:
            _check_static(structures[0], self._prefix)
            roles = tuple(
                role for (tensors, _), role in zip(parts, _ROLES, strict=True) for _ in tensors
            )
            flat = _flatten(self._fn, structures)
            bridged = self._bridged[structures] = self._bridge.wrap(flat, roles, self._platforms)
        # At each call: the structure is the same for all shapes and dtypes.
        self._check_tensors(*parts[0])
        outputs, aux, static = bridged(*(tensor for tensors, _ in parts for tensor in tensors))
        output_structure, aux_structure = static.value
        return output_structure.unflatten(outputs), aux_structure.unflatten(aux)

    def _check_tensors(self, tensors: list[Any], structure: Structure) -> None:
        dtypes = []
        for index, tensor in enumerate(tensors):
            try:
                dtypes.append(self._bridge.spec(tensor)[1])
            except (TypeError, ValueError) as error:
                path = structure.array_paths()[index]
                raise type(error)(f"{self._prefix}argument {path}: {error}") from None
        warn_if_narrowed(dtypes)


def _check_static(structure: Structure, prefix: str) -> None:
    for path, leaf in zip(structure.key_paths(), structure.leaves, strict=True):
        try:
            hash(leaf)
        except TypeError:
            raise TypeError(
                f"{prefix}argument {path_str(path)} is a {type(leaf).__name__}, which is neither a tensor nor "
                "hashable. Pass an array, or a value that can be hashed."
            ) from None


def _flatten(
    fn: Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]],
    structures: tuple[Structure, ...],
) -> FlatFunction:
    paths = [path for structure in structures for path in structure.array_paths()]
    names = {f"arrays[{place}]": path for place, path in enumerate(paths)}

    def flat(*arrays: Array) -> FlatResult:
        remaining = iter(arrays)
        with explained(names):
            outputs, aux = fn(*(structure.unflatten(remaining) for structure in structures))
        output_arrays, output_structure = partition(outputs, is_array)
        aux_arrays, aux_structure = partition(aux, is_array)
        return FlatResult(
            tuple(map(jnp.asarray, output_arrays)),
            tuple(map(jnp.asarray, aux_arrays)),
            Static((output_structure, aux_structure)),
        )

    return flat
