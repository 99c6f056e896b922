"""Several processes of JAX that write one file, or one directory, together."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxwrap.checkpoints._atomic import replacing

# Longer than a name of a file can be.
_NAME_BYTES = 1024


def writes() -> bool:
    """Whether this process writes what one process writes for all."""
    return jax.process_index() == 0


@contextlib.contextmanager
def replacing_together(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Do what `replacing` does, by process 0. All processes get one path, and leave when `path` has been replaced.

    Raises:
        RuntimeError: If the block failed in another process.
    """
    if jax.process_count() == 1:
        with replacing(path) as temporary:
            yield temporary
        return
    with _agreed(path), contextlib.ExitStack() as stack:
        own = stack.enter_context(replacing(path)) if writes() else path
        # The first renames when all others have written.
        with _agreed(path):
            yield path.with_name(_from_first(own.name))


@contextlib.contextmanager
def _agreed(path: pathlib.Path) -> Iterator[None]:
    """Leave the block when all processes have, and fail if it failed in one of them."""
    try:
        yield
    except BaseException:
        _all(False)
        raise
    if not _all(True):
        raise RuntimeError(f"{path} has not been written: another process failed. See its error.")


def _all(is_well: bool) -> bool:
    return bool(multihost_utils.process_allgather(np.array(is_well)).all())


def _from_first(text: str) -> str:
    """Return the text that process 0 passes."""
    data = np.frombuffer(text.encode().ljust(_NAME_BYTES, b"\0"), "uint8")
    return multihost_utils.broadcast_one_to_all(data).tobytes().rstrip(b"\0").decode()
