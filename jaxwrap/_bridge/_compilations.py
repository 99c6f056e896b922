"""Compiled functions on disk, for the next process."""

from __future__ import annotations

import os
import pathlib

import jax
import keras

_FLAG = "--tf_xla_persistent_cache_directory"


def cache_compilations(directory: str | os.PathLike[str]) -> None:
    """Keep what XLA compiles in a directory, so that the next process of the same program starts sooner.

    Call it before anything is computed. It turns on JAX's persistent compilation cache, for functions of any size, and
    on the TensorFlow backend that of TensorFlow as well, which compiles the graphs of `fit` and `predict` and reads its
    flags once in a process. Traces are not kept. Nothing is ever deleted. Whoever can write to the directory can run
    code in your programs. TensorFlow does not look which machine a file is from, so use one directory for each kind.

    Args:
        directory: Is made if it does not exist.

    Raises:
        OSError: If it cannot be made.
        TypeError: If `directory` is not a path.

    Example:
        >>> import tempfile, flax.linen as nn, numpy as np, jaxwrap
        >>> jaxwrap.cache_compilations(tempfile.mkdtemp())
        >>> jaxwrap.FlaxLayer(nn.Dense(2))(np.ones((1, 3), "float32")).shape[-1]
        2
    """
    if not isinstance(directory, (str, os.PathLike)):
        raise TypeError(
            f"cache_compilations: `directory` must be a path, as a string; received {directory!r}."
        )
    path = pathlib.Path(directory).expanduser().absolute()
    path.mkdir(parents=True, exist_ok=True)
    # Here, since it takes time to import.
    from jax.experimental.compilation_cache import compilation_cache

    jax.config.update("jax_compilation_cache_dir", str(path))
    # By default only what compiles for a second is kept, and a layer has many functions below that.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    # JAX asks once in a process whether there is a cache.
    compilation_cache.reset_cache()
    if keras.config.backend() == "tensorflow":
        others = [flag for flag in os.environ.get("TF_XLA_FLAGS", "").split() if _FLAG not in flag]
        own = path / "tensorflow"
        own.mkdir(exist_ok=True)
        os.environ["TF_XLA_FLAGS"] = " ".join([*others, f"{_FLAG}={own}"])
