"""How the variables of a layer are divided over a mesh, without data."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import keras

from jaxwrap._layer._building import trace_init
from jaxwrap._pytree import Structure
from jaxwrap._specs import Spec, is_shape
from jaxwrap._typing import PyTree
from jaxwrap._weights._axes import Axes, Meanings, is_spread, of_part, on_mesh
from jaxwrap._weights._devices import Layout, mesh_sizes
from jaxwrap._weights._leaf import Leaf
from jaxwrap._weights._variables import Initial

if TYPE_CHECKING:
    from jaxwrap._layer._engine import Engine


class Divided(NamedTuple):
    """A variable, and how a mesh divides it.

    Attributes:
        path: Its path, with the name of the layer.
        shape: Its shape.
        dtype: Its dtype.
        trainable: Whether it can be trained.
        axes: For each axis None, an axis of the mesh, or several.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    trainable: bool
    axes: Axes


class Placement(NamedTuple):
    """The weights of a layer on a mesh.

    Attributes:
        structures: The structures of the parameters and the state.
        leaves: Each leaf, its axes on the mesh, and its variables.
        specs: The inputs, or None if nobody asked for them.
    """

    structures: tuple[Structure, Structure]
    leaves: list[tuple[Leaf, Axes, list[Divided]]]
    specs: dict[str, PyTree] | None

    def variables(self) -> list[Divided]:
        """Return all variables."""
        return [one for _, _, own in self.leaves for one in own]


def layout_map(engine: Engine, mesh: Any, input_shape: Any, meanings: Any) -> Any:
    """Return the `keras.distribution.LayoutMap` of a layer. The other arguments are those of `placement`."""
    if not isinstance(mesh, keras.distribution.DeviceMesh):
        raise TypeError(
            "`device_mesh` must be a `keras.distribution.DeviceMesh`, as a LayoutMap holds it; received "
            f"{mesh!r}."
        )
    layouts = keras.distribution.LayoutMap(mesh)
    placed = placement(engine, mesh_sizes(mesh), input_shape, checked(meanings))
    for one in placed.variables():
        if is_spread(one.axes):
            layouts[re.escape(one.path)] = Layout(one.axes, mesh)
    return layouts


def placement(
    engine: Engine,
    sizes: Mapping[str, int],
    input_shape: Any,
    meanings: Meanings,
    with_inputs: bool = False,
) -> Placement:
    """Return how a mesh divides the weights of a layer.

    Args:
        engine: The layer.
        sizes: The sizes of the axes of the mesh.
        input_shape: See `input_specs`.
        meanings: The result of `checked`.
        with_inputs: Whether to describe the inputs too.

    Raises:
        ValueError: If the layer is not built and there is no shape, or a layout does not fit its leaf or the mesh.
    """
    weights = engine.weights
    specs = input_specs(engine, input_shape) if with_inputs or weights is None else None
    described: list[tuple[Leaf, list[Divided]]]
    if weights is not None:
        structures = weights.params.structure, weights.state.structure
        names = {leaf.path: leaf.axes for leaf in weights.leaves}
        if engine.has_values and not any(names.values()):
            names = _names_of_init(engine, input_shape)
        described = [
            (
                leaf,
                [Divided(v.path, tuple(v.shape), v.dtype, v.trainable, ()) for v in leaf.variables],
            )
            for leaf in weights.leaves
        ]
    else:
        assert specs is not None
        traced = trace_init(engine, specs)
        structures = traced.plan.structures
        names = {leaf.path: leaf.axes for leaf in traced.leaves}
        described = [
            (leaf, [_divided(engine, leaf, one) for one in part])
            for leaf, part in zip(traced.leaves, traced.initials, strict=True)
        ]
    found = []
    for leaf, variables in described:
        # The names of a rule are axes of the mesh, and it counts more than the model.
        ruled = leaf.rule.layout is not None
        own = leaf.rule.layout if ruled else names.get(leaf.path) or (None,) * len(leaf.shape)
        path = f"{engine.layer.name}/{leaf.path}"
        axes = on_mesh(path, leaf.shape, own, () if ruled else meanings, sizes)
        of_parts = [one._replace(axes=of_part(axes, leaf.shape, one.shape)) for one in variables]
        found.append((leaf, axes, of_parts))
    return Placement(structures, found, specs)


def _divided(engine: Engine, leaf: Leaf, one: Initial) -> Divided:
    trainable = one.trainable and leaf.rule.trainable is not False and engine.layer.trainable
    path = "/".join([engine.layer.name, *one.path])
    return Divided(path, one.value.shape, one.dtype, trainable, ())


def checked(meanings: Any) -> list[tuple[str, Any]]:
    """Return what names of axes mean as a list of pairs.

    Raises:
        TypeError: If they are not pairs of a name, and None, an axis of the mesh or several.
    """
    pairs = list(meanings.items() if isinstance(meanings, Mapping) else meanings)
    for pair in pairs:
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2) or not (
            isinstance(pair[0], str) and isinstance(pair[1], (str, tuple, list, type(None)))
        ):
            raise TypeError(
                "`axes` must be pairs of a name and None, an axis of the mesh, or a tuple of them, such as "
                f'(("mlp", "model"),); received {meanings!r}.'
            )
    return [(name, target) for name, target in pairs]


def _names_of_init(engine: Engine, input_shape: Any) -> dict[str, Axes | None]:
    """Return the names of axes that `init` of a model gives, for a layer whose values the user passed."""
    # They are plain, most often, and the model that has the names may not be able to make values.
    with contextlib.suppress(Exception):
        traced = trace_init(engine, input_specs(engine, input_shape))
        return {leaf.path: leaf.axes for leaf in traced.leaves}
    return {}


def input_specs(engine: Engine, input_shape: Any) -> dict[str, PyTree]:
    """Describe the inputs of a layer.

    Args:
        engine: The layer.
        input_shape: A shape as `build` takes it, or a nest of them; or of anything with a shape and a dtype. None for
            the inputs that the layer was built for.

    Raises:
        ValueError: If there is neither.
    """
    if input_shape is None:
        if engine.specs is None:
            raise ValueError(
                "the layer has not been built, so its parameters are not known. Pass `input_shape`, such as "
                '`(None, 8)` or `keras.KerasTensor((None, 8), "int32")`, or build it before.'
            )
        return engine.specs
    has_dtype = jax.tree_util.tree_leaves(
        jax.tree_util.tree_map(
            lambda node: hasattr(node, "dtype"), input_shape, is_leaf=_is_one_input
        )
    )
    if not any(has_dtype):
        return engine.inputs.from_shapes(input_shape, engine.layer.variable_dtype)

    def spec(node: Any) -> Spec:
        if is_shape(node):
            return Spec(tuple(node), engine.layer.variable_dtype)
        return Spec(tuple(node.shape), keras.backend.standardize_dtype(node.dtype))

    tree = jax.tree_util.tree_map(spec, input_shape, is_leaf=_is_one_input)
    return {engine.inputs.names[0]: tree}


def _is_one_input(node: Any) -> bool:
    return node is None or is_shape(node) or hasattr(node, "dtype")
