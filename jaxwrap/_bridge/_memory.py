"""Memory that JAX and a backend share: aligned copies, and the arguments that stay where they are."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np

from jaxwrap._typing import Array, Role

# JAX reads foreign memory in place if it begins at a multiple of so many bytes. Otherwise it copies.
ALIGNMENT = 64


def held_runs(roles: Sequence[Role]) -> list[slice]:
    """Return where arguments that variables hold follow each other: state apart, since it changes most often."""
    runs = []
    kinds = [(role.held, role is Role.STATE) for role in roles]
    for (held, _), run in itertools.groupby(enumerate(kinds), lambda item: item[1]):
        places = [place for place, _ in run]
        if held:
            runs.append(slice(places[0], places[-1] + 1))
    return runs


def host_copies(arrays: Iterable[Array | np.ndarray]) -> Iterator[np.ndarray]:
    """Yield copies on the host that JAX can read in place through any alias. Each is made when asked for."""
    for original in arrays:
        array = np.asarray(original)
        dtype = np.dtype(jax.dtypes.canonicalize_dtype(array.dtype))
        size = array.size * dtype.itemsize
        # NumPy aligns to 16 bytes only, so take a few more and begin at the right one.
        memory = np.empty(size + ALIGNMENT, "uint8")
        start = -memory.ctypes.data % ALIGNMENT
        copy = memory[start : start + size].view(dtype).reshape(array.shape)
        # The copy may be narrower: JAX has 32 bits for 64 unless `jax_enable_x64` is set.
        np.copyto(copy, array, casting="unsafe")
        yield copy
