"""More than one device, in processes of their own: `helpers/on_devices.py` has what is checked."""

import os
import pathlib
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.only("jax"), pytest.mark.trains]

HELPERS = pathlib.Path(__file__).parent / "helpers"
EIGHT = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}


def on_eight_devices(name):
    command = [sys.executable, str(HELPERS / "on_devices.py"), name]
    subprocess.run(command, env={**os.environ, **EIGHT}, check=True)


@pytest.mark.parametrize("name", ["optimizer_state", "optimizer_values", "optimizer_again"])
def test_the_state_of_an_optimizer_lies_as_its_variables(name):
    on_eight_devices(name)
