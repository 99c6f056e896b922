"""JAX functions as StableHLO artifacts, of a version that an older reader understands."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.interpreters.mlir import make_ir_context
from jaxlib.mlir import ir, passmanager
from jaxlib.mlir.dialects import stablehlo

from jaxwrap._bridge._lowering import PORTABLE_RULES
from jaxwrap._errors import is_ours
from jaxwrap._tracing import TracedValueError

Shape = tuple[int | None, ...]

# Composites (exact gelu among them) hide from TensorFlow's shape refinement what their bodies compute.
_PASSES = "builtin.module(func.func(stablehlo-legalize-composite-to-call),inline)"

_CALLBACKS = (
    "the function calls back into Python (`jax.pure_callback`, `jax.debug.print`, or a check that may raise, such as "
    "`eqx.error_if`), which a TensorFlow graph cannot hold. Take that out, or run it eagerly: "
    "`model.compile(..., run_eagerly=True)`."
)

# The symbol for a batch size that several arguments have.
_BATCH = "d_batch"

# Without it the pass manager knows none of the passes by name.
stablehlo.register_stablehlo_passes()


class Artifact(NamedTuple):
    """An exported function.

    Attributes:
        module: The portable bytecode.
        exported: The result of `jax.export`: kept arguments, platforms, output avals and output tree.
        jitted: The function itself.
    """

    module: bytes
    exported: jax.export.Exported
    jitted: Any


def export(
    jitted: Any,
    specs: Sequence[tuple[Shape, str]],
    platforms: tuple[str, ...] | None,
    version: str,
) -> Artifact:
    """Export a jitted function of arrays.

    Args:
        jitted: A function under `jax.jit`.
        specs: The shape and dtype of each argument. A dimension that is None may have any size.
        platforms: The platforms to lower for, as `jax.export` names them. None for the present one.
        version: The StableHLO version to write, such as "1.13.0".

    Raises:
        Exception: The error of the function, if all sizes are known.
        ValueError: If they are not, and JAX fails however they are tied to each other.
    """
    error = None
    for arguments in symbolic(specs):
        try:
            return export_for(jitted, arguments, platforms, version)
        except Exception as raised:
            # A callback or a foreign call, which our own errors are about, fails for all sizes alike.
            alike = isinstance(raised, NotImplementedError) and is_ours(raised)
            if alike or isinstance(raised, TracedValueError):
                raise
            if all(None not in shape for shape, _ in specs):
                raise
            # Examples come in batches, so an error for sizes of batches that differ is seldom what is wrong. Later
            # attempts tie sizes that the caller did not tie, and their errors would mislead.
            if error is None or _has_one_batch(arguments):
                error = raised
    assert error is not None
    received = ", ".join(f"{dtype}{list(shape)}" for shape, dtype in specs)
    raise ValueError(
        f"JAX cannot trace the function for arguments {received}, where each None stands for a size that is unknown "
        "while the graph is built. If the function has to know such a size, give it: set the shape of the input, or "
        f"`batch_size` in keras.Input. JAX says: {in_words(error, specs)}"
    ) from error


def in_words(error: Exception, specs: Sequence[tuple[Shape, str]]) -> str:
    """Return the first paragraph of JAX's error, with the sizes that our symbols stand for."""

    def name(match: re.Match[str]) -> str:
        if match[1] is None:
            return "the unknown batch size"
        argument, axis = map(int, match.groups())
        shape, dtype = specs[argument]
        return f"the unknown size {axis} of {dtype}{list(shape)}"

    if isinstance(error, TypeError) and "_DimExpr" in str(error):
        return (
            "a size that is unknown was used as a Python number. `x.shape[0]` can be computed with; `len(x)`, `int()` "
            "and `range()` need a size that is known."
        )
    paragraph = str(error).partition("\n\n")[0].partition("\nThis error arises")[0]
    return re.sub(rf"(?:Symbolic dimension )?'?\b(?:d(\d+)_(\d+)|{_BATCH})\b'?", name, paragraph)


def _has_one_batch(arguments: Sequence[jax.ShapeDtypeStruct]) -> bool:
    return any(str(size) == _BATCH for argument in arguments for size in argument.shape)


def export_for(
    jitted: Any,
    arguments: Sequence[Any],
    platforms: tuple[str, ...] | None,
    version: str,
    foreign: bool = False,
) -> Artifact:
    """Export a function for arguments whose unknown sizes are symbols of one scope.

    Args:
        jitted: A function under `jax.jit`.
        arguments: Pytrees of anything with a shape and a dtype.
        platforms: As for `export`.
        version: Likewise.
        foreign: Whether the reader has the functions that only JAX's own runtime has.
    """
    structs = jax.tree.map(
        lambda argument: jax.ShapeDtypeStruct(argument.shape, argument.dtype), tuple(arguments)
    )
    try:
        exported = jax.export.export(
            jitted, platforms=platforms, _override_lowering_rules=PORTABLE_RULES
        )(*structs)
    except Exception as raised:
        # JAX has no class of its own for this error.
        if "host_callbacks" in str(raised):
            raise NotImplementedError(_CALLBACKS) from raised
        raise
    return Artifact(_serialize(exported.mlir_module(), version, foreign), exported, jitted)


def symbolic(specs: Sequence[tuple[Shape, str]]) -> Iterator[list[jax.ShapeDtypeStruct]]:
    """Yield the arguments with a symbol for each None, from independent symbols to one for all.

    A function that adds two arguments needs their unknown sizes to be equal. Most functions need less, and the first
    way that works keeps the most sizes free.
    """
    unknown = [
        (argument, axis)
        for argument, (shape, _) in enumerate(specs)
        for axis, size in enumerate(shape)
        if size is None
    ]
    ways = [
        [f"d{argument}_{axis}" for argument, axis in unknown],
        [f"d{argument}_{axis}" if axis else _BATCH for argument, axis in unknown],
        [f"axis{axis}" for _, axis in unknown],
        [f"end{len(specs[argument][0]) - axis}" for argument, axis in unknown],
        ["size" for _ in unknown],
    ]
    tried = []
    for names in ways:
        # With few unknown sizes, several ways tie the same ones, and each attempt traces the function.
        partition = [names.index(name) for name in names]
        if partition in tried:
            continue
        tried.append(partition)
        symbols = dict(zip(sorted(set(names)), _symbols(sorted(set(names))), strict=True))
        named = dict(zip(unknown, names, strict=True))
        yield [
            jax.ShapeDtypeStruct(
                [
                    symbols[named[argument, axis]] if size is None else size
                    for axis, size in enumerate(shape)
                ],
                dtype,
            )
            for argument, (shape, dtype) in enumerate(specs)
        ]


def _symbols(names: list[str]) -> Sequence[Any]:
    return jax.export.symbolic_shape(",".join(names)) if names else ()


def _serialize(text: str, version: str, foreign: bool) -> bytes:
    with make_ir_context():
        module = ir.Module.parse(text)
        calls = list(_custom_calls(module.operation))
        if not foreign:
            _check_targets(calls)
        for call in calls:
            if _demands_one(call):
                call.erase()
        passmanager.PassManager.parse(_PASSES).run(module.operation)
        # JAX 0.12 writes StableHLO 1.18, TensorFlow 2.21 reads up to 1.13.7. Only this function takes a version.
        return stablehlo.serialize_portable_artifact_str(str(module), version)


def _custom_calls(operation: Any) -> Iterator[Any]:
    for region in operation.regions:
        for block in region:
            for inner in block.operations:
                if inner.operation.name == "stablehlo.custom_call":
                    yield inner.operation
                yield from _custom_calls(inner.operation)


def _check_targets(calls: list[Any]) -> None:
    """Raise NotImplementedError for calls of functions that only JAX's own runtime has, such as LAPACK's."""
    targets = {ir.StringAttr(call.attributes["call_target_name"]).value for call in calls}
    # LAPACK's kernels, for one, are a part of jaxlib, and TensorFlow cannot call them.
    foreign = sorted(target for target in targets if target.endswith("_ffi"))
    if foreign:
        raise NotImplementedError(
            f"the function calls {', '.join(foreign)}, which TensorFlow has no handler for in a graph. Run it eagerly "
            "(`model.compile(..., run_eagerly=True)`, or outside of `tf.function`), or use the JAX or PyTorch backend."
        )


def _demands_one(call: Any) -> bool:
    """Whether a custom call asserts that an unknown size is not zero. JAX adds it, and functions seldom need it."""
    if "error_message" not in call.attributes:
        return False
    return "Expected value >= 1" in ir.StringAttr(call.attributes["error_message"]).value
