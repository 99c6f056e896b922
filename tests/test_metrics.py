"""`JaxMetric`. The oracles: the functions themselves, and Keras's own metrics."""

import functools

import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest
from backends import to_numpy

import jaxwrap

pytestmark = pytest.mark.quick

register = jaxwrap.register_serializable("tests_metrics")
RNG = np.random.default_rng(0)
BATCHES = [
    (RNG.integers(0, 4, n).astype("int32"), RNG.standard_normal((n, 4)).astype("float32"))
    for n in (6, 3)
]
WEIGHTS = [RNG.uniform(0, 1, len(labels)).astype("float32") for labels, _ in BATCHES]


@register
def hits(labels, logits):
    return logits.argmax(axis=-1) == labels


@register
def init():
    return {"matrix": jnp.zeros((4, 4), "int32"), "best": jnp.full((), -jnp.inf)}


@register
def update(state, y_true, y_pred, sample_weight=None):
    matrix = state["matrix"].at[y_true, y_pred.argmax(axis=-1)].add(1)
    best = y_pred.max() if sample_weight is None else (y_pred.max(axis=-1) * sample_weight).max()
    return {"matrix": matrix, "best": jnp.maximum(state["best"], best)}


@register
def compute(state):
    matrix = state["matrix"]
    return {"accuracy": jnp.trace(matrix) / matrix.sum(), "best": state["best"]}


def triple():
    return jaxwrap.JaxMetric(init=init, update=update, compute=compute, name="confusion")


def plain(result):
    return {name: float(to_numpy(value)) for name, value in result.items()}


@pytest.mark.parametrize("weighted", [False, True])
def test_a_mean_is_that_of_keras(weighted, mode, backend):
    metric, own = jaxwrap.JaxMetric(hits), keras.metrics.SparseCategoricalAccuracy()
    assert metric.name == "hits"
    batches = [
        (*batch, weights) if weighted else batch
        for batch, weights in zip(BATCHES, WEIGHTS, strict=True)
    ]
    for batch in batches:
        own.update_state(*batch)
        if backend.name == "jax":
            values = [v.value for v in metric.variables]
            step = backend.compile(metric.stateless_update_state, mode)
            for variable, value in zip(metric.variables, step(values, *batch), strict=True):
                variable.assign(value)
        else:
            backend.compile(metric.update_state, mode, batch)(*batch)
    np.testing.assert_allclose(to_numpy(metric.result()), to_numpy(own.result()), 1e-6)
    metric.reset_state()
    assert float(to_numpy(metric.result())) == 0


def test_a_triple_is_the_three_functions():
    metric, state = triple(), init()
    for _ in range(2):
        for (labels, logits), weights in zip(BATCHES, WEIGHTS, strict=True):
            metric.update_state(labels, logits, weights)
            state = update(state, labels, logits, weights)
    assert plain(metric.result()) == pytest.approx(
        {name: float(value) for name, value in compute(state).items()}
    )
    paths = {v.path: (v.dtype, tuple(v.shape)) for v in metric.variables}
    assert paths == {
        "confusion/state/best": ("float32", ()),
        "confusion/state/matrix": ("int32", (4, 4)),
    }
    metric.reset_state()
    assert all(
        np.array_equal(to_numpy(v.value), first)
        for v, first in zip(metric.variables, (-np.inf, np.zeros((4, 4))), strict=True)
    )


def model_with(metrics, **kwargs):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Identity(name="same")])
    loss = jaxwrap.JaxLoss(optax.losses.softmax_cross_entropy_with_integer_labels)
    model.compile(loss=loss, metrics=metrics, **kwargs)
    return model


def test_evaluate():
    labels, logits = (np.concatenate(parts) for parts in zip(*BATCHES, strict=True))
    metrics = [jaxwrap.JaxMetric(hits), triple()]
    model = model_with(metrics, weighted_metrics=[jaxwrap.JaxMetric(hits, name="weighted")])
    weights = np.concatenate(WEIGHTS)
    for _ in range(2):
        logs = model.evaluate(
            logits, labels, sample_weight=weights, batch_size=4, verbose=0, return_dict=True
        )
    right = np.asarray(hits(labels, logits))
    assert logs["hits"] == pytest.approx(right.mean(), rel=1e-6)
    assert logs["accuracy"] == pytest.approx(right.mean(), rel=1e-6)
    assert logs["best"] == pytest.approx(logits.max(), rel=1e-6)
    assert logs["weighted"] == pytest.approx((right * weights).sum() / weights.sum(), rel=1e-5)


@pytest.mark.trains
def test_fit():
    labels, logits = BATCHES[0]
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4)])
    loss = jaxwrap.JaxLoss(optax.losses.softmax_cross_entropy_with_integer_labels)
    optimizer = jaxwrap.OptaxOptimizer(optax.adam, learning_rate=0.1)
    model.compile(optimizer, loss, metrics=[jaxwrap.JaxMetric(hits), triple()])
    history = model.fit(logits, labels, epochs=2, batch_size=2, verbose=0).history
    assert history["hits"] == pytest.approx(history["accuracy"], rel=1e-6)
    assert history["hits"][0] != history["hits"][1] or history["loss"][0] > history["loss"][1]


def test_metrics_are_saved(tmp_path):
    partial = functools.partial(optax.losses.huber_loss, delta=0.5)
    model = model_with([jaxwrap.JaxMetric(hits), triple()])
    labels, logits = BATCHES[0]
    expected = model.evaluate(logits, labels, verbose=0, return_dict=True)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert again.evaluate(logits, labels, verbose=0, return_dict=True) == expected
    metric = jaxwrap.JaxMetric.from_config(jaxwrap.JaxMetric(partial).get_config())
    metric.update_state(np.ones(3, "float32"), np.zeros(3, "float32"))
    assert metric.name == "huber_loss"
    assert float(to_numpy(metric.result())) == 0.375


def test_only_listed_names_are_loaded():
    config = {**triple().get_config(), "compute": {"kind": "name", "name": "os.getpid"}}
    with pytest.raises(ValueError, match=r"'os\.getpid' is not registered"):
        jaxwrap.JaxMetric.from_config(config)


# Bad input.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "received no function"),
        ({"init": init, "update": update}, "received init, update"),
        ({"fn": hits, "init": init}, "received fn, init"),
        ({"fn": 5}, "expected a function, received 5"),
        ({"init": init, "update": hits, "compute": compute}, r"fn\(state, y_true, y_pred\)"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(TypeError, match=message):
        jaxwrap.JaxMetric(**arguments)


def test_sample_weights_that_nobody_takes():
    metric = jaxwrap.JaxMetric(
        init=init, update=lambda state, y_true, y_pred: state, compute=compute, name="mine"
    )
    with pytest.raises(ValueError, match=r"'mine': received sample weights.*weighted_metrics"):
        metric.update_state(*BATCHES[0], WEIGHTS[0])


def test_a_state_whose_structure_changes():
    metric = jaxwrap.JaxMetric(
        init=init, update=lambda state, y_true, y_pred: {"best": 0.0}, compute=compute
    )
    with pytest.raises(ValueError, match=r"structure of the state\.\n  missing: matrix"):
        metric.update_state(*BATCHES[0])


def test_repr_names_the_function():
    metric = jaxwrap.JaxMetric(optax.losses.squared_error, name="mine")
    assert repr(metric) == "<JaxMetric 'mine': optax.losses.squared_error>"
    metric = jaxwrap.JaxMetric(init=init, update=update, compute=compute, name="mine")
    assert repr(metric) == f"<JaxMetric 'mine': {__name__}.update>"


@pytest.mark.trains
@pytest.mark.only("tensorflow")
@pytest.mark.parametrize(
    ("update", "message"),
    [
        (lambda state, labels, outputs: state + len(labels), r"`len\(x\)`.* need a size"),
        (
            lambda state, labels, outputs: state + (labels @ outputs).sum(),
            r"got \(1,\) and \(the unknown batch size,\)",
        ),
    ],
)
def test_errors_in_graphs_are_about_one_batch(update, message):
    metric = jaxwrap.JaxMetric(
        init=lambda: jnp.zeros(()),
        # Before what fails: batches of two sizes would fail here.
        update=lambda state, labels, outputs: update(
            state + (labels - outputs).sum(), labels, outputs
        ),
        compute=lambda state: state,
        name="sum",
    )
    model = keras.Sequential([keras.Input((1,)), keras.layers.Identity()])
    model.compile("sgd", "mse", metrics=[metric])
    with pytest.raises(ValueError, match=f"JaxMetric 'sum': .*{message}"):
        model.evaluate(np.ones((4, 1), "float32"), np.ones((4, 1), "float32"), verbose=0)
