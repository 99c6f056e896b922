"""How the variables of a layer are divided over a mesh, without data."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import keras

from jaxwrap._layer._building import trace_init
from jaxwrap._specs import Spec, is_shape
from jaxwrap._typing import PyTree
from jaxwrap._weights._axes import Axes, Meanings, is_spread, of_part, on_mesh
from jaxwrap._weights._devices import Layout, mesh_sizes

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


def layout_map(engine: Engine, mesh: Any, input_shape: Any, meanings: Any) -> Any:
    """Return the `keras.distribution.LayoutMap` of a layer. The other arguments are those of `divided`."""
    if not isinstance(mesh, keras.distribution.DeviceMesh):
        raise TypeError(
            "`device_mesh` must be a `keras.distribution.DeviceMesh`, as a LayoutMap holds it; received "
            f"{mesh!r}."
        )
    layouts = keras.distribution.LayoutMap(mesh)
    for one in divided(engine, mesh_sizes(mesh), input_shape, meanings):
        if is_spread(one.axes):
            layouts[re.escape(one.path)] = Layout(one.axes, mesh)
    return layouts


def divided(
    engine: Engine, sizes: Mapping[str, int], input_shape: Any, meanings: Any
) -> list[Divided]:
    """Return how a mesh divides each variable of a layer.

    Args:
        engine: The layer.
        sizes: The sizes of the axes of the mesh.
        input_shape: See `input_specs`.
        meanings: Pairs of a name that the model has for an axis, and None, an axis of the mesh or several.

    Raises:
        ValueError: If the layer is not built and there is no shape, or a layout does not fit its leaf or the mesh.
    """
    meanings = _checked(meanings)
    found = []
    weights = engine.weights
    if weights is not None:
        names = {leaf.path: leaf.axes for leaf in weights.leaves}
        if engine.has_values and not any(names.values()):
            names = _names_of_init(engine, input_shape)
        described = [
            (leaf, [(v.path, tuple(v.shape), v.dtype, v.trainable) for v in leaf.variables])
            for leaf in weights.leaves
        ]
    else:
        traced = trace_init(engine, input_specs(engine, input_shape))
        names = {leaf.path: leaf.axes for leaf in traced.leaves}
        name = engine.layer.name
        described = [
            (
                leaf,
                [("/".join([name, *i.path]), i.value.shape, i.dtype, i.trainable) for i in part],
            )
            for leaf, part in zip(traced.leaves, traced.initials, strict=True)
        ]
    for leaf, variables in described:
        # The names of a rule are axes of the mesh, and it counts more than the model.
        ruled = leaf.rule.layout is not None
        own = leaf.rule.layout if ruled else names.get(leaf.path) or (None,) * len(leaf.shape)
        path = f"{engine.layer.name}/{leaf.path}"
        axes = on_mesh(path, leaf.shape, own, () if ruled else meanings, sizes)
        for path, shape, dtype, trainable in variables:
            found.append(Divided(path, shape, dtype, trainable, of_part(axes, leaf.shape, shape)))
    return found


def _checked(meanings: Any) -> Meanings:
    pairs = list(meanings.items() if isinstance(meanings, Mapping) else meanings)
    for pair in pairs:
        if not (isinstance(pair, Iterable) and len(pair := tuple(pair)) == 2) or not (
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
