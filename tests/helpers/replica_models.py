"""The model of the scripts that train on several devices or processes, and the same training in plain JAX."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import keras
import numpy as np

import jaxwrap

SEED = 7
RATE = 0.1
BATCH = 8
STEPS = 4

rng = np.random.default_rng(0)
X = rng.standard_normal((BATCH * STEPS, 4)).astype("float32")
Y = X.sum(1, keepdims=True)


class Net(nn.Module):
    """Has float state and masks."""

    @nn.compact
    def __call__(self, x, training=False):
        x = nn.BatchNorm(use_running_average=not training, momentum=0.5)(nn.Dense(5)(x))
        return nn.Dense(1)(nn.Dropout(0.4, deterministic=not training)(nn.tanh(x)))


class Plain(nn.Module):
    """Its gradients are sums over examples: the same for a batch and for its parts."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.tanh(nn.Dense(5)(x)))


def make(module, **options):
    """Return a model of one layer, with the same weights each time."""
    layer = jaxwrap.FlaxLayer(module, seed=SEED, name="net", **options)
    return keras.Sequential([keras.Input((4,)), layer])


def key_of(count, replica=None):
    """Return the key of one call: the words of a Keras seed, and for one of several replicas its number folded in."""
    key = jax.random.wrap_key_data(jnp.array([SEED, count], "uint32"))
    return key if replica is None else jax.random.fold_in(key, replica)


def train(variables, replicas, distinct, epochs=1):
    """Train `Net` in plain JAX: the mean of the gradients and of the state of all replicas, by SGD."""

    def loss(params, stats, x, y, key):
        variables = {"params": params, "batch_stats": stats}
        rngs = {"dropout": jax.random.key_data(key)}
        out, new = Net().apply(variables, x, training=True, rngs=rngs, mutable=["batch_stats"])
        return ((out - y) ** 2).mean(), new["batch_stats"]

    def mean(trees):
        return jax.tree.map(lambda *leaves: sum(leaves) / replicas, *trees)

    gradient = jax.jit(jax.grad(loss, has_aux=True))
    params, stats = variables["params"], variables["batch_stats"]
    for count in range(epochs * STEPS):
        batch = slice(count % STEPS * BATCH, (count % STEPS + 1) * BATCH)
        parts = zip(np.split(X[batch], replicas), np.split(Y[batch], replicas), strict=True)
        results = [
            gradient(params, stats, x, y, key_of(count, replica if distinct else None))
            for replica, (x, y) in enumerate(parts)
        ]
        gradients, stats = (mean(part) for part in zip(*results, strict=True))
        params = jax.tree.map(lambda p, g: p - RATE * g, params, gradients)
    return {"params": params, "batch_stats": stats}


def assert_close(received, expected, tolerance=1e-6):
    """Compare two pytrees."""
    assert jax.tree.structure(received) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(received), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


def raised(fn, *kinds):
    """Return the message of the error that a call raises."""
    try:
        fn()
    except kinds as error:
        return str(error)
    raise AssertionError("no error")


def run_checks(checks):
    """Run functions by name. Return for each what it raised, or an empty string."""
    import traceback

    results = {}
    for check in checks:
        try:
            check()
            results[check.__name__] = ""
        except Exception:
            results[check.__name__] = traceback.format_exc()
    return results
