"""The package as a whole: what importing it loads, what it exports, who imports whom."""

import ast
import importlib.metadata
import os
import pathlib
import subprocess
import sys

import pytest

import jaxwrap

pytestmark = [pytest.mark.quick, pytest.mark.once]

SOURCE = pathlib.Path(jaxwrap.__file__).parent
# Left to right only.
LAYERS = [
    ["__init__"],
    ["adapters", "testing"],
    ["checkpoints", "_export", "_training"],
    ["_layer"],
    ["reparametrizations"],
    ["_weights", "_function"],
    ["_serialization", "_specs"],
    ["_bridge", "_pytree"],
    ["_typing", "_dtypes", "_errors", "_tracing", "_dense", "_instances"],
]


def test_import_loads_no_optional_library():
    code = (
        "import keras, sys; before = set(sys.modules); import jaxwrap; "
        "print(*{m.partition('.')[0] for m in set(sys.modules) - before})"
    )
    env = {**os.environ, "KERAS_BACKEND": "jax"}
    loaded = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    ).stdout.split()
    optional = {"flax", "haiku", "equinox", "optax", "torch", "tensorflow"}
    assert not optional & set(loaded)
    assert "jaxwrap" in loaded


def test_all_is_what_there_is():
    public = {
        name
        for name, value in vars(jaxwrap).items()
        if not name.startswith("_") and getattr(value, "__module__", None) is not None
    }
    # It is imported when it is asked for.
    assert public | {"export"} == set(jaxwrap.__all__)
    assert all(hasattr(jaxwrap, name) for name in jaxwrap.__all__)
    assert sorted(jaxwrap.__all__) == list(jaxwrap.__all__)
    assert jaxwrap.__version__ == importlib.metadata.version("jaxwrap")


def rank(module):
    return next(index for index, names in enumerate(LAYERS) if module in names)


def test_imports_go_one_way():
    for path in SOURCE.rglob("*.py"):
        relative = path.relative_to(SOURCE)
        own = relative.parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxwrap."):
                other = node.module.split(".")[1]
                assert other == own or rank(other) >= rank(own), f"{relative} imports {node.module}"
