"""What a layer puts into a TensorFlow graph."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backends import to_numpy
from models import x

from jaxwrap import JaxLayer, wrap_function

pytestmark = [pytest.mark.only("tensorflow"), pytest.mark.each_jax, pytest.mark.lowered]


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


# `tf.vectorized_map`.


def scaled(w, row):
    return jnp.sort(jnp.tanh(row) @ w, descending=True) * jnp.arange(1.0, 3.0)


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("size", [5, None])
def test_a_vectorized_map_and_its_gradients(graph, size):
    import tensorflow as tf

    w, rows = x(3, 2), x(5, 3, seed=1)
    fn = wrap_function(scaled)

    def run(w, rows):
        with tf.GradientTape() as tape:
            tape.watch([w, rows])
            outputs = tf.vectorized_map(lambda row: fn(w, row), rows, fallback_to_while_loop=False)
            loss = tf.reduce_sum(outputs**3)
        return outputs, tape.gradient(loss, [w, rows])

    if graph:
        run = tf.function(run, input_signature=[tf.TensorSpec((3, 2)), tf.TensorSpec((size, 3))])
    outputs, gradients = run(tf.constant(w), tf.constant(rows))

    mapped = jax.vmap(scaled, (None, 0))
    np.testing.assert_allclose(outputs, mapped(w, rows), 1e-5, 1e-5)
    expected = jax.grad(lambda w, rows: (mapped(w, rows) ** 3).sum(), (0, 1))(w, rows)
    for one, two in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(tf.convert_to_tensor(one), two, 1e-4, 1e-5)


def test_gradients_inside_of_a_vectorized_map():
    import tensorflow as tf

    w, rows = x(3, 2), x(5, 3, seed=1)
    fn = wrap_function(scaled)

    def one(row):
        with tf.GradientTape() as tape:
            tape.watch(row)
            loss = tf.reduce_sum(fn(tf.constant(w), row) ** 3)
        return tape.gradient(loss, row)

    @tf.function
    def run(rows):
        with tf.GradientTape() as tape:
            tape.watch(rows)
            gradients = tf.vectorized_map(one, rows, fallback_to_while_loop=False)
            total = tf.reduce_sum(gradients**2)
        return gradients, tape.gradient(total, rows)

    inner = jax.vmap(jax.grad(lambda row: (scaled(w, row) ** 3).sum()))
    gradients, second = run(tf.constant(rows))
    np.testing.assert_allclose(gradients, inner(rows), 1e-4, 1e-5)
    expected = jax.grad(lambda rows: (inner(rows) ** 2).sum())(rows)
    np.testing.assert_allclose(second, expected, 1e-3, 1e-4)


def test_a_layer_in_a_vectorized_map_trains():
    import keras

    layer = JaxLayer(lambda params, inputs: inputs @ params, params=x(3, 2))

    class EachOne(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.inner = layer

        def call(self, inputs):
            return keras.ops.vectorized_map(lambda one: self.inner(one[None])[0], inputs)

    layer.build((None, 3))
    model = keras.Sequential([keras.Input((3,)), EachOne()])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    inputs, targets, before = x(8, 3), x(8, 2, seed=1), x(3, 2)
    model.fit(inputs, targets, batch_size=8, verbose=0)
    gradient = jax.grad(lambda w: ((inputs @ w - targets) ** 2).mean())(before)
    np.testing.assert_allclose(to_numpy(layer.params.value), before - 0.1 * gradient, 1e-4, 1e-5)


@pytest.mark.parametrize("watched", [True, False])
def test_a_graph_that_is_dropped_takes_the_layer_with_it(watched):
    """TensorFlow's own `custom_gradient` keeps in a table of the process what is in the graph."""
    from tensorflow.python.framework import ops

    names = set(ops.gradient_registry.list())

    def use():
        layer = JaxLayer(lambda params, inputs: jnp.sin(inputs @ params), params=x(3, 2))
        layer.build((None, 3))
        step, _ = steps(layer, (4, 3), watched)
        step(x(4, 3))
        assert set(ops.gradient_registry.list()) - names
        return weakref.ref(layer), weakref.ref(layer.adapter.call_fn)

    alive = use()
    for _ in range(5):  # graphs go first, one after the other, and then what they held
        gc.collect()
    assert [one() for one in alive] == [None, None]
    assert set(ops.gradient_registry.list()) <= names


def test_a_gradient_outlives_the_python_function_of_its_graph():
    """As long as something can differentiate the graph, also where it is copied into another one."""
    import tensorflow as tf

    fn = wrap_function(lambda x: jnp.sin(x) * x)
    rows = x(4)
    expected = jax.grad(lambda x: (jnp.sin(x) * x).sum())(rows)

    @tf.function
    def outer(inputs):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = tf.cond(inputs[0] < 1e6, lambda: tf.function(fn)(inputs), lambda: inputs)
            gc.collect()
        return tape.gradient(outputs, inputs)

    np.testing.assert_allclose(outer(tf.constant(rows)), expected, 1e-4, 1e-5)

    looped = tf.function(lambda inputs: tf.map_fn(tf.function(fn), inputs))
    with tf.GradientTape() as tape:
        inputs = tf.constant(rows)
        tape.watch(inputs)
        outputs = looped(inputs)
        gc.collect()
    np.testing.assert_allclose(tape.gradient(outputs, inputs), expected, 1e-4, 1e-5)
