"""Trains on two logical devices of TensorFlow; `test_replicas.py` runs it. The argument is the file for the results."""

import json
import os
import sys

import tensorflow as tf

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)

import flax.linen as nn  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import keras  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from replica_models import (  # noqa: E402
    BATCH,
    RATE,
    Net,
    Plain,
    X,
    Y,
    assert_close,
    key_of,
    make,
    raised,
    run_checks,
    train,
)

import jaxwrap  # noqa: E402

TWO = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
ONE = tf.distribute.MirroredStrategy(["CPU:0"])
NONE = tf.distribute.get_strategy()


def fitted(strategy, module, optimizer, epochs=1, metrics=(), **options):
    with strategy.scope():
        model = make(module, **options)
        model.compile(optimizer(), "mse", metrics=[make_metric() for make_metric in metrics])
    model.history = model.fit(X, Y, batch_size=BATCH, epochs=epochs, shuffle=False, verbose=0)
    return model


def sgd():
    return keras.optimizers.SGD(RATE)


def copies(variable):
    return [copy.numpy() for copy in variable.value.values]


def assert_in_step(variables):
    for variable in variables:
        first, second = copies(variable)
        np.testing.assert_array_equal(first, second, err_msg=variable.path)


def fit_with_state_and_masks_is_equal_to_plain_jax():
    start = make(Net()).layers[0].get_variables()
    model = fitted(TWO, Net(), sgd, epochs=2)
    assert_close(model.layers[0].get_variables(), train(start, 2, distinct=True, epochs=2))
    assert_in_step(model.variables)
    alike = fitted(TWO, Net(), sgd, distinct_masks=False)
    assert_close(alike.layers[0].get_variables(), train(start, 2, distinct=False))


def one_replica_stays_as_it_is():
    one, none = (fitted(strategy, Net(), sgd) for strategy in (ONE, NONE))
    for a, b in zip(one.variables, none.variables, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy(), err_msg=a.path)


def each_replica_draws_masks_of_its_own():
    def masks(**options):
        with TWO.scope():
            layer = jaxwrap.JaxLayer(
                lambda params, rng, inputs, training: jax.random.bits(rng, inputs.shape),
                params=(),
                seed=7,
                **options,
            )
            layer.build((2, 3))
        results = TWO.run(lambda: layer(tf.zeros((2, 3)), training=True))
        assert copies(layer.seed_generator.state)[0].tolist() == [7, 1]
        return [result.numpy() for result in TWO.experimental_local_results(results)]

    for replica, mask in enumerate(masks()):
        np.testing.assert_array_equal(mask, jax.random.bits(key_of(0, replica), (2, 3)))
    for options in ({"distinct_masks": False}, {"distinct_masks": False, "key_impl": "rbg"}):
        first, second = masks(**options)
        np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(
        masks(distinct_masks=False)[0], jax.random.bits(key_of(0), (2, 3))
    )
    assert (masks(key_impl="rbg")[0] != masks(key_impl="rbg")[1]).any()


def state_is_aggregated_by_dtype_or_by_rule():
    def call(params, state, inputs):
        total = inputs.sum()
        count = state["count"] + total.astype("int32")
        floats = {name: state[name] + total for name in state if name != "count"}
        return inputs, {**floats, "count": count}

    names = ("mean", "sum", "first", "none", "complex")
    state = {name: jnp.zeros((), "complex64" if name == "complex" else "float32") for name in names}
    rules = {
        "state/sum": jaxwrap.Rule(aggregation="sum"),
        "state/first": jaxwrap.Rule(aggregation="only_first_replica"),
        "state/none": jaxwrap.Rule(aggregation="none"),
    }
    with TWO.scope():
        layer = jaxwrap.JaxLayer(call, state={**state, "count": jnp.int32(0)}, rules=rules)
        layer.build((1,))
    inputs = TWO.experimental_distribute_values_from_function(
        lambda context: tf.constant([1.0 + 2 * context.replica_id_in_sync_group])
    )
    for _ in range(2):
        TWO.run(layer, args=(inputs,))
    received = {name: copies(variable) for name, variable in layer.state.items()}
    # Replicas add 1 and 3 to what they have, twice.
    assert received["mean"] == [4, 4]
    assert received["complex"] == [2, 2]  # TensorFlow has no mean of complex numbers
    assert received["sum"] == [12, 12]  # 4, then 4 + 1 and 4 + 3
    assert received["first"] == [2, 2]
    assert received["count"] == [2, 2]
    assert received["none"] == [2, 6]
    error = raised(lambda: TWO.run(lambda: layer.sync_state()), RuntimeError)
    assert "between steps" in error, error
    layer.sync_state("mean")
    assert copies(layer.state["none"]) == [4, 4]
    assert received["mean"] == copies(layer.state["mean"])
    TWO.run(layer, args=(inputs,))
    layer.sync_state("first")
    assert copies(layer.state["none"]) == [5, 5]


def metrics_are_those_of_all_replicas():
    def call(params, inputs, training):
        return jaxwrap.CallResult(inputs * params, metrics={"size": inputs.mean()})

    def worst():
        return jaxwrap.JaxMetric(
            init=lambda: jnp.zeros(()),
            update=lambda state, y_true, y_pred: jnp.maximum(state, jnp.abs(y_true).max()),
            compute=lambda state: state,
            name="worst",
        )

    with TWO.scope():
        layer = jaxwrap.JaxLayer(call, params=jnp.float32(1), name="layer")
        model = keras.Sequential([keras.Input((1,)), layer])
        model.compile(sgd(), "mse", metrics=[worst()])
    # The second replica has the greater ones.
    inputs = np.array([[1.0], [2.0], [3.0], [4.0]], "float32")
    logs = model.fit(inputs, inputs, batch_size=4, verbose=0).history
    assert logs["layer/size"] == [2.5], logs
    assert logs["worst"] == [4.0], logs


def optax_makes_one_update():
    def plateau():
        return optax.chain(
            optax.sgd(RATE), optax.contrib.reduce_on_plateau(0.5, patience=1, rtol=0.5)
        )

    for optimizer in (
        lambda: jaxwrap.OptaxOptimizer(optax.sgd, RATE, momentum=0.9, clipnorm=100.0),
        lambda: jaxwrap.OptaxOptimizer(plateau),  # sees the loss
    ):
        two, none = (fitted(strategy, Plain(), optimizer, epochs=3) for strategy in (TWO, NONE))
        assert_in_step([*two.variables, *two.optimizer.variables])
        assert len(two.optimizer.variables) > 5
        pairs = zip(
            [*two.variables, *two.optimizer.variables],
            [*none.variables, *none.optimizer.variables],
            strict=True,
        )
        for a, b in pairs:
            np.testing.assert_allclose(copies(a)[0], b.numpy(), atol=1e-6, err_msg=a.path)


def optax_in_a_loop():
    with TWO.scope():
        model = make(Plain())
        optimizer = jaxwrap.OptaxOptimizer(optax.sgd, RATE)
    variables = model.trainable_variables

    def step(**extra):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(X[:2]))
        optimizer.apply(tape.gradient(loss, variables), variables, **extra)

    error = raised(lambda: TWO.run(step), ValueError)
    assert "cannot be built by one of the replicas" in error, error
    before = [v.numpy() for v in variables]
    with TWO.scope():
        optimizer.build(variables)
    error = raised(lambda: TWO.run(lambda: step(other=tf.constant(1.0))), ValueError)
    assert "`other`" in error, error
    assert [(v.numpy() == b).all() for v, b in zip(variables, before, strict=True)] == [True] * 4
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(model(X[:2]))
    gradients = tape.gradient(loss, variables)
    tf.function(lambda: TWO.run(step))()
    for variable, start, gradient in zip(variables, before, gradients, strict=True):
        expected = start - 2 * RATE * gradient.numpy()
        np.testing.assert_allclose(variable.numpy(), expected, atol=1e-6)
    assert_in_step(variables)


def weights_go_to_files_and_back():
    model = fitted(TWO, Net(), sgd)
    model.save_weights(FILE)
    other = make(Net())
    other.load_weights(FILE)
    with TWO.scope():
        again = make(Net())
    again.load_weights(FILE)
    assert_in_step(again.variables)
    for loaded in (other, again):
        for a, b in zip(loaded.variables, model.variables, strict=True):
            np.testing.assert_array_equal(a.numpy(), b.numpy(), err_msg=a.path)
    assert model.layers[0].seed_generator.state.numpy().tolist() == [7, 4]


def a_loop_inside_a_step_draws():
    with TWO.scope():
        layer = jaxwrap.FlaxLayer(nn.Dropout(0.5, deterministic=False), name="drop")
        layer.build((2, 3))

    def step():
        return tf.while_loop(
            lambda count, _: count < 3,
            lambda count, total: (count + 1, total + layer(tf.ones((2, 3)), training=True)),
            [0, tf.zeros((2, 3))],
        )[1]

    first, second = TWO.experimental_local_results(tf.function(lambda: TWO.run(step))())
    assert (first.numpy() != second.numpy()).any()
    assert [copy[1] for copy in copies(layer.seed_generator.state)] == [3, 3]


FILE = os.path.join(os.path.dirname(sys.argv[1]), "model.weights.h5")
results = run_checks(
    [
        fit_with_state_and_masks_is_equal_to_plain_jax,
        one_replica_stays_as_it_is,
        each_replica_draws_masks_of_its_own,
        state_is_aggregated_by_dtype_or_by_rule,
        metrics_are_those_of_all_replicas,
        optax_makes_one_update,
        optax_in_a_loop,
        weights_go_to_files_and_back,
        a_loop_inside_a_step_draws,
    ]
)
with open(sys.argv[1], "w") as file:
    json.dump(results, file)
