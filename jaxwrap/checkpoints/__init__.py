"""The weights of layers in the checkpoint files of JAX libraries."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Collection, Iterator

import jax
import numpy as np

from jaxwrap._errors import describe, naming
from jaxwrap._layer import JaxLayer
from jaxwrap._weights._variables import assign, to_host
from jaxwrap.checkpoints._atomic import existing, replacing
from jaxwrap.checkpoints._base import OpenFile
from jaxwrap.checkpoints._formats import find_format
from jaxwrap.checkpoints._plan import Entry, Names, Plan, make_plan, rename

__all__ = ["Plan", "load", "save"]

_UNCHANGED = "No weight has been changed. It may be damaged, or in another format: pass `format=`."
_CHANGED = "It passed the first reading and failed in the second, so some weights have been changed: load it again."


def save(
    layer: JaxLayer,
    path: str | os.PathLike[str],
    *,
    format: str | None = None,  # noqa: A002 (the usual word)
    names: Names = (),
) -> None:
    r"""Write the weights of a layer as a checkpoint of a JAX library.

    The name of a weight in the file is its path below the layer, `params/Dense_0/kernel`. `.msgpack` and Orbax hold
    nested dicts, the same as `layer.get_variables()`. `.safetensors` and `.npz` hold flat names. `.eqx` holds leaves
    without names, and for an `EquinoxLayer` those of the module. PRNG keys are written as their data. A failed or
    interrupted save leaves the file that was there before.

    Args:
        layer: A built layer of jaxwrap.
        path: The file, or for Orbax the directory.
        format: "msgpack", "orbax", "safetensors", "npz" or "eqx". By default the suffix of `path` decides. `.orbax`, or
            no suffix, is Orbax.
        names: New names, as a dict or as pairs, from a pattern of the path: `{r"params/(.*)": r"model/\1"}`. The first
            pattern that matches a whole path gives its name, as in `re.sub`. None leaves the weight out.

    Raises:
        ImportError: If the library of the format is not installed.
        TypeError: If `layer` is not a layer of jaxwrap.
        ValueError: If the layer has not been built, the format is unknown or cannot hold a dtype, or `names` matches
            nothing or gives two weights the same name.

    Example:
        >>> import flax.linen as nn, numpy as np, tempfile, jaxwrap
        >>> layer = jaxwrap.FlaxLayer(nn.Dense(2), name="dense")
        >>> _ = layer(np.ones((1, 3), "float32"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     jaxwrap.checkpoints.save(layer, f"{folder}/dense.npz")
        ...     sorted(np.load(f"{folder}/dense.npz"))
        ['params/bias', 'params/kernel']
    """
    _check_layer(layer, "save")
    path = pathlib.Path(path)
    with naming(describe(layer)):
        chosen = find_format(path, format)
        variables = layer._engine.built_weights().by_path()
        renamed = rename(list(variables), names)
        arrays = {
            name: to_host(variables[own]) for own, name in renamed.items() if name is not None
        }
        with replacing(path) as temporary:
            chosen.write(temporary, arrays, layer._engine.checkpoint_tree())


def load(
    layer: JaxLayer,
    path: str | os.PathLike[str],
    *,
    format: str | None = None,  # noqa: A002
    names: Names = (),
    dry_run: bool = False,
) -> Plan:
    r"""Read a checkpoint of a JAX library into the weights of a layer: all of them, or none.

    Numbers are cast to the dtype of the weight if it can hold their kind. Besides the weights, memory holds one array
    of the file at a time. Of an Orbax checkpoint, it holds up to 16 MB of arrays.

    Args:
        layer: A built layer of jaxwrap.
        path: The file, or for Orbax the directory, from `save` or from the library itself.
        format: See `save`.
        names: New names for the names in the file, by patterns. See `save`. None leaves an array out.
        dry_run: Print the plan and assign nothing.

    Returns:
        The plan: which array goes to which weight.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If the library of the format is not installed.
        TypeError: If `layer` is not a layer of jaxwrap.
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
    _check_layer(layer, "load")
    with naming(describe(layer)), contextlib.ExitStack() as stack:
        path = existing(pathlib.Path(path))
        chosen = find_format(path, format)
        with _readable(path):
            file = stack.enter_context(chosen.open(path, layer._engine.checkpoint_tree()))
        variables = layer._engine.built_weights().by_path()
        weights = {name: Entry(tuple(v.shape), v.dtype) for name, v in variables.items()}
        plan = make_plan(file.entries, rename(list(file.entries), names), weights)
        if dry_run:
            print(plan)  # noqa: T201 (the purpose of a dry run)
            return plan
        # Shapes and dtypes are known without reading arrays, so most problems show before.
        plan.check(path)
        targets = {row.name: variables[row.target] for row in plan if row.target in variables}
        # A damaged file may fail at its last array. To read it twice takes less memory than to keep all arrays.
        for _ in _arrays(file, targets, path):
            pass
        for name, array in _arrays(file, targets, path, _CHANGED):
            variable = targets[name]
            assign(variable, array.astype(variable.dtype, copy=False))
            # JAX copies in the background, and keeps each array until then.
            jax.block_until_ready(variable.value)
    return plan


def _arrays(
    file: OpenFile, names: Collection[str], path: pathlib.Path, outcome: str = _UNCHANGED
) -> Iterator[tuple[str, np.ndarray]]:
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


def _check_layer(layer: JaxLayer, function: str) -> None:
    if not isinstance(layer, JaxLayer):
        raise TypeError(
            f"checkpoints.{function}: expected a layer of jaxwrap; received {layer!r}. Pass the layers of a model one "
            "by one."
        )
