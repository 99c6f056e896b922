"""Where variables are, under `keras.distribution`."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

import jax
import keras
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from jaxwrap._weights._axes import Axes, is_spread, of_part, on_mesh


class Layout(keras.distribution.TensorLayout):
    """A layout that may divide one axis of a tensor by several axes of the mesh, which Keras's own refuses."""

    def _validate_axes(self) -> None:
        # Keras compares each entry with the names of the mesh. `on_mesh` has checked them.
        pass


def mesh_sizes(mesh: Any) -> dict[str, int]:
    """Return the sizes of the axes of a mesh of Keras or JAX, or of a dict of them.

    Raises:
        TypeError: If it is something else.
    """
    if isinstance(mesh, keras.distribution.DeviceMesh):
        return dict(zip(mesh.axis_names, mesh.shape, strict=True))
    shape = getattr(mesh, "shape", mesh)
    if isinstance(shape, Mapping):
        return {str(name): int(size) for name, size in shape.items()}
    raise TypeError(
        "expected a `keras.distribution.DeviceMesh`, a mesh of JAX, or a dict of the sizes of its axes; received "
        f"{mesh!r}."
    )


def layout_of(
    path: str,
    short: str,
    shape: tuple[int, ...],
    dtype: str,
    axes: Axes | None,
    value: Any,
    held: Any,
) -> Any:
    """Return the layout of a variable to make: a layout of Keras, a sharding of JAX, or None.

    In this order: the rule for it, the layout that the leaf had before, an entry of the `LayoutMap`, the sharding of a
    value that lies on several devices, and what the distribution has for all other variables.

    Args:
        path: The whole path of the variable.
        short: Its path from the name of its owner on.
        shape: Its shape.
        dtype: Its dtype.
        axes: The layout that a rule sets, or None.
        value: The first value.
        held: The layout that the leaf had before its parts were other ones, or None.

    Raises:
        ValueError: If a layout does not fit the shape, or the mesh of the distribution.
    """
    distribution = keras.distribution.distribution()
    given = value.sharding if isinstance(value, jax.Array) and is_spread_out(value) else None
    if distribution is None:
        return held or (given if isinstance(given, NamedSharding) else None)
    mesh = distribution.device_mesh
    if axes is not None:
        return Layout(on_mesh(path, shape, axes, (), mesh_sizes(mesh)), mesh)
    if is_spread(axes_of(held)):
        return held
    if isinstance(distribution, keras.distribution.ModelParallel):
        # A model puts its name in front of the path, if it builds the layer. The map of the layer does not know it.
        for known in (path, short):
            if (layout := distribution.get_tensor_layout(known)) is not None:
                return layout
    if given is not None:
        return given
    stand_in = types.SimpleNamespace(path=path, shape=shape, dtype=dtype, _layout=None)
    stand_in.name = path.rpartition("/")[2]
    return distribution.get_variable_layout(stand_in)


def layout_like(layout: Any, shape: tuple[int, ...], part: tuple[int, ...]) -> Any:
    """Return the layout of a part of a leaf, from that of the leaf, or None for a layout of another kind."""
    axes = axes_of(layout)
    own = of_part((*axes, *(None,) * (len(shape) - len(axes))), shape, part)
    if isinstance(layout, NamedSharding):
        return NamedSharding(layout.mesh, PartitionSpec(*own))
    is_layout = isinstance(layout, keras.distribution.TensorLayout)
    return Layout(own, layout.device_mesh) if is_layout else None


def is_spread_out(array: jax.Array) -> bool:
    """Whether an array lies on several devices."""
    return not isinstance(array, Tracer) and len(array.sharding.device_set) > 1


def sharding_of(layout: Any) -> Any:
    """Return a layout as JAX has it."""
    return getattr(layout, "backend_layout", layout)


def axes_of(layout: Any) -> Axes:
    """Return for each axis of a tensor the axes of the mesh that a layout divides it by."""
    if isinstance(layout, keras.distribution.TensorLayout):
        return layout.axes
    return tuple(layout.spec) if isinstance(layout, NamedSharding) else ()
