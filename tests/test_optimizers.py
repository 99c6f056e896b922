"""`OptaxOptimizer` beside native Optax, run in the same process on the same gradients."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest
from backends import to_numpy
from sklearn.datasets import load_digits

import jaxwrap

pytestmark = pytest.mark.trains
register = jaxwrap.register_serializable("tests_optimizers")


@register
class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(nn.tanh(nn.Dense(16)(x)))


@functools.cache
def digits():
    x, y = load_digits(return_X_y=True)
    return (x[:128] / 16).astype("float32"), y[:128].astype("int32")


def loss_of(logits, labels):
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@jax.jit
def loss_and_gradients(params):
    x, y = digits()
    return jax.value_and_grad(lambda p: loss_of(Net().apply({"params": p}, x), y))(params)


def make(seed=0):
    layer = jaxwrap.FlaxLayer(Net(), seed=seed, name="net")
    return keras.Sequential([keras.Input((64,)), layer], name="model")


def params_of(model):
    return model.layers[0].get_variables()["params"]


def gradients_of(model, **changes):
    """The loss and the gradients, computed by JAX, for the trainable variables of a model."""
    loss, gradients = loss_and_gradients(params_of(model))
    by_path = {
        "/".join(str(key.key) for key in path): gradient
        for path, gradient in jax.tree_util.tree_leaves_with_path(gradients)
    }
    tensors = [
        keras.ops.convert_to_tensor(np.asarray(by_path[v.path.split("params/")[1]]))
        for v in model.trainable_variables
    ]
    return float(loss), tensors


def train(model, optimizer, steps, **extra):
    for _ in range(steps):
        loss, gradients = gradients_of(model)
        given = dict.fromkeys(extra, loss)
        optimizer.apply(gradients, model.trainable_variables, **given)


def train_native(params, transformation, steps, **extra):
    if isinstance(transformation, optax.MultiSteps):
        transformation = transformation.gradient_transformation()
    transformation = optax.with_extra_args_support(transformation)
    looks_ahead = "lookahead" in transformation.init.__qualname__
    tree = optax.LookaheadParams.init_synced(params) if looks_ahead else params
    state = transformation.init(tree)

    @jax.jit
    def step(tree, state):
        loss, gradients = loss_and_gradients(tree.fast if looks_ahead else tree)
        given = dict.fromkeys(extra, loss)
        updates, state = transformation.update(gradients, state, tree, **given)
        return optax.apply_updates(tree, updates), state

    for _ in range(steps):
        tree, state = step(tree, state)
    return (tree.fast if looks_ahead else tree), state


def assert_close(received, expected, tolerance=1e-5):
    """Within a relative tolerance, of the largest number of each array."""
    leaves = jax.tree_util.tree_leaves_with_path(expected)
    for (path, one), two in zip(leaves, jax.tree.leaves(received), strict=True):
        one, two = np.asarray(one, "float64"), np.asarray(two, "float64")
        scale = np.abs(one).max()
        np.testing.assert_allclose(two, one, tolerance, tolerance * scale, err_msg=str(path))


def values(optimizer):
    return {v.path.split("/", 1)[1]: to_numpy(v.value) for v in optimizer.variables}


CHAIN = lambda: optax.chain(  # noqa: E731
    optax.clip_by_global_norm(0.5), optax.adamw(optax.cosine_decay_schedule(1e-2, 40))
)
TRANSFORMATIONS = {
    "multi_steps": lambda: optax.MultiSteps(optax.adam(1e-2), 3),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=1e-2),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(1e-2), 3),
    "lookahead": lambda: optax.lookahead(optax.sgd(0.1), sync_period=5, slow_step_size=0.5),
    "schedule_free": lambda: optax.contrib.schedule_free_adamw(1e-2),
    "muon": lambda: optax.contrib.muon(1e-2),
    "prodigy": lambda: optax.contrib.prodigy(),
    "lion": lambda: optax.lion(1e-3),
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=8),
    "lamb": lambda: optax.lamb(1e-2),
    "sgd": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "chain": CHAIN,
    "noise": lambda: optax.chain(optax.add_noise(0.01, 0.5, key=jax.random.key(3)), optax.sgd(0.1)),
}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_fifty_steps_are_those_of_optax(name):
    model = make()
    expected, state = train_native(params_of(model), TRANSFORMATIONS[name](), 50)
    optimizer = jaxwrap.OptaxOptimizer(TRANSFORMATIONS[name]())
    train(model, optimizer, 50)
    assert_close(params_of(model), expected)
    assert int(optimizer.iterations) == 50
    # What is no float is the same: counters, flags, keys.
    inner = optimizer.state.inner if name == "lookahead" else optimizer.state
    leaves = zip(jax.tree.leaves(state), jax.tree.leaves(inner), strict=True)
    exact = [(one, two) for one, two in leaves if not jnp.issubdtype(one.dtype, jnp.floating)]
    for one, two in exact:
        is_key = jax.dtypes.issubdtype(one.dtype, jax.dtypes.prng_key)
        one = jax.random.key_data(one) if is_key else one
        np.testing.assert_array_equal(to_numpy(two.value), one)
        assert two.dtype == str(one.dtype)


FACTORIES = {
    "adamw": functools.partial(optax.adamw, weight_decay=1e-2),
    "muon": optax.contrib.muon,
    "prodigy": optax.contrib.prodigy,
    "schedule_free": optax.contrib.schedule_free_adamw,
    "adafactor": optax.adafactor,
    "lion": optax.lion,
}


@pytest.mark.parametrize("name", FACTORIES)
def test_factories_with_a_learning_rate(name):
    model, rate = make(), 1.0 if name == "prodigy" else 1e-2
    expected, _ = train_native(params_of(model), FACTORIES[name](learning_rate=rate), 20)
    train(model, jaxwrap.OptaxOptimizer(FACTORIES[name], learning_rate=rate), 20)
    assert_close(params_of(model), expected)
