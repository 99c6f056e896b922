"""JAX's errors for Python code that needs the value of a traced array, in words."""

from __future__ import annotations

import contextlib
import linecache
import re
from collections.abc import Iterator, Mapping
from types import TracebackType

import jax
from jax.core import eval_context

# They need a tracer to be made, so Keras, which makes errors again from their messages, cannot raise them.
_ERRORS = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)
LIBRARIES = ("jax", "jaxlib", "jaxwrap", "keras", "flax", "haiku", "equinox", "optax", "numpy")
_REMEDIES = {
    jax.errors.TracerBoolConversionError: (
        "In place of `if`, `while`, `and` or `bool()`, use `jnp.where(condition, a, b)` or `jax.lax.cond`."
    ),
    jax.errors.TracerArrayConversionError: (
        "In place of `np` functions and `np.asarray`, use those of `jnp`; values for Python code cannot leave a trace."
    ),
    jax.errors.TracerIntegerConversionError: (
        "In place of a Python index, `range()` or a size that depends on it, use `jnp.take` or `jax.lax.fori_loop`."
    ),
    jax.errors.NonConcreteBooleanIndexError: (
        "The size of `x[mask]` depends on values. Use `jnp.where(mask, x, 0)`."
    ),
}
_DEFAULT = (
    "In place of `float()`, `int()` and `.item()`, go on with the array; for decisions, use `jnp.where` or "
    "`jax.lax.cond`."
)
_ARGUMENT = re.compile(r"\b\w+(?:\[\d+\])+")


class TracedValueError(TypeError):
    """Python code needs the value of a traced array."""


def outside_traces() -> contextlib.AbstractContextManager[None]:
    """Compute eagerly in this scope, even while JAX traces around it."""
    # Not `ensure_compile_time_eval`, which holds inside the traces of `jit` and `shard_map` in this scope too.
    return eval_context()


@contextlib.contextmanager
def explained(names: Mapping[str, str] | None = None) -> Iterator[None]:
    """Raise TypeError for a traced value that Python code needs: where, what it depends on, what to write instead.

    Args:
        names: The names of the arguments of the traced function, by what JAX calls them: `arrays[0]`.
    """
    try:
        yield
    except _ERRORS as error:
        remedy = next((r for cls, r in _REMEDIES.items() if isinstance(error, cls)), _DEFAULT)
        raise TracedValueError(
            f"{_place(error.__traceback__)} needs the value of an array, and JAX traces it without values."
            f"{_dependence(str(error), names or {})} {remedy} ({type(error).__name__})"
        ) from error


def _place(trace: TracebackType | None) -> str:
    """Return the innermost function, file and line that are the user's."""
    found = "the model"
    while trace is not None:
        frame = trace.tb_frame
        if frame.f_globals.get("__name__", "").partition(".")[0] not in LIBRARIES:
            code = frame.f_code
            line = linecache.getline(code.co_filename, trace.tb_lineno).strip()
            shown = f", `{line}`," if line else ""
            found = f"`{code.co_qualname}` ({code.co_filename}, line {trace.tb_lineno}{shown})"
            found = found.replace(",)", ")")
        trace = trace.tb_next
    return found


def _dependence(message: str, names: Mapping[str, str]) -> str:
    found = dict.fromkeys(_ARGUMENT.findall(message))
    known = [names[argument] for argument in found if argument in names]
    if not known:
        return ""
    more = f" and {len(known) - 5} more" if len(known) > 5 else ""
    return f" It depends on {', '.join(f'`{name}`' for name in known[:5])}{more}."
