"""The formats: which module writes and reads each, and what runs its files."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

Runner = Callable[[Sequence[np.ndarray]], list[np.ndarray]]

# A module of a format has:
#   write(inference, path, **options)   writes the file, or the folder. Returns None, or the names of weights that the
#                                       file takes before its inputs
#   load(path, ports) -> Runner         reads it in the runtime of the format, for the check


class Format(NamedTuple):
    """One format.

    Attributes:
        module: The module that writes and reads it.
        runtime: The library that runs its files, by the name of its import.
        install: What to pass to `pip install` for it.
        keeps_state: Whether a file holds variables that calls change.
        lapack: Whether a file may call LAPACK.
        complex: Whether it may hold complex numbers.
        options: The options that only this format has.
    """

    module: str
    runtime: str
    install: str
    keeps_state: bool = False
    lapack: bool = False
    complex: bool = False
    options: tuple[str, ...] = ()

    def load_module(self) -> Any:
        """Import the module of the format."""
        return importlib.import_module(f"jaxwrap._export.{self.module}")


FORMATS = {
    "stablehlo": Format(
        "_stablehlo", "jax", "jax", lapack=True, complex=True, options=("keep_params",)
    ),
    "tf_saved_model": Format(
        "_saved_model", "tensorflow", "jaxwrap[tensorflow]", keeps_state=True, complex=True
    ),
    "litert": Format("_litert", "ai_edge_litert", "jaxwrap[litert]"),
    "onnx": Format("_onnx", "onnxruntime", "jaxwrap[onnx]"),
}
