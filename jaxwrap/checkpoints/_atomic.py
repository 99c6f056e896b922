"""Replace a file by writing another and renaming it, so that there is a whole one at every moment."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import pathlib
import platform
import re
import shutil
import uuid
import warnings
from collections.abc import Iterator

PREVIOUS = ".previous"


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Give a path to write a file or a directory to. It takes the place of `path` if the block raises nothing."""
    _remove_leftovers(path)
    # Threads share a process id, and so do the first processes of two containers.
    name = f".{path.name}.{_place()}-{os.getpid()}-{uuid.uuid4().hex}.tmp"
    temporary = path.with_name(name)
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
    """Return the path, or with a warning the previous checkpoint, which `replacing` may leave between its renames.

    Raises:
        FileNotFoundError: If neither exists.
    """
    if path.exists():
        return path
    previous = path.with_name(path.name + PREVIOUS)
    if not previous.exists():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    warnings.warn(
        f"there is no checkpoint {path}, since a save was interrupted. The one before it is loaded, {previous}.",
        stacklevel=3,
    )
    return previous


@functools.cache
def _place() -> str:
    """Name what a process id belongs to: the machine, and on Linux the container."""
    namespace = os.stat("/proc/self/ns/pid").st_ino if os.path.exists("/proc/self/ns/pid") else 0
    return hashlib.sha256(f"{platform.node()} {namespace}".encode()).hexdigest()[:8]


def _remove_leftovers(path: pathlib.Path) -> None:
    """Remove what processes of this machine were writing for a path when they died."""
    ours = re.compile(rf"\.{re.escape(path.name)}\.{_place()}-(\d+)-[0-9a-f]{{32}}\.tmp")
    for sibling in path.parent.iterdir() if path.parent.is_dir() else ():
        # Not the whole name: Orbax adds a suffix of its own.
        if (found := ours.match(sibling.name)) and not _is_alive(int(found[1])):
            # Another thread may remove it too, and a save does not need it gone.
            with contextlib.suppress(OSError):
                _remove(sibling)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)  # sends nothing
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _remove(path: pathlib.Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
