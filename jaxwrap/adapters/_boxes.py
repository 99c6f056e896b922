"""The names of axes that Flax keeps beside arrays: boxes of Linen, metadata of NNX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxwrap._typing import PyTree


def unboxed(tree: PyTree) -> PyTree:
    """Return a pytree with what is in the boxes of Linen in their places."""
    return _map_boxes(_content, tree)


def specs_of(tree: PyTree) -> PyTree:
    """Return a pytree of variables of Linen with a `PartitionSpec` for each box and each other leaf."""
    return _map_boxes(_spec_of_box, tree, lambda _: PartitionSpec())


def specs_of_variables(state: Any) -> PyTree:
    """Return an `nnx.State` as a dict with a `PartitionSpec` for each variable."""
    from flax import nnx

    def spec(variable: Any) -> PartitionSpec:
        if not isinstance(variable, nnx.Variable):
            return PartitionSpec()
        metadata = variable.get_metadata()
        # Flax 0.12.3 and before have the second name.
        names = metadata.get("out_sharding", metadata.get("sharding_names"))
        spec = _renamed(names, metadata.get("sharding_rules"))
        # NNX leaves out the last axes.
        rank = len(getattr(variable.get_raw_value(), "shape", ()))
        return PartitionSpec(*spec, *[None] * (rank - len(spec))) if any(spec) else spec

    specs = jax.tree_util.tree_map(spec, state, is_leaf=lambda node: isinstance(node, nnx.Variable))
    return nnx.to_pure_dict(specs)


def _map_boxes(
    of_box: Callable[[Any], Any], tree: PyTree, of_leaf: Callable[[Any], Any] = lambda leaf: leaf
) -> PyTree:
    from flax.core import meta

    return jax.tree_util.tree_map(
        lambda node: of_box(node) if meta.is_axis_metadata(node) else of_leaf(node),
        tree,
        is_leaf=meta.is_axis_metadata,
    )


def _content(box: Any) -> Any:
    from flax.core import meta

    # Without a constraint: it would move the array, or need a mesh that the context does not have.
    is_partitioned = isinstance(box, meta.Partitioned)
    return unboxed(box.unbox(apply_constraint=False) if is_partitioned else box.unbox())


def _spec_of_box(box: Any) -> PartitionSpec:
    return _renamed(getattr(box, "names", None), getattr(box, "rules", None))


def _renamed(names: Any, rules: Any) -> PartitionSpec:
    """Return a spec with the names that a box's own rules give to axes."""
    sharding = getattr(names, "sharding", names)  # of a `jax.experimental.layout.Format`
    names = sharding.spec if isinstance(sharding, NamedSharding) else sharding
    on_mesh = {}
    for name, target in rules or ():
        on_mesh.setdefault(name, target)
    return PartitionSpec(*(on_mesh.get(name, name) for name in names or ()))
