"""LiteRT: a .tflite file of builtin operations, for phones and small devices."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence

import numpy as np

from jaxwrap._export import _saved_model
from jaxwrap._export._formats import Runner
from jaxwrap._export._inference import Inference, Ports
from jaxwrap._export._litert_rules import RULES
from jaxwrap._export._quiet import quiet
from jaxwrap._export._rewriting import rewrite
from jaxwrap._export._unsupported import place_of

_SIGNATURE = "serving_default"
# How the converter says what is wrong, and names what it has no operation for.
_ERROR = re.compile(r"\b(?:error|ERROR): (.*)")
_OPERATION = re.compile(r"""['"](?:tf|tfl|vhlo|mhlo|chlo|stablehlo)\.(\w+?)(?:_v\d+)?['"]""")


def write(inference: Inference, path: pathlib.Path) -> None:
    """Write the file. Its signature `serving_default` takes inputs and returns outputs by name.

    Args:
        inference: The model.
        path: The file.

    Raises:
        NotImplementedError: If the converter has no operation for one of the model.
    """
    rewritten = dataclasses.replace(inference, jaxpr=rewrite(inference.jaxpr, RULES))
    with tempfile.TemporaryDirectory() as folder:
        with quiet():
            _saved_model.write(rewritten, pathlib.Path(folder), ("cpu",))
        # In a process of its own, since the converter ends the process for some of what it does not know.
        done = subprocess.run(
            [
                *(sys.executable, "-P", "-m", "tensorflow.lite.python.tflite_convert"),
                f"--saved_model_dir={folder}",
                f"--saved_model_signature_key={_SIGNATURE}",
                f"--output_file={path}",
            ],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            errors="replace",
        )
    if done.returncode or not path.exists():
        raise NotImplementedError(_reason(done.stderr, inference))


def load(path: pathlib.Path, ports: Ports) -> Runner:
    """Read the file."""
    from ai_edge_litert.interpreter import Interpreter

    with quiet():
        runner = Interpreter(str(path)).get_signature_runner(_SIGNATURE)

    def run(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        named = {port.name: array for port, array in zip(ports.inputs, inputs, strict=True)}
        with quiet():
            outputs = runner(**named)
        return [outputs[port.name] for port in ports.outputs]

    return run


def _reason(text: str, inference: Inference) -> str:
    half = {"float16", "bfloat16"} & {
        str(variable.aval.dtype)
        for equation in inference.jaxpr.eqns
        for variable in equation.outvars
    }
    if half:
        return f"the model computes in {' and '.join(sorted(half))}, which 'litert' cannot hold. Cast it to float32."
    errors = _ERROR.findall(text) or text.strip().splitlines()[-1:] or ["nothing"]
    found = next(filter(None, map(_OPERATION.search, [*errors, text])), None)
    said = f"TensorFlow's converter says: {errors[0].strip().rstrip('.')}"
    advice = "Export to 'onnx', 'tf_saved_model' or 'stablehlo'."
    if found is None:
        return f"'litert' cannot hold the model. {said}. {advice}"
    name = found.group(1)
    place = place_of(inference.jaxpr, name)
    where = f" in {place}" if place else ""
    return f"`{name}`{where} is not among the builtin operations of 'litert'. {said}. {advice}"
