"""The inference of a model as a pure JAX function of flat arrays, which every format is written from."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.interpreters.partial_eval import dce_jaxpr

from jaxwrap._bridge._stablehlo import Shape, in_words, symbolic
from jaxwrap._typing import Array

# model(*inputs, training=False)
#   │  as a pure function of all variables and inputs: `Source`
#   ▼
# raw(values, inputs) -> outputs, changed values
#   │  traced once, for sizes that are symbols, and dead equations removed: `trace`
#   ▼
# Inference: jaxpr of the values that are used, and the inputs


@dataclasses.dataclass(frozen=True)
class Port:
    """One input or output of a file.

    Attributes:
        name: Its name.
        dims: The sizes. An unknown one is a string. Those with equal strings are equal.
        dtype: The name of the dtype.
    """

    name: str
    dims: tuple[int | str, ...]
    dtype: str

    @property
    def shape(self) -> Shape:
        """The sizes, with None for an unknown one."""
        return tuple(size if isinstance(size, int) else None for size in self.dims)


class Ports(NamedTuple):
    """The inputs and outputs of a file, in the order of the leaves of what the model takes and returns."""

    inputs: list[Port]
    outputs: list[Port]


@dataclasses.dataclass(frozen=True)
class Source:
    """A model as a function, before it is traced.

    Attributes:
        raw: Takes a list of arrays for the variables, and a list of the arrays of the inputs. Returns a list of
            outputs, and the new values of variables that it changes, by index.
        names: The name of each variable, for a weight that in a checkpoint.
        values: The value of each variable.
        weights: The names that are those of weights.
        inputs: The name, shape and dtype of each input.
        output_names: Returns the names of the outputs once `raw` has been traced.
        arguments: The structure of the positional arguments of the model, a tuple.
        results: Returns the structure of what the model returns, likewise.
    """

    raw: Callable[[list[Array], list[Array]], tuple[list[Array], dict[int, Array]]]
    names: list[str]
    values: list[np.ndarray]
    weights: set[str]
    inputs: list[tuple[str, Shape, str]]
    output_names: Callable[[], list[str]]
    arguments: Any
    results: Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Inference:
    """The inference of a model, traced.

    Attributes:
        values: The arrays of the variables that outputs depend on. int8 stays int8.
        names: Their names, for weights those in a checkpoint.
        unused: The shapes and dtypes of all other weights, by name.
        ports: The inputs, in the order of the leaves of `arguments`, and the outputs, in that of `results`.
        updates: The places in `values` of what a call changes. After the outputs, the function returns their new
            values.
        jaxpr: The closed jaxpr, a function of `(*values, *inputs)`.
        structs: A `jax.ShapeDtypeStruct` for each input, whose unknown sizes are the symbols of the jaxpr.
        arguments: The structure of the positional arguments of the model.
        results: The structure of what the model returns.
    """

    values: list[np.ndarray]
    names: list[str]
    unused: dict[str, jax.ShapeDtypeStruct]
    ports: Ports
    updates: list[int]
    jaxpr: Any
    structs: list[jax.ShapeDtypeStruct]
    arguments: Any
    results: Any
    _retrace: Callable[..., list[Array]]

    def __call__(self, values: Sequence[Array], *inputs: Array) -> list[Array]:
        """Compute the outputs, and after them the updates, for inputs of any sizes. JAX may trace it.

        The jaxpr holds for the symbols that it was traced for. This traces the model again, and removes dead equations.
        """
        return self._retrace(list(values), list(inputs))

    def symbolic(self, values: Sequence[Array], *inputs: Array) -> list[Array]:
        """Compute the same by the jaxpr, for inputs with the sizes of `structs`."""
        return jaxpr_as_fun(self.jaxpr)(*values, *inputs)


def trace(source: Source, keeps_state: bool = False) -> Inference:
    """Trace a model once, and remove what its outputs do not depend on.

    Args:
        source: The model.
        keeps_state: Whether the format holds variables that a call changes. If not, and the outputs depend on such
            variables, a warning names them.

    Raises:
        ValueError: If JAX fails for unknown sizes, however they are tied to each other.
    """
    value_structs = [jax.ShapeDtypeStruct(value.shape, value.dtype) for value in source.values]
    specs = [(shape, dtype) for _, shape, dtype in source.inputs]
    changed: list[int] = []

    def flat(values: list[Array], inputs: list[Array]) -> list[Array]:
        outputs, updates = source.raw(values, inputs)
        changed[:] = sorted(updates)
        return [*map(jnp.asarray, outputs), *(updates[index] for index in changed)]

    closed, structs = _trace_symbolic(flat, value_structs, specs)
    count = len(closed.out_avals) - len(changed)
    pruned, used = _prune(closed, len(value_structs), count if not keeps_state else None)
    kept = [index for index, is_used in enumerate(used) if is_used]
    if not keeps_state and (lost := [source.names[i] for i in changed if i in kept]):
        warnings.warn(
            f"inference reads and changes {', '.join(lost[:5])}, and this format holds no state: every call starts "
            "from the value of now. format='tf_saved_model' keeps the changes.",
            stacklevel=4,
        )

    def retrace(values: list[Array], inputs: list[Array]) -> list[Array]:
        # Nothing depends on the others, so they may have any values.
        every = [jnp.zeros(struct.shape, struct.dtype) for struct in value_structs]
        for index, value in zip(kept, values, strict=True):
            every[index] = value
        closed = jax.make_jaxpr(flat)(every, inputs)
        pruned, used = _prune(closed, len(every), None if keeps_state else count)
        assert [index for index, is_used in enumerate(used) if is_used] == kept
        return jaxpr_as_fun(pruned)(*values, *inputs)

    outputs = [
        Port(name, _dims(aval.shape), aval.dtype.name)
        for name, aval in zip(source.output_names(), closed.out_avals[:count], strict=True)
    ]
    inputs = [
        Port(name, _dims(struct.shape), struct.dtype.name)
        for (name, _, _), struct in zip(source.inputs, structs, strict=True)
    ]
    return Inference(
        [source.values[index] for index in kept],
        [source.names[index] for index in kept],
        {
            name: struct
            for index, (name, struct) in enumerate(zip(source.names, value_structs, strict=True))
            if index not in kept and name in source.weights
        },
        Ports(inputs, outputs),
        [kept.index(index) for index in changed] if keeps_state else [],
        pruned,
        structs,
        source.arguments,
        source.results(),
        retrace,
    )


def _trace_symbolic(
    flat: Callable[..., Any], values: list[Any], specs: list[tuple[Shape, str]]
) -> tuple[Any, list[jax.ShapeDtypeStruct]]:
    error = None
    for structs in symbolic(specs):
        try:
            return jax.make_jaxpr(flat)(values, structs), structs
        except Exception as raised:
            if all(None not in shape for shape, _ in specs):
                raise
            # Later attempts tie sizes that the caller did not tie, and their errors would mislead.
            error = error or raised
    assert error is not None
    raise ValueError(
        "JAX cannot trace the model for sizes that are unknown. Pass `input_signature` with the sizes that it has to "
        f"know, or `batch_size`. JAX says: {in_words(error, specs)}"
    ) from error


def _prune(closed: Any, values: int, outputs: int | None) -> tuple[Any, list[bool]]:
    """Remove dead equations, and values that nothing uses. Return the closed jaxpr, and which values are used.

    Args:
        closed: A closed jaxpr of values and inputs.
        values: The number of values.
        outputs: How many results to keep. None keeps all.
    """
    jaxpr = closed.jaxpr
    total = len(jaxpr.outvars)
    wanted = [index < (total if outputs is None else outputs) for index in range(total)]
    instantiate = [index >= values for index in range(len(jaxpr.invars))]
    pruned, used = dce_jaxpr(jaxpr, wanted, instantiate)
    return ClosedJaxpr(pruned, closed.consts), used[:values]


def _dims(shape: Sequence[Any]) -> tuple[int | str, ...]:
    return tuple(size if isinstance(size, int) else str(size) for size in shape)
