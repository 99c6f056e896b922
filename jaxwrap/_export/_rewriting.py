"""Jaxprs with some equations replaced, for converters that know only some operations or forms of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Literal
from jax.interpreters.partial_eval import dce_jaxpr

from jaxwrap._typing import Array

# Takes the inputs of an equation and its parameters. Returns its outputs, or None to leave it as it is.
Rule = Callable[..., Sequence[Array] | None]

# Calls whose bodies take their place. Their rules of differentiation are not needed any more.
_CALLS = {
    "call",
    "checkpoint",
    "closed_call",
    "custom_jvp_call",
    "custom_vjp_call",
    "jit",
    "remat2",
}
_BODIES = ("call_jaxpr", "fun_jaxpr", "jaxpr")
# Larger constants stay computations: int8 weights would become float ones.
_MOST_CONSTANTS = 1024


def rewrite(closed: Any, rules: Mapping[str, Rule]) -> ClosedJaxpr:
    """Replace equations of a closed jaxpr, put the bodies of calls in their place, and compute small constants.

    Args:
        closed: The jaxpr. Its sizes may be symbols.
        rules: What to replace, by the name of the primitive, in the bodies of loops and branches too.
    """
    structs = [
        jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type)
        for aval in closed.in_avals
    ]
    traced = jax.make_jaxpr(lambda *inputs: _evaluate(closed, rules, inputs))(*structs)
    jaxpr, _ = dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars), instantiate=True)
    return ClosedJaxpr(jaxpr, traced.consts)


def _evaluate(body: Any, rules: Mapping[str, Rule], inputs: Sequence[Any]) -> list[Any]:
    # The body of `checkpoint` has no constants.
    jaxpr, constants = (body.jaxpr, body.consts) if hasattr(body, "consts") else (body, ())
    values = dict(zip(jaxpr.constvars, constants, strict=True))
    values.update(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        outputs = _outputs(equation, rules, [read(atom) for atom in equation.invars])
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _outputs(equation: Any, rules: Mapping[str, Rule], inputs: list[Any]) -> Sequence[Any]:
    primitive, params = equation.primitive, equation.params
    if primitive.name in _CALLS:
        body = next(params[name] for name in _BODIES if name in params)
        return _evaluate(body, rules, inputs)
    if primitive.name in rules:
        # Literals may be numbers of Python.
        arrays = [
            value if hasattr(value, "shape") else np.asarray(value, atom.aval.dtype)
            for value, atom in zip(inputs, equation.invars, strict=True)
        ]
        outputs = rules[primitive.name](*arrays, **params)
        if outputs is not None:
            return outputs
    params = {name: _in_params(value, rules) for name, value in params.items()}

    def bind() -> Sequence[Any]:
        result = primitive.bind(*inputs, **primitive.get_bind_params(params))
        return result if primitive.multiple_results else [result]

    if _is_small_constant(equation, inputs):
        with jax.ensure_compile_time_eval():
            return bind()
    return bind()


def _in_params(value: Any, rules: Mapping[str, Rule]) -> Any:
    if type(value) is tuple:  # branches
        return tuple(_in_params(item, rules) for item in value)
    return rewrite(value, rules) if isinstance(value, ClosedJaxpr) else value


def _is_small_constant(equation: Any, inputs: list[Any]) -> bool:
    if (
        equation.primitive.name == "dim_as_value"
        or equation.effects
        or any(isinstance(value, Tracer) for value in inputs)
    ):
        return False
    return all(
        isinstance(variable.aval.dtype, np.dtype)
        and all(isinstance(size, int) for size in variable.aval.shape)
        and variable.aval.size <= _MOST_CONSTANTS
        for variable in equation.outvars
    )
