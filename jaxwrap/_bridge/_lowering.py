"""Lowering rules for exports: StableHLO's own operations where JAX calls the LAPACK that it has linked."""

from __future__ import annotations

from typing import Any

import jax
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo


def _cholesky(ctx: Any, matrix: Any) -> list[Any]:
    return [stablehlo.cholesky(matrix, lower=ir.BoolAttr.get(True))]


def _triangular_solve(
    ctx: Any,
    matrix: Any,
    values: Any,
    *,
    left_side: bool,
    lower: bool,
    transpose_a: bool,
    conjugate_a: bool,
    unit_diagonal: bool,
) -> list[Any]:
    is_complex = jax.numpy.issubdtype(ctx.avals_in[0].dtype, jax.numpy.complexfloating)
    if (
        conjugate_a and not transpose_a and is_complex
    ):  # StableHLO conjugates only what it transposes
        imaginary = stablehlo.negate(stablehlo.imag(matrix))
        matrix = stablehlo.complex(stablehlo.real(matrix), imaginary)
    transpose = "NO_TRANSPOSE"
    if transpose_a:
        transpose = "ADJOINT" if conjugate_a else "TRANSPOSE"
    solved = stablehlo.triangular_solve(
        matrix,
        values,
        ir.BoolAttr.get(left_side),
        ir.BoolAttr.get(lower),
        ir.BoolAttr.get(unit_diagonal),
        stablehlo.TransposeAttr.get(transpose),
    )
    return [solved]


PORTABLE_RULES = (
    (jax.lax.linalg.cholesky_p, _cholesky),
    (jax.lax.linalg.triangular_solve_p, _triangular_solve),
)
