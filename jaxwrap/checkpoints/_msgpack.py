"""Flax's msgpack: nested dicts, whose arrays are found first and read later."""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxwrap._pytree import KeyPath, path_str
from jaxwrap._typing import PyTree
from jaxwrap.checkpoints._base import FileFormat, OpenFile, nested, unique
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
# The first key of the map that stands for an array of more than 2**30 bytes. Flax splits it into parts of one axis:
#
#   {_CHUNKED: True, "shape": {"0": 70000, "1": 8192}, "chunks": {"0": array, "1": array}}
_CHUNKED = "__msgpack_chunked_array__"
# Read this much at once where no data are. The head of an array is shorter.
_BLOCK = 4096


class Msgpack(FileFormat):
    """Reads array by array, because Flax's own reader holds all of a file, and a copy of each array, in memory."""

    library = distribution = "flax"

    def index(self, file: BinaryIO, tree: PyTree) -> OpenFile:
        """See the base class."""
        places = unique(_Index(file).arrays())

        def read(names: Collection[str]) -> Iterator[tuple[str, np.ndarray]]:
            for name in names:
                yield name, places[name].read()

        return OpenFile({name: place.entry for name, place in places.items()}, read)

    def write(self, path: pathlib.Path, arrays: Mapping[str, np.ndarray], tree: PyTree) -> None:
        """See the base class."""
        from flax.serialization import msgpack_serialize

        path.write_bytes(msgpack_serialize(nested(arrays)))


class _Place(NamedTuple):
    """An array in the file, unread."""

    entry: Entry
    read: Callable[[], np.ndarray]


class _Index:
    """Finds the arrays of a file, one after the other, and jumps over their data."""

    # An unpacker that unpacks a map returns the whole map, with all its arrays. So we unpack only what is small, and of
    # a map only its head and its keys:
    #
    #   walk(()):              head of a map, 1 pair, key "params"
    #     walk(params):        head of a map, 2 pairs, key "kernel"
    #       walk(params/kernel):   an array: note its shape, its dtype and where its data are
    #       key "bias"
    #       walk(params/bias):     likewise
    #
    # An unpacker cannot jump, so there is a new one for each piece.

    def __init__(self, file: BinaryIO):
        self._file = file
        self._size = os.fstat(file.fileno()).st_size
        self._at = 0

    def arrays(self) -> Iterator[tuple[str, _Place]]:
        """Yield the place of each array with its name.

        Raises:
            ValueError: If the file is not msgpack, or goes on after its end.
        """
        yield from self._walk(())
        if self._at != self._size:
            raise ValueError(f"it ends after {self._at} of its {self._size} bytes")

    def _walk(self, prefix: KeyPath) -> Iterator[tuple[str, _Place]]:
        first = self._bytes(self._at, 1)[0]
        if 0x80 <= first <= 0x8F or first in (0xDE, 0xDF):
            count = self._next("read_map_header")
            for number in range(count):
                key = self._next("unpack")
                if key == _CHUNKED and number == 0:
                    yield path_str(prefix), self._chunked(count - 1)
                    return
                yield from self._walk((*prefix, jax.tree_util.DictKey(key)))
        elif 0x90 <= first <= 0x9F or first in (0xDC, 0xDD):
            for index in range(self._next("read_array_header")):
                yield from self._walk((*prefix, jax.tree_util.SequenceKey(index)))
        elif 0xC7 <= first <= 0xC9 and (place := self._array(first)):
            yield path_str(prefix), place
        else:
            start, value = self._at, self._next("unpack")
            if value is not None:
                yield path_str(prefix), self._other(start, np.asarray(value))

    def _array(self, first: int) -> _Place | None:
        """Note an array, or return None for another extension."""
        width = 1 << (first - 0xC7)
        start = self._at + 1 + width + 1
        length = int.from_bytes(self._bytes(self._at + 1, width), "big")
        if self._bytes(start - 1, 1)[0] not in _ARRAYS:
            return None
        self._at = start
        parts = self._next("read_array_header")
        shape, name = tuple(self._next("unpack")), self._next("unpack")
        dtype = jnp.dtype(name)
        # Bytes of the file would be taken for pointers.
        if dtype.hasobject or parts != 3:
            raise ValueError(f"{name!r} is not a dtype of numbers")
        # 1, 2 or 4 bytes of the length come before the data.
        data = self._at + 1 + (1 << (self._bytes(self._at, 1)[0] - 0xC4))
        self._at = start + length
        # Python integers, which do not overflow.
        size = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or data + size != self._at or self._at > self._size:
            raise ValueError(f"an array of shape {shape} is larger or smaller than its place")

        def read() -> np.ndarray:
            return np.frombuffer(self._bytes(data, size), dtype).reshape(shape)

        return _Place(Entry(shape, dtype.name), read)

    def _other(self, start: int, value: np.ndarray) -> _Place:
        entry = Entry(value.shape, value.dtype.name)
        return _Place(entry, lambda: np.asarray(self._unpacked(start, "unpack")[0]))

    def _chunked(self, pairs: int) -> _Place:
        self._next("unpack")
        parts: dict[str, _Place] = {}
        for _ in range(pairs):
            key = jax.tree_util.DictKey(self._next("unpack"))
            parts |= unique(self._walk((key,)))
        axes = sum(name.startswith("shape/") for name in parts)
        shape = tuple(int(parts[f"shape/{axis}"].read()) for axis in range(axes))
        chunks = [parts[f"chunks/{index}"] for index in range(len(parts) - axes)]
        (dtype,) = {chunk.entry.dtype for chunk in chunks}
        filled = sum(math.prod(chunk.entry.shape) for chunk in chunks)
        if min(shape, default=0) < 0 or math.prod(shape) != filled:
            raise ValueError(f"an array of shape {shape} is larger or smaller than its chunks")
        return _Place(Entry(shape, dtype), lambda: _join(shape, dtype, chunks))

    def _next(self, method: str) -> Any:
        value, length = self._unpacked(self._at, method)
        self._at += length
        return value

    def _unpacked(self, start: int, method: str) -> tuple[Any, int]:
        """Have an unpacker read one piece. Return it with its length."""
        import msgpack

        self._file.seek(start)
        # No length in a damaged file makes it allocate more than the file has.
        unpacker = msgpack.Unpacker(
            self._file, ext_hook=_restore, read_size=_BLOCK, max_buffer_size=self._size + _BLOCK
        )
        return getattr(unpacker, method)(), unpacker.tell()

    def _bytes(self, start: int, count: int) -> bytes:
        self._file.seek(start)
        data = self._file.read(count)
        if len(data) != count:
            raise ValueError(f"it ends after {self._size} bytes, in the middle of a value")
        return data


def _join(shape: tuple[int, ...], dtype: str, chunks: Sequence[_Place]) -> np.ndarray:
    # Filled in place, since both an array and its parts may not fit into memory.
    array, filled = np.empty(math.prod(shape), jnp.dtype(dtype)), 0
    for chunk in chunks:
        part = chunk.read().reshape(-1)
        array[filled : filled + part.size] = part
        filled += part.size
    return array.reshape(shape)


def _restore(code: int, data: bytes) -> Any:
    import msgpack
    from flax.serialization import msgpack_restore

    packed: Any = msgpack.packb(msgpack.ExtType(code, data))
    return msgpack_restore(packed)
