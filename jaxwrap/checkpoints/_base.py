"""The base of the formats, and what several of them share."""

from __future__ import annotations

import abc
import contextlib
import pathlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np

from jaxwrap._typing import PyTree
from jaxwrap.checkpoints._plan import Entry


class OpenFile(NamedTuple):
    """A file that is open for reading.

    Attributes:
        entries: The shape and dtype of each array in it, by name.
        read: Reads the arrays with these names, one or a few at a time, in the order that suits the file.
    """

    entries: dict[str, Entry]
    read: Callable[[Collection[str]], Iterator[tuple[str, np.ndarray]]]


class Format(abc.ABC):
    """A format of files. In `tree`, the pytree of a layer, a `LeafPath` stands for each weight.

    Attributes:
        library: The library to import, or None.
        distribution: The name under which pip installs it.
    """

    library: ClassVar[str | None] = None
    distribution: ClassVar[str | None] = None

    @abc.abstractmethod
    def open(self, path: pathlib.Path, tree: PyTree) -> contextlib.AbstractContextManager[OpenFile]:
        """List the arrays of a file, without their values if the format allows that.

        Raises:
            Exception: Any, if the file is damaged.
        """

    @abc.abstractmethod
    def write(self, path: pathlib.Path, arrays: Mapping[str, np.ndarray], tree: PyTree) -> None:
        """Write arrays by their names.

        Raises:
            ValueError: If the format cannot hold a dtype or a name.
        """


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
