"""Activations inside a module as outputs of its layer."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from backends import to_numpy
from flax import nnx
from models import x

import jaxwrap
from jaxwrap import FlaxLayer, NNXLayer

pytestmark = [pytest.mark.quick, pytest.mark.each_jax]


class Block(nn.Module):
    @nn.compact
    def __call__(self, inputs):
        return nn.relu(nn.Dense(3)(inputs))


@jaxwrap.register_serializable("tests_capture")
class Tower(nn.Module):
    """Has blocks in blocks, calls one twice, sows, and draws."""

    @nn.compact
    def __call__(self, inputs, training=False):
        block = Block(name="block")
        hidden = block(block(nn.Dense(3)(inputs)))
        self.sow("intermediates", "hidden", hidden)
        hidden = nn.BatchNorm(use_running_average=not training)(hidden)
        return nn.Dense(2)(hidden)


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, inputs):
        return nnx.relu(self.linear(inputs))


class NnxTower(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Linear(4, 3, rngs=rngs)
        self.blocks = nnx.List([NnxBlock(rngs), NnxBlock(rngs)])
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.unused = nnx.Linear(3, 3, rngs=rngs)
        self.head = nnx.Linear(3, 2, rngs=rngs)

    def hidden(self, inputs):
        first, second = self.blocks
        return first(nnx.jit(lambda block, h: block(h))(second, first(self.stem(inputs))))

    def __call__(self, inputs):
        return self.head(self.norm(self.hidden(inputs)))


@jaxwrap.register_serializable("tests_capture")
def make_tower(rngs):
    return NnxTower(rngs)


def test_linen_captures_by_path():
    layer = FlaxLayer(Tower(), capture=("Dense_.*", "block", "block/Dense_0"), name="tower")
    outputs, captured = to_numpy(layer(x(5, 4)))
    expected, sown = Tower().apply(
        layer.get_variables(), x(5, 4), capture_intermediates=True, mutable=["intermediates"]
    )
    native = sown["intermediates"]
    np.testing.assert_allclose(outputs, expected, 1e-5, 1e-5)
    assert set(captured) == {"Dense_0", "Dense_1", "block", "block/Dense_0"}
    np.testing.assert_allclose(captured["Dense_0"], native["Dense_0"]["__call__"][0], 1e-5, 1e-5)
    assert len(captured["block"]) == len(captured["block/Dense_0"]) == 2
    for ours, one in zip(captured["block"], native["block"]["__call__"], strict=True):
        np.testing.assert_allclose(ours, one, 1e-5, 1e-5)


def test_nnx_captures_by_path():
    module = NnxTower(nnx.Rngs(0))
    layer = NNXLayer(module, capture=("stem", "blocks/.*", "blocks/0/linear"), name="tower")
    outputs, captured = to_numpy(layer(x(5, 4)))
    module.eval()
    np.testing.assert_allclose(outputs, module(x(5, 4)), 1e-5, 1e-5)
    first, second = module.blocks
    steps = [module.stem(x(5, 4))]
    steps += [first(steps[0])]
    steps += [second(steps[1])]
    steps += [first(steps[2])]
    assert set(captured) == {"stem", "blocks/0", "blocks/0/linear", "blocks/1", "blocks/1/linear"}
    np.testing.assert_allclose(captured["stem"], steps[0], 1e-5, 1e-5)
    np.testing.assert_allclose(captured["blocks/0"][0], steps[1], 1e-5, 1e-5)
    np.testing.assert_allclose(captured["blocks/1"], steps[2], 1e-5, 1e-5)
    np.testing.assert_allclose(captured["blocks/0"][1], steps[3], 1e-5, 1e-5)
    # The module of the user, and its class, are as they were.
    assert type(module.stem) is nnx.Linear
    assert not hasattr(module.stem, "captured_outputs")


@pytest.mark.trains
@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_gradients_go_through_what_is_captured(backend, library):
    if library == "linen":
        layer = FlaxLayer(Tower(), capture=("Dense_0",))
        layer(x(5, 4))
        variables, name = layer.get_variables(), "Dense_0"

        def native(params):
            return nn.Dense(3).apply({"params": params}, x(5, 4))

        params = variables["params"]["Dense_0"]
    else:
        layer = NNXLayer(NnxTower(nnx.Rngs(0)), capture=("stem",))
        layer(x(5, 4))
        params, name = layer.get_variables()["params"]["stem"], "stem"

        def native(params):
            return x(5, 4) @ params["kernel"] + params["bias"]

    cotangent = x(5, 3, seed=1)
    _, (gradients, _) = backend.layer_vjp(
        layer, x(5, 4), False, [np.zeros((5, 2), "float32"), cotangent]
    )
    (expected,) = jax.vjp(native, jax.tree.map(jnp.asarray, params))[1](cotangent)
    found = {
        v.path.split("/")[-1]: to_numpy(gradient)
        for v, gradient in zip(layer.trainable_variables, gradients, strict=True)
        if v.path.split("/")[-3:-1] == ["params", name]
    }
    for leaf in ("kernel", "bias"):
        np.testing.assert_allclose(found[leaf], expected[leaf], 1e-5, 1e-5)


LAYERS = {
    "linen": lambda capture: FlaxLayer(Tower(), capture=capture, name="tower", seed=0),
    "nnx": lambda capture: NNXLayer.from_factory(make_tower, capture=capture, name="tower", seed=0),
}


@pytest.mark.trains
@pytest.mark.parametrize("library", LAYERS)
def test_a_functional_model_trains_on_an_activation_and_is_saved(library, tmp_path):
    layer = LAYERS[library]([".*_0|stem"])
    inputs = keras.Input((4,))
    outputs, captured = layer(inputs)
    assert outputs.shape == (None, 2)
    name = "Dense_0" if library == "linen" else "stem"
    assert captured[name].shape == (None, 3)
    model = keras.Model(inputs, [outputs, captured[name]])
    model.compile("sgd", ["mse", "mse"])
    history = model.fit(x(8, 4), [x(8, 2), x(8, 3, seed=1)], epochs=3, verbose=0).history["loss"]
    assert history[-1] < history[0]
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert again.get_layer("tower").adapter.capture == [".*_0|stem"]
    for ours, loaded in zip(
        model.predict(x(8, 4), verbose=0), again.predict(x(8, 4), verbose=0), strict=True
    ):
        np.testing.assert_allclose(ours, loaded, 1e-6, 1e-6)
    whole = keras.Model(inputs, layer.output).predict(x(8, 4), verbose=0)
    assert len(whole) == 1 + len(jax.tree.leaves(captured))


def test_captured_beside_sown():
    layer = FlaxLayer(Tower(), capture=("block",), collections={"intermediates": "output"})
    (_, sown), captured = to_numpy(layer(x(5, 4)))
    assert set(sown["intermediates"]) == {"hidden"}
    np.testing.assert_array_equal(sown["intermediates"]["hidden"][0], captured["block"][1])


def test_a_name_that_matches_nothing():
    with pytest.raises(ValueError, match=r"FlaxLayer 'tower': .*'Dense_7'.*Near it: Dense_"):
        FlaxLayer(Tower(), capture=("Dense_7",), name="tower")(x(5, 4))
    with pytest.raises(ValueError, match=r"NNXLayer 'tower': .*'stam'.*Near it: stem"):
        NNXLayer(NnxTower(nnx.Rngs(0)), capture=("stam",), name="tower")
    unused = NNXLayer(NnxTower(nnx.Rngs(0)), capture=("stem", "unused"), name="tower")
    with pytest.raises(ValueError, match=r"names modules that the call runs, but .*'unused'"):
        unused(x(5, 4))
    for given in ("Dense_0", [1]):
        with pytest.raises(ValueError, match="`capture` must be a tuple of names; received"):
            FlaxLayer(Tower(), capture=given)
    with pytest.raises(ValueError, match="is not a regular expression"):
        FlaxLayer(Tower(), capture=("(",))


def scanned(**axes):
    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, inputs):
            scan = nn.scan(
                Step, variable_axes={"params": 0, **axes}, split_rngs={"params": True}, length=3
            )
            return scan(name="steps")(inputs, None)[0]

    class Step(nn.Module):
        @nn.compact
        def __call__(self, carry, _):
            return nn.Dense(4)(carry), None

    return Scanned()


def test_modules_in_a_scan():
    layer = FlaxLayer(scanned(intermediates=0), capture=("steps/Dense_0",))
    outputs, captured = to_numpy(layer(x(5, 4)))
    assert captured["steps/Dense_0"].shape == (3, 5, 4)
    np.testing.assert_allclose(captured["steps/Dense_0"][-1], outputs, 1e-6)
    with pytest.raises(
        ValueError, match=r"does not pass on the collection 'intermediates'.*nn.scan"
    ):
        FlaxLayer(scanned(), capture=("steps/Dense_0",))(x(5, 4))
