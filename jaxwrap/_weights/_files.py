"""Weights in Keras's weights files, under their paths."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import keras
import numpy as np

from jaxwrap._dtypes import can_hold
from jaxwrap._weights._variables import assign, to_host

# The list of all paths, so that a reader notices unexpected ones. And a checksum of all, since HDF5 has none.
_PATHS = "paths"
_CHECKSUM = "checksum"
_SEEDS = "seed_generator"


def save(
    store: Any, weights: Mapping[str, keras.Variable], seeds: Mapping[str, keras.Variable]
) -> None:
    """Write weights, and the seeds of generators with their counters, which Keras leaves out.

    Args:
        store: The store that Keras passes to `save_own_variables`.
        weights: Variables by their paths below the layer.
        seeds: The states of seed generators by their names.
    """
    arrays = {path: _to_file(variable) for path, variable in weights.items()}
    for name, variable in seeds.items():
        # One dtype for all backends, whose seeds are uint32, int32 or int64.
        seed = keras.ops.convert_to_numpy(variable.value)
        arrays[f"{_SEEDS}/{name}"] = np.asarray(seed, dtype="int64")
    for path, array in arrays.items():
        store[path] = array
    store[_PATHS] = np.frombuffer("\n".join(arrays).encode(), "uint8")
    store[_CHECKSUM] = np.uint32(_checksum(arrays))


def load(
    store: Any,
    weights: Mapping[str, keras.Variable],
    in_order: Sequence[str],
    seeds: Mapping[str, keras.Variable],
) -> None:
    """Read a file of `save`, or of Keras's own layers, which number weights. Assign all or nothing.

    Args:
        store: The store that Keras passes to `load_own_variables`.
        weights: Variables by their paths below the layer.
        in_order: These paths in the order of Keras's own layers.
        seeds: The states of seed generators by their names. Those that the file does not have keep their values.

    Raises:
        ValueError: If weights are missing, not expected, or of another shape, with a line for each. Or if the file is
            damaged.
    """
    if _PATHS in store:
        arrays = {path: np.asarray(store[path]) for path in stored_paths(store) if path in store}
        whole = _CHECKSUM not in store or np.array_equal(store[_CHECKSUM], _checksum(arrays))
    else:
        by_number = {str(number): path for number, path in enumerate(in_order)}
        arrays = {
            by_number.get(key, str(key)): np.asarray(store[key]) for key in list(store.keys())
        }
        whole = True
    found_seeds = {path: arrays.pop(path) for path in list(arrays) if path.startswith(_SEEDS + "/")}
    problems = [f"  missing: {path}" for path in weights if path not in arrays]
    problems += [f"  unexpected: {path}" for path in arrays if path not in weights]
    values = {}
    for path, variable in weights.items():
        if path in arrays:
            values[path] = value = _from_file(arrays[path], variable.dtype)
            if value.shape != tuple(variable.shape):
                problems.append(
                    f"  shape: {path} is {tuple(variable.shape)}, in the file {value.shape}"
                )
            if not can_hold(variable.dtype, value.dtype):
                problems.append(f"  dtype: {path} is {variable.dtype}, in the file {value.dtype}")
    # The layer may have other streams than the one that wrote the file.
    states = {
        name: found_seeds[f"{_SEEDS}/{name}"] for name in seeds if f"{_SEEDS}/{name}" in found_seeds
    }
    for name, state in states.items():
        if state.shape != tuple(seeds[name].shape) or state.dtype.kind not in "iu":
            problems.append(f"  seed: {_SEEDS}/{name} is not a pair of integers")
    if problems:
        raise ValueError(
            "the weights in the file are not those of the layer. No weight has been changed.\n"
            + "\n".join(problems)
        )
    # After the problems, which say more about a file of another layer.
    if not whole:
        raise ValueError(
            "the weights in the file are not those that were written: their checksum differs. No weight has been "
            "changed. The file is damaged. Use another copy."
        )
    for path, value in values.items():
        assign(weights[path], value)
    for name, state in states.items():
        seeds[name].assign(state.astype("uint32"))


def stored_paths(store: Any) -> list[str]:
    """Return the paths in a file, as they were written. In a file of Keras's own layers, the numbers."""
    if _PATHS not in store:
        return sorted(map(str, store.keys()), key=lambda key: (len(key), key))
    listed = np.asarray(store[_PATHS]).tobytes().decode(errors="replace").split("\n")
    return [path for path in listed if path]


def _checksum(arrays: Mapping[str, np.ndarray]) -> int:
    checksum = 0
    for path, array in arrays.items():
        checksum = zlib.crc32(f"{path} {array.dtype} {array.shape}".encode(), checksum)
        checksum = zlib.crc32(np.ascontiguousarray(array).reshape(-1).view("uint8").data, checksum)
    return checksum


# Dtypes that HDF5 does not have are written as bits. Keras would write a bfloat16 with a string as attribute, and a
# damaged string crashes the HDF5 library.
_BITS = {1: "uint8", 2: "uint16"}


def _to_file(variable: keras.Variable) -> np.ndarray:
    value = to_host(variable)
    return value.view(_BITS[value.itemsize]) if _is_bits(variable.dtype) else value


def _from_file(value: np.ndarray, dtype: str) -> np.ndarray:
    as_bits = _is_bits(dtype) and value.dtype == _BITS[jnp.dtype(dtype).itemsize]
    return value.view(jnp.dtype(dtype)) if as_bits else value


def _is_bits(dtype: str) -> bool:
    return dtype == "bfloat16" or dtype.startswith("float8")
