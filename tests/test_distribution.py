"""More than one device, in processes of their own: `helpers/on_devices.py` has what is checked."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import flax.linen as nn
import keras
import numpy as np
import pytest

import jaxwrap

pytestmark = [pytest.mark.only("jax"), pytest.mark.trains]

HELPERS = pathlib.Path(__file__).parent / "helpers"
COUNT = "--xla_force_host_platform_device_count"
EIGHT = {"XLA_FLAGS": f"{COUNT}=8", "JAX_PLATFORMS": "cpu"}
TWO = {"XLA_FLAGS": f"{COUNT}=2", "JAX_PLATFORMS": "cpu"}


def on_eight_devices(*arguments):
    command = [sys.executable, str(HELPERS / "on_devices.py"), *map(str, arguments)]
    subprocess.run(command, env={**os.environ, **EIGHT}, check=True)


def in_two_processes(folder, *arguments):
    """Runs both, and returns their exit statuses. When one fails, the other may wait for it for ever."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(HELPERS / "two_processes.py")]
    env = {**os.environ, **TWO}
    running = [
        subprocess.Popen([*command, rank, str(port), str(folder), *arguments], env=env)
        for rank in "01"
    ]
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and all(one.poll() is None for one in running):
        time.sleep(0.1)
    well = all(one.returncode in (0, None) for one in running)
    for one in running:
        try:
            one.wait(20 if well else 2)
        except subprocess.TimeoutExpired:
            one.kill()
    return [one.wait() for one in running]


def test_the_state_of_an_optimizer_lies_as_its_variables():
    on_eight_devices("optimizer_state", "optimizer_values", "optimizer_again")


@pytest.mark.each_jax
def test_a_model_sees_the_mesh():
    on_eight_devices("constraints_inside", "functions_of_shards")


@pytest.mark.parametrize("rules", ["batch", [("batch",)], [(1, "model")], {"mlp": "model"}])
def test_axis_rules_that_flax_does_not_take_are_errors(rules):
    with pytest.raises(TypeError, match="`axis_rules` must be pairs"):
        jaxwrap.FlaxLayer(nn.Dense(2), axis_rules=rules)


def test_two_processes_train_and_write_together(tmp_path):
    """What they write loads in one process, onto one device and onto another mesh."""
    assert in_two_processes(tmp_path, "replicated,save") == [0, 0]
    on_eight_devices(f"loaded_elsewhere={tmp_path}")


def test_two_processes_that_were_killed_go_on(tmp_path):
    assert -signal.SIGKILL in in_two_processes(tmp_path, "train", "11")
    assert in_two_processes(tmp_path, "train") == [0, 0]


def test_save_model_in_one_process(tmp_path):
    model = keras.Sequential([keras.Input((3,)), jaxwrap.FlaxLayer(nn.Dense(2))])
    with pytest.raises(ValueError, match="save_model: expected a path that ends in"):
        jaxwrap.checkpoints.save_model(model, tmp_path / "model.msgpack")
    with pytest.raises(FileNotFoundError):
        jaxwrap.checkpoints.save_model(model, tmp_path / "nowhere/model.weights.h5")
    path = tmp_path / "model.weights.h5"
    jaxwrap.checkpoints.save_model(model, path)
    saved = model.get_weights()
    model.set_weights([0 * weight for weight in saved])
    model.load_weights(path)
    np.testing.assert_array_equal(model.get_weights()[1], saved[1])
    assert list(tmp_path.iterdir()) == [path]
