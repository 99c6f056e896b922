"""Models as files that run without Keras, and mostly without JAX."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence
from typing import Any

import keras

from jaxwrap._errors import describe, naming
from jaxwrap._export._formats import FORMATS
from jaxwrap._export._inference import trace
from jaxwrap._export._signature import signature_of
from jaxwrap._export._source import source_of_model
from jaxwrap._typing import PyTree
from jaxwrap.checkpoints._atomic import replacing

__all__ = ["export"]


def export(
    model: keras.Layer,
    path: str | os.PathLike[str],
    format: str = "stablehlo",  # noqa: A002 (the usual word)
    *,
    input_signature: PyTree = None,
    batch_size: int | None = None,
    modules: Sequence[str] = (),
    check: bool = True,
    **options: Any,
) -> None:
    """Write the inference of a model as a file that runs without Keras."""
    path = pathlib.Path(path)
    with naming(describe(model)):
        if format not in FORMATS:
            raise ValueError(
                f"`format` is {format!r}; expected one of {', '.join(map(repr, FORMATS))}."
            )
        chosen = FORMATS[format]
        signature = signature_of(model, input_signature, batch_size)
        inference = trace(source_of_model(model, signature), chosen.keeps_state)
        with replacing(path) as temporary:
            chosen.load_module().write(inference, temporary, **options)
