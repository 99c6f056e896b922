"""More than one device, in processes of their own: `helpers/on_devices.py` has what is checked."""

import os
import pathlib
import subprocess
import sys

import flax.linen as nn
import pytest

import jaxwrap

pytestmark = [pytest.mark.only("jax"), pytest.mark.trains]

HELPERS = pathlib.Path(__file__).parent / "helpers"
EIGHT = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}


def on_eight_devices(name):
    command = [sys.executable, str(HELPERS / "on_devices.py"), name]
    subprocess.run(command, env={**os.environ, **EIGHT}, check=True)


@pytest.mark.parametrize("name", ["optimizer_state", "optimizer_values", "optimizer_again"])
def test_the_state_of_an_optimizer_lies_as_its_variables(name):
    on_eight_devices(name)


@pytest.mark.parametrize("name", ["constraints_inside", "functions_of_shards"])
def test_a_model_sees_the_mesh(name):
    on_eight_devices(name)


@pytest.mark.parametrize("rules", ["batch", [("batch",)], [(1, "model")], {"mlp": "model"}])
def test_axis_rules_that_flax_does_not_take_are_errors(rules):
    with pytest.raises(TypeError, match="`axis_rules` must be pairs"):
        jaxwrap.FlaxLayer(nn.Dense(2), axis_rules=rules)
