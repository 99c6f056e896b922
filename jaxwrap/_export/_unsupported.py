"""Operations that a format cannot hold, found before anything is written."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

from jaxwrap._export._formats import Format
from jaxwrap._tracing import LIBRARIES

# Primitives that call LAPACK on the CPU. Cholesky and triangular solve have operations of their own in StableHLO.
_LAPACK = {
    "eig",
    "eigh",
    "geqp3",
    "geqrf",
    "hessenberg",
    "householder_product",
    "lu",
    "ormqr",
    "qr",
    "schur",
    "svd",
    "symmetric_product",
    "tridiagonal",
    "tridiagonal_solve",
}


def check_supported(closed: Any, name: str, chosen: Format) -> None:
    """Raise NotImplementedError for the first operation of a jaxpr that a format cannot hold.

    The error has the name of the operation, and of the user's function that calls it.
    """
    for equation, *around in _equations(closed.jaxpr):
        primitive = equation.primitive.name
        place = functools.partial(_place, [equation, *around])
        if "callback" in primitive or primitive == "debug_print":
            raise NotImplementedError(
                f"`{primitive}` in {place()} calls back into Python, which no file can hold. Take it out: "
                "`jax.pure_callback`, `jax.debug.print`, or a check that may raise, such as `eqx.error_if`."
            )
        if primitive in _LAPACK and not chosen.lapack:
            raise NotImplementedError(
                f"`{primitive}` in {place()} calls LAPACK, which {name!r} cannot hold. Export to 'stablehlo'."
            )
        if not chosen.complex and any(map(_is_complex, equation.outvars)):
            raise NotImplementedError(
                f"`{primitive}` in {place()} makes complex numbers, which {name!r} cannot hold. Export to "
                "'stablehlo' or 'tf_saved_model'."
            )


def place_of(closed: Any, primitive: str) -> str | None:
    """Return the user's function around the first operation of a name, with its file and line."""
    found = (path for path in _equations(closed.jaxpr) if path[0].primitive.name == primitive)
    return next(map(_place, found), None)


def _equations(jaxpr: Any) -> Iterator[list[Any]]:
    """Yield each equation of a jaxpr with those around it. The ones inside others come first: they are more exact."""
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from ([*found, equation] for found in _equations(inner))
        yield [equation]


def _is_complex(variable: Any) -> bool:
    dtype = getattr(variable.aval, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.complexfloating)


def _library_folders() -> tuple[str, ...]:
    files = [getattr(sys.modules.get(name), "__file__", None) for name in LIBRARIES]
    standard = os.path.dirname(os.__file__) + os.sep
    # What is installed below the standard library may be the user's.
    return (
        *(os.path.dirname(file) + os.sep for file in files if file),
        f"{standard}contextlib",
        f"{standard}functools",
    )


def _place(equations: list[Any]) -> str:
    """Return the innermost function of the user around an operation, with its file and line.

    Args:
        equations: The operation, and those that it is inside of. The trace of an inner one begins at the outer one.
    """
    folders = _library_folders()
    traces = [equation.source_info.traceback for equation in equations]
    for frame in (frame for trace in traces if trace for frame in trace.frames):
        if not frame.file_name.startswith(folders):
            return f"`{frame.function_name}` ({frame.file_name}, line {frame.line_num})"
    return "the model"
