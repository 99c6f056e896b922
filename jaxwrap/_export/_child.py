"""Exports of models on other backends, by a process with the JAX backend that loads them from a `.keras` file."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any

import keras
from keras.src.utils import io_utils

from jaxwrap._errors import is_ours
from jaxwrap._export._formats import FORMATS
from jaxwrap._export._inference import Port, Ports, trace
from jaxwrap._export._signature import Signature, signature_of
from jaxwrap._export._source import source_of_model
from jaxwrap._export._unsupported import check_supported
from jaxwrap._serialization import registered_objects

# parent                                  child, KERAS_BACKEND=jax
#   model.keras, signature, options  ──▶    loads, traces and writes
#   names and sizes of the file      ◀──    or an error
#   checks the file against the model

_START = """import json, sys
sys.path[:] = json.loads(sys.argv[1])
from jaxwrap._export import _child
_child.main(sys.argv[2])
"""
_ERRORS = {cls.__name__: cls for cls in (ValueError, TypeError, ImportError, NotImplementedError)}


def write_in_child(
    model: keras.Model,
    path: pathlib.Path,
    format: str,  # noqa: A002
    signature: Signature,
    modules: Sequence[str],
    options: dict[str, Any],
) -> tuple[Ports, list[str]]:
    """Write a model of any backend.

    Args:
        model: The model.
        path: What to write.
        format: The name of the format.
        signature: The inputs.
        modules: Names of modules to import before the model is loaded.
        options: The options of the format.

    Returns:
        The inputs and outputs of the file, and the names of the weights that it takes.

    Raises:
        TypeError: If it is a layer, which no `.keras` file holds.
        ValueError: If the model needs a class of `__main__`, or the child fails.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(
            "a layer that overrides `call` can be exported as a part of a model only. Put it into a `keras.Model`."
        )
    with tempfile.TemporaryDirectory() as folder:
        saved = os.path.join(folder, "model.keras")
        io_utils.print_msg(f"Exporting {model.name!r} by a process with the JAX backend.")
        model.save(saved)
        task = {
            "model": saved,
            "path": str(path),
            "format": format,
            # Keras does not write their names.
            "names": [one.name for one in signature.inputs],
            "signature": keras.saving.serialize_keras_object(signature.specs()),
            "modules": [*_needed_modules(saved), *modules],
            "options": options,
        }
        file = pathlib.Path(folder, "task.json")
        file.write_text(json.dumps(task))
        answer = _run(file)
    for text in answer["warnings"]:
        warnings.warn(text, stacklevel=4)
    if "error" in answer:
        kind, message = answer["error"]
        raise _ERRORS.get(kind, RuntimeError)(message)
    inputs, outputs = (
        [Port(name, tuple(dims), dtype) for name, dims, dtype in ports] for ports in answer["ports"]
    )
    return Ports(inputs, outputs), answer["leading"]


def _run(task: pathlib.Path) -> dict[str, Any]:
    """Run a child, and show its progress."""
    env = {**os.environ, "KERAS_BACKEND": "jax"}
    command = [sys.executable, "-c", _START, json.dumps(sys.path), str(task)]
    answer = task.with_name("answer.json")
    errors = task.with_name("errors.txt")
    with (
        errors.open("w") as log,
        subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=log, text=True) as child,
    ):
        try:
            for line in child.stdout or ():
                io_utils.print_msg(f"  {line.rstrip()}")
        except BaseException:
            child.kill()
            raise
    if not answer.exists():
        raise RuntimeError(
            f"the process with the JAX backend ended with {child.returncode}:\n{errors.read_text()[-2000:]}"
        )
    return json.loads(answer.read_text())


def _needed_modules(saved: str) -> list[str]:
    """Return the modules of the classes and functions that a `.keras` file names.

    Raises:
        ValueError: If one is `__main__`, which another process cannot import.
    """
    with zipfile.ZipFile(saved) as archive:
        config = json.loads(archive.read("config.json"))
    names = set(_strings(config))
    needed = {
        name: obj.__module__
        for name, obj in registered_objects().items()
        if name in names and hasattr(obj, "__module__")
    }
    own = sorted(name for name, module in needed.items() if module == "__main__")
    if own or "__main__" in names:
        raise ValueError(
            f"the model needs {', '.join(own) or 'a class'} from `__main__`, which the process that exports it cannot "
            "import. Move it to a module of its own and import it from there, or export with KERAS_BACKEND=jax."
        )
    return sorted(
        {module for module in needed.values() if not module.startswith(("keras.", "jaxwrap."))}
    )


def _strings(config: Any) -> Iterator[str]:
    if isinstance(config, str):
        yield config
    elif isinstance(config, dict):
        for value in config.values():
            yield from _strings(value)
    elif isinstance(config, list):
        for value in config:
            yield from _strings(value)


# In the child.


def main(task: str) -> None:
    """Export as the file says, and leave an answer beside it."""
    answer: dict[str, Any] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            answer |= _export(json.loads(pathlib.Path(task).read_text()))
        except Exception as error:
            kind = type(error).__name__
            message = str(error) if is_ours(error) else f"{kind} in the process with JAX: {error}"
            answer["error"] = [kind, message]
    answer["warnings"] = [str(one.message) for one in caught if one.category is UserWarning]
    pathlib.Path(task).with_name("answer.json").write_text(json.dumps(answer))


def _export(task: dict[str, Any]) -> dict[str, Any]:
    for module in task["modules"]:
        importlib.import_module(module)
    _tell("loading")
    # The parent has made the file a moment ago.
    model = keras.saving.load_model(task["model"], compile=False, safe_mode=False)
    specs = keras.saving.deserialize_keras_object(task["signature"])
    chosen = FORMATS[task["format"]]
    _tell("tracing")
    signature = signature_of(model, specs, None).renamed(task["names"])
    inference = trace(source_of_model(model, signature), chosen.keeps_state)
    check_supported(inference.jaxpr, task["format"], chosen)
    _tell(f"writing {task['format']}")
    leading = chosen.load_module().write(inference, pathlib.Path(task["path"]), **task["options"])
    ports = [[dataclasses.astuple(port) for port in side] for side in inference.ports]
    return {"ports": ports, "leading": leading or []}


def _tell(step: str) -> None:
    sys.stdout.write(f"{step}\n")
    sys.stdout.flush()
