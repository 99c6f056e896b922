"""Checks of layers on eight virtual devices of JAX. Prints what each gives: None, or the error."""

import json
import os
import sys
import traceback

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["KERAS_BACKEND"] = "jax"

import flax.linen as nn
import jax
import keras
import numpy as np
import pytest
from jax.sharding import NamedSharding
from keras.distribution import DataParallel, DeviceMesh, LayoutMap, ModelParallel

from jaxwrap import FlaxLayer, Rule, reparametrizations

MESH = DeviceMesh((2, 4), ("batch", "model"))
CHECKS = {}


def check(function):
    """Add a check under its name, in words."""
    CHECKS[function.__name__.replace("_", " ")] = function
    return function


def x(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def spec(variable):
    """Return how the value of a variable is divided."""
    sharding = variable.value.sharding
    return tuple(sharding.spec) if isinstance(sharding, NamedSharding) else ()


class MLP(nn.Module):
    """Names on one kernel, so that rules are for the other one."""

    @nn.compact
    def __call__(self, inputs, training=False):
        init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
        hidden = nn.relu(nn.Dense(16, kernel_init=init, name="up")(inputs))
        hidden = nn.Dropout(0.3, deterministic=not training)(hidden)
        return nn.Dense(3, name="down")(hidden)


def mlp():
    rules = {"params/down/kernel": Rule(layout=(("batch", "model"), None))}
    return FlaxLayer(MLP(), rules=rules, name="mlp", seed=1)


@check
def data_and_model_parallel_fit_is_equal_to_one_device():
    def trained():
        model = keras.Sequential([keras.Input((6,)), mlp()])
        model.compile(keras.optimizers.SGD(0.1), "mse")
        model.fit(x(16, 6), x(16, 3, seed=1), batch_size=8, epochs=2, shuffle=False, verbose=0)
        return model

    expected = trained().get_weights()
    layouts = mlp().layout_map(MESH, (None, 6), axes={"embed": None, "mlp": "model"})
    with ModelParallel(layout_map=layouts, batch_dim_name="batch").scope():
        model = trained()
        specs = {v.path.partition("mlp/")[2]: spec(v) for v in model.layers[-1].weights}
        assert specs["params/up/kernel"] == (None, "model"), specs
        assert specs["params/down/kernel"][:1] == (("batch", "model"),), specs
        for one, two in zip(expected, model.get_weights(), strict=True):
            np.testing.assert_allclose(two, one, 1e-5, 1e-6)


@check
def a_rule_counts_more_than_a_layout_map():
    layouts = LayoutMap(MESH)
    layouts["d/params/kernel"] = ("model", None)
    layouts["d/params/bias"] = ("model",)
    layer = FlaxLayer(nn.Dense(8), rules={".*/kernel": Rule(layout=(None, "batch"))}, name="d")
    with ModelParallel(layout_map=layouts).scope():
        layer.build((None, 4))
    assert spec(layer.params["params"]["kernel"]) == (None, "batch")
    assert spec(layer.params["params"]["bias"]) == ("model",)
    assert [row.layout for row in layer.weight_table()] == [("model",), (None, "batch")]
    layer.set_variables(jax.tree.map(np.ones_like, layer.get_variables()))
    assert spec(layer.params["params"]["kernel"]) == (None, "batch")


@check
def a_map_of_the_layer_holds_where_a_model_builds_it():
    layer = FlaxLayer(nn.Dense(8), rules={".*/kernel": Rule(layout=(None, "model"))}, name="d")
    layouts = layer.layout_map(MESH, (None, 4))
    plain = FlaxLayer(nn.Dense(8), name="d")
    with ModelParallel(layout_map=layouts).scope():
        model = keras.Sequential([plain], name="outer")
        model(x(2, 4))
    assert spec(plain.params["params"]["kernel"]) == (None, "model")


@check
def a_rule_for_an_axis_that_the_mesh_lacks_raises():
    layer = FlaxLayer(nn.Dense(8), rules={".*/kernel": Rule(layout=(None, "model"))}, name="d")
    with (
        DataParallel().scope(),
        pytest.raises(ValueError, match=r"d/params/kernel, of shape \(4, 8\)") as error,
    ):
        layer.build((None, 4))
    assert "batch=8: the mesh has no axis 'model'" in str(error.value), error
    assert not layer.weights


@check
def parts_are_divided_as_their_leaf():
    form = reparametrizations.LoRA(2, base=reparametrizations.Int8())
    rules = {".*/kernel": Rule(layout=("batch", "model"), reparametrize=form)}
    layer = FlaxLayer(nn.Dense(8), rules=rules, name="d")
    with ModelParallel(layout_map=LayoutMap(MESH)).scope():
        layer.build((None, 4))
    found = {v.path.removeprefix("d/params/kernel/"): spec(v) for v in layer.weights}
    assert found["base/values"] == ("batch", "model"), found
    assert found["base/scale"] == (None, "model"), found
    assert found["a"][:1] == ("batch",), found
    assert found["b"] == (None, "model"), found


def run(function):
    """Return None, or what went wrong."""
    try:
        function()
    except Exception:
        return traceback.format_exc()
    return None


if __name__ == "__main__":
    sys.stdout.write(json.dumps({name: run(function) for name, function in CHECKS.items()}))
