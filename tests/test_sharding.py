"""Layouts on several devices: names of axes in models, rules, layout maps, reports."""

import flax.linen as nn
import flax.serialization
import jax
import keras
import numpy as np
import pytest
from backends import to_numpy
from flax import nnx
from flax.core import meta
from models import x

import jaxwrap
from jaxwrap import FlaxLayer, NNXLayer


@jaxwrap.register_serializable("sharding")
class Block(nn.Module):
    @nn.compact
    def __call__(self, carry, _):
        init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
        return nn.Dense(8, kernel_init=init, use_bias=False, name="one")(carry), None


@jaxwrap.register_serializable("sharding")
class Boxed(nn.Module):
    """Names of the axes of a kernel, of a running mean, and of the layers of a scan."""

    @nn.compact
    def __call__(self, inputs, training=False):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
        hidden = nn.Dense(8, kernel_init=init, name="up")(inputs)

        def make_mean(shape):
            return nn.LogicallyPartitioned(jax.numpy.zeros(shape), ("mlp",))

        mean = self.variable("stats", "mean", make_mean, (8,))
        if training:
            mean.value = 0.9 * mean.value + 0.1 * hidden.mean(0)
        stack = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
            metadata_params={meta.PARTITION_NAME: "layers"},
        )
        return stack(name="blocks")(hidden - mean.value, None)[0]


def boxed(**kwargs):
    return FlaxLayer(Boxed(), name="boxed", seed=0, **kwargs)


def native():
    return Boxed().init(jax.random.key(1), x(4, 3))


@pytest.mark.quick
def test_boxes_of_flax_are_no_part_of_paths():
    layer = boxed()
    layer(x(4, 3))
    paths = {v.path for v in layer.variables if "seed" not in v.path}
    below = ["params/blocks/one/kernel", "params/up/bias", "params/up/kernel", "stats/mean"]
    assert paths == {f"boxed/{path}" for path in below}
    values = layer.get_variables()
    assert not any(
        meta.is_axis_metadata(leaf)
        for leaf in jax.tree.leaves(values, is_leaf=meta.is_axis_metadata)
    )
    outputs, changed = Boxed().apply(values, x(4, 3), training=True, mutable="stats")
    np.testing.assert_allclose(to_numpy(layer(x(4, 3), training=True)), outputs, 1e-5, 1e-6)
    np.testing.assert_allclose(
        layer.get_variables()["stats"]["mean"], changed["stats"]["mean"], 1e-5, 1e-6
    )


@pytest.mark.parametrize("form", ["boxed", "plain"])
def test_values_load_with_boxes_and_without(form, tmp_path):
    variables = native() if form == "boxed" else meta.unbox(native())
    expected = Boxed().apply(variables, x(4, 3))
    file = tmp_path / "variables.msgpack"
    file.write_bytes(flax.serialization.to_bytes(variables))
    layers = [boxed(variables=variables), boxed(), boxed()]
    for layer in layers[1:]:
        layer(x(4, 3))
    layers[1].set_variables(variables)
    jaxwrap.checkpoints.load(layers[2], file)
    for layer in layers:
        np.testing.assert_allclose(to_numpy(layer(x(4, 3))), expected, 1e-5, 1e-6)


@pytest.mark.trains
def test_a_module_with_boxes_trains_and_is_saved(tmp_path):
    model = keras.Sequential([keras.Input((3,)), boxed()])
    model.compile("sgd", "mse")
    model.fit(x(8, 3), x(8, 8), verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    expected = model.predict(x(4, 3), verbose=0)
    np.testing.assert_allclose(again.predict(x(4, 3), verbose=0), expected, 1e-5, 1e-6)


class Annotated(nnx.Module):
    def __init__(self, rngs):
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"))
        self.up = nnx.Linear(3, 8, kernel_init=init, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, inputs):
        return self.drop(self.up(inputs))


@pytest.mark.parametrize("made", ["instance", "factory"])
def test_nnx_metadata_needs_no_mesh_and_comes_back(made):
    if made == "factory":
        layer = NNXLayer.from_factory(Annotated, name="annotated")
    else:
        with nnx.use_eager_sharding(False):
            layer = NNXLayer(Annotated(nnx.Rngs(0)), name="annotated")
    layer(x(4, 3), training=True)
    with nnx.use_eager_sharding(True):
        module = layer.module_with_weights()
    assert module.up.kernel.get_metadata("out_sharding") == (None, "model")
    module.eval()
    np.testing.assert_allclose(module(x(4, 3)), to_numpy(layer(x(4, 3))), 1e-5, 1e-6)
