"""The state of an optimizer or a metric: a pytree of any arrays, kept in Keras variables named by its paths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxwrap._pytree import (
    ARRAY,
    check_shapes,
    describe_difference,
    is_leaf_array,
    key_name,
    partition,
)
from jaxwrap._typing import Array, PyTree, Static
from jaxwrap._variables import Initial, create_variables, key_impl, unique_names

Names = tuple[str, ...]


class State:
    """A pytree of arrays in Keras variables.

    Args:
        owner: Whose state it is; its name begins the paths of the variables. It must still track them.
        root: What follows the name in the paths.
        init: Makes the pytree with its first values. It is compiled by JAX.
        args: The arguments of `init`.
        rank: Where a leaf stands among the variables, by the names in its path; by default in leaf order.

    Attributes:
        structure: The structure of the pytree, with the leaves that are no arrays.
        variables: A variable for each array or number.
        initial: The first values, as NumPy arrays.
        tree: The pytree with the variables in place.
    """

    def __init__(
        self,
        owner: Any,
        root: str,
        init: Callable[..., PyTree],
        args: Sequence[Any] = (),
        rank: Callable[[Names], Any] | None = None,
    ):
        def traced(*args: Any) -> tuple[list[Array], Static]:
            arrays, structure = partition(init(*args), is_leaf_array)
            keys = tuple(key_impl(array) for array in arrays)
            return list(map(_encode, arrays)), Static((structure, keys))

        arrays, known = jax.jit(traced)(*args)
        self.structure, self._keys = known.value
        names = [
            tuple(map(key_name, path)) or ("value",)
            for path, leaf in zip(self.structure.key_paths(), self.structure.leaves, strict=True)
            if leaf is ARRAY
        ]
        places = range(len(names))
        self._order = sorted(places, key=lambda place: rank(names[place])) if rank else places
        paths = unique_names([(root, *path) for path in names])
        self.initial = [np.array(arrays[place]) for place in self._order]
        self.variables = create_variables(
            owner,
            [
                Initial(paths[place], value, value.dtype.name, trainable=False)
                for place, value in zip(self._order, self.initial, strict=True)
            ],
        )
        self.tree = self._unflatten(self.variables)

    def decode(self, arrays: Sequence[Array]) -> PyTree:
        """The pytree, as JAX functions take it, with `arrays` in the order of the variables."""
        # A backend may hold a dtype that it has not in another one.
        pairs = zip(arrays, self.variables, strict=True)
        return self._unflatten([jnp.asarray(array, variable.dtype) for array, variable in pairs])

    def encode(self, tree: PyTree, problem: str) -> list[Array]:
        """The inverse of `decode`, for a new state, in the dtypes of the variables.

        Args:
            tree: The new state.
            problem: What an error begins with.

        Raises:
            ValueError: If structure or shapes differ from those of the first state, with a line for each path.
        """
        arrays, received = partition(tree, is_leaf_array)
        if difference := describe_difference(self.structure, received):
            raise ValueError(f"{problem}\n{difference}")
        encoded = [_encode(arrays[place]) for place in self._order]
        expected = [(variable.path, tuple(variable.shape)) for variable in self.variables]
        check_shapes(expected, encoded, problem)
        pairs = zip(encoded, self.variables, strict=True)
        return [jnp.asarray(array, variable.dtype) for array, variable in pairs]

    def _unflatten(self, values: Sequence[Any]) -> PyTree:
        leaves: list[Any] = [None] * len(values)
        for place, value in zip(self._order, values, strict=True):
            impl = self._keys[place]
            is_key = impl is not None and isinstance(value, jax.Array)
            leaves[place] = jax.random.wrap_key_data(value, impl=impl) if is_key else value
        return self.structure.unflatten(leaves)


def _encode(value: Any) -> Array:
    return jnp.asarray(value if key_impl(value) is None else jax.random.key_data(value))
