"""`JaxLoss`. The oracles: the function itself for values, `jax.grad` of it for gradients, Keras for reductions."""

import concurrent.futures
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest
from backends import to_numpy

import jaxwrap

register = jaxwrap.register_serializable("tests_losses")
RNG = np.random.default_rng(0)
LOGITS = RNG.standard_normal((6, 4)).astype("float32")
CLASSES = RNG.integers(0, 4, 6).astype("int32")
FLOATS = RNG.uniform(0.1, 1, (6, 4)).astype("float32")
PROBABILITIES = np.asarray(jax.nn.softmax(FLOATS))
WEIGHTS = RNG.uniform(0, 1, 6).astype("float32")

losses = optax.losses
# Function and labels; the predictions are LOGITS.
CASES = {
    "softmax_cross_entropy_with_integer_labels": CLASSES,
    "softmax_cross_entropy": PROBABILITIES,
    "safe_softmax_cross_entropy": PROBABILITIES,
    "poly_loss_cross_entropy": PROBABILITIES,
    "sigmoid_binary_cross_entropy": FLOATS,
    "sigmoid_focal_loss": FLOATS,
    "squared_error": FLOATS,
    "l2_loss": FLOATS,
    "huber_loss": FLOATS,
    "log_cosh": FLOATS,
    "hinge_loss": np.sign(FLOATS - 0.5),
    "cosine_distance": FLOATS,
    "generalized_kl_divergence": PROBABILITIES,
    "kl_divergence": PROBABILITIES,
    "kl_divergence_with_log_targets": np.log(PROBABILITIES),
    "multiclass_hinge_loss": CLASSES,
    "ranking_softmax_loss": FLOATS,
}


@pytest.mark.once
def test_there_are_optax_losses_of_both_kinds():
    assert set(CASES) <= set(dir(losses))


@pytest.mark.parametrize("name", CASES)
def test_losses_of_optax(name, mode, backend):
    fn, labels = getattr(losses, name), CASES[name]
    loss = jaxwrap.JaxLoss(fn)
    expected = np.asarray(fn(LOGITS, labels)).mean()
    call = backend.compile(loss, mode, [labels, LOGITS])
    tensors = [keras.ops.convert_to_tensor(array) for array in (labels, LOGITS)]
    np.testing.assert_allclose(to_numpy(call(*tensors)), expected, 1e-5, 1e-6)


def of_examples(loss):
    return loss.mean(axis=-1) if loss.ndim > 1 else loss


@pytest.mark.quick
@pytest.mark.trains
@pytest.mark.parametrize("name", ["softmax_cross_entropy_with_integer_labels", "huber_loss"])
def test_gradients_are_those_of_jax(name, mode, backend):
    if mode == "batch":
        return
    fn, labels = getattr(losses, name), CASES[name]
    loss = jaxwrap.JaxLoss(fn, reduction="sum")
    expected = jax.grad(lambda logits: (of_examples(fn(logits, labels)) * WEIGHTS).sum())(LOGITS)
    cotangents = [np.float32(1)]

    def weighted(labels, logits):
        return (loss(labels, logits, WEIGHTS),)

    (received,) = backend.vjp(weighted, [labels, LOGITS], [1], cotangents, mode)
    np.testing.assert_allclose(to_numpy(received), expected, 1e-5, 1e-6)


def squares(y_true, y_pred):
    return jnp.square(y_true - y_pred).mean(axis=-1)


@pytest.mark.quick
@pytest.mark.parametrize(
    "reduction", ["sum_over_batch_size", "sum", "mean", "mean_with_sample_weight", None, "none"]
)
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "weighted"])
def test_reductions_and_weights_are_those_of_keras(reduction, weights):
    ours = jaxwrap.JaxLoss(squares, reduction)(FLOATS, LOGITS, weights)
    theirs = keras.losses.MeanSquaredError(reduction)(FLOATS, LOGITS, weights)
    np.testing.assert_allclose(to_numpy(ours), to_numpy(theirs), 1e-5, 1e-6)


def test_masks_are_those_of_keras():
    ids = np.array([[1, 2, 0], [3, 0, 0]])
    labels = FLOATS[:, :3].reshape(2, 3, 3)
    outputs = keras.layers.Embedding(5, 3, mask_zero=True)(ids)
    ours = jaxwrap.JaxLoss(squares)(labels, outputs)
    theirs = keras.losses.MeanSquaredError()(labels, outputs)
    np.testing.assert_allclose(to_numpy(ours), to_numpy(theirs), 1e-5, 1e-6)
    plain = jaxwrap.JaxLoss(squares)(labels, keras.ops.convert_to_tensor(to_numpy(outputs)))
    assert abs(float(to_numpy(plain)) - float(to_numpy(ours))) > 1e-3


@pytest.mark.once
def test_the_order_of_the_arguments():
    def minus(first, second):
        return first - second

    def by_name(logits, labels):
        return labels - logits

    def half_named(whatever, y_pred):
        return whatever - y_pred

    for fn in (minus, by_name, half_named, functools.partial(by_name)):
        received = jaxwrap.JaxLoss(fn, None)(FLOATS, LOGITS)
        np.testing.assert_allclose(to_numpy(received), (FLOATS - LOGITS).mean(axis=-1), 1e-5)


def test_nested_labels_and_predictions():
    def total(y_true, y_pred):
        return squares(y_true["a"], y_pred["a"]) + squares(y_true["b"][0], y_pred["b"][0])

    trees = [{"a": array, "b": (2 * array,)} for array in (FLOATS, LOGITS)]
    received = jaxwrap.JaxLoss(total)(*trees)
    np.testing.assert_allclose(to_numpy(received), np.asarray(total(*trees)).mean(), 1e-5)


def test_dtypes():
    seen = []

    def fn(y_true, y_pred):
        seen.append((str(y_true.dtype), str(y_pred.dtype)))
        return jnp.zeros(6, y_pred.dtype)

    assert keras.backend.standardize_dtype(jaxwrap.JaxLoss(fn)(CLASSES, LOGITS).dtype) == "float32"
    half = jaxwrap.JaxLoss(fn, dtype="float16")(FLOATS, LOGITS)
    assert keras.backend.standardize_dtype(half.dtype) == "float16"
    assert seen == [("int32", "float32"), ("float16", "float16")]


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return {"class": nn.Dense(4)(x), "value": nn.Dense(1)(x)}


@pytest.mark.trains
def test_fit_with_several_outputs():
    """Against a loop of JAX, with sample weights."""
    layer = jaxwrap.FlaxLayer(Net(), seed=0, name="net")
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layer(inputs))
    y = {"class": CLASSES, "value": FLOATS[:, :1]}
    params = layer.get_variables()["params"]

    @jax.jit
    def step(params):
        def loss(params):
            outputs = Net().apply({"params": params}, LOGITS)
            entropy = losses.softmax_cross_entropy_with_integer_labels(outputs["class"], y["class"])
            huber = losses.huber_loss(outputs["value"], y["value"])
            return (entropy * WEIGHTS).mean() + 2 * (huber[:, 0] * WEIGHTS).mean()

        value, gradients = jax.value_and_grad(loss)(params)
        return value, jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients)

    model.compile(
        keras.optimizers.SGD(0.1),
        loss={
            "class": jaxwrap.JaxLoss(losses.softmax_cross_entropy_with_integer_labels),
            "value": jaxwrap.JaxLoss(losses.huber_loss),
        },
        loss_weights={"class": 1.0, "value": 2.0},
    )
    history = model.fit(
        LOGITS, y, sample_weight={"class": WEIGHTS, "value": WEIGHTS},
        batch_size=6, epochs=3, verbose=0,
    )  # fmt: skip
    for value in history.history["loss"]:
        expected, params = step(params)
        assert value == pytest.approx(float(expected), rel=1e-5)
    for one, two in zip(
        jax.tree.leaves(params), jax.tree.leaves(layer.get_variables()["params"]), strict=True
    ):
        np.testing.assert_allclose(two, one, 1e-5, 1e-6)


# Saving.


@register
def registered(y_true, y_pred):
    return squares(y_true, y_pred)


def saved_losses():
    return {
        "optax": jaxwrap.JaxLoss(losses.softmax_cross_entropy_with_integer_labels, "sum"),
        "partial": jaxwrap.JaxLoss(functools.partial(losses.poly_loss_cross_entropy, epsilon=0.5)),
        "registered": jaxwrap.JaxLoss(registered, name="mine", dtype="float32"),
    }


@pytest.mark.quick
@pytest.mark.parametrize("name", ["optax", "partial", "registered"])
def test_losses_are_saved(name, tmp_path):
    loss = saved_losses()[name]
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4)])
    model.compile(loss=loss)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras").loss
    labels = CLASSES if name == "optax" else PROBABILITIES
    assert (again.name, again.reduction, again.dtype) == (loss.name, loss.reduction, loss.dtype)
    assert float(to_numpy(again(labels, LOGITS))) == float(to_numpy(loss(labels, LOGITS)))


@pytest.mark.once
def test_only_listed_names_are_loaded():
    config = {**jaxwrap.JaxLoss(registered).get_config(), "fn": {"kind": "name", "name": "os.kill"}}
    with pytest.raises(ValueError, match=r"'os\.kill' is not registered"):
        jaxwrap.JaxLoss.from_config(config)


@pytest.mark.once
@pytest.mark.parametrize(
    "fn",
    [
        lambda y_hat, y: (1 - y) * y_hat.sum(-1),
        lambda preds, target: (1 - target) * preds.sum(-1),
        lambda y, y_hat: (1 - y) * y_hat.sum(-1),
        lambda gt, out: (1 - gt) * out.sum(-1),
        lambda a, b: (1 - a) * b.sum(-1),
    ],
)
def test_usual_names_say_which_are_the_labels(fn):
    labels, predictions = np.array([0.0, 1.0, 0.5], "float32"), np.ones((3, 2), "float32")
    expected = ((1 - labels) * 2).mean()
    assert float(to_numpy(jaxwrap.JaxLoss(fn)(labels, predictions))) == pytest.approx(expected)


def test_threads_keep_their_own_labels():
    def slow(labels, logits):
        return (logits.sum(-1) * 0 + labels).astype("float32")

    loss = jaxwrap.JaxLoss(slow)
    values = np.arange(480)
    predictions = keras.ops.convert_to_tensor(np.zeros((1, 2), "float32"))
    loss(np.array([0]), predictions)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda v: float(to_numpy(loss(np.array([v]), predictions))), values))
    np.testing.assert_array_equal(found, values)


# Bad input.


@pytest.mark.once
@pytest.mark.quick
@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (5, "expected a function, received 5"),
        (losses.ctc_loss, "cannot be called so: missing a required argument"),
        (lambda y_true, labels: y_true, "does not say which ones are the labels"),
        (lambda y_true: y_true, "too many positional arguments"),
        (lambda p, y: p, "If 'y' is the labels, call the other one `y_pred`"),
    ],
)
def test_bad_functions(fn, message):
    with pytest.raises(TypeError, match=rf"JaxLoss 'mine'.*{message}.*fn\(y_true, y_pred\)"):
        jaxwrap.JaxLoss(fn, name="mine")


# Printing.


@pytest.mark.once
@pytest.mark.quick
@pytest.mark.parametrize(
    ("fn", "name"),
    [
        (losses.squared_error, "optax.losses.squared_error"),
        (functools.partial(losses.huber_loss, delta=2.0), "optax.losses.huber_loss"),
        (squares, f"{__name__}.squares"),
        (lambda y_true, y_pred: y_true - y_pred, "<lambda>"),
    ],
)
def test_repr_names_the_function(fn, name):
    assert repr(jaxwrap.JaxLoss(fn, name="mine")) == f"<JaxLoss 'mine': {name}>"
