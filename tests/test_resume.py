"""A training that was killed goes on as if it had not been."""

import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

SCRIPT = pathlib.Path(__file__).parent / "helpers" / "resume_script.py"


def train(*arguments):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)], check=False
    ).returncode


@pytest.mark.trains
@pytest.mark.parametrize(
    "deaths",
    # How Keras writes a backup is the same on every backend.
    [
        pytest.param(["batch", "backup"], marks=pytest.mark.once),
        pytest.param(["batch"], marks=pytest.mark.only("tensorflow", "torch")),
    ],
    ids="-".join,
)
def test_a_killed_training_ends_with_the_weights_of_one_that_was_not(deaths, tmp_path):
    """Weights, state, seeds and optimizer, bit for bit."""
    whole = tmp_path / "whole.npz"
    assert train(tmp_path / "never", whole) == 0
    for death in deaths:
        resumed = tmp_path / f"{death}.npz"
        assert train(tmp_path / death, resumed, death) == -signal.SIGKILL
        assert not resumed.exists()
        assert train(tmp_path / death, resumed) == 0
        with np.load(whole) as expected, np.load(resumed) as received:
            assert expected["epochs"] == 5
            assert received["epochs"] == 3  # it did not start again
            names = set(expected.files) - {"epochs"}
            assert names == set(received.files) - {"epochs"}
            assert any("seed_generator" in name for name in names)
            assert any("calls" in name and expected[name] == 20 for name in names)
            for name in names:
                np.testing.assert_array_equal(received[name], expected[name], err_msg=name)
