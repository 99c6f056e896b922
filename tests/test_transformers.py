"""Flax models of Hugging Face's transformers as layers. The oracle is the model itself."""

import functools
import os
import subprocess
import sys

import jax
import keras
import numpy as np
import pytest
from backends import to_numpy
from models import once_except
from transformers import (
    BertConfig,
    FlaxBertForSequenceClassification,
    FlaxBertModel,
    FlaxResNetForImageClassification,
    FlaxViTForImageClassification,
    ResNetConfig,
    ViTConfig,
)

import jaxwrap
from jaxwrap import from_transformers

pytestmark = pytest.mark.each_jax

SMALL = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_labels": 3,
    "hidden_dropout_prob": 0.2,
}


# Models take seconds to make, and no layer changes them.
@functools.cache
def bert(cls=FlaxBertForSequenceClassification, seed=1, **kwargs):
    config = BertConfig(vocab_size=20, max_position_embeddings=9, type_vocab_size=3, **SMALL)
    return cls(config, seed=seed, **kwargs)


@functools.cache
def vit():
    config = ViTConfig(image_size=6, patch_size=3, num_channels=2, **SMALL)
    return FlaxViTForImageClassification(config)


def native(model, *args, **kwargs):
    """The model itself, compiled, since it takes seconds without."""
    params = kwargs.pop("params", model.params if model._is_initialized else None)
    return jax.jit(lambda params: model(*args, params=params, **kwargs))(params)


def tokens():
    return np.random.default_rng(0).integers(0, 20, (4, 7)).astype("int32")


def images():
    return np.random.default_rng(0).standard_normal((4, 2, 6, 6)).astype("float32")


MODELS = {"bert": (bert, tokens), "vit": (vit, images)}


@pytest.fixture(scope="module", params=once_except(MODELS, ["vit"]))
def case(request):
    make, inputs = MODELS[request.param]
    return make(), inputs()


def test_values_are_those_of_the_model(case):
    model, inputs = case
    layer = from_transformers(model, output="logits", name="hf")
    np.testing.assert_allclose(to_numpy(layer(inputs)), native(model, inputs).logits, 1e-5, 1e-6)
    assert all(v.path.startswith(("hf/bert/", "hf/vit/", "hf/classifier/")) for v in layer.weights)
    given = layer.get_variables()
    jax.tree.map(np.testing.assert_array_equal, given, model.params)
    # Dropout draws in training alone, by the keys of the layer.
    first, second = (to_numpy(layer(inputs, training=True)) for _ in range(2))
    assert np.abs(first - second).max() > 1e-4


@pytest.mark.trains
def test_gradients_are_those_of_the_model(case, backend):
    model, inputs = case
    layer = from_transformers(model, output="logits")
    outputs = layer(inputs)
    cotangent = np.random.default_rng(1).standard_normal(tuple(outputs.shape)).astype("float32")
    _, (gradients, _) = backend.layer_vjp(layer, inputs, False, [cotangent])
    expected = jax.jit(
        jax.grad(lambda params: (model(inputs, params=params).logits * cotangent).sum())
    )(model.params)
    found = {
        v.path.partition("/")[2]: to_numpy(gradient)
        for v, gradient in zip(layer.trainable_variables, gradients, strict=True)
    }
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected):
        name = "/".join(key.key for key in path)
        np.testing.assert_allclose(found[name], leaf, 1e-4, 1e-5, err_msg=name)


@pytest.mark.trains
def test_fit_save_load_and_the_way_back(case, tmp_path):
    model, inputs = case
    spec = keras.Input(inputs.shape[1:], dtype=inputs.dtype.name)
    layer = from_transformers(model, output="logits", name="hf", seed=0)
    keras_model = keras.Model(spec, layer(spec))
    before = jax.tree.map(np.array, model.params)
    keras_model.compile(
        keras.optimizers.Adam(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    losses = keras_model.fit(inputs, np.arange(4) % 3, epochs=8, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    jax.tree.map(np.testing.assert_array_equal, model.params, before)
    outputs = keras_model.predict(inputs, verbose=0)
    keras_model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(again.predict(inputs, verbose=0), outputs, 1e-5, 1e-6)
    # The way back: by transformers' own files.
    model.save_pretrained(tmp_path / "hf", params=layer.get_variables())
    again = type(model).from_pretrained(tmp_path / "hf", _do_init=False)[1]
    np.testing.assert_allclose(native(model, inputs, params=again).logits, outputs, 1e-4, 1e-5)


READ = """
import keras, numpy as np, sys, jaxwrap
model = keras.saving.load_model(sys.argv[1])
np.save(sys.argv[2], model.predict(np.load(sys.argv[3]), verbose=0))
"""


def test_another_backend_reads_the_file(tmp_path, backend):
    model = bert()
    spec = keras.Input((7,), dtype="int32")
    keras_model = keras.Model(spec, from_transformers(model, output="logits", name="hf")(spec))
    keras_model.save(tmp_path / "model.keras")
    np.save(tmp_path / "in.npy", tokens())
    files = [str(tmp_path / name) for name in ("model.keras", "out.npy", "in.npy")]
    env = {**os.environ, "KERAS_BACKEND": "jax" if backend.name == "numpy" else "numpy"}
    subprocess.run([sys.executable, "-c", READ, *files], env=env, check=True)
    np.testing.assert_allclose(np.load(files[1]), native(model, tokens()).logits, 1e-5, 1e-6)


@pytest.mark.once
def test_arguments_are_filled_in_as_the_model_does():
    model = bert()
    mask = np.array([[1] * 7, [1] * 4 + [0] * 3] * 2, "int32")
    kinds = np.ones((4, 7), "int32")
    layer = from_transformers(model, output="logits")
    np.testing.assert_allclose(
        to_numpy(layer(tokens(), attention_mask=mask, token_type_ids=kinds)),
        native(model, tokens(), mask, kinds).logits,
        1e-5,
        1e-6,
    )
    named = from_transformers(model, ("token_type_ids", "input_ids"), "logits")
    np.testing.assert_allclose(
        to_numpy(named(kinds, tokens())),
        native(model, tokens(), token_type_ids=kinds).logits,
        1e-5,
        1e-6,
    )
    with pytest.raises(TypeError, match="input_ids"):
        named(kinds)


@pytest.mark.once
def test_all_outputs_and_attention():
    model = bert(FlaxBertModel, add_pooling_layer=False)
    layer = from_transformers(model, name="hf")
    outputs = layer(tokens(), output_attentions=True)
    expected = native(model, tokens(), output_attentions=True)
    np.testing.assert_allclose(
        to_numpy(outputs.last_hidden_state), expected.last_hidden_state, 1e-5, 1e-5
    )
    assert len(outputs.attentions) == 1
    np.testing.assert_allclose(to_numpy(outputs.attentions[0]), expected.attentions[0], 1e-5, 1e-6)
    with pytest.raises(ValueError, match=r"returns None for `output='attentions'`.*output_attent"):
        from_transformers(model, output="attentions")(tokens())
    # What the configuration does not hold comes along.
    again = jaxwrap.JaxLayer.from_config(layer.get_config()).adapter.model
    assert again.module.add_pooling_layer is False
    assert again.config.to_dict() == model.config.to_dict()
    assert (again.dtype, again.input_shape) == (model.dtype, model.input_shape)


@pytest.mark.once
def test_batch_statistics_are_state():
    config = ResNetConfig(
        num_channels=2, embedding_size=4, hidden_sizes=[4], depths=[1], num_labels=3
    )
    model = FlaxResNetForImageClassification(config, input_shape=(1, 8, 8, 2), seed=1)
    inputs = np.random.default_rng(0).standard_normal((4, 2, 8, 8)).astype("float32")
    layer = from_transformers(model, output="logits")
    np.testing.assert_allclose(to_numpy(layer(inputs)), native(model, inputs).logits, 1e-4, 1e-5)
    outputs, changed = native(model, inputs, train=True)
    np.testing.assert_allclose(to_numpy(layer(inputs, training=True)), outputs.logits, 1e-4, 1e-5)
    variables = layer.get_variables()
    assert set(variables) == {"params", "batch_stats"}
    jax.tree.map(
        lambda ours, native: np.testing.assert_allclose(ours, native, 1e-4, 1e-5),
        variables["batch_stats"],
        changed["batch_stats"],
    )
    layer.set_variables(model.params)
    np.testing.assert_allclose(to_numpy(layer(inputs)), native(model, inputs).logits, 1e-4, 1e-5)


@pytest.mark.once
def test_a_model_without_values():
    full, empty = bert(), bert(_do_init=False)
    layer = from_transformers(empty, output="logits", params=full.params)
    np.testing.assert_allclose(to_numpy(layer(tokens())), native(full, tokens()).logits, 1e-5, 1e-6)
    made = from_transformers(empty, output="logits", seed=0)
    again = from_transformers(empty, output="logits", seed=0)
    np.testing.assert_array_equal(to_numpy(made(tokens())), to_numpy(again(tokens())))


@pytest.mark.once
def test_wrap_knows_the_models():
    layer = jaxwrap.wrap(bert(), output="logits")
    assert layer.adapter.output == "logits"


@pytest.mark.once
def test_what_is_refused():
    with pytest.raises(TypeError, match=r"from_transformers: expected a Flax model .* a Dense\."):
        from_transformers(keras.layers.Dense(2))
    model = bert()
    with pytest.raises(ValueError, match=r"names 'input_id', .*Did you mean 'input_ids'\?"):
        from_transformers(model, inputs=("input_id",))
    config = from_transformers(model, name="hf").get_config()

    def changed(**values):
        adapter = {**config["call_fn"]["config"]}
        adapter["model"] = {**adapter["model"], **values}
        return {**config, "call_fn": {**config["call_fn"], "config": adapter}}

    def configuration(**values):
        before = config["call_fn"]["config"]["model"]["configuration"]
        return changed(configuration={**before, **values})

    for broken, message in (
        (changed(**{"class": "pipeline"}), "'pipeline' is not one of the Flax models"),
        (changed(**{"class": "os.system"}), "'os.system' is not one of the Flax models"),
        (changed(options={"seed": 1}), "FlaxBertForSequenceClassification has no options"),
        (configuration(num_hidden_layers=10**9), "at most 1000 layers"),
    ):
        with pytest.raises(ValueError, match=message):
            jaxwrap.JaxLayer.from_config(broken)


@pytest.mark.once
def test_a_class_of_your_own_needs_a_name(tmp_path):
    class Own(FlaxBertForSequenceClassification):
        pass

    model = keras.Sequential(
        [keras.Input((7,), dtype="int32"), from_transformers(bert(Own), output="logits")]
    )
    with pytest.raises(TypeError, match=r"Own"):
        model.save(tmp_path / "model.keras")
    jaxwrap.register_serializable("tests_transformers")(Own)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(
        again.predict(tokens(), verbose=0), model.predict(tokens(), verbose=0), 1e-5, 1e-6
    )
