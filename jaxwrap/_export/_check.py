"""Run a file that has just been written, in its own runtime, and compare it with the model."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import pathlib
import warnings
from collections.abc import Callable, Iterator, Sequence

import jax.numpy as jnp
import numpy as np

from jaxwrap._export._formats import Format
from jaxwrap._export._inference import Port, Ports

Reference = Callable[[list[np.ndarray]], list[np.ndarray]]

_TOLERANCE = {"float32": 1e-4, "float64": 1e-4, "complex64": 1e-4, "complex128": 1e-4}
_HALF = 2e-2  # of 16 bits, and of 8
_BATCHES = (2, 3)
# Two sizes for all unknown axes but the first. Not every model takes the first ones.
_LENGTHS = ((8, 12), (64, 96), (224, 256), (4, 3), (2, 3))


def check_file(
    path: pathlib.Path,
    name: str,
    chosen: Format,
    ports: Ports,
    reference: Reference,
    leading: Sequence[np.ndarray] = (),
) -> None:
    """Compare a file with the model for two batch sizes, or for one if the file takes one only.

    Args:
        path: The file.
        name: The name of the format.
        chosen: The format.
        ports: The inputs and outputs of the file.
        reference: The model.
        leading: What the file takes before its inputs.

    Raises:
        ValueError: If the runtime refuses the file, or an output is off, or NaN where that of the model is not.
    """
    if importlib.util.find_spec(chosen.runtime) is None:
        warnings.warn(
            f"the file is not checked, since {chosen.runtime}, which runs it, is not installed. Install it with "
            f"`pip install {chosen.install}`, or pass `check=False`.",
            stacklevel=4,
        )
        return
    pairs = list(_pairs(ports, reference))
    try:
        load = functools.partial(chosen.load_module().load, path, ports)
        # A call may change the state of what was loaded.
        runs = [load() for _ in pairs] if chosen.keeps_state else [load()] * len(pairs)
        received = [run([*leading, *inputs]) for run, (inputs, _) in zip(runs, pairs, strict=True)]
    except Exception as error:
        raise ValueError(
            f"{chosen.runtime} cannot run what was written as {name!r}, so it has been deleted. It raised "
            f"{type(error).__name__}: {error}"
        ) from error
    for (inputs, expected), outputs in zip(pairs, received, strict=True):
        for port, one, two in zip(ports.outputs, expected, outputs, strict=True):
            if difference := _difference(one, two):
                shapes = ", ".join(str(list(array.shape)) for array in inputs)
                raise ValueError(
                    f"output {port.name!r} of what was written as {name!r} {difference}, for inputs of shapes "
                    f"{shapes}. The file has been deleted. Export to another format, such as 'stablehlo'."
                )


def _pairs(
    ports: Ports, reference: Reference
) -> Iterator[tuple[list[np.ndarray], list[np.ndarray]]]:
    """Yield inputs and what the model returns for them."""
    rng = np.random.default_rng(0)
    failure = None
    for lengths in _LENGTHS:
        sizes = [_sizes(ports.inputs, *pair) for pair in zip(_BATCHES, lengths, strict=True)]
        sizes = [size for size, _ in itertools.groupby(sizes)]
        try:
            made = [[_input(port, size, rng) for port in ports.inputs] for size in sizes]
            pairs = [(inputs, reference(inputs)) for inputs in made]
        except Exception as error:
            failure = failure or error
        else:
            yield from pairs
            return
    assert failure is not None
    raise ValueError(
        "the check found no sizes that the model takes. Pass sizes by `input_signature`, or `check=False`. For the "
        f"first ones it raised {type(failure).__name__}: {failure}"
    ) from failure


def _sizes(inputs: Sequence[Port], batch: int, length: int) -> dict[str, int]:
    """Return a size for each unknown one."""
    unknown = [size for port in inputs for size in port.dims if isinstance(size, str)]
    first = {port.dims[0] for port in inputs if port.dims}
    return {size: batch if size in first else length for size in unknown}


def _input(port: Port, sizes: dict[str, int], rng: np.random.Generator) -> np.ndarray:
    shape = [sizes[size] if isinstance(size, str) else size for size in port.dims]
    if jnp.issubdtype(port.dtype, jnp.inexact):
        return rng.standard_normal(shape).astype(port.dtype)
    # Of integers, two that are most likely valid: tokens, labels, pixels.
    return rng.integers(0, 2, shape).astype(port.dtype)


def _difference(expected: np.ndarray, received: np.ndarray) -> str | None:
    """Say how an output differs from that of the model, or return None."""
    if expected.shape != received.shape:
        return f"has the shape {received.shape}; that of the model has {expected.shape}"
    if expected.dtype.kind in "iub":
        wrong = int((expected != received).sum())
        return f"has {wrong} other values of {expected.size} than the model" if wrong else None
    tolerance = _TOLERANCE.get(expected.dtype.name, _HALF)
    wide = np.complex128 if jnp.issubdtype(expected.dtype, jnp.complexfloating) else np.float64
    expected, received = expected.astype(wide), received.astype(wide)
    if extra := int((np.isnan(received) & ~np.isnan(expected)).sum()):
        return f"is NaN in {extra} of {expected.size} places where that of the model is not"
    if np.allclose(received, expected, tolerance, tolerance, equal_nan=True):
        return None
    with np.errstate(invalid="ignore"):
        off = np.nanmax(np.abs(received - expected))
    return f"is off by {off:.2g} from that of the model"
