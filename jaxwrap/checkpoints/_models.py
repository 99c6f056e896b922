"""Keras's own files, written by several processes together."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator

import keras

from jaxwrap._errors import naming
from jaxwrap._weights._variables import gathered_on_host
from jaxwrap.checkpoints._processes import replacing_together, writes


def save_model(model: keras.Model, path: str | os.PathLike[str]) -> None:
    """Write a Keras model as `model.save` does, or its weights as `model.save_weights` does, from several processes.

    In Keras's own functions each process writes the file, and none can read variables whose parts are on devices of
    other processes. Here all processes of JAX call this with one path, and wait for each other. Process 0 gets one
    variable after the other, those of the optimizer too, and writes. A failed or interrupted save leaves the file that
    was there before. Every process loads the file by Keras's functions.

    Args:
        model: A built Keras model.
        path: A file that ends in `.keras`, or in `.weights.h5` for the weights and the state of the optimizer alone.

    Raises:
        ValueError: If the path has another suffix.
        RuntimeError: If another process fails.

    Example:
        >>> import flax.linen as nn, keras, numpy as np, tempfile, jaxwrap
        >>> model = keras.Sequential([keras.Input((3,)), jaxwrap.FlaxLayer(nn.Dense(2))])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     jaxwrap.checkpoints.save_model(model, f"{folder}/dense.weights.h5")
        ...     model.load_weights(f"{folder}/dense.weights.h5")
    """
    path = pathlib.Path(path)
    suffix = next((end for end in (".keras", ".weights.h5") if path.name.endswith(end)), None)
    if suffix is None:
        with naming("checkpoints.save_model"):
            raise ValueError(
                f"expected a path that ends in .keras or .weights.h5; received {path}."
            )
    optimizer = getattr(model, "optimizer", None)  # a model that is not compiled has none
    variables = [*model.variables, *(optimizer.variables if optimizer else ())]
    with (
        replacing_together(path) as temporary,
        gathered_on_host(variables, writes()),
    ):
        if writes():
            # Keras asks for the suffix.
            named = temporary.with_name(temporary.name + suffix)
            try:
                with _undistributed():
                    model.save(named) if suffix == ".keras" else model.save_weights(named)
                named.rename(temporary)
            finally:
                named.unlink(missing_ok=True)


@contextlib.contextmanager
def _undistributed() -> Iterator[None]:
    """Leave the distribution: Keras makes objects when it saves, and would wait for the others to make them too."""
    distribution = keras.distribution.distribution()
    keras.distribution.set_distribution(None)
    try:
        yield
    finally:
        keras.distribution.set_distribution(distribution)
