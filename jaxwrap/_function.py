"""Any JAX function of pytrees on any backend's tensors."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from jaxwrap._bridge import Bridge, BridgedFunction, get_bridge
from jaxwrap._dense import check_dense
from jaxwrap._dtypes import warn_if_narrowed
from jaxwrap._errors import raise_named
from jaxwrap._pytree import KeyPath, Structure, is_array, key_name, partition, path_str
from jaxwrap._tracing import explained
from jaxwrap._typing import Array, FlatFunction, FlatResult, PyTree, Role, Static

# The roles of the arguments of a `PytreeFunction`.
_ROLES = (Role.INPUT, Role.CONSTANT, Role.STATE)
# A function that is called with ever new static values must not keep all that was compiled for them.
_MAX_KEPT = 512


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

    name = getattr(fn, "__name__", repr(fn))
    call_tensors = PytreeFunction(call, name, argument=_names_of_arguments(fn))

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
        argument: Prints the path of a leaf of `differentiable` in errors.
    """

    def __init__(
        self,
        fn: Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]],
        name: str | None = None,
        platforms: tuple[str, ...] | None = None,
        bridge: Bridge | None = None,
        argument: Callable[[KeyPath], str] = path_str,
    ):
        self._fn = fn
        self._argument = argument
        self._name = name
        self._platforms = platforms
        self._bridge = bridge or get_bridge()
        self._bridged = functools.lru_cache(_MAX_KEPT)(self._bridge_for)
        self._opaque_call = self._bridge.opaque(self._call)

    def __call__(
        self, differentiable: PyTree, constant: PyTree, state: PyTree
    ) -> tuple[PyTree, PyTree]:
        """Call the function on pytrees of tensors. Return `(outputs, aux)`."""
        return self._opaque_call(differentiable, constant, state)

    def _call(self, *trees: PyTree) -> tuple[PyTree, PyTree]:
        parts = [partition(tree, self._bridge.is_tensor) for tree in trees]
        structures = tuple(structure for _, structure in parts)
        try:
            bridged = self._bridged(structures)
            # At each call: the structure is the same for all shapes and dtypes.
            self._check_tensors(*parts[0])
            outputs, aux, static = bridged(*(tensor for tensors, _ in parts for tensor in tensors))
        except Exception as error:
            if self._name:
                raise_named(error, self._name)
            raise
        output_structure, aux_structure = static.value
        return output_structure.unflatten(outputs), aux_structure.unflatten(aux)

    def _bridge_for(self, structures: tuple[Structure, ...]) -> BridgedFunction:
        self._check_static(structures[0])
        roles = tuple(
            role
            for structure, role in zip(structures, _ROLES, strict=True)
            for _ in range(structure.array_count())
        )
        first, *others = structures
        paths = [
            *first.array_paths(self._argument),
            *(path for structure in others for path in structure.array_paths()),
        ]
        flat = _flatten(self._fn, structures, paths)
        return self._bridge.wrap(flat, roles, self._platforms)

    def _check_tensors(self, tensors: list[Any], structure: Structure) -> None:
        dtypes = []
        for index, tensor in enumerate(tensors):
            try:
                dtypes.append(self._bridge.spec(tensor)[1])
            except (TypeError, ValueError) as error:
                path = structure.array_paths(self._argument)[index]
                raise type(error)(f"argument {path}: {error}") from None
        warn_if_narrowed(dtypes)

    def _check_static(self, structure: Structure) -> None:
        for path, leaf in zip(structure.key_paths(), structure.leaves, strict=True):
            what = f"argument {self._argument(path)}"
            try:
                check_dense(leaf)
            except TypeError as error:
                raise TypeError(f"{what}: {error}") from None
            try:
                hash(leaf)
            except TypeError:
                raise TypeError(
                    f"{what} is a {type(leaf).__name__}, which is neither a tensor nor hashable. Pass an array, or a "
                    "value that can be hashed."
                ) from None


def _names_of_arguments(fn: Callable[..., Any]) -> Callable[[KeyPath], str]:
    """Return what prints a path in `(args, kwargs)` with the name of the parameter: `x/w` for `0/0/w`."""
    try:
        parameters = list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):  # a function of C
        parameters = []
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), "args")

    def printed(path: KeyPath) -> str:
        part, place, *below = path
        name = key_name(place)
        if part.idx == 0:
            index = int(name)
            name = names[index] if index < len(names) else f"{rest}[{index - len(names)}]"
        return "/".join([name, *map(key_name, below)])

    return printed


def _flatten(
    fn: Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]],
    structures: tuple[Structure, ...],
    paths: Sequence[str],
) -> FlatFunction:
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
