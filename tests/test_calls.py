"""What is kept between calls to make them fast, and what must not be: aliases, traces, and the way around Keras."""

import concurrent.futures
import gc
import sys
import weakref

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
from jaxwrap._pytree import is_array, partition

pytestmark = pytest.mark.each_jax


def tensor(*shape, seed=0):
    return keras.ops.convert_to_tensor(x(*shape, seed=seed))


# Aliases.


def scaled_by_state(params, state, inputs):
    return inputs * params * state, 2 * state + 1


@pytest.mark.trains
def test_state_that_is_overwritten_after_the_call_serves_the_gradient(backend):
    layer = JaxLayer(scaled_by_state, params=jnp.array([3.0]), state=jnp.array([5.0]))
    layer.build((4,))
    inputs, ones = x(4), np.ones(4, "float32")
    _, (weights, floats) = backend.layer_vjp(layer, inputs, True, [ones])
    np.testing.assert_allclose(to_numpy(floats[0]), 15 * ones, 1e-6)
    np.testing.assert_allclose(to_numpy(weights[0]), [5 * inputs.sum()], 1e-5)
    np.testing.assert_array_equal(layer.get_variables()["state"], [11.0])


def exchanged(state, inputs):
    return (inputs, state["a"]), {"a": state["b"], "b": state["a"]}


def test_an_output_is_no_alias_of_a_weight():
    layer = JaxLayer(exchanged, state={"a": x(3), "b": x(3, seed=1)})
    for step in range(4):
        _, before = layer(tensor(2))
        state = layer.get_variables()["state"]
        np.testing.assert_array_equal(to_numpy(before), x(3, seed=step % 2))
        np.testing.assert_array_equal(state["a"], x(3, seed=(step + 1) % 2))
        np.testing.assert_array_equal(state["b"], x(3, seed=step % 2))


def returned(params, inputs):
    return params, inputs


def test_a_parameter_that_is_returned_does_not_change_with_the_variable():
    layer = JaxLayer(returned, params=x(3))
    given = tensor(2)
    for _ in range(2):
        output, same = layer(given)
        value = to_numpy(output)
        layer.params.assign(layer.params.value + 1)
        np.testing.assert_array_equal(to_numpy(output), value)
        np.testing.assert_array_equal(to_numpy(same), to_numpy(given))


def test_what_a_variable_is_assigned_the_next_call_sees():
    layer = JaxLayer(lambda params, inputs: inputs * params, params=x(40_000))
    for step in range(1, 4):
        layer.params.assign(np.full(40_000, step, "float32"))
        np.testing.assert_array_equal(to_numpy(layer(np.ones(40_000, "float32"))), step)
        layer.set_variables({"params": np.full(40_000, -step, "float32")})
        np.testing.assert_array_equal(to_numpy(layer(np.ones(40_000, "float32"))), -step)


@pytest.mark.only("torch")
def test_a_tensor_that_takes_other_memory():
    layer = JaxLayer(lambda params, inputs: inputs @ params, params=x(4, 4))
    inputs = tensor(4, 4, seed=1)
    parameter = layer.params.value
    layer(inputs)
    for data in (x(4, 4, seed=2), x(5, 4, seed=3)[1:], x(4, 4, seed=4).T, x(9, 9)[1:5, 2:6]):
        parameter.data = keras.ops.convert_to_tensor(data)
        for _ in range(2):
            np.testing.assert_allclose(to_numpy(layer(inputs)), x(4, 4, seed=1) @ data, 1e-5, 1e-5)
    parameter.data = parameter.data.t()
    np.testing.assert_allclose(to_numpy(layer(inputs)), x(4, 4, seed=1) @ data.T, 1e-5, 1e-5)


@pytest.mark.only("torch")
def test_a_write_between_forward_and_backward_is_found_as_torch_finds_it():
    import torch

    layer = JaxLayer(models.mlp_call, models.mlp_init)
    own = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    for call, parameter in (
        (layer, lambda: layer.params[1]["w"].value),
        (own, lambda: own[2].weight),
    ):
        inputs = tensor(2, 5).requires_grad_()
        loss = call(inputs).sum()
        with torch.no_grad():
            parameter().mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.only("torch")
def test_a_thousand_steps_with_reads_in_between_end_as_without():
    """The optimizer writes in place what JAX reads through an alias."""
    import torch

    def train(between):
        layer = JaxLayer(models.mlp_call, models.mlp_init, seed=1)
        layer.build((None, 5))
        parameters = [variable.value for variable in layer.trainable_variables]
        optimizer = torch.optim.SGD(parameters, 0.01, momentum=0.9)
        inputs = tensor(16, 5)
        read = []
        for step in range(1000):
            optimizer.zero_grad()
            loss = (layer(inputs) ** 2).mean() + 0.1 * (layer(inputs + 1) - 1).abs().mean()
            read.append(between(layer, inputs, step))
            loss.backward()
            optimizer.step()
            read.append(between(layer, inputs, step))
        return [to_numpy(p.detach()) for p in parameters], read

    def reading(layer, inputs, step):
        with torch.no_grad():
            return layer(inputs[step % 16][None])

    # What is read is looked at only when all has been written.
    expected, _ = train(lambda *_: None)
    once, read = train(reading)
    again, copied = train(lambda *arguments: reading(*arguments).clone())
    for one, two, three in zip(expected, once, again, strict=True):
        np.testing.assert_array_equal(one, two)
        np.testing.assert_array_equal(one, three)
    for one, two in zip(read, copied, strict=True):
        np.testing.assert_array_equal(to_numpy(one), to_numpy(two))


# Traces.


def test_a_function_is_traced_once_for_each_shape_and_mode():
    traced = []

    def call(params, inputs, training):
        traced.append((inputs.shape, training))
        return inputs * params

    layer = JaxLayer(call, params=2.0)
    layer(tensor(2))
    traced.clear()
    layer(tensor(2))
    for size in (2, 3, 4):
        for _ in range(3):
            layer(tensor(size))
            layer(tensor(size), training=True)
    assert len(traced) == len(set(traced))


def test_a_new_static_value_is_traced_once_and_explained_where_the_model_fails():
    traced = []

    def call(params, inputs, power=1):
        traced.append(power)
        if power < 0:
            raise OverflowError("too small")
        return (inputs * params) ** power

    layer = JaxLayer(call, params=2.0, call_arguments=("inputs", "power"))
    layer(tensor(2))
    traced.clear()
    for power in (2, 3):
        for _ in range(2):
            np.testing.assert_allclose(
                to_numpy(layer(tensor(2), power=power)), (2 * x(2)) ** power, 1e-6
            )
    assert traced == [2, 3]
    for _ in range(2):
        with pytest.raises(ValueError, match=r"(?s)unexpected: power.*OverflowError: too small"):
            layer(tensor(2), power=-1)
    assert to_numpy(layer(tensor(2), power=2)).shape == (2,)


def test_threads_compute_what_one_thread_computes():
    layer = FlaxLayer(models.Cnn(), seed=0)
    batches = [tensor(size % 3 + 1, 6, 6, 2, seed=size) for size in range(24)]
    layer(batches[0])
    expected = [to_numpy(layer(batch)) for batch in batches]
    fresh = FlaxLayer(models.Cnn(), variables=layer.get_variables())
    fresh(batches[0])
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for called in (layer, fresh):
            outputs = [
                to_numpy(output.detach() if hasattr(output, "detach") else output)
                for output in pool.map(called, batches)
            ]
            for one, two in zip(outputs, expected, strict=True):
                np.testing.assert_allclose(one, two, 1e-5, 1e-6)


def test_a_model_predicts_from_threads(backend):
    """On JAX, Keras takes the values out of all variables while a `predict` runs: there the model is called."""
    inputs = keras.Input((6, 6, 2))
    model = keras.Model(inputs, FlaxLayer(models.Cnn(), seed=0)(inputs))

    def predict(part):
        if backend.name == "jax":
            return model(part)
        return model.predict(part, batch_size=4, verbose=0)

    data = [x(8, 6, 6, 2, seed=seed) for seed in range(8)]
    expected = [model.predict(part, batch_size=4, verbose=0) for part in data]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        outputs = list(pool.map(predict, data))
    for one, two in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(one, two, 1e-5, 1e-6)


# Around Keras: the second call of a kind goes straight to the function.


def told(inputs, training):
    return inputs + (10.0 if training else 1.0)


def test_the_train_flag_comes_from_the_caller_or_from_the_layer_around():
    class Around(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.inner = JaxLayer(told)

        def call(self, inputs):
            return self.inner(inputs)

    layer, around, given = JaxLayer(told), Around(), tensor(3)
    for _ in range(3):
        for training, shift in ((True, 10), (False, 1), (None, 1)):
            for called in (layer, around):
                output = called(given, training=training)
                np.testing.assert_allclose(to_numpy(output), x(3) + shift, 1e-6)
        np.testing.assert_allclose(to_numpy(layer(given)), x(3) + 1, 1e-6)


def test_losses_are_those_of_the_last_call():
    layer = JaxLayer(lambda inputs: CallResult(inputs, losses=inputs.sum()))
    for seed in range(3):
        layer(tensor(3, seed=seed))
        assert len(layer.losses) == 1
        np.testing.assert_allclose(to_numpy(layer.losses[0]), x(3, seed=seed).sum(), 1e-5)


def test_a_policy_and_a_regularizer_that_come_later():
    seen = []

    def call(params, inputs):
        seen.append(inputs.dtype)
        return inputs * params

    layer = JaxLayer(call, params=x(3))
    given = tensor(2, 3)
    for _ in range(3):
        assert keras.backend.standardize_dtype(layer(given).dtype) == "float32"
    layer.activity_regularizer = keras.regularizers.L2(1.0)
    layer(given)
    assert len(layer.losses) == 1
    layer.activity_regularizer = None
    layer.dtype_policy = "mixed_bfloat16"
    seen.clear()
    layer(tensor(4, 3))
    assert seen == [jnp.bfloat16]


def test_masks_go_on(backend):
    embed = keras.layers.Embedding(7, 4, mask_zero=True)
    layer = JaxLayer(
        lambda inputs, mask: inputs * mask[..., None] if mask is not None else inputs,
        supports_masking=True,
    )
    model = keras.Sequential([keras.Input((5,), dtype="int32"), embed, layer])
    tokens = np.array([[1, 2, 0, 0, 3]], "int32")
    layer(tensor(1, 5, 4))
    layer(tensor(1, 5, 4))
    for _ in range(3):
        outputs = to_numpy(model(keras.ops.convert_to_tensor(tokens)))
        assert (outputs[0, 2:4] == 0).all()
        assert (outputs[0, [0, 1, 4]] != 0).all()


def test_an_error_of_a_later_call_says_what_keras_says():
    layer = JaxLayer(lambda params, inputs: inputs @ params, params=x(4, 2), name="product")
    for _ in range(2):
        layer(tensor(3, 4))
    with pytest.raises(TypeError, match=r"(?s)dot_general.*product|Arguments received by JaxLayer"):
        layer(tensor(3, 5))
    np.testing.assert_allclose(to_numpy(layer(tensor(3, 4))), x(3, 4) @ x(4, 2), 1e-5, 1e-5)


@pytest.mark.trains
def test_few_residuals_give_the_same_gradients(backend):
    """What is cheap is computed again for the gradient, and the rest is not."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, inputs, training=False):
            for _ in range(3):
                inputs = inputs + nn.gelu(nn.Dense(4)(nn.LayerNorm()(inputs)))
            inputs = nn.Dropout(0.5, deterministic=not training)(nn.relu(inputs))
            return nn.softmax(nn.Dense(3)(inputs))

    layer = FlaxLayer(Net(), seed=2)
    inputs, cotangent = x(5, 4), x(5, 3, seed=1)
    layer.build((None, 4))
    variables = layer.get_variables()
    _, (weights, floats) = backend.layer_vjp(layer, inputs, True, [cotangent])

    def native(params, inputs):
        keys = {"dropout": jnp.array([2, 0], "uint32")}
        return Net().apply({"params": params}, inputs, training=True, rngs=keys)

    _, vjp = jax.vjp(native, variables["params"], inputs)
    expected, expected_inputs = vjp(cotangent)
    np.testing.assert_allclose(to_numpy(floats[0]), expected_inputs, 1e-4, 1e-5)
    for one, two in zip(weights, jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(to_numpy(one), two, 1e-4, 1e-5)


# What is kept for a layer, and not after it.


def test_threads_make_plans_for_ever_new_values(monkeypatch):
    monkeypatch.setattr("jaxwrap._layer._program._MAX_PLANS", 16)
    layer = JaxLayer(lambda inputs, n: inputs * n, call_arguments=("inputs", "n"))
    layer(tensor(3), n=1)
    program = layer._engine.program
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def add(thread):
        for number in range(200):
            _, structure = partition({"inputs": x(3), "n": (thread, number)}, is_array)
            program.add((thread, number), structure, [0], False)

    try:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            list(pool.map(add, range(8)))
    finally:
        sys.setswitchinterval(interval)
    assert len(program.plans) < 16 + 8
    np.testing.assert_array_equal(to_numpy(layer(tensor(3), n=2)), 2 * x(3))


def test_what_is_compiled_for_a_dropped_layer_goes_with_it(backend):
    client = jax.devices()[0].client

    def use():
        """Call a new layer, and differentiate it where that is possible."""
        layer = FlaxLayer(nn.Dense(8))
        layer(tensor(4, 3))
        alive = weakref.ref(layer)
        if backend.name != "numpy":
            backend.layer_vjp(layer, x(4, 3), True, [x(4, 8)])
        del layer
        gc.collect()
        return alive() is not None, len(client.live_executables())

    # The first ones compile what all layers share.
    counts = [use() for _ in range(5)]
    assert counts[2:] == [(False, counts[2][1])] * 3


@pytest.mark.only("numpy")
def test_arrays_that_are_written_past_keras_count_or_refuse():
    """JAX reads the array of a variable in place. One that it cannot read so is read-only."""
    layer = JaxLayer(lambda params, inputs: inputs + params, params=np.zeros(3, "float32"))
    (variable,) = layer.weights
    # JAX reads in place what begins at a multiple of 64 bytes, at most one of these.
    for start in range(4):
        memory = np.zeros(7, "float32")
        variable._value = memory[start : start + 3]
        np.testing.assert_array_equal(layer(x(3)), x(3))
        refused = not variable.value.flags.writeable
        if not refused:
            variable.value[...] = 3
        np.testing.assert_array_equal(layer(x(3)), x(3) + (0 if refused else 3))
