"""The state of an optimizer or a metric: a pytree of any arrays in Keras variables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import keras
import numpy as np

from jaxwrap._bridge import get_bridge
from jaxwrap._pytree import ARRAY, Structure, is_leaf_array, key_name, partition
from jaxwrap._typing import Array, PyTree, Static
from jaxwrap._weights._leaf import Leaf
from jaxwrap._weights._leaves import Leaves
from jaxwrap._weights._names import unique_names
from jaxwrap._weights._rules import Rule
from jaxwrap._weights._variables import array_of, as_copies, as_they_are, key_impl, mesh_sharding

Names = tuple[str, ...]


class State:
    """A pytree of arrays in Keras variables, with its first values.

    Args:
        owner: Whose state it is. Its name begins the paths of the variables, and it must still track them.
        root: The part of the paths after the name.
        init: Makes the pytree with its first values. JAX compiles it.
        args: The arguments of `init`.
        rank: Sorts the leaves in the order of the variables, by the names in their paths. By default leaf order.
        like: Returns a variable, by the names in the path of a leaf. With a distribution, a leaf of its shape has its
            layout. All others are on every device.

    Attributes:
        variables: A variable for each array or number.
        tree: The pytree with the variables in place.
    """

    def __init__(
        self,
        owner: Any,
        root: str,
        init: Callable[..., PyTree],
        args: Sequence[Any] = (),
        rank: Callable[[Names], Any] | None = None,
        like: Callable[[Names], keras.Variable | None] = lambda _: None,
    ):
        def traced(*args: Any) -> tuple[list[Array], Static]:
            arrays, structure = partition(init(*args), is_leaf_array)
            impls = tuple(map(key_impl, arrays))
            return list(map(array_of, arrays)), Static((structure, impls))

        # Compiled, since an eager `init` runs an operation for each leaf. What is no array comes out in `Static`.
        compiled, mesh = jax.jit(traced), get_bridge().mesh()
        if mesh is not None:
            # Each device computes its own part. No device, and not the host, ever holds the whole.
            shapes, static = jax.eval_shape(traced, *args)
            found = map(like, _names(static.value[0]))
            shardings = [_sharding(v, shape, mesh) for v, shape in zip(found, shapes, strict=True)]
            compiled = jax.jit(traced, out_shardings=(shardings, None))
        arrays, static = compiled(*args)
        structure, impls = static.value
        names = _names(structure)
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
        values = arrays if mesh is not None else [np.asarray(array) for array in arrays]
        source = as_copies if mesh is None else as_they_are
        self._leaves = Leaves.create(owner, structure, leaves, values, order, source)
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


def _names(structure: Structure) -> list[Names]:
    """Return the names in the path of each array."""
    return [
        tuple(map(key_name, path)) or ("value",)
        for path, leaf in zip(structure.key_paths(), structure.leaves, strict=True)
        if leaf is ARRAY
    ]


def _sharding(
    variable: keras.Variable | None, shape: jax.ShapeDtypeStruct, mesh: jax.sharding.Mesh
) -> jax.sharding.NamedSharding:
    """Return the sharding of a leaf: that of a variable of its shape, or on every device."""
    if variable is not None and tuple(variable.shape) == shape.shape:
        sharding = mesh_sharding(variable.value)
        if sharding is not None and sharding.mesh == mesh:
            return sharding
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
