"""The state of an optimizer or a metric: a pytree of any arrays in Keras variables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxwrap._pytree import ARRAY, is_leaf_array, key_name, partition
from jaxwrap._typing import Array, PyTree, Static
from jaxwrap._weights._leaf import Leaf
from jaxwrap._weights._leaves import Leaves
from jaxwrap._weights._names import unique_names
from jaxwrap._weights._rules import Rule
from jaxwrap._weights._variables import array_of, key_impl

Names = tuple[str, ...]


class State:
    """A pytree of arrays in Keras variables, with its first values.

    Args:
        owner: Whose state it is. Its name begins the paths of the variables, and it must still track them.
        root: The part of the paths after the name.
        init: Makes the pytree with its first values. JAX compiles it.
        args: The arguments of `init`.
        rank: Sorts the leaves in the order of the variables, by the names in their paths. By default leaf order.

    Attributes:
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
            impls = tuple(map(key_impl, arrays))
            return list(map(array_of, arrays)), Static((structure, impls))

        # Compiled, since an eager `init` runs an operation for each leaf. What is no array comes out in `Static`.
        arrays, static = jax.jit(traced)(*args)
        structure, impls = static.value
        names = [
            tuple(map(key_name, path)) or ("value",)
            for path, leaf in zip(structure.key_paths(), structure.leaves, strict=True)
            if leaf is ARRAY
        ]
        places = range(len(names))
        order = sorted(places, key=lambda place: rank(names[place])) if rank else places
        paths = unique_names([(root, *path) for path in names])
        leaves = [
            Leaf(
                path="/".join(path),
                dtype=array.dtype.name,
                impl=impl,
                is_params=False,
                shape=array.shape,
                stored=array.dtype.name,
                # All replicas compute it from the same values.
                rule=Rule(aggregation="none"),
            )
            for path, array, impl in zip(paths, arrays, impls, strict=True)
        ]
        # Copies on the host: on JAX, `fit` donates and deletes the buffers of variables.
        self.initial = [np.array(arrays[place]) for place in order]
        values = [np.asarray(array) for array in arrays]
        self._leaves = Leaves.create(owner, structure, leaves, values, order)
        self.variables = self._leaves.variables
        self.tree = self._leaves.tree
        self.decode = self._leaves.decode

    def encode(self, tree: PyTree, problem: str) -> list[Array]:
        """Compute the new values of all variables.

        Args:
            tree: The new state.
            problem: The first line of an error.

        Raises:
            ValueError: If structure or shapes differ from those of the first state, with a line for each path.
        """
        encoded = self._leaves.encode(tree, problem)
        return [encoded[index] for index in range(len(self.variables))]
