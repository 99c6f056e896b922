"""The base of the formats, and what several of them share."""

from __future__ import annotations

import abc
import contextlib
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, BinaryIO, ClassVar, NamedTuple, TypeVar

import numpy as np
from jax.sharding import NamedSharding

from jaxwrap._typing import PyTree
from jaxwrap.checkpoints._plan import Entry

_Value = TypeVar("_Value")


class OpenFile(NamedTuple):
    """A file that is open for reading.

    Attributes:
        entries: The shape and dtype of each array in it, by name.
        read: Reads the arrays with these names, one or a few at a time, in the order that suits the file. A format that
            takes shards reads those onto a mesh that have a sharding here.
    """

    entries: dict[str, Entry]
    read: Callable[[Mapping[str, NamedSharding | None]], Iterator[tuple[str, Any]]]


class Format(abc.ABC):
    """A format of files. In `tree`, the pytree of a layer, a `LeafPath` stands for each weight.

    Attributes:
        library: The library to import, or None.
        distribution: The name under which pip installs it.
        has_names: Whether files hold the names of arrays. If not, they hold the leaves of `tree` in order.
        takes_shards: Whether arrays on a mesh are written and read in parts, by each process its own.
    """

    library: ClassVar[str | None] = None
    distribution: ClassVar[str | None] = None
    has_names: ClassVar[bool] = True
    takes_shards: ClassVar[bool] = False

    @abc.abstractmethod
    def open(self, path: pathlib.Path, tree: PyTree) -> contextlib.AbstractContextManager[OpenFile]:
        """List the arrays of a file, without reading their values.

        Raises:
            Exception: Any, if the file is damaged.
        """

    @abc.abstractmethod
    def write(self, path: pathlib.Path, arrays: Mapping[str, np.ndarray], tree: PyTree) -> None:
        """Write arrays by their names.

        Raises:
            ValueError: If the format cannot hold a dtype or a name.
        """


class FileFormat(Format):
    """A format of single files. A file is opened once, so a new one in its place changes nothing."""

    @abc.abstractmethod
    def index(self, file: BinaryIO, tree: PyTree) -> OpenFile:
        """See `open`. The file is at its beginning, and stays open."""

    @contextlib.contextmanager
    def open(self, path: pathlib.Path, tree: PyTree) -> Iterator[OpenFile]:
        """See the base class."""
        with path.open("rb") as file:
            before = version(os.fstat(file.fileno()))
            entries, read = self.index(file, tree)

            def checked(names: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
                for item in read(names):
                    # Libraries write over a file in place.
                    check_version(before, os.fstat(file.fileno()))
                    yield item

            yield OpenFile(entries, checked)


def version(stat: os.stat_result) -> tuple[int, ...]:
    """Return what changes when a file or a directory is written, or replaced by another."""
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def check_version(before: tuple[int, ...], stat: os.stat_result) -> None:
    """Raise ValueError if a file or a directory has another version than before."""
    if version(stat) != before:
        raise ValueError("it was written or replaced while it was read.")


def unique(pairs: Iterable[tuple[str, _Value]]) -> dict[str, _Value]:
    """Make a dict of pairs.

    Raises:
        ValueError: If a name comes twice. Readers differ in which of the two they take.
    """
    values: dict[str, _Value] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"it holds the name {name!r} twice.")
        values[name] = value
    return values


def nested(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Make nested dicts of arrays from their names: `a/b` goes into the dict `a`.

    Raises:
        ValueError: If a name is both an array's and a dict's.
    """
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                break
        # Either order of the two names leads here.
        if not isinstance(node, dict) or last in node:
            raise ValueError(
                f"{name!r} cannot be in one file with a name that it begins with, or that begins with it. Use other "
                "`names`, or save as `.safetensors`."
            )
        node[last] = array
    return tree
