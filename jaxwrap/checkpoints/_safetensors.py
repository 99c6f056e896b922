"""Safetensors: flat names."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Collection, Iterator, Mapping

import numpy as np

from jaxwrap._typing import PyTree
from jaxwrap.checkpoints._base import Format, OpenFile
from jaxwrap.checkpoints._plan import Entry

_DTYPES = {
    "BOOL": "bool",
    "BF16": "bfloat16",
    "C64": "complex64",
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
}


class Safetensors(Format):
    """Reads through the library, which checks the header."""

    library = distribution = "safetensors"

    @contextlib.contextmanager
    def open(self, path: pathlib.Path, tree: PyTree) -> Iterator[OpenFile]:
        """See the base class."""
        from safetensors import safe_open

        entries = {}
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                part = file.get_slice(name)
                dtype = str(part.get_dtype())
                entries[name] = Entry(tuple(part.get_shape()), _DTYPES.get(dtype, dtype))

        def read(names: Collection[str]) -> Iterator[tuple[str, np.ndarray]]:
            for name in names:
                # An open file keeps in memory all that has been read of it. So open it for each array.
                with safe_open(path, framework="np") as file:
                    yield name, np.asarray(file.get_tensor(name))

        yield OpenFile(entries, read)

    def write(self, path: pathlib.Path, arrays: Mapping[str, np.ndarray], tree: PyTree) -> None:
        """See the base class."""
        import safetensors.numpy

        for name, array in arrays.items():
            if array.dtype.name.startswith("float8"):
                raise ValueError(
                    f"{name} is {array.dtype}, which NumPy cannot read from `.safetensors`. Save it as `.msgpack`."
                )
        safetensors.numpy.save_file(
            {
                # The library writes memory as it lies. `ascontiguousarray` gives a scalar an axis.
                name: np.ascontiguousarray(array).reshape(array.shape)
                for name, array in arrays.items()
            },
            path,
        )
