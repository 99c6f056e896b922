"""The model without data: shapes and dtypes of outputs, names of metrics, draws, masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxwrap._layer._adapter import call_adapter
from jaxwrap._layer._seeds import Generator, drawing
from jaxwrap._specs import abstract_call, fillings, partition_specs, used_inputs
from jaxwrap._typing import PyTree

if TYPE_CHECKING:
    from jaxwrap._layer._engine import Engine

Shape = tuple[int | None, ...]


def abstract_result(engine: Engine, specs: dict[str, PyTree], training: bool) -> dict[str, PyTree]:
    """Trace the model by `jax.eval_shape`. No user code runs on data, on any backend.

    Returns:
        The `outputs` and `metrics` of a call, with a spec for each array.
    """
    weights = engine.weights
    parts = () if weights is None else (weights.params, weights.state)

    def result_of(arguments: dict[str, PyTree], values: list[list[Any]]) -> PyTree:
        if not parts:
            (params, state), _ = engine.adapter.unbox(*engine.init(arguments))
        else:
            pairs = zip(parts, values, strict=True)
            params, state = (leaves.decode(arrays) for leaves, arrays in pairs)
        generators: list[Generator] = list(engine.seeds.generators.values())
        # Shapes depend on no seed, and a call without data must not move one.
        with drawing(generators, [jnp.zeros(2, jnp.uint32) for _ in generators]):
            keys = engine.draw_keys(training)
        inputs = engine.inputs.for_adapter(arguments)
        result = call_adapter(engine.adapter, params, state, keys, inputs, training)
        return {"outputs": result.outputs, "metrics": dict(result.metrics)}

    return abstract_call(result_of, specs, [leaves.structs() for leaves in parts])


class Survey(NamedTuple):
    """What a trace of the model in training tells.

    Attributes:
        metrics: The names of the metrics that it reports.
        draws: Whether its results depend on its keys.
    """

    metrics: tuple[str, ...]
    draws: bool


def survey(engine: Engine, training: bool) -> Survey:
    """Trace the built model without data, for the arguments that the layer was built for."""
    failure: Exception | None = None
    # A function may fail for some sizes: none divides a prime.
    for specs in fillings(engine.specs):
        try:
            return _survey(engine, specs, training)
        except Exception as error:
            failure = failure or error
    assert failure is not None
    raise failure


def _survey(engine: Engine, specs: dict[str, PyTree], training: bool) -> Survey:
    weights = engine.built_weights()
    known, structure = partition_specs(specs)
    parts = (weights.params, weights.state)
    generators: list[Generator] = list(engine.seeds.generators.values())
    with drawing(generators, [jnp.zeros(2, jnp.uint32) for _ in generators]):
        keys = engine.draw_keys(training)

    def call(keys: PyTree, arrays: list[Any], values: list[list[Any]]) -> PyTree:
        params, state = (leaves.decode(v) for leaves, v in zip(parts, values, strict=True))
        inputs = engine.inputs.for_adapter(structure.unflatten(arrays))
        result = call_adapter(engine.adapter, params, state, keys, inputs, training)
        return result.outputs, result.state, result.losses, dict(result.metrics)

    arrays = [jax.ShapeDtypeStruct(s.shape, jax.dtypes.canonicalize_dtype(s.dtype)) for s in known]
    closed, shapes = jax.make_jaxpr(call, return_shape=True)(
        keys, arrays, [leaves.structs() for leaves in parts]
    )
    count = len(jax.tree_util.tree_leaves(keys))
    return Survey(tuple(shapes[3]), any(used_inputs(closed)[:count]))


def masks_for(shapes: Sequence[Shape], masks: PyTree) -> list[Any]:
    """Return for each output the first mask whose axes it begins with, or None."""
    known = [mask for mask in jax.tree_util.tree_leaves(masks) if mask is not None]
    return [
        next((mask for mask in known if _begins_with(shape, tuple(mask.shape))), None)
        for shape in shapes
    ]


def _begins_with(shape: Shape, start: Shape) -> bool:
    return len(shape) >= len(start) and all(
        None in pair or pair[0] == pair[1] for pair in zip(shape, start, strict=False)
    )
