"""Calls that fail: what they leave behind, which is nothing, and what the next call makes of it."""

import concurrent.futures
import hashlib
import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import keras
import models
import numpy as np
import pytest
from backends import to_numpy
from keras.src.layers.layer import Layer
from keras.src.ops.operation import Operation
from models import x

from jaxwrap import CallResult, EquinoxLayer, FlaxLayer, JaxLayer, NNXLayer
from jaxwrap._layer import _fast

pytestmark = pytest.mark.quick


def tensor(*shape, seed=0):
    return keras.ops.convert_to_tensor(x(*shape, seed=seed))


def counting(fail):
    """A layer that counts its calls in its state, and by a callback, and fails for a negative first number."""
    calls = []

    def call(state, inputs, training):
        metrics = {"late": inputs} if fail and inputs.shape[0] == 3 else {}
        jax.debug.callback(lambda: calls.append(1))
        return CallResult(inputs * 1.0, state + 1, metrics=metrics)

    return JaxLayer(call, state=np.zeros((), "int32"), name="counting"), calls


@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_call_that_fails_assigns_nothing_and_runs_once(times, backend):
    layer, calls = counting(fail=True)
    for _ in range(times):
        layer(tensor(2))
    jax.effects_barrier()
    calls.clear()
    with pytest.raises(
        ValueError, match="JaxLayer 'counting': the model reports the metric 'late'"
    ):
        layer(tensor(3))
    jax.effects_barrier()
    assert len(calls) == 1
    assert int(to_numpy(layer.state.value)) == times
    layer(tensor(2))
    assert int(to_numpy(layer.state.value)) == times + 1


@pytest.mark.only("torch")
def test_activation_checkpointing_computes_what_it_computes_without():
    from torch.utils.checkpoint import checkpoint

    gradients = []
    for wrapped in (
        lambda fn, value: fn(value),
        lambda fn, v: checkpoint(fn, v, use_reentrant=False),
    ):
        layer = JaxLayer(models.mlp_call, models.mlp_init, seed=3)
        for _ in range(3):
            value = tensor(4, 5).requires_grad_()
            wrapped(layer, value).sum().backward()
        gradients.append([value.grad, *(v.value.grad for v in layer.trainable_variables)])
    for one, two in zip(*gradients, strict=True):
        np.testing.assert_allclose(to_numpy(one), to_numpy(two), 1e-6)


def test_the_short_way_is_that_of_a_keras_that_has_been_read():
    """Keras may change what it does around a call. Read it, then add the version and the hash."""
    source = "".join(map(inspect.getsource, (Layer.__call__, Operation.__call__)))
    found = hashlib.sha256(source.encode()).hexdigest()
    assert _fast.READ_SOURCES.get(keras.__version__, found) == found
    assert keras.__version__ in _fast.READ_SOURCES or "dev" in keras.__version__


def test_what_a_user_replaces_is_called():
    layer = JaxLayer(models.function_call)
    given = tensor(3)
    for _ in range(3):
        layer(given)
    layer.call = lambda inputs, training=False: inputs * 100
    np.testing.assert_allclose(to_numpy(layer(given)), 100 * x(3), 1e-6)

    seen = []
    layer = JaxLayer(lambda inputs: seen.append(inputs.dtype) or inputs, dtype="mixed_bfloat16")
    for _ in range(3):
        layer(keras.ops.cast(given, "bfloat16"))
    layer.autocast = False
    layer(given)
    assert seen[-1] == "float32"


# Building.


def test_a_first_call_that_fails_leaves_the_layer_unbuilt():
    def call(params, inputs):
        assert inputs.shape[-1] == 4, "four features"
        return inputs @ params["w"]

    def init(rng, inputs):
        return {"w": jax.random.normal(rng, (inputs.shape[-1], 2))}

    layer = JaxLayer(call, init, seed=1, name="four")
    with pytest.raises(AssertionError, match="four features"):
        layer(tensor(2, 7))
    assert not layer.built
    assert layer.params is None
    assert layer.variables == []
    layer.build((None, 4))
    assert tuple(layer.params["w"].shape) == (4, 2)
    expected = JaxLayer(call, init, seed=1)
    expected.build((None, 4))
    np.testing.assert_array_equal(
        to_numpy(layer.params["w"].value), to_numpy(expected.params["w"].value)
    )
    assert layer(tensor(2, 4)).shape == (2, 2)
    assert len(layer.trainable_variables) == 1


def test_shapes_of_an_unbuilt_layer_change_no_initial_value():
    asked, not_asked = (FlaxLayer(models.Cnn(), seed=2) for _ in range(2))
    for _ in range(3):
        assert asked.compute_output_shape((None, 6, 6, 2)) == (None, 3)
    for layer in (asked, not_asked):
        layer.build((None, 6, 6, 2))
    for one, two in zip(asked.variables, not_asked.variables, strict=True):
        np.testing.assert_array_equal(to_numpy(one.value), to_numpy(two.value))


@pytest.mark.parametrize("kind", ["linen", "functions", "equinox"])
def test_first_calls_from_threads_build_once(kind):
    import equinox as eqx

    made = []

    def init(rng, inputs):
        made.append(1)
        return models.mlp_init(rng, inputs)

    make = {
        "linen": lambda: FlaxLayer(nn.Dense(3), seed=1),
        "functions": lambda: JaxLayer(models.mlp_call, init, seed=1),
        "equinox": lambda: EquinoxLayer(
            eqx.nn.Linear(5, 3, key=jax.random.key(0)), batch=True, seed=1
        ),
    }[kind]
    expected = to_numpy(make()(tensor(2, 5)))
    made.clear()
    for _ in range(3):
        layer = make()
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            outputs = list(pool.map(layer, [tensor(2, 5)] * 8))
        for output in outputs:
            output = output.detach() if hasattr(output, "detach") else output
            np.testing.assert_allclose(to_numpy(output), expected, 1e-6)
    assert len(made) <= 3


# Traces that fail.


def test_a_trace_that_failed_is_not_kept_as_no_metrics():
    ready = []

    def call(inputs, training):
        if training and not ready:
            raise RuntimeError("the mesh is not there yet")
        return CallResult(inputs, metrics={"size": inputs})

    layer = JaxLayer(call, name="late")
    given = tensor(3)
    with pytest.raises(
        ValueError, match=r"no variable for it.*RuntimeError: the mesh is not there"
    ):
        layer(given)
    ready.append(1)
    layer(given)
    (metric,) = layer.metrics
    np.testing.assert_allclose(to_numpy(metric.result()), x(3).mean(), 1e-5)


# Arguments.


def test_a_tensor_for_the_train_flag_is_an_error_that_says_so():
    layer = FlaxLayer(nn.Dense(2), name="dense")
    with pytest.raises(
        TypeError,
        match=r"FlaxLayer 'dense': `training` must be a bool; received .* of shape \(3, 4\).*inputs",
    ):
        layer(tensor(3, 4), tensor(3, 4))
    with pytest.raises(
        TypeError, match=r"FlaxLayer 'dense': .*the layer of `Dense` takes .inputs, training"
    ):
        layer(tensor(3, 4), other=tensor(3, 4))
    assert not layer.built


def test_the_factory_of_a_pure_init_leaves_the_adapter_alone():
    from flax import nnx

    layer = NNXLayer.from_factory(lambda rngs: nnx.Linear(4, 2, rngs=rngs), seed=0)
    before = dict(vars(layer))
    layer.compute_output_shape((None, 4))
    assert dict(vars(layer)) == before
    keys = jax.random.PRNGKey(0)
    jax.eval_shape(lambda: layer.adapter.init(keys, {"x": jnp.ones((1, 4))}))
    assert layer(tensor(3, 4)).shape == (3, 2)
