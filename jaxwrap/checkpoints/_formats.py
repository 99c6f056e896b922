"""The formats of checkpoints: each lists what a file holds before it reads it, and writes arrays by their names."""

from __future__ import annotations

import contextlib
import importlib.util
import pathlib
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxwrap._pytree import KeyPath, path_str
from jaxwrap._typing import PyTree
from jaxwrap._weights import LeafPath
from jaxwrap.checkpoints._plan import Entry


class OpenFile(NamedTuple):
    """A file that is being read.

    Attributes:
        entries: What it holds, by name.
        read: Reads arrays of these names, a few at a time, in an order of its own.
    """

    entries: dict[str, Entry]
    read: Callable[[Collection[str]], Iterator[tuple[str, np.ndarray]]]


class Format(Protocol):
    """What each format can do. `tree` is the pytree of the layer with a `LeafPath` for each weight."""

    def open(
        self, path: pathlib.Path, tree: PyTree, owner: str
    ) -> contextlib.AbstractContextManager[OpenFile]:
        """Reads what the file holds, without the values where the format allows that.

        Raises:
            ValueError: If the file is damaged.
        """
        ...

    def write(
        self, path: pathlib.Path, arrays: Mapping[str, np.ndarray], tree: PyTree, owner: str
    ) -> None:
        """Writes arrays by their names.

        Raises:
            ValueError: If the format does not have a dtype.
        """
        ...


class _Npz:
    """Flat names. Without pickle, and the numbers of bytes are checked before they are allocated."""

    @contextlib.contextmanager
    def open(self, path: pathlib.Path, tree: PyTree, owner: str) -> Iterator[OpenFile]:
        with zipfile.ZipFile(path) as archive:
            entries = {}
            for info in archive.infolist():
                with archive.open(info) as member:
                    entry, _ = _read_header(member, info.file_size, info.filename, owner)
                entries[info.filename.removesuffix(".npy")] = entry

            def read(names: Collection[str]) -> Iterator[tuple[str, np.ndarray]]:
                for name in names:
                    with archive.open(f"{name}.npy") as member:
                        yield name, np.lib.format.read_array(member, allow_pickle=False)

            yield OpenFile(entries, read)

    def write(
        self, path: pathlib.Path, arrays: Mapping[str, np.ndarray], tree: PyTree, owner: str
    ) -> None:
        for name, array in arrays.items():
            if array.dtype.kind not in "biufc":
                raise ValueError(
                    f"{owner}: {name} is {array.dtype}, which `.npz` does not have. Save it as `.safetensors`."
                )
        with path.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)


_SAFETENSORS_DTYPES = {
    "BOOL": "bool",
    "BF16": "bfloat16",
    "C64": "complex64",
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
}


class _Safetensors:
    """Flat names."""

    @contextlib.contextmanager
    def open(self, path: pathlib.Path, tree: PyTree, owner: str) -> Iterator[OpenFile]:
        from safetensors import safe_open

        entries = {}
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                part = file.get_slice(name)
                dtype = str(part.get_dtype())
                entries[name] = Entry(
                    tuple(part.get_shape()), _SAFETENSORS_DTYPES.get(dtype, dtype)
                )

        def read(names: Collection[str]) -> Iterator[tuple[str, np.ndarray]]:
            for name in names:
                # Opened anew for each array: what has been read of an open file stays in memory.
                with safe_open(path, framework="np") as file:
                    yield name, np.asarray(file.get_tensor(name))

        yield OpenFile(entries, read)

    def write(
        self, path: pathlib.Path, arrays: Mapping[str, np.ndarray], tree: PyTree, owner: str
    ) -> None:
        import safetensors.numpy

        for name, array in arrays.items():
            if array.dtype.name.startswith("float8"):
                raise ValueError(
                    f"{owner}: {name} is {array.dtype}, which cannot be read from `.safetensors` as a NumPy array. "
                    "Save it as `.msgpack`."
                )
        safetensors.numpy.save_file(
            {
                name: np.ascontiguousarray(array).reshape(array.shape)
                for name, array in arrays.items()
            },
            path,
        )


class _Msgpack:
    """Flax's own: nested dicts."""

    @contextlib.contextmanager
    def open(self, path: pathlib.Path, tree: PyTree, owner: str) -> Iterator[OpenFile]:
        entries = {
            name: Entry(array.shape, array.dtype.name) for name, array in _msgpack_arrays(path)
        }

        def read(names: Collection[str]) -> Iterator[tuple[str, np.ndarray]]:
            wanted = set(names)
            return ((name, array) for name, array in _msgpack_arrays(path) if name in wanted)

        yield OpenFile(entries, read)

    def write(
        self, path: pathlib.Path, arrays: Mapping[str, np.ndarray], tree: PyTree, owner: str
    ) -> None:
        from flax.serialization import msgpack_serialize

        path.write_bytes(msgpack_serialize(_nested(arrays)))


# How much of an Orbax checkpoint is read at once. Array by array, thousands of small ones would take long.
_ORBAX_BYTES = 2**24


class _Orbax:
    """Nested dicts, in a directory."""

    @contextlib.contextmanager
    def open(self, path: pathlib.Path, tree: PyTree, owner: str) -> Iterator[OpenFile]:
        from orbax import checkpoint as ocp

        # Orbax takes absolute paths only. Its standard checkpointer reads everything or nothing.
        path = path.absolute()
        with (
            ocp.StandardCheckpointer() as standard,
            ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer,
        ):
            metadata = standard.metadata(path).item_metadata.tree
            entries = {
                name: Entry(tuple(leaf.shape), jnp.dtype(leaf.dtype).name)
                for name, leaf in _flat(metadata).items()
            }
            kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata)

            def read(names: Collection[str]) -> Iterator[tuple[str, np.ndarray]]:
                for batch in _batches({name: entries[name] for name in names}, _ORBAX_BYTES):
                    item = jax.tree_util.tree_map_with_path(
                        lambda where, leaf, batch=batch: (
                            leaf if path_str(where) in batch else ocp.PLACEHOLDER
                        ),
                        metadata,
                    )
                    arguments = ocp.args.PyTreeRestore(item=item, restore_args=kinds)
                    restored = _flat(checkpointer.restore(path, args=arguments))
                    for name in batch:
                        yield name, restored.pop(name)

            yield OpenFile(entries, read)

    def write(
        self, path: pathlib.Path, arrays: Mapping[str, np.ndarray], tree: PyTree, owner: str
    ) -> None:
        from orbax.checkpoint import StandardCheckpointer

        with StandardCheckpointer() as checkpointer:
            checkpointer.save(path.absolute(), _nested(arrays))
            checkpointer.wait_until_finished()


class _Eqx:
    """Leaves one after the other, without names: Equinox finds their places in the tree."""

    @contextlib.contextmanager
    def open(self, path: pathlib.Path, tree: PyTree, owner: str) -> Iterator[OpenFile]:
        import equinox as eqx

        places: dict[str, int] = {}
        entries: dict[str, Entry] = {}
        size = path.stat().st_size

        def skip(file: BinaryIO, leaf: Any) -> Any:
            if not isinstance(leaf, LeafPath):
                # What is no weight may be a number, which is there as well.
                eqx.default_deserialise_filter_spec(file, leaf)
                return leaf
            places[leaf.path] = file.tell()
            entry, length = _read_header(file, size - file.tell(), leaf.path, owner)
            entries[leaf.path] = entry
            file.seek(length, 1)
            return leaf

        with path.open("rb") as file:
            eqx.tree_deserialise_leaves(file, tree, filter_spec=skip)
            if file.tell() != size:
                raise ValueError(f"{owner}: the file {path} holds more than the layer has leaves.")

            def read(names: Collection[str]) -> Iterator[tuple[str, np.ndarray]]:
                for name in names:
                    file.seek(places[name])
                    array = np.load(file, allow_pickle=False)
                    # NumPy does not know the name of what it writes for bfloat16.
                    yield name, array.view(jnp.bfloat16) if array.dtype == "V2" else array

            yield OpenFile(entries, read)

    def write(
        self, path: pathlib.Path, arrays: Mapping[str, np.ndarray], tree: PyTree, owner: str
    ) -> None:
        import equinox as eqx

        def put(file: BinaryIO, leaf: Any) -> None:
            if not isinstance(leaf, LeafPath):
                eqx.default_serialise_filter_spec(file, leaf)
            elif leaf.path in arrays:
                np.save(file, arrays[leaf.path], allow_pickle=False)
            else:
                raise ValueError(
                    f"{owner}: an `.eqx` file has no names, so `names` cannot be used."
                )

        with path.open("wb") as file:
            eqx.tree_serialise_leaves(file, tree, filter_spec=put)


# The library that each needs.
_FORMATS: dict[str, tuple[Format, str | None]] = {
    "msgpack": (_Msgpack(), "flax"),
    "orbax": (_Orbax(), "orbax"),
    "safetensors": (_Safetensors(), "safetensors"),
    "npz": (_Npz(), None),
    "eqx": (_Eqx(), "equinox"),
}


def find_format(path: pathlib.Path, name: str | None, owner: str) -> Format:
    """The format of that name, or that the suffix of the path says.

    Raises:
        ImportError: If its library is not installed.
        ValueError: If there is none.
    """
    if name is None:
        suffix = path.name.removesuffix(".previous").rpartition(".")[2]
        name = (
            suffix if suffix in _FORMATS or not ("." not in path.name or path.is_dir()) else "orbax"
        )
    if name not in _FORMATS:
        raise ValueError(
            f"{owner}: there is no format {name!r} for {path}. There are {', '.join(_FORMATS)}; pass `format=`."
        )
    chosen, library = _FORMATS[name]
    if library is not None and importlib.util.find_spec(library) is None:
        raise ImportError(
            f"{owner}: `.{name}` needs {library!r}, which is not installed. Install it with `pip install "
            f"{'orbax-checkpoint' if library == 'orbax' else library}`."
        )
    return chosen


def _read_header(file: Any, available: int, name: str, owner: str) -> tuple[Entry, int]:
    """The shape and dtype of an array in NumPy's format, and how many bytes of it follow.

    Raises:
        ValueError: If it is no array of numbers, or says that it is longer than the file.
    """
    version = np.lib.format.read_magic(file)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise ValueError(
            f"{owner}: {name} is of version {version} of NumPy's format; expected 1 or 2."
        )
    shape, _, dtype = readers[version](file)
    numbers = dtype.kind in "biufc" or dtype == "V2"
    length = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if not numbers or min(shape, default=0) < 0 or length > available:
        raise ValueError(
            f"{owner}: the file says of {name} that it is {dtype} of shape {shape}, which is no array of numbers in "
            f"the {available} bytes that there are. None of the weights has been changed."
        )
    return Entry(tuple(shape), "bfloat16" if dtype == "V2" else dtype.name), length


# The codes of arrays, and of arrays of rank 0, in Flax's files.
_MSGPACK_ARRAYS = (1, 3)
# What Flax calls an array of more than 2**30 bytes, which it writes in parts.
_MSGPACK_CHUNKED = "__msgpack_chunked_array__"


def _msgpack_arrays(path: pathlib.Path) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays of a file, one after the other.

    Flax itself holds the whole file, and copies of each array, in memory.

    Raises:
        ValueError: If the file is no msgpack, or goes on after its end.
    """
    import msgpack
    from flax.serialization import msgpack_restore

    def restore(code: int, data: bytes) -> Any:
        if code not in _MSGPACK_ARRAYS:
            packed: Any = msgpack.packb(msgpack.ExtType(code, data))
            return msgpack_restore(packed)
        shape, name, buffer = msgpack.unpackb(data, raw=False)
        dtype = jnp.dtype(name)
        if dtype.hasobject:
            raise ValueError(f"{name!r} is no dtype of numbers")
        return np.frombuffer(buffer, dtype).reshape(shape)

    size = path.stat().st_size
    with path.open("rb") as file, path.open("rb") as ahead:
        unpacker = msgpack.Unpacker(file, ext_hook=restore, max_buffer_size=size + 1)

        def walk(prefix: KeyPath) -> Iterator[tuple[str, np.ndarray]]:
            ahead.seek(unpacker.tell())
            first = ahead.read(1)
            if not (b"\x80" <= first <= b"\x8f" or first in (b"\xde", b"\xdf")):  # no dict
                leaf = unpacker.unpack()
                for path, part in jax.tree_util.tree_leaves_with_path(leaf):
                    yield path_str((*prefix, *path)), np.asarray(part)
                return
            for _ in range(unpacker.read_map_header()):
                key = unpacker.unpack()
                if key == _MSGPACK_CHUNKED:
                    unpacker.skip()
                    yield path_str(prefix), chunked()
                    return
                yield from walk((*prefix, jax.tree_util.DictKey(key)))

        def chunked() -> np.ndarray:
            shape, array, filled = [], np.empty(0), 0
            for _ in range(2):
                for name, part in walk((jax.tree_util.DictKey(unpacker.unpack()),)):
                    if name.startswith("shape/"):
                        shape.append(int(part))
                        continue
                    if not filled:
                        array = np.empty(np.prod(shape, dtype=object), part.dtype)
                    array[filled : filled + part.size] = part
                    filled += part.size
            return array[:filled].reshape(shape)

        yield from walk(())
        if unpacker.tell() != size:
            raise ValueError(f"it ends after {unpacker.tell()} of its {size} bytes")


def _batches(entries: Mapping[str, Entry], most: int) -> Iterator[list[str]]:
    """The names in lists of no more bytes than `most`, or of one."""
    batch: list[str] = []
    room = most
    for name, entry in entries.items():
        size = int(np.prod(entry.shape, dtype=object)) * jnp.dtype(entry.dtype).itemsize
        if batch and size > room:
            yield batch
            batch, room = [], most
        batch.append(name)
        room -= size
    if batch:
        yield batch


def _nested(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    from flax.traverse_util import unflatten_dict

    return unflatten_dict(arrays, sep="/")


def _flat(tree: PyTree) -> dict[str, Any]:
    return {path_str(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
