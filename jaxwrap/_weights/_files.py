"""Weights in Keras's weights files, under their paths."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import keras
import numpy as np

from jaxwrap._dtypes import can_hold
from jaxwrap._weights._targets import Target, untied
from jaxwrap._weights._variables import to_host

# The list of all paths, so that a reader notices unexpected ones. And a checksum of all, since HDF5 has none.
_PATHS = "paths"
_CHECKSUM = "checksum"
_SEEDS = "seed_generator"
# Bytes of a list that no layer reaches.
_MOST_PATHS = 2**26


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
    targets: Callable[[Collection[str]], Mapping[str, Target]],
    in_order: Sequence[str],
    seeds: Mapping[str, keras.Variable],
) -> None:
    """Read a file of `save`, or of Keras's own layers, which number weights. Assign all or nothing.

    Args:
        store: The store that Keras passes to `load_own_variables`.
        targets: Returns what is read into by its path, for the paths in the file.
        in_order: The paths of the leaves in the order of Keras's own layers.
        seeds: The states of seed generators by their names. Those that the file does not have keep their values.

    Raises:
        ValueError: If weights are missing, not expected, or of another shape, with a line for each. Or if the file is
            damaged.
    """
    entries = _entries(store, in_order)
    weights = targets(entries)
    # A file may claim more than it holds: links to one dataset, or one of zeros that are not stored. So names and
    # shapes are compared before anything is read, and what is read is at most what the layer has.
    if problems := _problems(entries, weights, seeds):
        raise ValueError(
            "the weights in the file are not those of the layer. No weight has been changed.\n"
            + "\n".join(problems)
        )
    own_seeds = {f"{_SEEDS}/{name}": variable for name, variable in seeds.items()}
    arrays = {
        path: np.asarray(store[key])
        for path, (key, _) in entries.items()
        if path in weights or path.startswith(_SEEDS + "/")
    }
    if _CHECKSUM in store and not np.array_equal(store[_CHECKSUM], _checksum(arrays)):
        raise ValueError(
            "the weights in the file are not those that were written: their checksum differs. No weight has been "
            "changed. The file is damaged. Use another copy."
        )
    for path, target in weights.items():
        arrays[path] = _from_file(arrays[path], target.dtype).astype(target.dtype, copy=False)
        target.look(arrays[path])
    if lines := untied(weights, arrays):
        raise ValueError(
            "the weights in the file do not fit the layer. No weight has been changed.\n"
            + "\n".join(lines)
        )
    # Each array goes as soon as it is assigned, so that memory never holds two copies of the whole.
    for path, target in weights.items():
        target.write(arrays.pop(path))
    # The layer may have other streams than the one that wrote the file.
    for path, variable in own_seeds.items():
        if path in arrays:
            variable.assign(arrays[path].astype("uint32"))


def _entries(store: Any, in_order: Sequence[str]) -> dict[str, tuple[str, Any]]:
    """Return the datasets of a file by path: the key of each in the store, and what has its shape and dtype."""
    if _PATHS not in store:
        by_number = {str(number): path for number, path in enumerate(in_order)}
        keys = {by_number.get(key, str(key)): key for key in list(store.keys())}
    else:
        keys = {path: path for path in stored_paths(store) if path in store}
    return {path: (key, _unread(store, key)) for path, key in keys.items()}


def _unread(store: Any, key: str) -> Any:
    # The items of Keras's store are read already. Its group has datasets of h5py, which give shapes unread.
    group = getattr(store, "_h5_entry_group", {})
    dataset = group.get(key)
    return store[key] if dataset is None or "dtype" in dataset.attrs else dataset


def _problems(
    entries: Mapping[str, tuple[str, Any]],
    weights: Mapping[str, Target],
    seeds: Mapping[str, keras.Variable],
) -> list[str]:
    """Return a line for each reason not to read the file."""
    found = {path for path in entries if not path.startswith(_SEEDS + "/")}
    problems = [f"  missing: {path}" for path in weights if path not in found]
    problems += [f"  unexpected: {path}" for path in entries if path in found - weights.keys()]
    for path, target in weights.items():
        if path not in found:
            continue
        _, entry = entries[path]
        shape, dtype = tuple(entry.shape), entry.dtype
        if shape != target.shape:
            problems.append(f"  shape: {path} is {target.shape}, in the file {shape}")
        if not _as_bits(dtype, target.dtype) and not can_hold(target.dtype, dtype):
            problems.append(f"  dtype: {path} is {target.dtype}, in the file {dtype}")
    for path in entries.keys() - found:
        _, entry = entries[path]
        name = path.removeprefix(_SEEDS + "/")
        # Others are compared too, as the checksum reads them.
        shape = tuple(seeds[name].shape) if name in seeds else (2,)
        if tuple(entry.shape) != shape or entry.dtype.kind not in "iu":
            problems.append(f"  seed: {path} is not a pair of integers")
    return problems


def stored_paths(store: Any) -> list[str]:
    """Return the paths in a file, as they were written. In a file of Keras's own layers, the numbers.

    Raises:
        ValueError: If the file lists a path twice.
    """
    if _PATHS not in store:
        return sorted(map(str, store.keys()), key=lambda key: (len(key), key))
    listed = _unread(store, _PATHS)
    if listed.size > _MOST_PATHS:
        raise ValueError(f"the list of paths in the file has {listed.size:,} bytes. It is damaged.")
    names = np.asarray(listed).tobytes().decode(errors="replace").split("\n")
    paths = [path for path in names if path]
    if twice := sorted(path for path, count in Counter(paths).items() if count > 1)[:5]:
        raise ValueError(
            f"the file lists {', '.join(twice)} more than once. No weight has been changed. The file is damaged. "
            "Use another copy."
        )
    return paths


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
    return value.view(jnp.dtype(dtype)) if _as_bits(value.dtype, dtype) else value


def _as_bits(stored: Any, dtype: str) -> bool:
    return _is_bits(dtype) and stored == _BITS[jnp.dtype(dtype).itemsize]


def _is_bits(dtype: str) -> bool:
    return dtype == "bfloat16" or dtype.startswith("float8")
