"""NumPy's `.npz`: flat names."""

from __future__ import annotations

import io
import pathlib
import zipfile
from collections.abc import Collection, Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np

from jaxwrap._typing import PyTree
from jaxwrap.checkpoints._base import FileFormat, OpenFile, unique
from jaxwrap.checkpoints._plan import Entry

# NumPy takes no longer head, but reads it first. One may be packed to a thousandth.
_MOST_HEAD = 12 + 10_000


class Npz(FileFormat):
    """Reads without pickle, and allocates no more than the file holds."""

    def index(self, file: BinaryIO, tree: PyTree) -> OpenFile:
        """See the base class."""
        archive = zipfile.ZipFile(file)
        members = unique((m.filename.removesuffix(".npy"), m) for m in archive.infolist())
        entries = {}
        for name, info in members.items():
            with archive.open(info) as member:
                entries[name], _ = read_header(member, info.file_size, info.filename)

        def read(names: Collection[str]) -> Iterator[tuple[str, np.ndarray]]:
            for name in names:
                with archive.open(members[name]) as member:
                    yield name, np.lib.format.read_array(member, allow_pickle=False)

        return OpenFile(entries, read)

    def write(self, path: pathlib.Path, arrays: Mapping[str, np.ndarray], tree: PyTree) -> None:
        """See the base class."""
        for name, array in arrays.items():
            # NumPy would write bfloat16 as bare bytes, without an error.
            if array.dtype.kind not in "biufc":
                raise ValueError(
                    f"{name} is {array.dtype}, which `.npz` cannot hold. Save it as `.safetensors`."
                )
        with path.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)


def read_header(file: Any, available: int, name: str) -> tuple[Entry, int]:
    """Read the head of an array in NumPy's format: its shape and dtype, and the number of bytes with the head.

    Args:
        file: The file, at the beginning of the array.
        available: The number of bytes from there to the end of the file.
        name: The name of the array, for errors.

    Raises:
        ValueError: If it is not an array of numbers, or claims to be longer than the file.
    """
    head = io.BytesIO(file.read(_MOST_HEAD))
    version = np.lib.format.read_magic(head)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise ValueError(f"{name} is of version {version} of NumPy's format; expected 1 or 2.")
    shape, _, dtype = readers[version](head)
    # Equinox writes bfloat16, for which NumPy's format has no name.
    numbers = dtype.kind in "biufc" or dtype == "V2"
    # Python integers, which do not overflow.
    length = head.tell() + int(np.prod(shape, dtype=object)) * dtype.itemsize
    if not numbers or min(shape, default=0) < 0 or length > available:
        raise ValueError(
            f"{name} claims to be {dtype} of shape {shape}; expected numbers, of at most {available} bytes."
        )
    return Entry(tuple(shape), "bfloat16" if dtype == "V2" else dtype.name), length
