"""The formats by name, and by the suffix of a path."""

from __future__ import annotations

import importlib.util
import pathlib

from jaxwrap.checkpoints._atomic import PREVIOUS
from jaxwrap.checkpoints._base import Format
from jaxwrap.checkpoints._eqx import Eqx
from jaxwrap.checkpoints._msgpack import Msgpack
from jaxwrap.checkpoints._npz import Npz
from jaxwrap.checkpoints._orbax import Orbax
from jaxwrap.checkpoints._safetensors import Safetensors

_FORMATS: dict[str, Format] = {
    "msgpack": Msgpack(),
    "orbax": Orbax(),
    "safetensors": Safetensors(),
    "npz": Npz(),
    "eqx": Eqx(),
}


def find_format(path: pathlib.Path, name: str | None) -> Format:
    """Return the format with this name. Without a name, the suffix of the path decides.

    Raises:
        ImportError: If its library is not installed.
        ValueError: If there is no such format.
    """
    name = _format_of(path) if name is None else name
    if name not in _FORMATS:
        raise ValueError(
            f"there is no format {name!r} for {path}. Pass `format=`, one of {', '.join(_FORMATS)}."
        )
    found = _FORMATS[name]
    if found.library is not None and importlib.util.find_spec(found.library) is None:
        raise ImportError(
            f"`.{name}` needs {found.library!r}, which is not installed. Install it with `pip install "
            f"{found.distribution}`."
        )
    return found


def _format_of(path: pathlib.Path) -> str:
    suffix = path.name.removesuffix(PREVIOUS).rpartition(".")[2]
    if suffix not in _FORMATS and ("." not in path.name or path.is_dir()):
        return "orbax"
    return suffix
