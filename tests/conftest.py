"""Fixtures. The backend is the one KERAS_BACKEND names; one that is missing fails the run."""

import gc
import itertools
import os
import shutil

import pytest

NAME = os.environ.get("KERAS_BACKEND")
if NAME is None:
    raise pytest.UsageError(
        "set KERAS_BACKEND to jax, tensorflow, torch or numpy to say what is to be tested"
    )

from backends import BACKENDS  # noqa: E402  (imports Keras, which fails where the backend is missing)

BACKEND = BACKENDS[NAME]()
FIRST = os.environ.get("JAXWRAP_BACKENDS", NAME).split(",")[0]
TESTS = itertools.count()
# nox hides it: on a GPU backends agree less closely.
GPU = bool(shutil.which("nvidia-smi")) and os.environ.get("CUDA_VISIBLE_DEVICES") != ""


def pytest_report_header():
    import jax
    import keras

    return f"backend: {keras.config.backend()}, keras {keras.__version__}, jax {jax.__version__}"


def pytest_generate_tests(metafunc):
    own = [
        name for mark in metafunc.definition.iter_markers("parametrize") for name in mark.args[0]
    ]
    if "mode" in metafunc.fixturenames and "mode" not in own:
        metafunc.parametrize("mode", BACKEND.modes)


def pytest_collection_modifyitems(config, items):
    """Leave out the tests that have no meaning on this backend."""

    def applies(item):
        only = item.get_closest_marker("only")
        trains = item.get_closest_marker("trains")
        gpu = item.get_closest_marker("gpu")
        once = item.get_closest_marker("once")
        return (
            (BACKEND.trains or not trains)
            and (not only or BACKEND.name in only.args)
            and (GPU or not gpu)
            and (NAME == FIRST or not once)
        )

    config.hook.pytest_deselected(items=[item for item in items if not applies(item)])
    items[:] = [item for item in items if applies(item)]


def pytest_runtest_setup():
    """Keep the garbage collector from looking, each time, at all that was imported: a million objects in the end."""
    if next(TESTS) % 20 == 1:
        gc.collect()
        gc.freeze()


@pytest.fixture
def backend():
    return BACKEND


@pytest.fixture(autouse=True)
def _seeded():
    import keras

    keras.utils.set_random_seed(0)
    yield
    keras.config.set_dtype_policy("float32")
