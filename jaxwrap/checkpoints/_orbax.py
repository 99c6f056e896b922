"""Orbax: nested dicts, in a directory."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxwrap._pytree import path_str
from jaxwrap._typing import PyTree
from jaxwrap.checkpoints._base import Format, OpenFile, check_version, nested, unique, version
from jaxwrap.checkpoints._plan import Entry

# Restore this much at once. Thousands of small arrays, one by one, would take long.
_BATCH_BYTES = 2**24


class Orbax(Format):
    """Restores a batch of arrays at a time, with placeholders for all others."""

    library = "orbax"
    distribution = "orbax-checkpoint"
    takes_shards = True

    @contextlib.contextmanager
    def open(self, path: pathlib.Path, tree: PyTree) -> Iterator[OpenFile]:
        """See the base class."""
        from orbax import checkpoint as ocp

        # Orbax takes only absolute paths. Its standard checkpointer restores all or nothing.
        path = path.absolute()
        with (
            _same(path) as check,
            ocp.StandardCheckpointer() as standard,
            ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer,
        ):
            metadata = standard.metadata(path).item_metadata.tree
            entries = unique(
                (name, Entry(tuple(leaf.shape), jnp.dtype(leaf.dtype).name))
                for name, leaf in _flat(metadata)
            )

            def read(names: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
                def kind(where: Any, leaf: Any) -> Any:
                    if (sharding := names.get(path_str(where))) is None:
                        # Otherwise Orbax asks for the devices that wrote the file.
                        return ocp.RestoreArgs(restore_type=np.ndarray)
                    return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=tuple(leaf.shape))

                kinds = jax.tree_util.tree_map_with_path(kind, metadata)
                for batch in _batches({name: entries[name] for name in names}, _BATCH_BYTES):
                    item = jax.tree_util.tree_map_with_path(
                        lambda where, leaf, batch=batch: (
                            leaf if path_str(where) in batch else ocp.PLACEHOLDER
                        ),
                        metadata,
                    )
                    arguments = ocp.args.PyTreeRestore(item=item, restore_args=kinds)
                    restored = dict(_flat(checkpointer.restore(path, args=arguments)))
                    check()
                    for name in batch:
                        # Popped, so that each array can be freed as soon as it is assigned.
                        yield name, restored.pop(name)

            yield OpenFile(entries, read)

    def write(self, path: pathlib.Path, arrays: Mapping[str, np.ndarray], tree: PyTree) -> None:
        """See the base class."""
        from orbax.checkpoint import StandardCheckpointer

        with StandardCheckpointer() as checkpointer:
            checkpointer.save(path.absolute(), nested(arrays))
            # Orbax writes in the background, and the directory is renamed next.
            checkpointer.wait_until_finished()


@contextlib.contextmanager
def _same(path: pathlib.Path) -> Iterator[Callable[[], None]]:
    """Give a check that the directory is still the same. Orbax opens its files by their names, time and again."""
    # Held open, it keeps its number, which no other directory gets.
    held = os.open(path, os.O_RDONLY)
    before = version(os.fstat(held))
    try:
        yield lambda: check_version(before, path.stat())
    finally:
        os.close(held)


def _batches(entries: Mapping[str, Entry], most: int) -> Iterator[set[str]]:
    """Split the names into sets of at most `most` bytes. A larger array has a set of its own."""
    batch: set[str] = set()
    room = most
    for name, entry in entries.items():
        size = int(np.prod(entry.shape, dtype=object)) * jnp.dtype(entry.dtype).itemsize
        if batch and size > room:
            yield batch
            batch, room = set(), most
        batch.add(name)
        room -= size
    if batch:
        yield batch


def _flat(tree: PyTree) -> list[tuple[str, Any]]:
    return [(path_str(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
