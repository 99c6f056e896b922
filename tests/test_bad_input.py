"""Bad input: a clear error, early, and nothing has changed."""

import subprocess
import sys

import flax.linen as nn
import jax.numpy as jnp
import keras
import models
import numpy as np
import pytest
from backends import to_numpy

import jaxwrap
from jaxwrap import FlaxLayer, JaxLayer, _bridge

pytestmark = pytest.mark.quick


def snapshot(layer):
    return [to_numpy(v.value).tobytes() for v in layer.variables]


def pair_layer():
    return JaxLayer(
        lambda params, rng, inputs: inputs["a"] * params + inputs["b"], params=jnp.ones(2), seed=0
    )


@pytest.mark.parametrize(
    "inputs",
    [
        np.ones((3, 2), "float32"),
        (np.ones((3, 2), "float32"),) * 2,
        {"a": np.ones((3, 2), "float32")},
    ],
    ids=["array", "tuple", "missing key"],
)
def test_wrong_nest(inputs):
    layer = pair_layer()
    good = {"a": np.ones((3, 2), "float32"), "b": np.ones((3, 2), "float32")}
    layer(good)
    before = snapshot(layer)
    with pytest.raises(ValueError, match=r"JaxLayer '.*': .*structure.*\n  (missing|unexpected): "):
        layer(inputs, training=True)
    assert snapshot(layer) == before
    layer(good)


def test_wrong_structure_of_params():
    layer = JaxLayer(models.mlp_call, params={"not": np.ones(2)}, name="wrong")
    before = snapshot(layer)
    with pytest.raises((ValueError, TypeError)):
        layer(np.ones((2, 2), "float32"))
    assert snapshot(layer) == before


def test_wrong_structure_of_linen_variables():
    with pytest.raises((ValueError, TypeError), match="variables"):
        FlaxLayer(models.Sowing(), variables=[np.ones(3)])


def test_strings(backend):
    layer = JaxLayer(lambda inputs: inputs, name="text")
    strings = np.array(["a", "b"])
    values = [strings]
    if backend.name == "tensorflow":
        values.append(keras.ops.convert_to_tensor(strings))
    for value in values:
        with pytest.raises(TypeError, match="JaxLayer 'text': input <root>: JAX has no dtype"):
            layer(value)
        with pytest.raises(TypeError, match="JAX has no dtype"):
            jaxwrap.wrap_function(lambda x: x)(value)


def test_what_is_no_tensor():
    with pytest.raises(
        TypeError, match=r"JaxLayer 'a': input 1 is 'text', a str; expected a tensor"
    ):
        JaxLayer(lambda inputs: inputs, name="a")((np.ones(2, "float32"), "text"))


@pytest.mark.parametrize("shape", [None, "text", [(None, 3), None]], ids=str)
def test_build_with_an_unknown_rank(shape):
    layer = JaxLayer(models.mlp_call, models.mlp_init)
    with pytest.raises(ValueError, match="how many dimensions"):
        layer.build(shape)
    assert not layer.built
    assert layer.params is None


@pytest.mark.only("tensorflow")
def test_call_with_an_unknown_rank():
    import tensorflow as tf

    layer = JaxLayer(models.mlp_call, models.mlp_init)

    @tf.function(input_signature=[tf.TensorSpec(None)])
    def call(inputs):
        return layer(inputs)

    with pytest.raises(ValueError, match="unknown rank"):
        call(np.ones((2, 2), "float32"))
    assert layer.params is None


@pytest.mark.parametrize("name", ["openvino", "mxnet"])
def test_a_backend_without_a_bridge(name, monkeypatch):
    monkeypatch.setattr(keras.config, "backend", lambda: name)
    with pytest.raises(
        ValueError, match=f"no bridge for the Keras backend '{name}'.*KERAS_BACKEND"
    ):
        JaxLayer(lambda inputs: inputs)


def test_a_backend_that_is_not_installed():
    code = "import sys; sys.modules['torch'] = None; import jaxwrap"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**__import__("os").environ, "KERAS_BACKEND": "torch"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "pip install jaxwrap[torch]" in result.stderr, result.stderr


def test_bridge_of_a_backend_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    monkeypatch.delitem(sys.modules, "jaxwrap._bridge._tensorflow", raising=False)
    _bridge._load.cache_clear()
    try:
        with pytest.raises(
            ImportError, match=r"needs 'tensorflow', which is not installed.*jaxwrap\[tensorflow\]"
        ):
            _bridge._load("tensorflow")
    finally:
        _bridge._load.cache_clear()


def test_nan_passes_unharmed():
    layer = JaxLayer(lambda state, inputs: (inputs * 2, state + inputs.sum()), state=0.0)
    outputs = to_numpy(layer(np.array([1, np.nan], "float32")))
    np.testing.assert_array_equal(outputs, [2, np.nan])
    assert np.isnan(to_numpy(layer.state.value))


@pytest.mark.only("torch")
def test_torch_notices_a_parameter_that_was_changed_in_place():
    import torch

    layer = JaxLayer(models.mlp_call, models.mlp_init)
    loss = layer(np.ones((2, 3), "float32")).sum()
    with torch.no_grad():
        layer.trainable_variables[0].value.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("built", [False, True])
def test_a_misspelled_argument_is_answered_with_the_near_name(built):
    class Scaled(nn.Module):
        @nn.compact
        def __call__(self, image, *, temperature=1.0):
            return nn.Dense(2)(image) * temperature

    layer = FlaxLayer(Scaled(), name="scaled")
    x = np.ones((1, 3), "float32")
    if built:
        layer(x)
    takes = r"the layer of `\S*Scaled` takes \(image, \*, temperature=1.0, training=None\)"
    for args, kwargs, problem in (
        ((x,), {"temprature": 2.0}, r"'temprature' \(did you mean 'temperature'\?\)"),
        ((), {"temperature": 2.0}, "missing a required argument: 'image'"),
        ((x, x, x), {}, "too many positional arguments"),
    ):
        with pytest.raises(TypeError, match=f"FlaxLayer 'scaled': .*{problem}; {takes}"):
            layer(*args, **kwargs)
