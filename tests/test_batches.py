"""`PaddedBatches`. The oracles: `jax.grad` of the mean over the real rows, and `fit` with the arrays themselves."""

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from backends import to_numpy

import jaxwrap

RNG = np.random.default_rng(0)
X = RNG.standard_normal((10, 3)).astype("float32")
Y = RNG.standard_normal((10, 2)).astype("float32")
WEIGHTS = RNG.uniform(0.5, 2, 10).astype("float32")
PARAMS = {"kernel": RNG.standard_normal((3, 2)).astype("float32")}


def dense(params, inputs):
    return jnp.tanh(inputs @ params["kernel"])


def compiled(**options):
    layer = jaxwrap.JaxLayer(dense, params=PARAMS)
    model = keras.Sequential([keras.Input((3,)), layer])
    options = {"optimizer": keras.optimizers.SGD(0.5), "loss": "mse", **options}
    model.compile(**options)
    return model


def padded(*arrays, **options):
    return jaxwrap.PaddedBatches(*arrays, batch_size=4, **options)


def kernel(model):
    return to_numpy(model.trainable_variables[0].value)


def close(received, expected, tolerance=1e-6):
    np.testing.assert_allclose(received, expected, tolerance, tolerance)


@pytest.mark.quick
@pytest.mark.trains
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "weighted"])
def test_a_step_on_the_last_batch_is_that_of_its_rows(weights):
    def mean(params):
        rows = jnp.square(dense(params, X[8:]) - Y[8:]).mean(axis=-1)
        return (rows if weights is None else rows * weights[8:]).mean()

    loss, gradients = jax.value_and_grad(mean)(PARAMS)
    batch = padded(X, Y, weights)[2]
    assert [len(part) for part in batch] == [4, 4, 4]
    model = compiled()
    close(model.train_on_batch(*batch), loss)
    close(kernel(model), PARAMS["kernel"] - 0.5 * gradients["kernel"])


@pytest.mark.trains
def test_fit_ends_where_it_does_with_the_arrays():
    ours, theirs = compiled(), compiled()
    ours.fit(padded(X, Y, WEIGHTS), epochs=2, shuffle=False, verbose=0)
    theirs.fit(X, Y, 4, sample_weight=WEIGHTS, epochs=2, shuffle=False, verbose=0)
    close(kernel(ours), kernel(theirs))
    assert abs(kernel(ours) - PARAMS["kernel"]).max() > 0.01


@pytest.mark.only("jax")
@pytest.mark.parametrize(("data", "traces"), [((X, Y, 4), 2), ((padded(X, Y),), 1)])
def test_fit_compiles_one_step(data, traces):
    class Counting(keras.Sequential):
        steps = 0

        def train_step(self, *args):
            type(self).steps += 1
            return super().train_step(*args)

    model = Counting([keras.Input((3,)), jaxwrap.JaxLayer(dense, params=PARAMS)])
    model.compile("sgd", "mse")
    model.fit(*data, epochs=2, verbose=0)
    assert Counting.steps == traces


@pytest.mark.quick
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "weighted"])
def test_evaluate_gives_the_means_over_all_rows(weights):
    model = compiled(weighted_metrics=["mae", keras.metrics.MeanSquaredError()])
    received = model.evaluate(padded(X, Y, weights, training=False), verbose=0)
    close(received, model.evaluate(X, Y, 4, sample_weight=weights, verbose=0))


@pytest.mark.quick
def test_predict_without_labels():
    predictions = compiled().predict(padded(X), verbose=0)
    assert predictions.shape == (12, 2)
    close(predictions[:10], dense(PARAMS, X))


classes = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
accuracy = keras.metrics.SparseCategoricalAccuracy
squares = keras.losses.MeanSquaredError()
distance = keras.metrics.MeanAbsoluteError
# Loss, metric, and the shapes of labels and predictions.
RANKS = {
    "numbers": (squares, distance, (10,), (10, 1)),
    "images": (squares, distance, (10, 4, 4, 3), (10, 4, 4, 3)),
    "classes": (classes, accuracy, (10,), (10, 3)),
    # As long as a batch: a wrong axis would not be seen.
    "tokens": (classes, accuracy, (10, 4), (10, 4, 3)),
    "pixels": (classes, accuracy, (10, 4, 4), (10, 4, 4, 3)),
}


@pytest.mark.once
@pytest.mark.parametrize("case", RANKS)
def test_weights_fit_losses_of_any_rank(case):
    loss, metric, shape, predicted = RANKS[case]
    labels = RNG.integers(0, 3, shape).astype("float32")
    predictions = RNG.standard_normal(predicted).astype("float32")
    last, labels_of_last, weights = padded(predictions, labels)[2]
    expected = to_numpy(loss(labels[8:], predictions[8:]))
    close(to_numpy(loss(labels_of_last, last, weights)), expected, 1e-5)
    whole, parts = metric(), metric()
    whole.update_state(labels, predictions)
    for x, y, w in padded(predictions, labels, training=False):
        parts.update_state(y, x, w)
    close(to_numpy(parts.result()), to_numpy(whole.result()), 1e-5)


@pytest.mark.parametrize("make", [list, tuple, lambda pair: dict(zip("ab", pair, strict=True))])
def test_nests_of_arrays(make, backend):
    first, second = keras.Input((3,), name="a"), keras.Input((1,), name="b")
    joined = keras.layers.Concatenate()([first, second])
    outputs = [keras.layers.Dense(2)(joined), keras.layers.Reshape((2, 2))(joined)]
    model = keras.Model(make([first, second]), make(outputs))
    model.compile(keras.optimizers.SGD(0.5), loss=make(["mse", "mse"]))
    inputs = make([X, X[:, :1].astype("float64")])
    labels = make([Y, X[:, :2, None] + Y[:, None]])
    batches = padded(inputs, labels)
    assert [array.shape for array in jax.tree.leaves(batches[2][2])] == [(4, 1), (4, 1, 1)]
    rows = jax.tree.map(lambda array: array[8:], (inputs, labels))
    expected = model.test_on_batch(*rows, return_dict=True)["loss"]
    model.reset_metrics()
    close(model.test_on_batch(*batches[2], return_dict=True)["loss"], expected, 1e-5)
    model.evaluate(batches, verbose=0)
    if backend.trains:
        model.fit(batches, verbose=0)


@pytest.mark.once
@pytest.mark.quick
def test_each_epoch_has_every_row_once():
    def epochs(seed):
        batches = padded(X, np.arange(10), shuffle=True, seed=seed)
        orders = []
        for _ in range(3):
            rows = [labels[weights > 0] for _, labels, weights in batches]
            assert [len(part) for part in rows] == [4, 4, 2]
            orders.append(np.concatenate(rows).tolist())
            batches.on_epoch_end()
        return orders

    first = epochs(1)
    assert all(sorted(order) == list(range(10)) for order in first)
    assert len({tuple(order) for order in first}) == 3
    assert epochs(1) == first != epochs(2)
    keras.utils.set_random_seed(5)
    unseeded = epochs(None)
    keras.utils.set_random_seed(5)
    assert epochs(None) == unseeded


@pytest.mark.once
@pytest.mark.quick
def test_fewer_rows_than_a_batch_and_a_multiple():
    inputs, labels, weights = padded(X[:1], Y[:1])[0]
    assert (inputs == X[0]).all()
    assert (labels == Y[0]).all()
    assert weights.ravel().tolist() == [4, 0, 0, 0]
    full = padded(X[:8], Y[:8])
    assert len(full) == 2
    assert all((weights == 1).all() for _, _, weights in full)


@pytest.mark.once
@pytest.mark.quick
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({"a": X, "b": X[1:]}, Y), r"`x/b` has 9 rows, .* \(9, 3\); expected 10, as `x/a` has"),
        ((X, [Y, Y[:4]]), "`y/1` has 4 rows, .* expected 10, as `x` has"),
        ((X, Y, WEIGHTS[:3]), "`sample_weight` has 3 rows"),
        ((X, [Y, Y], [WEIGHTS]), "`sample_weight` has 1 arrays, `y` has 2"),
        ((X, None, WEIGHTS), "`sample_weight` without `y`"),
        ((X[:0], Y[:0]), "`x` has no rows"),
        (({}, Y), "`x` has no arrays"),
        (([1.0, 2.0], Y), "`x/0` is 1.0, which has no rows"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=f"PaddedBatches: .*{message}"):
        padded(*arguments)


@pytest.mark.once
@pytest.mark.quick
@pytest.mark.parametrize("size", [0, -1, 2.0, None])
def test_wrong_batch_sizes(size):
    with pytest.raises(ValueError, match="PaddedBatches: `batch_size` must be an integer"):
        jaxwrap.PaddedBatches(X, Y, batch_size=size)
