"""Weights in Keras's weights files, under their paths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import keras
import numpy as np

from jaxwrap._variables import assign, to_host

# The list of all paths, so that a reader sees what it does not expect.
_PATHS = "paths"
_SEEDS = "seed_generator"


def save(
    store: Any, weights: Mapping[str, keras.Variable], seeds: Mapping[str, keras.Variable]
) -> None:
    """Writes weights, and the seeds of generators with their counters, which Keras leaves out.

    Args:
        store: What Keras gives to `save_own_variables`.
        weights: Variables by their paths below the layer.
        seeds: The states of seed generators by their names.
    """
    for path, variable in weights.items():
        store[path] = _to_file(variable)
    for name, variable in seeds.items():
        store[f"{_SEEDS}/{name}"] = np.asarray(
            keras.ops.convert_to_numpy(variable.value), dtype="int64"
        )
    store[_PATHS] = np.frombuffer("\n".join(weights).encode(), "uint8")


def load(
    store: Any,
    weights: Mapping[str, keras.Variable],
    in_order: Sequence[str],
    seeds: Mapping[str, keras.Variable],
    owner: str,
) -> None:
    """Reads what `save` wrote, or what Keras's own layers wrote: numbers for names. Assigns all or nothing.

    Args:
        store: What Keras gives to `load_own_variables`.
        weights: Variables by their paths below the layer.
        in_order: These paths in the order of Keras's own layers.
        seeds: The states of seed generators by their names. Those not in the file are left alone.
        owner: What errors begin with.

    Raises:
        ValueError: If weights are missing, not expected, or of another shape. All of them are listed.
    """
    if _PATHS in store:
        found = np.asarray(store[_PATHS]).tobytes().decode().split("\n")
        names = {path: path for path in found if path}
    else:
        numbers = sorted(map(int, store.keys()))
        names = {
            in_order[number] if number < len(in_order) else f"number {number}": str(number)
            for number in numbers
        }
    problems = [f"  missing: {path}" for path in weights if path not in names]
    problems += [f"  unexpected: {path}" for path in names if path not in weights]
    values = {}
    for path, variable in weights.items():
        if path in names:
            values[path] = value = _from_file(np.asarray(store[names[path]]), variable.dtype)
            if value.shape != tuple(variable.shape):
                problems.append(
                    f"  shape: {path} is {tuple(variable.shape)}, in the file {value.shape}"
                )
    if problems:
        raise ValueError(
            f"{owner}: the weights in the file are not those of the layer. None has been changed.\n"
            + "\n".join(problems)
        )
    for path, value in values.items():
        assign(weights[path], value)
    for name, variable in seeds.items():
        if f"{_SEEDS}/{name}" in store:
            variable.assign(np.asarray(store[f"{_SEEDS}/{name}"]).astype("uint32"))


def _to_file(variable: keras.Variable) -> np.ndarray:
    value = to_host(variable)
    # HDF5 has no floats of 8 bits.
    return value.view("uint8") if variable.dtype.startswith("float8") else value


def _from_file(value: np.ndarray, dtype: str) -> np.ndarray:
    bits = value.dtype == np.uint8 and dtype.startswith("float8")
    return value.view(jnp.dtype(dtype)) if bits else value
