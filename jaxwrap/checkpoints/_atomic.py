"""A file is written under another name and renamed, so that there is a whole one at every moment."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator

_PREVIOUS = ".previous"


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives a name to write a file or a directory to, which takes the place of `path` if nothing has been raised."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    previous = path.with_name(path.name + _PREVIOUS)
    try:
        yield temporary
        if temporary.is_dir():
            # Directories cannot replace one another: between the two renames there is only the previous one.
            if path.exists():
                _remove(previous)
                path.rename(previous)
            temporary.rename(path)
            _remove(previous)
        else:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        _remove(temporary)


def existing(path: pathlib.Path) -> pathlib.Path:
    """The path, or the one that `replacing` was about to replace when it was interrupted.

    Raises:
        FileNotFoundError: If there is neither.
    """
    previous = path.with_name(path.name + _PREVIOUS)
    for candidate in (path, previous):
        if candidate.exists():
            return candidate
    raise FileNotFoundError(f"there is no checkpoint {path}")


def _remove(path: pathlib.Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
