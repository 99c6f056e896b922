"""`python -m benchmarks.exports`: sizes of exported files and milliseconds per call, as a table in Markdown.

Beside each file: the Keras model that was exported, and the jitted call of its module.
"""

import argparse
import os
import pathlib
import statistics
import tempfile

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import keras
import numpy as np

import jaxwrap
from benchmarks.models import MODELS
from benchmarks.timing import race
from jaxwrap._export._formats import FORMATS
from jaxwrap._export._inference import trace
from jaxwrap._export._signature import signature_of
from jaxwrap._export._source import source_of_layer


def size(path):
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def contestants(model, inputs, module, variables, folder):
    call = jax.jit(module.apply)
    yield "unwrapped JAX, jitted", None, lambda: lambda: call(variables, inputs).block_until_ready()
    yield "Keras model", None, lambda: lambda: keras.ops.convert_to_numpy(model(inputs))
    ports = trace(source_of_layer(model, signature_of(model, None, None))).ports
    for name, chosen in FORMATS.items():
        path = folder / name
        try:
            jaxwrap.export(model, path, name)
            run = chosen.load_module().load(path, ports)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {error}")
            continue
        yield f"`{name}`", size(path), lambda run=run: lambda: run([inputs])


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exports", description=__doc__)
    parser.add_argument("--models", nargs="+", default=["mlp", "resnet"], choices=MODELS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.1, help="of one measurement, at least")
    arguments = parser.parse_args()
    print("| model | what runs | size | ms per call |\n| --- | --- | --- | --- |")
    for name in arguments.models:
        row = MODELS[name]
        module, inputs, variables = row.make(), np.asarray(row.inputs()), row.variables()
        entry = keras.Input(inputs.shape[1:], dtype=str(inputs.dtype), name="inputs")
        model = keras.Model(entry, jaxwrap.FlaxLayer(module, variables=variables)(entry))
        with tempfile.TemporaryDirectory() as folder:
            found = list(contestants(model, inputs, module, variables, pathlib.Path(folder)))
            makers = {label: make for label, _, make in found}
            times, failures = race(makers, arguments.rounds, arguments.seconds)
        for label, bytes_, _ in found:
            taken = (
                f"{1000 * statistics.median(times[label]):.3g}"
                if label in times
                else failures[label]
            )
            shown = "" if bytes_ is None else f"{bytes_ / 1e6:.3g} MB"
            print(f"| {row.title} | {label} | {shown} | {taken} |", flush=True)


if __name__ == "__main__":
    main()
