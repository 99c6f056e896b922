"""Initial values: what `init` is called with, and what becomes of its result."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxwrap._bridge import get_bridge
from jaxwrap._layer._inputs import placeholders
from jaxwrap._pytree import is_array, partition
from jaxwrap._serialization import check_size
from jaxwrap._specs import Spec, partition_specs, smallest
from jaxwrap._tracing import outside_traces
from jaxwrap._typing import Array, PyTree
from jaxwrap._weights import Plan
from jaxwrap._weights._leaf import Leaf
from jaxwrap._weights._variables import Initial, array_of, made_by

if TYPE_CHECKING:
    from jaxwrap._layer._engine import Engine


def init_weights(engine: Engine, specs: dict[str, PyTree]) -> None:
    """Make the variables of a layer with the values that `init` returns.

    Raises:
        ValueError: Inside a JAX trace, if the values exist only there.
    """
    if engine.is_from_file:
        _check_sizes(engine, specs)
    # Keras may build a layer inside `jax.jit`, and initial values must outlive that trace.
    with outside_traces():
        try:
            if get_bridge().mesh() is not None:
                _init_divided(engine, specs)
            else:
                params, state = engine.init(placeholders(specs))
                _check_outlive(jax.tree_util.tree_leaves((params, state)))
                engine.create_weights(params, state)
        except jax.errors.UnexpectedTracerError as error:
            raise ValueError(_ONLY_THERE) from error


_ONLY_THERE = (
    "the layer is being built inside a JAX trace, and `init_fn` makes values that exist only in that trace. Build it "
    "before: `layer.build(input_shape)`, or call it once outside of `jax.jit`."
)


def _check_outlive(values: Iterable[Any]) -> None:
    """Raise ValueError for values that exist only in a trace."""
    if any(isinstance(value, Tracer) for value in values):
        raise ValueError(_ONLY_THERE)


def _init_divided(engine: Engine, specs: dict[str, PyTree]) -> None:
    """Make the variables in their places on the devices: all in one compiled function, and no array as a whole."""
    # Here, since it takes longer than most of jaxwrap.
    from jax.extend.core import jaxpr_as_fun

    traced, closed = _traced(engine, specs)
    _check_outlive(closed.consts)

    def make(shardings: Sequence[Any]) -> list[Array]:
        return jax.jit(jaxpr_as_fun(closed), out_shardings=list(shardings))()

    engine.fill(traced.plan, traced.initials, made_by(make))


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
    """Find out which variables `init` makes, without data. Nothing is allocated."""
    with engine.lock, outside_traces():
        return _traced(engine, specs)[0]


def _traced(engine: Engine, specs: dict[str, PyTree]) -> tuple[Traced, Any]:
    """Trace `init`. Return the variables, and the jaxpr that makes their values in order."""
    noted: list[Any] = []

    def arrays_of() -> list[list[Array]]:
        plan, values = engine.plan(*engine.init(placeholders(specs)))
        initials = [leaf.initials(value) for leaf, value in zip(plan.leaves, values, strict=True)]
        noted.append((plan, initials))
        return [[jnp.asarray(array_of(one.value), one.dtype) for one in part] for part in initials]

    closed, shapes = jax.make_jaxpr(arrays_of, return_shape=True)()
    plan, initials = noted[-1]
    pairs = [zip(part, own, strict=True) for part, own in zip(initials, shapes, strict=True)]
    return Traced(plan, [[one._replace(value=s) for one, s in part] for part in pairs]), closed


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
