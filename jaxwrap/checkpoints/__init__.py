"""Weights of layers in the checkpoint files of the JAX world."""

from __future__ import annotations

import os
import pathlib

import jax

from jaxwrap._variables import assign, to_host
from jaxwrap._weights import WeightedLayer
from jaxwrap.checkpoints._atomic import existing, replacing
from jaxwrap.checkpoints._formats import find_format
from jaxwrap.checkpoints._plan import Names, Plan, make_plan, rename

__all__ = ["Plan", "load", "save"]


def save(
    layer: WeightedLayer,
    path: str | os.PathLike[str],
    *,
    format: str | None = None,  # noqa: A002 (the word that the field uses)
    names: Names = (),
) -> None:
    r"""Writes the weights of a layer as a checkpoint of a JAX library.

    In the file they are called what their paths below the layer are, `params/Dense_0/kernel`: as nested dicts in
    `.msgpack` and Orbax, which is what `layer.get_variables()` returns; flat in `.safetensors` and `.npz`. An `.eqx`
    file holds leaves without names, those of the module for an `EquinoxLayer`. PRNG keys are written as their data. The
    file is written under another name and then renamed, so the one that was there stays whole until then.

    Args:
        layer: A layer of jaxwrap that has been built.
        path: The file, or for Orbax the directory.
        format: "msgpack", "orbax", "safetensors", "npz" or "eqx"; by default what the suffix says, with `.orbax`, or no
            suffix, for Orbax.
        names: Other names, by patterns of the paths, as pairs or as a dict: `{r"params/(.*)": r"model/\1"}`. The first
            pattern that matches a whole path says its name, as in `re.sub`; None leaves it out.

    Raises:
        ImportError: If the library of the format is not installed.
        TypeError: If `layer` is none of jaxwrap.
        ValueError: If the layer has not been built, the format is not known or cannot hold a dtype, or `names` matches
            nothing or gives two weights one name.

    Example:
        >>> import flax.linen as nn, numpy as np, tempfile, jaxwrap
        >>> layer = jaxwrap.FlaxLayer(nn.Dense(2), name="dense")
        >>> _ = layer(np.ones((1, 3), "float32"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     jaxwrap.checkpoints.save(layer, f"{folder}/dense.npz")
        ...     sorted(np.load(f"{folder}/dense.npz"))
        ['params/bias', 'params/kernel']
    """
    owner = _check(layer, "save")
    path = pathlib.Path(path)
    chosen = find_format(path, format, owner)
    variables = layer._variables_by_path()
    renamed = rename(list(variables), names, owner)
    arrays = {name: to_host(variables[own]) for own, name in renamed.items() if name is not None}
    with replacing(path) as temporary:
        chosen.write(temporary, arrays, layer._checkpoint_tree(), owner)


def load(
    layer: WeightedLayer,
    path: str | os.PathLike[str],
    *,
    format: str | None = None,  # noqa: A002
    names: Names = (),
    dry_run: bool = False,
) -> Plan:
    r"""Reads a checkpoint of a JAX library into the weights of a layer: all of them, or none.

    Numbers are cast to the dtype of the weight if they are of its kind, or of one that it holds. Beside the weights,
    memory holds one array of the file at a time; of an Orbax checkpoint, up to 16 MB of them.

    Args:
        layer: A layer of jaxwrap that has been built.
        path: The file, or for Orbax the directory. A file of the library's own will do as well as one from `save`.
        format: See `save`.
        names: What the names in the file are to be called, by patterns, as for `save`. None leaves a name out.
        dry_run: Prints the plan, and assigns nothing.

    Returns:
        The plan: what goes where.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If the library of the format is not installed.
        TypeError: If `layer` is none of jaxwrap.
        ValueError: If weights are missing, not expected, or of another shape or kind; all are listed. Or if the file is
            damaged. No weight has been changed then.

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
    owner = _check(layer, "load")
    path = existing(pathlib.Path(path))
    chosen = find_format(path, format, owner)
    variables = layer._variables_by_path()
    try:
        with chosen.open(path, layer._checkpoint_tree(), owner) as file:
            plan = make_plan(file.entries, rename(list(file.entries), names, owner), variables)
            if dry_run:
                print(plan)  # noqa: T201 (what a dry run is for)
                return plan
            plan.check(owner, path)
            targets = {row.name: variables[row.target] for row in plan if row.target in variables}
            # A damaged file may say so late. Reading all of it twice takes less memory than keeping it.
            for _ in file.read(targets):
                pass
            for name, array in file.read(targets):
                variable = targets[name]
                assign(variable, array.astype(variable.dtype, copy=False))
                # JAX copies while we go on, and would keep all arrays alive.
                jax.block_until_ready(variable.value)
    except (ValueError, TypeError):
        raise
    except Exception as error:
        # Each library has errors of its own for a file that it cannot read.
        raise ValueError(
            f"{owner}: {path} cannot be read. None of the weights has been changed. It may be damaged, or of another "
            f"format; `format=` says which. {type(error).__name__}: {error}"
        ) from error
    return plan


def _check(layer: WeightedLayer, function: str) -> str:
    if not isinstance(layer, WeightedLayer):
        raise TypeError(
            f"checkpoints.{function}: expected a layer of jaxwrap; received {layer!r}. Pass the layers of a model one "
            "by one."
        )
    layer._built_leaves()
    return layer._owner
