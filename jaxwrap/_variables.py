"""Leaves of a pytree ⇄ Keras variables named by their paths."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np

from jaxwrap._bridge import inexact
from jaxwrap._pytree import ARRAY, describe_difference, is_leaf_array, key_name, partition
from jaxwrap._typing import Array, PyTree


class Leaves:
    """The Keras variables of one pytree of a layer, and how to turn their values back into that pytree.

    Attributes:
        structure: The structure of the user's pytree.
        variables: One variable per array or number in it, in leaf order.
        tree: The user's pytree with the variables in place.
    """

    def __init__(
        self,
        layer: keras.layers.Layer,
        tree: PyTree,
        *,
        root: Sequence[str],
        trainable: bool,
        keep_dtypes: bool,
    ):
        """Creates the variables of `layer` for `tree`.

        Args:
            layer: The layer that is to own the variables; it must still track them.
            tree: The pytree with the initial values, which are copied.
            root: Names that go before each leaf's path.
            trainable: Whether float leaves can be trained. Those that cannot are never cast for mixed precision.
            keep_dtypes: Whether float leaves of other widths than 32 bits keep theirs; if not, the layer's variable
                dtype is for all.
        """
        values, self.structure = partition(tree, is_leaf_array)
        self._impls = tuple(_key_impl(value) for value in values)
        paths = [
            path
            for path, leaf in zip(self.structure.key_paths(), self.structure.leaves, strict=True)
            if leaf is ARRAY
        ]
        names = unique_names([(*root, *map(key_name, path)) or ("value",) for path in paths])
        # Where the compute dtype is that of the variables, Keras casts nothing.
        self._autocast = trainable and layer.compute_dtype != layer.variable_dtype
        self.variables: list[keras.Variable] = []
        for value, name in zip(values, names, strict=True):
            initial = _own(value)
            follows = initial.dtype == jnp.float32 or not keep_dtypes
            dtype = layer.variable_dtype if follows and _is_real(initial) else str(initial.dtype)
            self.variables.append(
                _create(
                    layer, initial, dtype, name, trainable and inexact(initial.dtype), trainable
                )
            )
        self.tree = self.structure.unflatten(self.variables)

    def decode(self, arrays: Sequence[Array]) -> PyTree:
        """The user's pytree with `arrays` for leaves, as JAX functions take it."""
        return self.structure.unflatten(
            array if impl is None else jax.random.wrap_key_data(array, impl=impl)
            for array, impl in zip(arrays, self._impls, strict=True)
        )

    def zeros(self, compute_dtype: str) -> PyTree:
        """The user's pytree with zeros for leaves, in the dtypes that a call gives them: for tracing."""

        def dtype(variable: keras.Variable) -> str:
            cast = self._autocast and jnp.issubdtype(variable.dtype, jnp.floating)
            return compute_dtype if cast else variable.dtype

        return self.decode([jnp.zeros(v.shape, dtype(v)) for v in self.variables])

    def encode(self, tree: PyTree, owner: str) -> list[Array]:
        """The inverse of `decode`, for a new state: checks it against the old; returns arrays for the variables.

        Raises:
            ValueError: If structure or shapes differ, with a line for each path where they do.
        """
        problem = (
            f"{owner}: the new state that `call_fn` returned differs from the state it was given. No state has been "
            "changed. Return a state with the same paths and shapes.\n"
        )
        values, received = partition(tree, is_leaf_array)
        difference = describe_difference(self.structure, received)
        if difference:
            raise ValueError(problem + difference)
        arrays = [
            jnp.asarray(value if impl is None else jax.random.key_data(value), variable.dtype)
            for value, impl, variable in zip(values, self._impls, self.variables, strict=True)
        ]
        shapes = [
            f"  shape: {path} was {tuple(variable.shape)}, is {array.shape}"
            for path, variable, array in zip(
                self.structure.array_paths(), self.variables, arrays, strict=True
            )
            if tuple(variable.shape) != array.shape
        ]
        if shapes:
            raise ValueError(problem + "\n".join(shapes))
        return arrays


def unique_names(paths: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Makes key paths into paths of variable names that every backend takes, one name for each, in order.

    Characters other than letters, digits, `_` and `-` become `_`. Where two paths collide thereby, or one is the
    beginning of another, the later one gets a number.
    """
    taken: set[tuple[str, ...]] = set()
    groups: set[tuple[str, ...]] = set()
    result = []
    for path in paths:
        clean = tuple(re.sub(r"[^A-Za-z0-9_-]", "_", name) or "_" for name in path)
        candidate, count = clean, 0
        while (
            candidate in taken
            or candidate in groups
            or any(candidate[:end] in taken for end in range(1, len(candidate)))
        ):
            count += 1
            candidate = (*clean[:-1], f"{clean[-1]}_{count}")
            if any(clean[:end] in taken for end in range(1, len(clean))):
                candidate = (f"{clean[0]}_{count}", *clean[1:])
        taken.add(candidate)
        groups.update(candidate[:end] for end in range(1, len(candidate)))
        result.append(candidate)
    return result


def _create(
    layer: keras.layers.Layer,
    initial: np.ndarray,
    dtype: str,
    name: tuple[str, ...],
    trainable: bool,
    autocast: bool,
) -> keras.Variable:
    with contextlib.ExitStack() as stack:
        # `add_weight` would put the name right under the layer; the leaf's path becomes nested scopes instead.
        stack.enter_context(keras.name_scope(layer.name, caller=layer))
        for scope in name[:-1]:
            stack.enter_context(keras.name_scope(scope))
        return keras.Variable(
            lambda shape, dtype: keras.ops.convert_to_tensor(initial, dtype),
            shape=initial.shape,
            dtype=dtype,
            trainable=trainable,
            autocast=autocast,
            name=name[-1],
        )


def _own(value: Any) -> np.ndarray:
    """A host copy, so that nothing a backend does to the variable reaches the user's array."""
    if _key_impl(value) is not None:
        value = jax.random.key_data(value)
    elif not isinstance(value, (jax.Array, np.ndarray, np.generic, bool, int, float, complex)):
        value = keras.ops.convert_to_numpy(value)
    array = np.array(value)
    return array.astype(jax.dtypes.canonicalize_dtype(array.dtype), copy=False)


def _key_impl(value: Any) -> Any:
    if isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
        return jax.random.key_impl(value)
    return None


def _is_real(array: np.ndarray) -> bool:
    return jnp.issubdtype(array.dtype, jnp.floating)
