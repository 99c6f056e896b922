"""Weights in Keras's weights files, under their paths."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import keras
import numpy as np

from jaxwrap._variables import assign, can_hold, to_host

# The list of all paths, so that a reader sees what it does not expect; and a checksum of all, since HDF5 has none.
_PATHS = "paths"
_CHECKSUM = "checksum"
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
    checksum = 0
    for path, variable in weights.items():
        store[path] = value = _to_file(variable)
        checksum = _update(checksum, path, value)
    for name, variable in seeds.items():
        seed = np.asarray(keras.ops.convert_to_numpy(variable.value), dtype="int64")
        store[f"{_SEEDS}/{name}"] = seed
        checksum = _update(checksum, name, seed)
    paths = [*weights, *(f"{_SEEDS}/{name}" for name in seeds)]
    store[_PATHS] = np.frombuffer("\n".join(paths).encode(), "uint8")
    store[_CHECKSUM] = np.uint32(checksum)


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
        ValueError: If weights are missing, not expected, or of another shape. All of them are listed. Or if they are
            not what was written.
    """
    seeds_in_file = set()
    if _PATHS in store:
        found = np.asarray(store[_PATHS]).tobytes().decode(errors="replace").split("\n")
        seeds_in_file = {path for path in found if path.startswith(f"{_SEEDS}/")}
        names = {path: path for path in found if path and path not in seeds_in_file}
    else:
        by_number = {str(number): path for number, path in enumerate(in_order)}
        names = {by_number.get(key, key): key for key in store.keys()}  # noqa: SIM118 (a store is no dict)
    problems = [f"  missing: {path}" for path in weights if path not in names]
    problems += [f"  unexpected: {path}" for path in names if path not in weights]
    values = {}
    checksum = 0
    for path, variable in weights.items():
        if path in names:
            raw = np.asarray(store[names[path]])
            checksum = _update(checksum, path, raw)
            values[path] = value = _from_file(raw, variable.dtype)
            if value.shape != tuple(variable.shape):
                problems.append(
                    f"  shape: {path} is {tuple(variable.shape)}, in the file {value.shape}"
                )
            if not can_hold(variable.dtype, value.dtype):
                problems.append(f"  dtype: {path} is {variable.dtype}, in the file {value.dtype}")
    states = {}
    for name, variable in seeds.items():
        if (path := f"{_SEEDS}/{name}") in seeds_in_file:
            states[name] = state = np.asarray(store[path])
            checksum = _update(checksum, name, state)
            if state.shape != tuple(variable.shape) or state.dtype.kind not in "iu":
                problems.append(f"  seed: {path} is no pair of integers")
    if problems:
        raise ValueError(
            f"{owner}: the weights in the file are not those of the layer. None has been changed.\n"
            + "\n".join(problems)
        )
    # The layer may have other streams than the one that wrote the file.
    if len(states) == len(seeds_in_file) and _CHECKSUM in store and checksum != store[_CHECKSUM]:
        raise ValueError(
            f"{owner}: the weights in the file are not those that were written: their checksum differs. None has been "
            "changed. The file is damaged; use another copy."
        )
    for path, value in values.items():
        assign(weights[path], value)
    for name, state in states.items():
        seeds[name].assign(state.astype("uint32"))


def _update(checksum: int, name: str, value: np.ndarray) -> int:
    checksum = zlib.crc32(f"{name} {value.dtype} {value.shape}".encode(), checksum)
    return zlib.crc32(np.ascontiguousarray(value).reshape(-1).view("uint8").data, checksum)


def _to_file(variable: keras.Variable) -> np.ndarray:
    value = to_host(variable)
    # HDF5 has no floats of 8 bits.
    return value.view("uint8") if variable.dtype.startswith("float8") else value


def _from_file(value: np.ndarray, dtype: str) -> np.ndarray:
    bits = value.dtype == np.uint8 and dtype.startswith("float8")
    return value.view(jnp.dtype(dtype)) if bits else value
