"""State, collections, losses and metrics of a layer."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import keras
import models
import numpy as np
import pytest
from backends import to_numpy
from models import x

from jaxwrap import CallResult, FlaxLayer, JaxLayer

pytestmark = pytest.mark.each_jax


class Mixture(nn.Module):
    """Sows what a mixture of experts sows."""

    @nn.compact
    def __call__(self, inputs, training=False):
        gates = nn.softmax(nn.Dense(3, name="router")(inputs))
        self.sow("losses", "balance", (gates.mean(0) ** 2).sum())
        self.sow("losses", "z", 0.1 * jnp.abs(gates).sum(-1))  # not a scalar
        self.sow("metrics", "load", gates.max(-1))
        self.sow("intermediates", "gates", gates)
        experts = nn.Dense(3, name="experts")(inputs)
        return (gates * experts).sum(-1, keepdims=True)


def native_losses(variables, inputs):
    outputs, sown = Mixture().apply(variables, inputs, mutable=["losses", "metrics"])
    return outputs, sum(leaf.sum() for leaf in jax.tree.leaves(sown["losses"])), sown["metrics"]


def mixture(**kwargs):
    layer = FlaxLayer(Mixture(), name="moe", seed=0, **kwargs)
    return layer, keras.Sequential([keras.Input((4,)), layer])


# Losses.


def test_sown_losses_are_the_layer_s():
    layer, _ = mixture()
    layer(x(6, 4))
    _, expected, _ = native_losses(layer.get_variables(), x(6, 4))
    (loss,) = layer.losses
    np.testing.assert_allclose(to_numpy(loss), expected, 1e-5)
    layer(x(6, 4, seed=1))
    assert len(layer.losses) == 1
    assert "losses" not in layer.get_variables()


@pytest.mark.trains
def test_sown_losses_change_the_gradients_in_fit_as_in_native_flax():
    layer, model = mixture()
    inputs, targets = x(8, 4), x(8, 1, seed=1)
    params = jax.tree.map(jnp.asarray, layer.get_variables())

    def total(params):
        outputs, losses, _ = native_losses(params, inputs)
        return ((outputs - targets) ** 2).mean() + losses

    model.compile(keras.optimizers.SGD(0.1), "mse")
    history = model.fit(inputs, targets, batch_size=8, epochs=3, verbose=0).history
    for step in range(3):
        value, gradients = jax.value_and_grad(total)(params)
        np.testing.assert_allclose(history["loss"][step], value, 1e-5)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients)
    jax.tree.map(
        lambda ours, native: np.testing.assert_allclose(ours, native, 1e-4, 1e-5),
        layer.get_variables(),
        params,
    )
    evaluated = model.evaluate(inputs, targets, verbose=0, return_dict=True)["loss"]
    np.testing.assert_allclose(evaluated, total(params), 1e-4)


# Metrics.


@pytest.mark.trains
def test_sown_metrics_are_averaged_over_batches_and_shown_by_fit():
    layer, model = mixture()
    variables = layer.get_variables()
    inputs = x(8, 4)
    loads = [native_losses(variables, inputs[i : i + 4])[2]["load"][0].mean() for i in (0, 4)]
    model.compile(keras.optimizers.SGD(0.0), "mse")
    history = model.fit(
        inputs, x(8, 1), batch_size=4, epochs=2, verbose=0, validation_data=(inputs[:4], x(4, 1))
    ).history
    np.testing.assert_allclose(history["moe/load"], [np.mean(loads)] * 2, 1e-5)
    np.testing.assert_allclose(history["val_moe/load"], [loads[0]] * 2, 1e-5)
    evaluated = model.evaluate(inputs[:4], x(4, 1), verbose=0, return_dict=True)
    np.testing.assert_allclose(evaluated["moe/load"], loads[0], 1e-5)


@pytest.mark.trains
def test_sown_losses_are_shown_by_fit():
    layer, model = mixture()
    inputs, targets = x(8, 4), x(8, 1, seed=1)
    outputs, sown = Mixture().apply(layer.get_variables(), inputs, mutable=["losses"])
    model.compile(keras.optimizers.SGD(0.0), "mse")
    history = model.fit(inputs, targets, batch_size=8, verbose=0).history
    balance, z = (float(sown["losses"][name][0].sum()) for name in ("balance", "z"))
    np.testing.assert_allclose(history["moe/balance"], [balance], 1e-5)
    np.testing.assert_allclose(history["moe/z"], [z], 1e-5)
    total = ((outputs - targets) ** 2).mean() + balance + z
    np.testing.assert_allclose(history["loss"], [total], 1e-5)


def test_names_that_are_sown_twice():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, inputs):
            for scale in (1.0, 2.0):
                self.sow("losses", "size", scale * inputs.sum())
            self.sow("metrics", "size", inputs)
            self.sow("more", "size", 5 * inputs)
            return inputs

    layer = FlaxLayer(Twice(), name="twice", collections={"more": "loss"})
    layer(np.ones(4, "float32"))
    (loss,) = layer.losses
    assert float(to_numpy(loss)) == 3 * 4 + 5 * 4
    results = {metric.name: float(to_numpy(metric.result())) for metric in layer.metrics}
    assert results == {"twice/size": 1, "twice/losses/size": 12, "twice/more/size": 20}


def test_metrics_of_a_function():
    def call(params, inputs):
        return CallResult(inputs * params, losses={"l2": params**2}, metrics={"size": inputs})

    layer = JaxLayer(call, params=3.0)
    layer(np.full(4, 2.0, "float32"))
    layer(np.full(4, 4.0, "float32"))
    assert [float(to_numpy(loss)) for loss in layer.losses] == [9]
    loss, metric = sorted(layer.metrics, key=lambda metric: metric.name)
    assert float(to_numpy(loss.result())) == 9
    assert float(to_numpy(metric.result())) == 3
    metric.reset_state()
    assert float(to_numpy(metric.result())) == 0


@pytest.mark.trains
def test_losses_of_a_dict_are_reported_by_name():
    def call(params, inputs):
        fields = inputs * params
        return CallResult(fields, losses={"pde": (fields**2).mean(), "bc": [jnp.abs(params), 1.0]})

    layer = JaxLayer(call, params=2.0, name="pinn")
    model = keras.Sequential([keras.Input((3,)), layer])
    model.compile(keras.optimizers.SGD(0.0), "mse")
    data = x(8, 3)
    history = model.fit(data, data, batch_size=4, verbose=0).history
    pde = ((2 * data) ** 2).mean()
    np.testing.assert_allclose(history["pinn/pde"][0], pde, 1e-5)
    np.testing.assert_allclose(history["pinn/bc"][0], 3.0, 1e-6)
    results = model.evaluate(data, data, batch_size=4, verbose=0, return_dict=True)
    np.testing.assert_allclose(results["pinn/pde"], pde, 1e-5)
    np.testing.assert_allclose(results["loss"], (data**2).mean() + pde + 3, 1e-5)


def test_a_loss_and_a_metric_of_one_name():
    def call(inputs):
        return CallResult(inputs, losses={"size": inputs.sum()}, metrics={"size": inputs})

    with pytest.raises(ValueError, match=r"JaxLayer 'twice': .*a loss and a metric of the name"):
        JaxLayer(call, name="twice")(x(3))


def test_a_metric_that_comes_late():
    def call(inputs, training):
        return CallResult(inputs, metrics={} if training else {"late": inputs})

    layer = JaxLayer(call, name="late")
    with pytest.raises(ValueError, match="JaxLayer 'late': the model reports the metric 'late'"):
        layer(x(3))


# Other roles.


def test_output_collections():
    layer, _ = mixture(collections={"intermediates": "output", "metrics": "output"})
    outputs, extra = layer(keras.KerasTensor((None, 4)))
    assert outputs.shape == (None, 1)
    assert extra["intermediates"]["gates"][0].shape == (None, 3)
    outputs, extra = to_numpy(layer(x(5, 4)))
    native, sown = Mixture().apply(
        layer.get_variables(), x(5, 4), mutable=["losses", "metrics", "intermediates"]
    )
    np.testing.assert_allclose(outputs, native, 1e-5, 1e-5)
    assert set(extra) == {"intermediates", "metrics"}
    np.testing.assert_allclose(
        extra["intermediates"]["gates"][0], sown["intermediates"]["gates"][0], 1e-5, 1e-5
    )


def test_dropped_collections():
    layer, _ = mixture(collections={"losses": "drop", "metrics": "drop"})
    layer(x(5, 4))
    assert layer.losses == []
    assert not layer.metrics
    assert set(layer.get_variables()) == {"params"}


@pytest.mark.trains
def test_trainable_and_state_collections(backend):
    class Adapted(nn.Module):
        @nn.compact
        def __call__(self, inputs):
            down = self.variable("lora", "down", jnp.ones, (4, 2))
            return nn.Dense(3)(inputs) + inputs @ down.value @ jnp.ones((2, 3))

    layer = FlaxLayer(Adapted(), collections={"params": "state", "lora": "trainable"}, name="a")
    inputs = x(5, 4)
    outputs = to_numpy(layer(inputs))
    assert [v.path for v in layer.trainable_variables] == ["a/lora/down"]
    variables = layer.get_variables()
    cotangent = np.ones_like(outputs)

    def native(down):
        return Adapted().apply({**variables, "lora": {"down": down}}, inputs)

    (expected,) = jax.vjp(native, jnp.asarray(variables["lora"]["down"]))[1](cotangent)
    _, (gradients, _) = backend.layer_vjp(layer, inputs, True, [cotangent])
    np.testing.assert_allclose(to_numpy(gradients[0]), expected, 1e-5, 1e-5)


def test_a_role_that_is_none():
    with pytest.raises(ValueError, match="`collections` maps 'aux' to 'losses'; expected one of"):
        FlaxLayer(Mixture(), collections={"aux": "losses"})


# State.


@pytest.mark.parametrize("kept", [True, False])
def test_state_in_inference(kept):
    layer = JaxLayer(
        models.counter_call, params={"w": 3.0}, state=0, update_state_in_inference=kept
    )
    layer(x(2))
    assert int(to_numpy(layer.state.value)) == kept
    layer(x(2), training=True)
    assert int(to_numpy(layer.state.value)) == kept + 1
    assert (
        JaxLayer.from_config(
            JaxLayer(
                models.norm_call, models.norm_init, update_state_in_inference=kept
            ).get_config()
        ).update_state_in_inference
        is kept
    )


@pytest.mark.parametrize("kind", ["functional", "sequential", "subclassed"])
def test_a_layer_used_twice_threads_its_state_in_order(kind):
    def call(state, inputs):
        return inputs + state, 2 * state + 1

    layer = JaxLayer(call, state=1.0)
    if kind == "functional":
        inputs = keras.Input((2,))
        model = keras.Model(inputs, layer(layer(inputs)))
    elif kind == "sequential":
        model = keras.Sequential([keras.Input((2,)), keras.Sequential([layer]), layer])
    else:

        class Twice(keras.Model):
            def __init__(self):
                super().__init__()
                self.layer = layer

            def call(self, inputs):
                return self.layer(self.layer(inputs))

        model = Twice()
    outputs = model.predict(np.zeros((1, 2), "float32"), verbose=0)
    np.testing.assert_allclose(outputs, np.full((1, 2), 1 + 3))
    assert float(to_numpy(layer.state.value)) == 7


@pytest.mark.parametrize("how", ["loop", "predict"])
def test_a_decode_cache_works_step_by_step(how):
    """Attention over a cache, one token a call, is causal attention over the whole."""
    decoding = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=4, decode=True)
    layer = FlaxLayer(decoding, seed=0)
    layer.build((2, 5, 4))
    steps = x(2, 5, 4)
    mask = nn.make_causal_mask(np.ones((2, 5)))
    plain = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=4)
    expected = plain.apply({"params": layer.get_variables()["params"]}, steps, mask=mask)
    if how == "predict":
        inputs = keras.Input((1, 4), batch_size=2)
        model = keras.Model(inputs, layer(inputs))
    for step in range(5):
        part = steps[:, step : step + 1]
        outputs = model.predict(part, verbose=0) if how == "predict" else to_numpy(layer(part))
        np.testing.assert_allclose(outputs, expected[:, step : step + 1], 1e-4, 1e-5)
    assert int(layer.get_variables()["cache"]["cache_index"]) == 5
