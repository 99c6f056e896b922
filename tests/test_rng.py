"""Keys, streams, seeds: what draws, when, and that it is saved."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import keras
import models
import numpy as np
import pytest
from backends import to_numpy

from jaxwrap import FlaxLayer, JaxLayer

pytestmark = pytest.mark.each_jax


def ones(*shape):
    return np.ones(shape, "float32")


def seeds(layer):
    generators = [layer.seed_generator, *layer.stream_generators]
    return [to_numpy(g.state.value).tolist() for g in generators if g is not None]


class Sampler(nn.Module):
    """Samples in inference too, as a variational autoencoder does."""

    stream: str = "sample"

    @nn.compact
    def __call__(self, inputs, training=False):
        mean = nn.Dense(3)(inputs)
        noise = jax.random.normal(self.make_rng(self.stream), mean.shape)
        return nn.Dropout(0.5, deterministic=not training)(mean + noise)


class Optional(nn.Module):
    """Draws if there is something to draw from."""

    @nn.compact
    def __call__(self, inputs):
        if self.has_rng("noise"):
            return inputs + jax.random.normal(self.make_rng("noise"), inputs.shape)
        return inputs


@pytest.mark.parametrize("rngs", [None, ["sample", "dropout"], {"sample": 7, "dropout": None}])
@pytest.mark.parametrize("training", [False, True])
def test_streams_draw_in_training_and_in_inference(rngs, training):
    layer = FlaxLayer(Sampler(), seed=1, rngs=rngs)
    first, second = (to_numpy(layer(ones(4, 5), training=training)) for _ in range(2))
    assert (first != second).any()
    again = FlaxLayer(Sampler(), seed=1, rngs=rngs)
    np.testing.assert_array_equal(to_numpy(again(ones(4, 5), training=training)), first)


def test_an_inference_call_that_draws_nothing_changes_no_seed():
    for layer in (
        FlaxLayer(models.Cnn(), seed=1),
        FlaxLayer(models.Cnn(), seed=1, rngs=["dropout"]),
        FlaxLayer(Sampler(), seed=1, rngs={"sample": 3, "unused": 4, "dropout": None}),
        JaxLayer(models.dropout_call, seed=1),
    ):
        inputs = ones(2, 6, 6, 2)
        layer(inputs)
        before = seeds(layer)
        layer(inputs)
        layer(inputs)
        draws = isinstance(getattr(layer, "module", None), Sampler)
        assert (seeds(layer) != before) == draws
        before = seeds(layer)
        layer(inputs, training=True)
        assert seeds(layer) != before


def test_predict_that_draws_nothing_changes_no_seed():
    layer = FlaxLayer(models.Cnn(), seed=1)
    model = keras.Sequential([keras.Input((6, 6, 2)), layer])
    before = seeds(layer)
    model.predict(ones(5, 6, 6, 2), batch_size=2, verbose=0)
    assert seeds(layer) == before


def test_predict_that_draws_draws_anew_for_each_batch():
    layer = FlaxLayer(Sampler(), seed=1)
    model = keras.Sequential([keras.Input((5,)), layer])
    outputs = model.predict(ones(4, 5), batch_size=2, verbose=0)
    assert (outputs[:2] != outputs[2:]).any()
    assert (model.predict(ones(4, 5), batch_size=2, verbose=0) != outputs).any()


def test_monte_carlo_dropout():
    """A loop over batches that asks for training, as `predict` asks for inference."""
    model = keras.Sequential([keras.Input((50,)), FlaxLayer(nn.Dropout(0.5), seed=0)])
    samples = [to_numpy(model(ones(2, 50), training=True)) for _ in range(3)]
    assert (samples[0] != samples[1]).any()
    assert (samples[1] != samples[2]).any()
    np.testing.assert_array_equal(model.predict(ones(2, 50), verbose=0), ones(2, 50))


def test_optional_streams():
    assert (to_numpy(FlaxLayer(Optional())(ones(3))) == 1).all()
    assert (to_numpy(FlaxLayer(Optional(), rngs=["noise"])(ones(3))) != 1).any()


def test_named_streams_have_the_keys_that_their_seeds_say():
    """Against native Flax with the same keys."""
    layer = FlaxLayer(Sampler(), seed=1, rngs={"sample": 7, "dropout": None})
    outputs = to_numpy(layer(ones(4, 5), training=True))
    keys = {"sample": jnp.array([7, 0], "uint32"), "dropout": jnp.array([1, 0], "uint32")}
    native = Sampler().apply(layer.get_variables(), ones(4, 5), training=True, rngs=keys)
    np.testing.assert_allclose(outputs, native, 1e-5, 1e-5)


def test_a_stream_that_is_not_named():
    with pytest.raises(Exception, match="sample"):
        FlaxLayer(Sampler(), rngs=["dropout"], seed=0)(ones(2, 3))


def test_two_layers_without_a_seed_share_no_stream():
    first, second = (JaxLayer(models.dropout_call) for _ in range(2))
    assert (
        to_numpy(first(ones(99), training=True)) != to_numpy(second(ones(99), training=True))
    ).any()


def test_set_random_seed_makes_everything_repeat():
    def run():
        keras.utils.set_random_seed(5)
        layers = [FlaxLayer(Sampler()), JaxLayer(models.dropout_call)]
        return [to_numpy(layer(ones(4, 5), training=True)) for layer in layers]

    for one, two in zip(run(), run(), strict=True):
        np.testing.assert_array_equal(one, two)


# Key implementations.


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_key_implementations(impl):
    seen = []

    def call(inputs, rng, training):
        if not training:
            return inputs
        seen.append(jax.random.key_impl(rng))
        return inputs * jax.random.uniform(rng, inputs.shape)

    layer = JaxLayer(call, seed=4, key_impl=impl)
    first, second = (to_numpy(layer(ones(9), training=True)) for _ in range(2))
    assert (first != second).any()
    assert set(map(str, seen)) == {impl}
    words = jnp.array([4, 0] * (1 if impl == "threefry2x32" else 2), "uint32")
    key = jax.random.wrap_key_data(words, impl=impl)
    np.testing.assert_allclose(first, jax.random.uniform(key, (9,)), 1e-6)
    config = JaxLayer(models.dropout_call, key_impl=impl).get_config()
    assert JaxLayer.from_config(config).get_config()["key_impl"] == impl


def test_flax_with_another_implementation():
    layer = FlaxLayer(nn.Dropout(0.5), seed=4, key_impl="rbg")
    first, second = (to_numpy(layer(ones(50), training=True)) for _ in range(2))
    assert (first != second).any()


def test_an_implementation_that_jax_does_not_have():
    with pytest.raises(ValueError, match=r"`key_impl` must be one of JAX's.*received 'mersenne'"):
        JaxLayer(models.dropout_call, key_impl="mersenne")


def test_the_default_implementation_of_jax_is_followed():
    layer = JaxLayer(models.dropout_call, seed=3)
    with jax.default_prng_impl("rbg"):
        outputs = to_numpy(layer(ones(9), training=True))
        key = jnp.array([3, 0, 3, 0], "uint32")
        expected = models.dropout_call(jnp.ones(9), key, training=True)
    np.testing.assert_array_equal(outputs, expected)


# Saving.


@keras.saving.register_keras_serializable(package="tests")
class SavedSampler(Sampler):
    def get_config(self):
        return {"stream": self.stream}

    @classmethod
    def from_config(cls, config):
        return cls(**config)


@pytest.mark.trains
@pytest.mark.parametrize("rngs", [None, {"sample": 7, "dropout": None}])
def test_resumed_training_draws_what_an_uninterrupted_run_draws(rngs, tmp_path):
    def make():
        keras.utils.set_random_seed(3)
        layer = FlaxLayer(SavedSampler(), rngs=rngs)
        model = keras.Sequential([keras.Input((5,)), layer])
        model.compile(keras.optimizers.Adam(0.01), "mse")
        return model

    def train(model):
        model.fit(ones(8, 5), ones(8, 3), batch_size=4, shuffle=False, verbose=0)

    straight = make()
    train(straight)
    train(straight)
    stopped = make()
    train(stopped)
    stopped.save(tmp_path / "m.keras")
    resumed = keras.models.load_model(tmp_path / "m.keras")
    train(resumed)
    for one, two in zip(straight.variables, resumed.variables, strict=True):
        np.testing.assert_array_equal(to_numpy(one.value), to_numpy(two.value))
