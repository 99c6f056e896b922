"""Flax's msgpack: nested dicts, read as a stream."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxwrap._pytree import KeyPath, path_str
from jaxwrap._typing import PyTree
from jaxwrap.checkpoints._base import Format, OpenFile, nested
from jaxwrap.checkpoints._plan import Entry

# The file of {"params": {"kernel": array, "bias": array}} is one value, from front to back:
#
#     81                                  a map of 1 pair
#     a6 params                             its key
#     82                                    its value, a map of 2 pairs
#     a6 kernel
#     c8 .... 01 [shape, dtype, bytes]        an extension with the code 1: one array
#     a4 bias
#     c8 .... 01 [shape, dtype, bytes]

# The codes of arrays, and of arrays of rank 0.
_ARRAYS = (1, 3)
# The first key of the map that stands for an array of more than 2**30 bytes.
_CHUNKED = "__msgpack_chunked_array__"


class Msgpack(Format):
    """Streams the file, because Flax's own reader holds all of it, and a copy of each array, in memory."""

    library = distribution = "flax"

    @contextlib.contextmanager
    def open(self, path: pathlib.Path, tree: PyTree) -> Iterator[OpenFile]:
        """See the base class."""
        with _Reader(path) as reader:
            entries = {
                name: Entry(array.shape, array.dtype.name) for name, array in reader.arrays()
            }

        def read(names: Collection[str]) -> Iterator[tuple[str, np.ndarray]]:
            wanted = set(names)
            with _Reader(path) as reader:
                for name, array in reader.arrays():
                    if name in wanted:
                        yield name, array

        yield OpenFile(entries, read)

    def write(self, path: pathlib.Path, arrays: Mapping[str, np.ndarray], tree: PyTree) -> None:
        """See the base class."""
        from flax.serialization import msgpack_serialize

        path.write_bytes(msgpack_serialize(nested(arrays)))


class _Reader:
    """Reads the arrays of a file one after the other."""

    # An unpacker that unpacks a map returns the whole map, with all its arrays. So we unpack only leaves, and of a map
    # only its head and its keys:
    #
    #   walk(()):              head of a map, 1 pair, key "params"
    #     walk(params):        head of a map, 2 pairs, key "kernel"
    #       walk(params/kernel):   no map: unpack, yield the array, and forget it
    #       key "bias"
    #       walk(params/bias):     no map: unpack, yield, forget
    #
    # The unpacker cannot say what comes next before it unpacks it, and it reads in blocks. A second handle of the file
    # does: it looks at the byte at the unpacker's position.
    #
    # Flax splits an array of more than 2**30 bytes into chunks of one axis. Its map holds shape before chunks:
    #
    #   {_CHUNKED: True, "shape": {"0": 70000, "1": 8192}, "chunks": {"0": array, "1": array}}

    def __init__(self, path: pathlib.Path):
        import msgpack

        self._size = path.stat().st_size
        self._files = contextlib.ExitStack()
        self._ahead = self._files.enter_context(path.open("rb"))
        self._unpacker = msgpack.Unpacker(
            self._files.enter_context(path.open("rb")),
            ext_hook=_restore,
            # No length in a damaged file makes it allocate more than that.
            max_buffer_size=self._size + 1,
        )

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *error: object) -> None:
        self._files.close()

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield each array with its name.

        Raises:
            ValueError: If the file is not msgpack, or goes on after its end.
        """
        yield from self._walk(())
        if self._unpacker.tell() != self._size:
            raise ValueError(f"it ends after {self._unpacker.tell()} of its {self._size} bytes")

    def _walk(self, prefix: KeyPath) -> Iterator[tuple[str, np.ndarray]]:
        if not self._at_map():
            leaf = self._unpacker.unpack()
            for path, part in jax.tree_util.tree_leaves_with_path(leaf):
                yield path_str((*prefix, *path)), np.asarray(part)
            return
        for _ in range(self._unpacker.read_map_header()):
            key = self._unpacker.unpack()
            if key == _CHUNKED:
                self._unpacker.skip()
                yield path_str(prefix), self._chunked()
                return
            yield from self._walk((*prefix, jax.tree_util.DictKey(key)))

    def _at_map(self) -> bool:
        self._ahead.seek(self._unpacker.tell())
        first = self._ahead.read(1)
        return b"\x80" <= first <= b"\x8f" or first in (b"\xde", b"\xdf")

    def _chunked(self) -> np.ndarray:
        shape, array, filled = [], np.empty(0), 0
        for _ in range(2):
            for name, part in self._walk((jax.tree_util.DictKey(self._unpacker.unpack()),)):
                if name.startswith("shape/"):
                    shape.append(int(part))
                    continue
                if not filled:
                    array = self._empty(shape, part.dtype)
                array[filled : filled + part.size] = part
                filled += part.size
        return array[:filled].reshape(shape)

    def _empty(self, shape: list[int], dtype: np.dtype) -> np.ndarray:
        # Python integers, which do not overflow. The shape comes from the file, so check before allocating.
        count = int(np.prod(shape, dtype=object))
        if count * dtype.itemsize > self._size:
            raise ValueError(f"an array of shape {shape} is larger than the file")
        return np.empty(count, dtype)


def _restore(code: int, data: bytes) -> Any:
    import msgpack
    from flax.serialization import msgpack_restore

    if code not in _ARRAYS:
        packed: Any = msgpack.packb(msgpack.ExtType(code, data))
        return msgpack_restore(packed)
    shape, name, buffer = msgpack.unpackb(data, raw=False)
    dtype = jnp.dtype(name)
    # Bytes of the file would be taken for pointers.
    if dtype.hasobject:
        raise ValueError(f"{name!r} is not a dtype of numbers")
    return np.frombuffer(buffer, dtype).reshape(shape)
