"""Equinox's `.eqx`: leaves one after the other, without names. Their places in the tree tell which is which."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from jaxwrap._typing import PyTree
from jaxwrap._weights._leaf import LeafPath
from jaxwrap.checkpoints._base import FileFormat, OpenFile
from jaxwrap.checkpoints._npz import read_header
from jaxwrap.checkpoints._plan import Entry


class Eqx(FileFormat):
    """Notes where each array begins, and reads it later."""

    library = distribution = "equinox"
    has_names = False

    def index(self, file: BinaryIO, tree: PyTree) -> OpenFile:
        """See the base class."""
        import equinox as eqx

        places: dict[str, int] = {}
        entries: dict[str, Entry] = {}
        size = os.fstat(file.fileno()).st_size

        def skip(file: BinaryIO, leaf: Any) -> Any:
            if not isinstance(leaf, LeafPath):
                # Numbers that are not weights are in the file too.
                eqx.default_deserialise_filter_spec(file, leaf)
                return leaf
            places[leaf.path] = start = file.tell()
            entries[leaf.path], length = read_header(file, size - start, leaf.path)
            file.seek(start + length)
            return leaf

        eqx.tree_deserialise_leaves(file, tree, filter_spec=skip)
        # Without names, only the length tells the file of another module.
        if file.tell() != size:
            raise ValueError("it holds more than the layer has leaves.")

        def read(names: Collection[str]) -> Iterator[tuple[str, np.ndarray]]:
            for name in names:
                file.seek(places[name])
                array = np.load(file, allow_pickle=False)
                # NumPy's format has no name for bfloat16.
                yield name, array.view(jnp.bfloat16) if array.dtype == "V2" else array

        return OpenFile(entries, read)

    def write(self, path: pathlib.Path, arrays: Mapping[str, np.ndarray], tree: PyTree) -> None:
        """See the base class."""
        import equinox as eqx

        def put(file: BinaryIO, leaf: Any) -> None:
            if not isinstance(leaf, LeafPath):
                eqx.default_serialise_filter_spec(file, leaf)
            elif leaf.path in arrays:
                np.save(file, arrays[leaf.path], allow_pickle=False)
            else:
                raise ValueError("an `.eqx` file has no names. Save it without `names`.")

        with path.open("wb") as file:
            eqx.tree_serialise_leaves(file, tree, filter_spec=put)
