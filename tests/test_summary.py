"""The modules inside a layer, in Keras's summary, and what must not take them for layers."""

import flax.linen as nn
import keras
import models
import numpy as np
import pytest
from backends import to_numpy
from models import x

from jaxwrap import FlaxLayer, JaxLayer, Rule

pytestmark = pytest.mark.quick


class Block(nn.Module):
    @nn.compact
    def __call__(self, inputs):
        return nn.Dense(5)(nn.Dense(3, name="inner")(inputs))


class Net(nn.Module):
    @nn.compact
    def __call__(self, inputs):
        hidden = Block(name="block")(inputs)
        hidden = nn.BatchNorm(use_running_average=True, name="norm")(hidden)
        return hidden * self.param("scale", nn.initializers.ones, (5,))


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")


def model_of(layer, *shape):
    return keras.Sequential([keras.Input(shape), layer])


def rows(model, **kwargs):
    printed = []
    model.summary(print_fn=printed.append, line_length=120, **kwargs)
    lines = [line.strip("│ ") for line in "\n".join(printed).splitlines() if "(" in line]
    return [[cell.strip() for cell in line.split("│")] for line in lines]


@pytest.mark.once
def test_expanded_summary_shows_the_tree():
    layer = FlaxLayer(Net(), name="net", rules={"params/norm/.*": Rule(trainable=False)})
    model = model_of(layer, 4)
    table = rows(model, expand_nested=True, show_trainable=True)
    found = {row[0]: row[1:] for row in table if len(row) == 4}
    block, norm = 4 * 3 + 3 + 3 * 5 + 5, 4 * 5
    assert found["net (FlaxLayer)"][1] == str(block + norm + 5)
    assert found["└ block (Module)"] == ["?", str(block), "Y"]
    assert found["└ Dense_0 (Module)"][1] == str(3 * 5 + 5)
    assert found["└ inner (Module)"][1] == str(4 * 3 + 3)
    # The parameters and the statistics of a module stand together.
    assert found["└ norm (Module)"] == ["?", str(norm), "N"]
    names = [row[0] for row in table]
    assert names.index("└ block (Module)") < names.index("└ inner (Module)")
    assert len([name for name in names if "(Module)" in name]) == 4


@pytest.mark.once
def test_other_summaries_are_as_before():
    layer = FlaxLayer(Net(), name="net")
    assert not any("(Module)" in row[0] for row in rows(model_of(layer, 4)))
    plain = JaxLayer(lambda params, inputs: inputs * params, params=2.0, name="plain")
    inputs = keras.Input((4,))
    model = keras.Model(inputs, plain(layer(inputs) + 0))
    names = [row[0] for row in rows(model, expand_nested=True)]
    assert len([name for name in names if "(Module)" in name]) == 4
    assert FlaxLayer(Net()).layers == ()  # not built


@pytest.mark.once
def test_modules_are_no_layers(tmp_path):
    layer = FlaxLayer(models.Cnn(), name="cnn")
    model = model_of(layer, 6, 6, 2)
    assert {one.name for one in model._flatten_layers(include_self=False)} >= {"cnn"}
    assert not any(one.name == "Conv_0" for one in model._flatten_layers())
    with pytest.raises(ValueError, match="No such layer: Conv_0"):
        model.get_layer("Conv_0")
    again = keras.models.clone_model(model)
    again.set_weights(model.get_weights())
    model.save_weights(tmp_path / "model.weights.h5")
    again.load_weights(tmp_path / "model.weights.h5")
    inputs = x(3, 6, 6, 2)
    np.testing.assert_allclose(to_numpy(again(inputs)), to_numpy(model(inputs)), 1e-6, 1e-6)
    layer.freeze("params/Conv_0/.*")
    layer.trainable = False
    assert not layer.layers[0].trainable
    with pytest.raises(AttributeError):
        layer.layers[0].trainable = True


@pytest.mark.once
def test_a_class_keeps_its_own_layers():
    class Own(FlaxLayer):
        def __init__(self, **kwargs):
            super().__init__(Net(), **kwargs)
            self.layers = [keras.layers.Dense(2)]

    layer = Own(name="own")
    layer(x(2, 4))
    assert [type(one).__name__ for one in layer.layers] == ["Dense"]
