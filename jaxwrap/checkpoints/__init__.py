"""The weights of layers in the checkpoint files of JAX libraries."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import keras

from jaxwrap._errors import describe, naming
from jaxwrap._weights._targets import untied
from jaxwrap.checkpoints._atomic import existing
from jaxwrap.checkpoints._base import OpenFile
from jaxwrap.checkpoints._formats import find_format
from jaxwrap.checkpoints._models import save_model
from jaxwrap.checkpoints._owner import TRAINABLE, owner_of
from jaxwrap.checkpoints._plan import Entry, Names, Plan, make_plan, rename, resolve
from jaxwrap.checkpoints._processes import replacing_together, writes

__all__ = ["Plan", "load", "save", "save_model"]

_UNCHANGED = "No weight has been changed. It may be damaged, or in another format: pass `format=`."
_CHANGED = "It passed the first reading and failed in the second, so some weights have been changed: load it again."


def save(
    layer: keras.Layer,
    path: str | os.PathLike[str],
    *,
    format: str | None = None,  # noqa: A002 (the usual word)
    names: Names = None,
    trainable_only: bool = False,
) -> None:
    r"""Write the weights of a layer, or of a model, as a checkpoint of a JAX library.

    The name of a weight in the file is its path below the layer, `params/Dense_0/kernel`. In a file of a model, the
    name of the layer comes before it, and weights of Keras's own layers have their paths below it. `.msgpack` and Orbax
    hold nested dicts, the same as `layer.get_variables()`. `.safetensors` and `.npz` hold flat names. `.eqx` holds
    leaves without names, and for an `EquinoxLayer` those of the module. PRNG keys are written as their data. A failed
    or interrupted save leaves the file that was there before.

    With several processes of JAX, all of them call this with one path, and wait for each other. Process 0 writes, and
    arrays whose parts are on devices of several processes are gathered one by one. To Orbax, each process writes its
    own parts.

    Args:
        layer: A built layer of jaxwrap, or a Keras model.
        path: The file, or for Orbax the directory.
        format: "msgpack", "orbax", "safetensors", "npz" or "eqx". By default the suffix of `path` decides. `.orbax`, or
            no suffix, is Orbax.
        names: New names, as a dict or as pairs, from a pattern of the path: `{r"params/(.*)": r"model/\1"}`. The first
            pattern that matches a whole path gives its name, as in `re.sub`. None leaves a weight out. Or a function
            from the path to the name or None.
        trainable_only: Write the variables that are trained, and no others: the adapters of LoRA without their bases. A
            reparametrized leaf is written as its parts. `load` knows such a file by its names, which begin with
            `trainable/`, and leaves all other weights as they are.

    Raises:
        ImportError: If the library of the format is not installed.
        TypeError: If `layer` is neither.
        ValueError: If the layer has not been built, the format is unknown or cannot hold a dtype, or `names` matches
            nothing or gives two weights the same name. Or for `trainable_only` in `.eqx`, which has no names.

    Example:
        >>> import flax.linen as nn, numpy as np, tempfile, jaxwrap
        >>> layer = jaxwrap.FlaxLayer(nn.Dense(2), name="dense")
        >>> _ = layer(np.ones((1, 3), "float32"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     jaxwrap.checkpoints.save(layer, f"{folder}/dense.npz")
        ...     sorted(np.load(f"{folder}/dense.npz"))
        ['params/bias', 'params/kernel']
    """
    path = pathlib.Path(path)
    with naming(_door(layer, "save")):
        owner = owner_of(layer, trainable_only)
        chosen = find_format(path, format)
        if trainable_only and not chosen.has_names:
            raise ValueError(
                "`.eqx` holds leaves without names, so `trainable_only=True` needs another format, such as "
                "`.safetensors`."
            )
        renamed = rename(list(owner.targets), names)
        arrays = {}
        with replacing_together(path) as temporary:
            for own, name in renamed.items():
                if name is None:
                    continue
                target = owner.targets[own]
                array = target.shards() if chosen.takes_shards else target.read()
                # All processes take part in reading what lies on all of them.
                if chosen.takes_shards or writes():
                    arrays[name] = array
            if chosen.takes_shards or writes():
                chosen.write(temporary, arrays, owner.tree)


def load(
    layer: keras.Layer,
    path: str | os.PathLike[str],
    *,
    format: str | None = None,  # noqa: A002
    names: Names = None,
    only: str | None = None,
    progress: bool = False,
    dry_run: bool = False,
) -> Plan:
    r"""Read a checkpoint of a JAX library into the weights of a layer or a model: all of them, or none.

    A name in the file stands for the weight with this path, or for the one that the library itself calls so, such as
    `params/mlp/~/linear_0/w` in Haiku. `params/` may be missing in both. If a model has one layer of jaxwrap, so may
    the name of that layer. Numbers are cast to the dtype of the weight if it can hold their kind. Besides the weights,
    memory holds one array of the file at a time. Of an Orbax checkpoint, it holds up to 16 MB of arrays.

    Args:
        layer: A built layer of jaxwrap, or a Keras model. See `save`.
        path: The file, or for Orbax the directory, from `save` or from the library itself.
        format: See `save`.
        names: New names for the names in the file, by patterns or by a function. See `save`. None leaves an array out.
        only: A pattern for the paths of the weights to load: `"params/.*"`. Others are left alone, whether the file has
            them or not.
        progress: Show a progress bar. It counts each array twice, as each is read once before any is assigned.
        dry_run: Print the plan and assign nothing.

    Returns:
        The plan, which says which array goes to which weight.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If the library of the format is not installed.
        TypeError: If `layer` is neither.
        ValueError: If weights are missing, unexpected, or of another shape or kind. The error lists all of them. Or if
            the file is damaged. No weight has been changed then.

    Example:
        >>> import flax.linen as nn, numpy as np, tempfile, jaxwrap
        >>> layer = jaxwrap.FlaxLayer(nn.Dense(2), name="dense")
        >>> _ = layer(np.ones((1, 3), "float32"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.savez(f"{folder}/w.npz", kernel=np.ones((3, 2)), bias=np.zeros(2))
        ...     plan = jaxwrap.checkpoints.load(layer, f"{folder}/w.npz", names={"(.*)": r"params/\1"})
        >>> [row.status for row in plan], float(layer.get_variables()["params"]["kernel"].sum())
        (['cast', 'cast'], 6.0)
    """
    with naming(_door(layer, "load")), contextlib.ExitStack() as stack:
        owner = owner_of(layer)
        path = existing(pathlib.Path(path))
        chosen = find_format(path, format)
        with _readable(path):
            file = stack.enter_context(chosen.open(path, owner.tree))
        if file.entries and all(name.startswith(TRAINABLE) for name in file.entries):
            owner = owner_of(layer, trainable_only=True)
        weights = {path: Entry(one.shape, one.dtype) for path, one in owner.targets.items()}
        renamed = resolve(rename(list(file.entries), names), weights, owner.spellings)
        there = set(renamed.values())
        # The value of a tied leaf need not be in the file.
        wanted = {p: e for p, e in weights.items() if p in there or not owner.targets[p].tie}
        plan = make_plan(file.entries, renamed, wanted, only)
        if dry_run:
            print(plan)  # noqa: T201 (the purpose of a dry run)
            return plan
        # Shapes and dtypes are known without reading arrays, so most problems show before.
        plan.check(path)
        targets = {row.name: str(row.target) for row in plan if row.is_loaded}
        held, compared = owner.held(), {}
        places = {
            name: None if path in held else owner.targets[path].sharding()
            for name, path in targets.items()
        }
        bar = keras.utils.Progbar(2 * len(targets), unit_name="array") if progress else None
        # A damaged file may fail at its last array. To read it twice takes less memory than to keep all arrays.
        for name, array in _arrays(file, places, path):
            own = targets[name]
            value = array.astype(owner.targets[own].dtype, copy=False)
            owner.targets[own].look(value)
            if own in held:
                compared[own] = value
            if bar is not None:
                bar.add(1)
        if lines := untied(owner.targets, compared):
            raise ValueError(
                f"the weights in {path} do not fit. No weight has been changed.\n"
                + "\n".join(lines)
            )
        for name, array in _arrays(file, places, path, _CHANGED):
            target = owner.targets[targets[name]]
            target.write(array.astype(target.dtype, copy=False))
            if bar is not None:
                bar.add(1)
    return plan


def _arrays(
    file: OpenFile, names: Mapping[str, Any], path: pathlib.Path, outcome: str = _UNCHANGED
) -> Iterator[tuple[str, Any]]:
    with _readable(path, outcome):
        yield from file.read(names)


@contextlib.contextmanager
def _readable(path: pathlib.Path, outcome: str = _UNCHANGED) -> Iterator[None]:
    """Turn whatever a library raises for a file that it cannot read into a ValueError with the path."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read. {outcome} {type(error).__name__}: {error}"
        ) from error


def _door(layer: object, function: str) -> str:
    return describe(layer) if isinstance(layer, keras.Layer) else f"checkpoints.{function}"
