"""Initial values: what `init` is called with, and what becomes of its result."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxwrap._layer._inputs import placeholders
from jaxwrap._pytree import is_array, partition, path_str
from jaxwrap._serialization import check_size
from jaxwrap._specs import Spec, partition_specs
from jaxwrap._typing import Array, PyTree
from jaxwrap._weights import Plan
from jaxwrap._weights._leaf import Leaf
from jaxwrap._weights._variables import Initial, array_of

if TYPE_CHECKING:
    from jaxwrap._layer._engine import Engine


def init_weights(engine: Engine, specs: dict[str, PyTree]) -> None:
    """Make the variables of a layer with the values that `init` returns.

    Raises:
        ValueError: Inside a JAX trace, if the values exist only there.
    """
    if engine.is_from_file:
        _check_sizes(engine, specs)
    # Keras may build a layer inside `jax.jit`, and initial values must outlive that trace. It breaks a `shard_map`
    # with a collective in `init_fn`: build such a layer before.
    with jax.ensure_compile_time_eval():
        params, state = engine.init(placeholders(specs))
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


class Traced(NamedTuple):
    """The variables that a layer will have, from a trace of its `init`.

    Attributes:
        plan: The weights.
        initials: For each leaf its variables, with a `jax.ShapeDtypeStruct` in the place of the value.
    """

    plan: Plan
    initials: list[list[Initial]]

    @property
    def leaves(self) -> list[Leaf]:
        """The leaves."""
        return self.plan.leaves


def trace_init(engine: Engine, specs: dict[str, PyTree]) -> Traced:
    """Find out which variables `init` makes, by `jax.eval_shape`, which allocates nothing."""
    noted: list[Any] = []

    def arrays_of() -> list[list[Array]]:
        plan, values = engine.plan(*engine.init(placeholders(specs)))
        initials = [leaf.initials(value) for leaf, value in zip(plan.leaves, values, strict=True)]
        noted.append((plan, initials))
        return [[jnp.asarray(array_of(one.value), one.dtype) for one in part] for part in initials]

    with engine.lock:
        shapes = jax.eval_shape(arrays_of)
    plan, initials = noted[-1]
    pairs = [zip(part, own, strict=True) for part, own in zip(initials, shapes, strict=True)]
    return Traced(plan, [[one._replace(value=shape) for one, shape in part] for part in pairs])


def _check_sizes(engine: Engine, specs: dict[str, PyTree]) -> None:
    """Raise ValueError if inputs or weights do not fit into memory: their shapes come from a file."""
    known, structure = partition_specs(specs)
    inputs = [jax.ShapeDtypeStruct(spec.fill(1), spec.dtype) for spec in known]

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
