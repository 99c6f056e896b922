"""`python -m benchmarks.coverage`: which models of the tests each format holds, as a table in Markdown."""

import argparse
import functools
import os
import pathlib
import sys
import tempfile
import warnings

os.environ.setdefault("KERAS_BACKEND", "jax")
# The models are those of the tests.
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tests" / "helpers"))

import keras
import models
import numpy as np
import zoo

import jaxwrap
from jaxwrap._export._formats import FORMATS


def layers():
    """Yield the name, a function that makes the layer, and inputs of each model."""
    for name, model in models.MODELS.items():
        yield name, model.make, model.inputs(np.random.default_rng(0), 2)
    for name, entry in zoo.ZOO.items():
        yield name, functools.partial(entry.make, seed=5), entry.inputs


def outcome(layer, kind):
    """Export a layer, and return "yes", or the reason why not."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = pathlib.Path(folder, "model")
        try:
            jaxwrap.export(layer, path, kind)
        except (NotImplementedError, ValueError) as error:
            assert not path.exists()
            return str(error).partition(": ")[2].replace("|", "/").replace("\n", " ")
        return "yes"


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description=__doc__)
    parser.add_argument("--formats", nargs="+", default=[*FORMATS], choices=FORMATS)
    kinds = parser.parse_args().formats
    keras.config.disable_interactive_logging()
    counts = dict.fromkeys(kinds, 0)
    total = 0
    print(f"| model | {' | '.join(kinds)} |\n| --- |{' --- |' * len(kinds)}")
    for name, make, inputs in layers():
        layer = make()
        layer(inputs)
        outcomes = [outcome(layer, kind) for kind in kinds]
        for kind, said in zip(kinds, outcomes, strict=True):
            counts[kind] += said == "yes"
        total += 1
        print(f"| {name} | {' | '.join(outcomes)} |", flush=True)
    print(f"| of {total} | {' | '.join(str(counts[kind]) for kind in kinds)} |")


if __name__ == "__main__":
    main()
