"""What a layer puts into a TensorFlow graph."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backends import to_numpy
from models import x

from jaxwrap import JaxLayer

pytestmark = pytest.mark.only("tensorflow")


def steps(layer, shape, watched=True):
    """A `tf.function` of a layer, and of its gradients if it is watched, traced for inputs of some shape."""
    import tensorflow as tf

    @tf.function(input_signature=[tf.TensorSpec(shape, "float32")])
    def step(inputs):
        if not watched:
            return layer(inputs, training=True)
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(layer(inputs, training=True) ** 2)
        return loss, tape.gradient(loss, [v.value for v in layer.trainable_variables])

    return step, step.get_concrete_function()


def modules(graph):
    """The functions of JAX in a graph, as lists of the numbers of their outputs."""
    return [len(op.outputs) for op in graph.graph.get_operations() if op.type == "XlaCallModule"]


@pytest.mark.parametrize("shape", [(4, 3), (None, 3)])
def test_a_gradient_computes_nothing_again(shape):
    traced = []

    def call(params, inputs):
        traced.append(1)
        return jnp.exp(jnp.sin(inputs @ params["w"]) @ params["v"])

    params = {"w": x(3, 5), "v": x(5, 2)}
    layer = JaxLayer(call, params=params)
    layer.build(shape)
    assert not layer.metrics  # to know that takes a trace of its own
    traced.clear()
    step, graph = steps(layer, shape)
    assert len(traced) == 1
    assert len(modules(graph)) == 2

    inputs = x(4, 3)
    loss, gradients = step(inputs)

    def loss_of(params):
        return (call(params, inputs) ** 2).sum()

    expected = jax.value_and_grad(loss_of)(params)
    np.testing.assert_allclose(to_numpy(loss), expected[0], rtol=1e-5)
    by_path = dict(zip([v.name for v in layer.trainable_variables], gradients, strict=True))
    for name, gradient in expected[1].items():
        np.testing.assert_allclose(to_numpy(by_path[name]), gradient, rtol=1e-5, atol=1e-5)


def test_a_graph_without_a_tape_has_no_residuals():
    params = {"w": x(3, 5), "v": x(5, 2)}
    layer = JaxLayer(
        lambda params, inputs: jnp.sin(inputs @ params["w"]) @ params["v"], params=params
    )
    layer.build((None, 3))
    _, graph = steps(layer, (None, 3), watched=False)
    assert modules(graph) == [1]


@pytest.mark.parametrize("impl", [None, "threefry2x32", "rbg"])
def test_a_gradient_has_the_mask_of_its_dropout(impl):
    """Keys may be among the residuals, and TensorFlow has no dtype for them."""

    @jax.custom_vjp
    def drop(x, key):
        return jnp.where(jax.random.bernoulli(key, 0.5, x.shape), x, 0)

    def forward(x, key):
        return drop(x, key), (key, x)

    def backward(residuals, cotangent):
        key, x = residuals
        return jnp.where(jax.random.bernoulli(key, 0.5, x.shape), cotangent, 0), None

    drop.defvjp(forward, backward)
    layer = JaxLayer(
        lambda params, rng, inputs: inputs * drop(params, rng),
        params=np.ones(64, "float32"),
        key_impl=impl,
    )
    layer.build((None, 64))
    step, _ = steps(layer, (None, 64))
    loss, (gradient,) = step(np.ones((1, 64), "float32"))
    # The loss is how many are kept, and so is half of the sum of the gradients, 2 for each of these.
    assert 0 < float(loss) < 64
    assert float(loss) == to_numpy(gradient).sum() / 2


def test_sizes_that_residuals_do_not_tell_are_no_obstacle():
    """The only residual is of a size of which JAX cannot tell what the unknown one has been."""

    def call(params, inputs):
        flat = jnp.concatenate([inputs.reshape(-1), inputs.reshape(-1)])
        return jnp.sum(jnp.sin(flat * params))[None]

    layer = JaxLayer(call, params=np.float32(0.5))
    layer.build((None, None))
    step, _ = steps(layer, (None, None))
    inputs = x(2, 3)
    _, (gradient,) = step(inputs)
    expected = jax.grad(lambda params: (call(params, inputs) ** 2).sum())(jnp.float32(0.5))
    np.testing.assert_allclose(to_numpy(gradient), expected, rtol=1e-5)
