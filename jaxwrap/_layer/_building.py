"""Initial values: what `init` is called with, and what becomes of its result."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxwrap._bridge import get_bridge
from jaxwrap._layer._inputs import placeholders
from jaxwrap._pytree import is_array, partition, path_str
from jaxwrap._serialization import check_size
from jaxwrap._specs import Spec, partition_specs, smallest
from jaxwrap._typing import PyTree, Static

if TYPE_CHECKING:
    from jaxwrap._layer._engine import Engine


def init_weights(engine: Engine, specs: dict[str, PyTree]) -> None:
    """Make the variables of a layer with the values that `init` returns.

    Raises:
        ValueError: Inside a JAX trace, if the values exist only there.
    """
    if engine.is_from_file:
        _check_sizes(engine, specs)
    params, state = _first_values(engine, specs)
    traced = [
        path_str(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path((params, state))
        if isinstance(leaf, Tracer)
    ]
    if traced:
        raise ValueError(
            "the layer is being built inside a JAX trace, and `init_fn` makes values that exist only in that trace "
            f"({', '.join(traced)}). Build it before: `layer.build(input_shape)`, or call it once outside of "
            "`jax.jit`."
        )
    with jax.ensure_compile_time_eval():
        engine.create_weights(params, state)


def _first_values(engine: Engine, specs: dict[str, PyTree]) -> tuple[PyTree, PyTree]:
    # Keras may build a layer inside `jax.jit`, and initial values must outlive that trace. It breaks a `shard_map`
    # with a collective in `init_fn`: build such a layer before.
    if (mesh := get_bridge().mesh()) is None:
        with jax.ensure_compile_time_eval():
            return engine.init(placeholders(specs))

    def made() -> tuple[list[Any], Static]:
        arrays, structure = partition(engine.init(placeholders(specs)), is_array)
        return arrays, Static(structure)

    # Compiled, as constraints to a mesh hold in compiled functions only.
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    with jax.core.eval_context():
        arrays, static = jax.jit(made, out_shardings=(everywhere, None))()
    return static.value.unflatten(arrays)


def _check_sizes(engine: Engine, specs: dict[str, PyTree]) -> None:
    """Raise ValueError if inputs or weights do not fit into memory: their shapes come from a file."""
    known, structure = partition_specs(specs)
    inputs = [jax.ShapeDtypeStruct(smallest(spec), spec.dtype) for spec in known]

    def arrays_of(inputs: list[Any]) -> list[Any]:
        return partition(engine.init(structure.unflatten(inputs)), is_array)[0]

    # By `eval_shape`, which allocates nothing.
    arrays = (*inputs, *jax.eval_shape(arrays_of, inputs))
    check_size(arrays)


def seen_by_init(layer: Any, specs: PyTree) -> PyTree:
    """Set the precision of the variables for floats, which Keras casts for each call."""

    def cast(leaf: Any) -> Any:
        is_float = isinstance(leaf, Spec) and jnp.issubdtype(leaf.dtype, jnp.floating)
        return Spec(leaf.shape, layer.variable_dtype) if is_float and layer.autocast else leaf

    return jax.tree_util.tree_map(cast, specs)
