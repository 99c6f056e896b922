"""Replace a file by writing another and renaming it, so that there is a whole one at every moment."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterator

PREVIOUS = ".previous"


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Give a path to write a file or a directory to. It takes the place of `path` if the block raises nothing."""
    # Threads share a process id, and so do the first processes of two containers.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    previous = path.with_name(path.name + PREVIOUS)
    try:
        yield temporary
        if temporary.is_dir():
            # A directory cannot replace another: between the two renames only the previous one exists.
            if path.exists():
                _remove(previous)
                path.rename(previous)
            temporary.rename(path)
            _remove(previous)
        else:
            # A rename may reach the disk before the data do, and a crash between them leaves an empty file.
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        _remove(temporary)


def existing(path: pathlib.Path) -> pathlib.Path:
    """Return the path, or the previous checkpoint if `replacing` was interrupted between its renames.

    Raises:
        FileNotFoundError: If neither exists.
    """
    for candidate in (path, path.with_name(path.name + PREVIOUS)):
        if candidate.exists():
            return candidate
    raise FileNotFoundError(f"there is no checkpoint {path}")


def _remove(path: pathlib.Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
