"""Safetensors: flat names."""

from __future__ import annotations

import json
import math
import pathlib
import shutil
from collections.abc import Collection, Iterator, Mapping
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from jaxwrap._typing import PyTree
from jaxwrap.checkpoints._base import FileFormat, OpenFile, unique
from jaxwrap.checkpoints._plan import Entry

_DTYPES = {
    "BOOL": "bool",
    "BF16": "bfloat16",
    "C64": "complex64",
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
}


class Safetensors(FileFormat):
    """Reads the parts of a file that the header names, after the library has checked the header."""

    library = distribution = "safetensors"

    def index(self, file: BinaryIO, tree: PyTree) -> OpenFile:
        """See the base class."""
        from safetensors import safe_open

        # Its own arrays would stay in memory as long as the file is open. And it opens the file again: by this name,
        # the same one, whatever is in its place by now.
        with safe_open(f"/dev/fd/{file.fileno()}", framework="np"):
            pass
        start = 8 + int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(start - 8), object_pairs_hook=unique)
        header.pop("__metadata__", None)
        entries = {
            name: Entry(tuple(part["shape"]), _DTYPES.get(part["dtype"]) or part["dtype"])
            for name, part in header.items()
        }

        def read(names: Collection[str]) -> Iterator[tuple[str, np.ndarray]]:
            for name in names:
                shape, dtype = entries[name]
                file.seek(start + header[name]["data_offsets"][0])
                data = file.read(math.prod(shape) * jnp.dtype(dtype).itemsize)
                yield name, np.frombuffer(data, jnp.dtype(dtype)).reshape(shape)

        return OpenFile(entries, read)

    def write(self, path: pathlib.Path, arrays: Mapping[str, np.ndarray], tree: PyTree) -> None:
        """See the base class."""
        import safetensors.numpy

        for name, array in arrays.items():
            if array.dtype.name.startswith("float8"):
                raise ValueError(
                    f"{name} is {array.dtype}, which NumPy cannot read from `.safetensors`. Save it as `.msgpack`."
                )
        # The library writes to a name of its own and renames it. In our folder, the next save finds what is left.
        folder = path.with_name(f"{path.name}.folder")
        folder.mkdir()
        try:
            safetensors.numpy.save_file(
                {
                    # The library writes memory as it lies. `ascontiguousarray` gives a scalar an axis.
                    name: np.ascontiguousarray(array).reshape(array.shape)
                    for name, array in arrays.items()
                },
                folder / path.name,
            )
            (folder / path.name).rename(path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
