"""`OptaxOptimizer` beside native Optax, run in the same process on the same gradients."""

import concurrent.futures
import functools
import threading

import flax.linen as nn
import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest
from backends import to_numpy
from models import once_except
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
        scale = np.abs(one).max() if tolerance else 0
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


# Those whose state has integers, keys and other trees; the update of all is one JAX function.
@pytest.mark.parametrize(
    "name", once_except(TRANSFORMATIONS, ["multi_steps", "lookahead", "noise"])
)
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


@pytest.mark.parametrize("name", once_except(FACTORIES, ["adamw"]))
def test_factories_with_a_learning_rate(name):
    model, rate = make(), 1.0 if name == "prodigy" else 1e-2
    expected, _ = train_native(params_of(model), FACTORIES[name](learning_rate=rate), 20)
    train(model, jaxwrap.OptaxOptimizer(FACTORIES[name], learning_rate=rate), 20)
    assert_close(params_of(model), expected)


# Inside of Keras.

KERAS_ARGUMENTS = [
    {"clipnorm": 0.05},
    {"global_clipnorm": 0.1},
    {"clipvalue": 0.01},
    {"weight_decay": 0.1},
    {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 2},
    {"gradient_accumulation_steps": 2, "clipnorm": 0.05},
    {"loss_scale_factor": 16.0},
]


def fit(model, optimizer, epochs=2, **kwargs):
    x, y = digits()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss)
    return model.fit(x, y, epochs=epochs, batch_size=32, shuffle=False, verbose=0, **kwargs)


@pytest.mark.parametrize("arguments", KERAS_ARGUMENTS, ids=lambda a: "-".join(a))
def test_what_keras_does_with_gradients_it_does_here(arguments):
    one, two = make(), make()
    fit(one, keras.optimizers.SGD(0.1, momentum=0.9, **arguments))
    sgd = functools.partial(optax.sgd, momentum=0.9)
    fit(two, jaxwrap.OptaxOptimizer(sgd, learning_rate=0.1, **arguments))
    assert_close(params_of(two), params_of(one))


@pytest.mark.each_jax
@pytest.mark.quick
def test_fit_is_the_native_loop():
    model = make()
    x, y = digits()
    params, transformation = params_of(model), CHAIN()
    state = transformation.init(params)

    @jax.jit
    def step(params, state, x, y):
        gradients = jax.grad(lambda p: loss_of(Net().apply({"params": p}, x), y))(params)
        updates, state = transformation.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    for start in [*range(0, 128, 32)] * 3:
        params, state = step(params, state, x[start : start + 32], y[start : start + 32])
    fit(model, jaxwrap.OptaxOptimizer(CHAIN()), epochs=3)
    assert_close(params_of(model), params)


@pytest.mark.each_jax
@pytest.mark.quick
def test_loops(mode, backend):
    """`apply`, `apply_gradients` and `stateless_apply`, eager and compiled."""
    expected, _ = train_native(params_of(make()), optax.adam(1e-2), 3)
    model = make()
    optimizer = jaxwrap.OptaxOptimizer(optax.adam, learning_rate=1e-2)
    if backend.name == "jax":
        optimizer.build(model.trainable_variables)
        apply = backend.compile(optimizer.stateless_apply, mode)
        for _ in range(3):
            trained, own = apply(
                [v.value for v in optimizer.variables],
                gradients_of(model)[1],
                [v.value for v in model.trainable_variables],
            )
            pairs = [(model.trainable_variables, trained), (optimizer.variables, own)]
            for variables, new in pairs:
                for variable, value in zip(variables, new, strict=True):
                    variable.assign(value)
    elif mode != "batch":

        def apply(*gradients):
            pairs = zip(gradients, model.trainable_variables, strict=True)
            return optimizer.apply_gradients(pairs)

        apply = backend.compile(apply, mode)
        for _ in range(3):
            apply(*gradients_of(model)[1])
    else:
        return
    assert_close(params_of(model), expected)


def test_mixed_precision_with_loss_scaling():
    keras.config.set_dtype_policy("mixed_float16")
    x, y = digits()
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(10)])
    history = fit(model, jaxwrap.OptaxOptimizer(optax.adamw, learning_rate=1e-2), 3)
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert history.history["loss"][-1] < history.history["loss"][0]
    inner = model.optimizer.inner_optimizer
    assert all(v.dtype == "float32" for v in jax.tree.leaves(inner.state[0].mu))
    # A step that overflows is skipped.
    before, weights = values(inner), model.get_weights()
    model.fit(np.full_like(x, np.inf), y, batch_size=128, verbose=0)
    assert_close(values(inner), before, 0)
    assert_close(model.get_weights(), weights, 0)


def test_gradients_of_embeddings():
    """They are sparse on TensorFlow."""
    models = [
        keras.Sequential([keras.Input((4,)), keras.layers.Embedding(10, 3), keras.layers.Flatten()])
        for _ in range(2)
    ]
    models[1].set_weights(models[0].get_weights())
    x = np.arange(20).reshape(5, 4) % 7
    rate = {"learning_rate": 0.5}
    optimizers = [keras.optimizers.SGD(**rate), jaxwrap.OptaxOptimizer(optax.sgd, **rate)]
    for model, optimizer in zip(models, optimizers, strict=True):
        model.compile(optimizer, "mse")
        model.fit(x, np.ones((5, 12)), verbose=0)
    assert_close(models[1].get_weights(), models[0].get_weights())


# Parameters by path.


def labels(params):
    def label(path, leaf):
        return "head" if "Dense_1" in [key.key for key in path] else "frozen"

    return jax.tree_util.tree_map_with_path(label, params)


@register
def head_only(learning_rate):
    parts = {"head": optax.contrib.muon(learning_rate), "frozen": optax.set_to_zero()}
    return optax.multi_transform(parts, labels)


def is_kernel(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


@pytest.mark.once
def test_the_params_are_a_nested_dict_by_path():
    model = keras.Sequential(
        [keras.Input((64,)), jaxwrap.FlaxLayer(Net(), name="net"), keras.layers.Dense(2, name="d")],
        name="model",
    )
    seen = []

    def update(updates, state, params):
        seen.append((updates, params))
        return updates, state

    init = lambda params: seen.append(params) or ()  # noqa: E731
    optimizer = jaxwrap.OptaxOptimizer(optax.GradientTransformation(init, update))
    optimizer.build(model.trainable_variables)
    tree = optimizer.params
    assert jax.tree.structure(seen[0]) == jax.tree.structure(tree)
    names = {
        "/".join(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    }
    assert names == {v.path for v in model.trainable_variables}
    assert all(
        "/".join(k.key for k in path) == v.path
        for path, v in jax.tree_util.tree_leaves_with_path(tree)
    )


def test_multi_transform_by_path():
    model = make()
    before = params_of(model)
    expected, _ = train_native(before, head_only(1e-2), 5)
    optimizer = jaxwrap.OptaxOptimizer(head_only, learning_rate=1e-2)
    train(model, optimizer, 5)
    after = params_of(model)
    assert_close(after, expected)
    np.testing.assert_array_equal(after["Dense_0"]["kernel"], before["Dense_0"]["kernel"])
    assert np.abs(after["Dense_1"]["kernel"] - before["Dense_1"]["kernel"]).max() > 1e-3


@pytest.mark.parametrize(
    "make_transformation",
    [
        lambda: optax.chain(optax.add_decayed_weights(0.1, mask=is_kernel), optax.sgd(0.1)),
        lambda: optax.chain(optax.masked(optax.adam(1e-2), is_kernel), optax.scale(0.5)),
    ],
    ids=["add_decayed_weights", "masked"],
)
def test_masks_by_path(make_transformation):
    model = make()
    expected, _ = train_native(params_of(model), make_transformation(), 5)
    train(model, jaxwrap.OptaxOptimizer(make_transformation()), 5)
    assert_close(params_of(model), expected)


class Composed(keras.Model):
    def __init__(self):
        super().__init__()
        self.net = jaxwrap.FlaxLayer(Net(), name="net")
        self.head = keras.layers.Dense(2, name="head")

    def call(self, x):
        return self.head(self.net(x))


def composed():
    model = Composed()
    model(digits()[0])
    return model


def alone():
    layer = jaxwrap.FlaxLayer(Net())
    layer.build((None, 64))
    return layer


def sequential():
    layers = [jaxwrap.FlaxLayer(Net(), name="net"), keras.layers.Dense(2, name="head")]
    return keras.Sequential([keras.Input((64,)), *layers])


@pytest.mark.once
@pytest.mark.parametrize(
    ("make_one", "root"),
    [(sequential, "sequential"), (composed, "composed"), (alone, "flax_layer")],
)
def test_the_root_does_not_depend_on_a_counter(make_one, root):
    """What Keras made before in this process gives a model another number."""
    for _ in range(2):
        model = make_one()
        optimizer = jaxwrap.OptaxOptimizer(optax.adam, learning_rate=1e-2)
        optimizer.build(model.trainable_variables)
        assert list(optimizer.params) == [root]
        assert list(optimizer.state[0].mu) == [root]
    assert model.name != root


@pytest.mark.once
def test_numbers_in_names_of_layers_stay():
    layers = [keras.layers.Dense(2, name=f"dense_{number}") for number in (2, 5)]
    for layer in layers:
        layer.build((None, 2))
    optimizer = jaxwrap.OptaxOptimizer(optax.adam, learning_rate=1e-2)
    optimizer.build([variable for layer in layers for variable in layer.trainable_variables])
    assert list(optimizer.params) == ["dense_2", "dense_5"]
    optimizer.build(layers[0].trainable_variables)
    assert list(optimizer.params) == ["dense_2"]


def test_state_stays_with_its_variable_when_the_root_changes():
    layer, head = jaxwrap.FlaxLayer(Net(), name="flax_layer_7"), keras.layers.Dense(2, name="head")
    layer.build((None, 64))
    head.build((None, 10))
    variables = list(layer.trainable_variables)
    optimizer = jaxwrap.OptaxOptimizer(optax.adam, learning_rate=1e-2)
    optimizer.build([*variables, *head.trainable_variables])
    gradients = [np.full(v.shape, 0.1 * (i + 1), "float32") for i, v in enumerate(variables)]
    optimizer.apply(list(map(keras.ops.convert_to_tensor, gradients)), variables)
    before = jax.tree.map(lambda v: to_numpy(v.value), optimizer.state[0].mu["flax_layer_7"])
    optimizer.build(variables)
    after = jax.tree.map(lambda v: to_numpy(v.value), optimizer.state[0].mu["flax_layer"])
    assert_close(after, before, 0)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(after))


@pytest.mark.once
@pytest.mark.parametrize(
    "transformation",
    [
        optax.multi_transform({"a": optax.sgd(1.0)}, {"net": "a"}),
        optax.multi_transform({"a": optax.sgd(1.0)}, {"net": "a", "other": "a"}),
        optax.multi_transform({"a": optax.sgd(1.0)}, {"net": "a", "head": "b"}),
        optax.multi_transform(
            {"a": optax.sgd(1.0)}, lambda params: dict.fromkeys([*params, "more"], "a")
        ),
        optax.masked(optax.sgd(1.0), {"model": {"net": True, "head": False}}),
        optax.adamw(1.0, mask={"net": {"params": {"Dense_0": True}}, "head": True}),
    ],
    ids=["missing", "other", "unknown label", "function", "a root too many", "below"],
)
def test_labels_that_do_not_fit_name_the_top_of_the_tree(transformation):
    inputs = keras.Input((64,))
    outputs = keras.layers.Dense(2, name="head")(jaxwrap.FlaxLayer(Net(), name="net")(inputs))
    model = keras.Model(inputs, outputs)
    optimizer = jaxwrap.OptaxOptimizer(transformation, name="mine")
    top = r"'mine'.*{'head': {'bias', 'kernel'}, 'net': {'params'}}.*tree_map_with_path"
    with pytest.raises(ValueError, match=top) as caught:
        optimizer.build(model.trainable_variables)
    assert caught.value.__cause__ is not None
    assert not optimizer.built


@pytest.mark.once
def test_an_error_in_a_function_of_labels_notes_the_top_of_the_tree():
    optimizer = jaxwrap.OptaxOptimizer(
        optax.masked(optax.sgd(1.0), lambda params: params["encoder"])
    )
    with pytest.raises(KeyError) as caught:
        optimizer.build([keras.Variable(np.ones(2), name=f"v{number}") for number in range(20)])
    note = caught.value.__notes__[-1]
    assert "{'v0', 'v1', 'v10', 'v11', 'v12', 'v13', 'v14', 'v15', ... 12 more}" in note


# Freezing.


def test_a_variable_without_a_gradient_stays():
    model = make()
    optimizer = jaxwrap.OptaxOptimizer(optax.adamw, learning_rate=1e-2)
    train(model, optimizer, 2)
    before = params_of(model)
    _, gradients = gradients_of(model)
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        optimizer.apply([None, *gradients[1:]], model.trainable_variables)
    first = model.trainable_variables[0].path.split("params/")[1].split("/")
    after = params_of(model)
    np.testing.assert_array_equal(after[first[0]][first[1]], before[first[0]][first[1]])
    assert not np.array_equal(after["Dense_1"]["kernel"], before["Dense_1"]["kernel"])


@pytest.mark.parametrize("arguments", [{}, {"use_ema": True}, {"gradient_accumulation_steps": 2}])
def test_frozen_and_later_unfrozen_variables(arguments):
    model = make()
    layer = model.layers[0]
    optimizer = jaxwrap.OptaxOptimizer(optax.adam, learning_rate=1e-2, **arguments)
    layer.freeze("params/Dense_0/.*")
    start = params_of(model)
    train(model, optimizer, 4)
    frozen = params_of(model)
    np.testing.assert_array_equal(frozen["Dense_0"]["kernel"], start["Dense_0"]["kernel"])
    kept = values(optimizer)
    assert not any("/mu/" in name and "Dense_0" in name for name in kept)
    layer.unfreeze("params/.*")
    with pytest.raises(
        ValueError, match=r"built for .*Dense_0.*optimizer\.build\(model\.trainable"
    ):
        train(model, optimizer, 1)
    optimizer.build(model.trainable_variables)
    grown = values(optimizer)
    assert_close({name: grown[name] for name in kept}, kept, 0)
    assert sum("/mu/" in name for name in grown) == 4
    train(model, optimizer, 4)
    assert int(to_numpy(optimizer._iterations.value)) == 8
    thawed = params_of(model)
    assert np.abs(thawed["Dense_0"]["kernel"] - start["Dense_0"]["kernel"]).max() > 1e-3
    # And back: those that stay keep their state.
    layer.freeze("params/Dense_0/.*")
    kept = values(optimizer)
    optimizer.build(model.trainable_variables)
    shrunk = values(optimizer)
    assert len(shrunk) == len(kept) - 2 * (2 + len(arguments))  # mu and nu; averages or sums
    assert_close(shrunk, {name: kept[name] for name in shrunk}, 0)
    fit(model, optimizer, 1)


@pytest.mark.only("jax")
def test_stateless_apply_of_other_variables():
    model = make()
    optimizer = jaxwrap.OptaxOptimizer(optax.adam, learning_rate=1e-2)
    optimizer.build(model.trainable_variables[:2])
    own, trained = ([v.value for v in part] for part in (optimizer.variables, model.variables[:4]))
    with pytest.raises(ValueError, match=r"built for 2 variables; received 4.*optimizer\.build"):
        optimizer.stateless_apply(own, gradients_of(model)[1], trained)


# Learning rate.


def rate_of(optimizer):
    return float(keras.ops.convert_to_numpy(optimizer.learning_rate))


KERAS_SCHEDULE = {"initial_learning_rate": 0.1, "decay_steps": 10, "decay_rate": 0.5}
RATES = {
    "number": (lambda: 0.05, lambda: 0.05),
    "keras": (
        lambda: keras.optimizers.schedules.ExponentialDecay(**KERAS_SCHEDULE),
        lambda: optax.exponential_decay(0.1, 10, 0.5),
    ),
    "optax": (
        lambda: optax.warmup_cosine_decay_schedule(0.01, 0.1, 4, 12),
        lambda: optax.warmup_cosine_decay_schedule(0.01, 0.1, 4, 12),
    ),
}


@pytest.mark.once
@pytest.mark.parametrize("name", RATES)
def test_learning_rates(name):
    given, native = (make_rate() for make_rate in RATES[name])
    model = make()
    expected, _ = train_native(params_of(model), optax.adam(native), 8)
    optimizer = jaxwrap.OptaxOptimizer(optax.adam, learning_rate=given)
    train(model, optimizer, 8)
    assert_close(params_of(model), expected)
    wanted = native(8) if callable(native) else native
    assert rate_of(optimizer) == pytest.approx(float(wanted), rel=1e-5)


def optimizers_with_a_rate():
    return {
        "factory": jaxwrap.OptaxOptimizer(optax.sgd, learning_rate=0.5),
        "injected": jaxwrap.OptaxOptimizer(optax.inject_hyperparams(optax.sgd)(learning_rate=0.5)),
        "chained": jaxwrap.OptaxOptimizer(
            optax.chain(optax.clip(10.0), optax.inject_hyperparams(optax.sgd)(learning_rate=0.5))
        ),
    }


@pytest.mark.parametrize("name", ["factory", "injected", "chained"])
def test_callbacks_read_and_set_the_learning_rate(name):
    optimizer, model = optimizers_with_a_rate()[name], make()
    seen = []

    def schedule(epoch, rate):
        seen.append(rate)
        return rate / 2

    # A loss that cannot get better by 100.
    plateau = keras.callbacks.ReduceLROnPlateau("loss", 0.1, patience=1, min_delta=100.0)
    optimizer.build(model.trainable_variables)
    scheduler = keras.callbacks.LearningRateScheduler(schedule)
    history = fit(model, optimizer, 3, callbacks=[scheduler, plateau])
    assert seen == pytest.approx([0.5, 0.25, 0.0125], rel=1e-5)
    assert history.history["learning_rate"] == pytest.approx([0.25, 0.125, 0.00625], rel=1e-5)
    before = params_of(model)
    optimizer.learning_rate = 0.0
    fit(model, optimizer, 1)
    assert_close(params_of(model), before, 0)


def test_a_learning_rate_that_only_the_transformation_knows():
    model = make()
    optimizer = jaxwrap.OptaxOptimizer(optax.adam(1e-2), name="mine")
    fit(model, optimizer, 1)
    how = r"OptaxOptimizer 'mine'.*OptaxOptimizer\(optax\.adamw, learning_rate=1e-3\).*inject_hyperparams"
    with pytest.raises(ValueError, match=how):
        _ = optimizer.learning_rate
    with pytest.raises(ValueError, match=how):
        optimizer.learning_rate = 0.1
    with pytest.raises(ValueError, match=how):
        fit(model, optimizer, 2, callbacks=[keras.callbacks.ReduceLROnPlateau("loss")])
    decaying = jaxwrap.OptaxOptimizer(optax.adam(1e-2), weight_decay=0.1)
    with pytest.raises(ValueError, match="cannot decay weights"):
        decaying.build(model.trainable_variables)
    assert not decaying.built


@pytest.mark.once
def test_schedules_and_numbers_are_not_mixed():
    scheduled = jaxwrap.OptaxOptimizer(optax.sgd, learning_rate=optax.linear_schedule(1, 0, 5))
    with pytest.raises(TypeError, match=r"received learning_rate=0\.5, .* follows the schedule"):
        scheduled.learning_rate = 0.5
    scheduled.learning_rate = optax.constant_schedule(0.25)
    assert rate_of(scheduled) == 0.25
    number = jaxwrap.OptaxOptimizer(optax.sgd, learning_rate=1)
    train(make(), number, 1)
    number.learning_rate = optax.constant_schedule(0.25)
    assert rate_of(number) == 0.25
    injected = optax.inject_hyperparams(optax.sgd)(learning_rate=optax.constant_schedule(0.5))
    optimizer = jaxwrap.OptaxOptimizer(injected)
    optimizer.build(make().trainable_variables)
    assert rate_of(optimizer) == 0.5
    with pytest.raises(ValueError, match="takes numbers only"):
        optimizer.learning_rate = 0.1


# What else a transformation needs.


def plateau():
    return optax.chain(
        optax.sgd(0.5), optax.contrib.reduce_on_plateau(factor=0.5, patience=2, rtol=0.5)
    )


def test_the_loss_is_passed_on():
    model = make()
    expected, state = train_native(params_of(model), plateau(), 20, value=True)
    optimizer = jaxwrap.OptaxOptimizer(plateau())
    train(model, optimizer, 20, value=True)
    assert_close(params_of(model), expected)
    assert float(state[1].scale) == float(to_numpy(optimizer.state[1].scale.value)) < 0.5


def test_the_loss_in_fit():
    model, (x, y) = make(), digits()
    expected, state = train_native(params_of(model), plateau(), 20, value=True)
    optimizer = jaxwrap.OptaxOptimizer(plateau())
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(x, y, epochs=20, batch_size=len(x), shuffle=False, verbose=0)
    assert_close(params_of(model), expected)
    assert float(state[1].scale) == float(to_numpy(optimizer.state[1].scale.value)) < 0.5


def test_the_loss_in_fit_is_the_unscaled_one():
    results = []
    for arguments in ({}, {"loss_scale_factor": 8.0}):
        model, optimizer = make(), jaxwrap.OptaxOptimizer(plateau(), **arguments)
        fit(model, optimizer, 3)
        results.append(float(to_numpy(optimizer.state[1].avg_value.value)))
    np.testing.assert_allclose(*results, rtol=1e-4)


def test_a_missing_argument_changes_nothing():
    model = make()
    optimizer = jaxwrap.OptaxOptimizer(plateau())
    _, gradients = gradients_of(model)
    optimizer.build(model.trainable_variables)
    before, state = params_of(model), values(optimizer)
    with pytest.raises(ValueError, match="needs `value`"):
        optimizer.apply(gradients, model.trainable_variables)
    assert_close(params_of(model), before, 0)
    assert_close(values(optimizer), state, 0)


@pytest.mark.once
@pytest.mark.parametrize(
    "make_transformation",
    [optax.lbfgs, lambda: optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(5))],
    ids=["lbfgs", "backtracking"],
)
def test_line_searches_are_not_supported(make_transformation):
    optimizer = jaxwrap.OptaxOptimizer(make_transformation())
    with pytest.raises(ValueError, match=r"`value_fn`.*not supported.*linesearch=None"):
        optimizer.build(make().trainable_variables)


@pytest.mark.once
def test_what_has_no_line_search_is_supported():
    optimizer = jaxwrap.OptaxOptimizer(optax.lbfgs(1e-2, memory_size=2, linesearch=None))
    optimizer.build(make().trainable_variables)
    assert optimizer.built


@pytest.mark.parametrize("source", ["loss", "argument"])
def test_threads_keep_their_own_losses(source):
    """Each thread updates a variable of its own, by the loss that it passes."""
    count = 4
    barrier = threading.Barrier(count, timeout=60)

    class Slow(jaxwrap.OptaxOptimizer):
        def _check_variables_are_known(self, variables):
            barrier.wait()
            super()._check_variables_are_known(variables)

    def update(updates, state, params=None, *, value, **_):
        return jax.tree.map(lambda update: -update * value, updates), state

    transformation = optax.GradientTransformationExtraArgs(lambda params: (), update)
    variables = [keras.Variable(np.zeros(2, "float32"), name=f"v{i}") for i in range(count)]
    optimizer = Slow(transformation)
    optimizer.build(variables)
    one = keras.ops.ones(2)

    def step(index):
        loss = keras.ops.convert_to_tensor(float(index + 1))
        extra = {"value": loss} if source == "argument" else {}
        if not extra:
            optimizer.scale_loss(loss)
        optimizer.apply([one], [variables[index]], **extra)

    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        for _ in range(3):
            list(pool.map(step, range(count)))
    for index, variable in enumerate(variables):
        assert_close(to_numpy(variable.value), np.full(2, -3.0 * (index + 1)))


def test_another_thread_cannot_read_a_rate_that_does_not_exist():
    errors = []

    def read():
        try:
            _ = optimizer.learning_rate
        except ValueError as error:
            errors.append(error)

    def update(updates, state, params=None):
        thread = threading.Thread(target=read)
        thread.start()
        thread.join()
        return updates, state

    variable = keras.Variable(np.zeros(2, "float32"), name="v")
    optimizer = jaxwrap.OptaxOptimizer(optax.GradientTransformation(lambda params: (), update))
    optimizer.build([variable])
    errors.clear()
    optimizer.apply([keras.ops.ones(2)], [variable])
    assert "has no learning rate that could be read" in str(errors[0])


def test_a_schedule_is_compiled_once():
    calls = []

    def schedule(step):
        calls.append(step)
        return 0.1 / (1.0 + step)

    variable = keras.Variable(np.zeros(2, "float32"), name="v")
    optimizer = jaxwrap.OptaxOptimizer(optax.sgd, learning_rate=schedule)
    optimizer.apply([keras.ops.ones(2)], [variable])
    count = len(calls)
    for _ in range(3):
        optimizer.apply([keras.ops.ones(2)], [variable])
    assert len(calls) == count
    assert_close(to_numpy(variable.value), np.full(2, -0.1 * (1 + 1 / 2 + 1 / 3 + 1 / 4)))
    optimizer.learning_rate = lambda step: 0.5 + 0.0 * step
    assert float(to_numpy(optimizer.learning_rate)) == 0.5


# Bad input.


@pytest.mark.once
@pytest.mark.quick
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((3,), TypeError, r"received 3\. Pass `optax\.adamw"),
        ((optax.adam(1e-3), 1e-3), ValueError, "made with one already"),
        ((optax.adamw,), ValueError, "cannot be called without arguments.*missing a required"),
        ((functools.partial(optax.adamw, 1e-3), 1e-2), ValueError, "cannot be called with `learn"),
        ((optax.MultiSteps, 1e-3), TypeError, "expected an Optax transformation"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        jaxwrap.OptaxOptimizer(*arguments)


@pytest.mark.once
def test_a_function_that_makes_something_else():
    optimizer = jaxwrap.OptaxOptimizer(lambda: 5)
    with pytest.raises(TypeError, match="it returned 5"):
        optimizer.build(make().trainable_variables)


@pytest.mark.once
def test_a_state_whose_structure_changes():
    def update(updates, state, params):
        return updates, (*state, jnp.zeros(()))

    optimizer = jaxwrap.OptaxOptimizer(
        optax.GradientTransformation(lambda params: (jnp.zeros(()),), update)
    )
    model = make()
    before = params_of(model)
    with pytest.raises(ValueError, match=r"changed the structure of its state\.\n  unexpected: 1"):
        train(model, optimizer, 1)
    assert_close(params_of(model), before, 0)


# Saving.


SAVED = {
    "adamw": lambda: jaxwrap.OptaxOptimizer(
        functools.partial(optax.adamw, weight_decay=0.1), learning_rate=1e-2, global_clipnorm=0.1
    ),
    "registered": lambda: jaxwrap.OptaxOptimizer(head_only, learning_rate=1e-2),
    "several": lambda: jaxwrap.OptaxOptimizer(several),
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(
        jaxwrap.OptaxOptimizer(optax.adamw, learning_rate=1e-2), initial_scale=1.0
    ),
}


@register
def several():
    """Counters, flags, keys, and accumulated gradients."""
    noise = optax.add_noise(0.01, 0.5, key=jax.random.key(3))
    every = optax.MultiSteps(optax.chain(noise, optax.adam(1e-2)), 2)
    return optax.apply_if_finite(every.gradient_transformation(), 3)


@pytest.mark.parametrize("name", SAVED)
def test_training_goes_on_bit_for_bit(name, tmp_path):
    model = make()
    fit(model, SAVED[name](), 1)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    results = []
    for one in (model, again):
        x, y = digits()
        one.fit(x, y, batch_size=32, shuffle=False, verbose=0)
        results.append([to_numpy(v.value) for v in [*one.variables, *one.optimizer.variables]])
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_weights_of_layers_of_other_names(tmp_path):
    """Keras numbers names: `dense_9` and `dense_10` sort in another order than `dense` and `dense_1`."""

    def build(names):
        layers = [keras.layers.Dense(4, name=name) for name in names]
        model = keras.Sequential([keras.Input((4,)), *layers])
        optimizer = jaxwrap.OptaxOptimizer(optax.adam, learning_rate=1e-2)
        model.compile(optimizer, "mse")
        return model

    one, two = build(["dense", "dense_1"]), build(["dense_9", "dense_10"])
    x = np.random.default_rng(0).standard_normal((8, 4)).astype("float32")
    one.fit(x, x, verbose=0)
    one.save_weights(tmp_path / "one.weights.h5")
    two.optimizer.build(two.trainable_variables)
    two.load_weights(tmp_path / "one.weights.h5")
    for first, second in zip(one.optimizer.variables, two.optimizer.variables, strict=True):
        np.testing.assert_array_equal(to_numpy(second.value), to_numpy(first.value))
    one.fit(x, x, verbose=0)
    two.fit(x, x, verbose=0)
    assert_close(two.get_weights(), one.get_weights())


def test_weights_of_another_optimizer(tmp_path):
    model = make()
    fit(model, jaxwrap.OptaxOptimizer(optax.adam, learning_rate=1e-2), 1)
    model.save_weights(tmp_path / "model.weights.h5")
    other = make(1)
    other.compile(jaxwrap.OptaxOptimizer(optax.lion, learning_rate=1e-2), "mse")
    with pytest.warns(UserWarning, match="is not built yet"):
        other.load_weights(tmp_path / "model.weights.h5")
    other.optimizer.build(other.trainable_variables)
    with pytest.warns(UserWarning, match="has 7 variables, and the file 11"):
        other.load_weights(tmp_path / "model.weights.h5")


@pytest.mark.once
@pytest.mark.parametrize(
    "transformation", [optax.adam(1e-3), optax.MultiSteps(optax.adam(1e-3), 2)], ids=["tx", "multi"]
)
def test_a_transformation_cannot_be_saved(transformation, tmp_path):
    model = make()
    fit(model, jaxwrap.OptaxOptimizer(transformation, name="mine"), 1)
    with pytest.raises(
        TypeError, match=r"'mine': cannot be saved:\n.*register_serializable.*save_weights"
    ):
        model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")


@pytest.mark.once
def test_a_function_that_is_not_registered_cannot_be_saved(tmp_path):
    def mine(learning_rate):
        return optax.sgd(learning_rate)

    model = make()
    model.compile(jaxwrap.OptaxOptimizer(mine, learning_rate=1e-3), "mse")
    message = r"`optimizer.transformation` is a function that has not been reg"
    with pytest.raises(TypeError, match=message):
        model.save(tmp_path / "model.keras")


@pytest.mark.once
@pytest.mark.parametrize("name", ["os.system", "optax.inject_hyperparams", "builtins.exec"])
def test_only_listed_names_are_loaded(name):
    config = jaxwrap.OptaxOptimizer(optax.adamw, learning_rate=1e-3).get_config()
    config["transformation"] = {"kind": "name", "name": name}
    with pytest.raises(ValueError, match="is not registered"):
        jaxwrap.OptaxOptimizer.from_config(config)
    config["transformation"] = {"kind": "call", "name": name, "arguments": {}}
    with pytest.raises(ValueError, match="a file may not call the factory"):
        jaxwrap.OptaxOptimizer.from_config(config)


SCHEDULES = [
    optax.constant_schedule(0.1),
    optax.linear_schedule(1.0, 0.1, 10, 2),
    optax.polynomial_schedule(1.0, 0.1, 2, 10),
    optax.cosine_decay_schedule(0.1, 10, 0.2),
    optax.exponential_decay(0.1, 5, 0.5, 2, staircase=True, end_value=0.03),
    optax.piecewise_constant_schedule(1.0, {3: 0.1, 7: 0.5}),
    optax.warmup_cosine_decay_schedule(0.0, 0.1, 4, 12),
    optax.warmup_exponential_decay_schedule(0.0, 0.1, 4, 5, 0.5),
    optax.join_schedules([optax.constant_schedule(0.1), optax.linear_schedule(1, 0, 4)], [5]),
]


@pytest.mark.once
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.__qualname__.split(".")[0])
def test_schedules_of_optax_are_saved(schedule):
    optimizer = jaxwrap.OptaxOptimizer(optax.sgd, learning_rate=schedule)
    again = jaxwrap.OptaxOptimizer.from_config(optimizer.get_config())
    for step in range(15):
        assert float(again._learning_rate(step)) == float(schedule(step))


@pytest.mark.once
def test_schedules_of_keras_are_saved():
    schedule = keras.optimizers.schedules.ExponentialDecay(**KERAS_SCHEDULE)
    optimizer = jaxwrap.OptaxOptimizer(optax.sgd, learning_rate=schedule)
    again = jaxwrap.OptaxOptimizer.from_config(optimizer.get_config())
    assert again._learning_rate.get_config() == schedule.get_config()
    assert again.get_config() == optimizer.get_config()


@pytest.mark.once
def test_arguments_that_keras_does_not_know_go_to_the_factory():
    optimizer = jaxwrap.OptaxOptimizer(optax.adam, learning_rate=0.1, b1=0.5, clipnorm=1.0)
    variable = keras.Variable(np.ones(2, "float32"), name="w")
    again = jaxwrap.OptaxOptimizer.from_config(optimizer.get_config())
    other = keras.Variable(np.ones(2, "float32"), name="w")
    gradients = [np.array([0.3, -0.2], "float32"), np.array([-0.1, 0.4], "float32")]
    transformation = optax.adam(0.1, b1=0.5)
    params = jnp.ones(2)
    state = transformation.init(params)
    for gradient in gradients:
        optimizer.apply([keras.ops.convert_to_tensor(gradient)], [variable])
        again.apply([keras.ops.convert_to_tensor(gradient)], [other])
        updates, state = transformation.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(to_numpy(variable.value), params, 1e-5)
    np.testing.assert_allclose(to_numpy(other.value), params, 1e-5)
    assert repr(optimizer).startswith("<OptaxOptimizer 'optax_optimizer")
    assert "optax.adam, learning_rate=0.1, step 2" in repr(optimizer)


@pytest.mark.once
@pytest.mark.parametrize("transformation", [optax.adam, optax.adam(1e-3)])
def test_arguments_that_nobody_knows(transformation):
    with pytest.raises(
        TypeError, match=r"OptaxOptimizer 'o': received beta, which neither.*clipnorm"
    ):
        jaxwrap.OptaxOptimizer(transformation, name="o", beta=0.5)


# Printing.


@register
def slow_sgd(learning_rate):
    return optax.sgd(learning_rate / 10)


def halved(step, scale=0.5):
    return scale / (step + 1)


READY = "optax.GradientTransformationExtraArgs"


# What is printed, and what after one step if that differs.
@pytest.mark.once
@pytest.mark.quick
@pytest.mark.parametrize(
    ("arguments", "before", "after"),
    [
        ((optax.adamw, 1e-3), "optax.adamw, learning_rate=0.001", None),
        ((functools.partial(optax.adamw, b1=0.8), 1), "optax.adamw, learning_rate=1", None),
        ((optax.contrib.muon, 0.5), "optax.contrib.muon, learning_rate=0.5", None),
        ((slow_sgd, 0.5), f"{__name__}.slow_sgd, learning_rate=0.5", None),
        ((lambda: optax.sgd(0.1),), "<lambda>, learning_rate=unknown", None),
        ((optax.adamw(1e-3),), f"{READY}, learning_rate=unknown", None),
        (
            (optax.inject_hyperparams(optax.sgd)(learning_rate=0.5),),
            f"{READY}, learning_rate=unknown",
            f"{READY}, learning_rate=0.5",
        ),
        (
            (optax.sgd, optax.cosine_decay_schedule(0.1, 10)),
            "optax.sgd, learning_rate=optax.schedules.cosine_decay_schedule",
            None,
        ),
        (
            (optax.sgd, functools.partial(halved, scale=0.1)),
            f"optax.sgd, learning_rate={__name__}.halved",
            None,
        ),
        (
            (optax.sgd, keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9)),
            "optax.sgd, learning_rate=ExponentialDecay",
            None,
        ),
    ],
)
def test_repr_names_transformation_rate_and_step(arguments, before, after):
    optimizer = jaxwrap.OptaxOptimizer(*arguments, name="mine")
    assert repr(optimizer) == f"<OptaxOptimizer 'mine': {before}, step 0>"
    variable = keras.Variable(np.ones((2, 2), "float32"), name="w")
    optimizer.build([variable])
    assert repr(optimizer) == f"<OptaxOptimizer 'mine': {after or before}, step 0>"
    optimizer.apply([keras.ops.ones((2, 2))], [variable])
    assert repr(optimizer) == f"<OptaxOptimizer 'mine': {after or before}, step 1>"


@pytest.mark.once
@pytest.mark.quick
def test_repr_follows_the_learning_rate_and_the_step():
    optimizer = jaxwrap.OptaxOptimizer(optax.sgd, learning_rate=0.5, name="mine")
    optimizer.learning_rate = 0.0625
    optimizer.iterations.assign(123456)
    assert (
        repr(optimizer) == "<OptaxOptimizer 'mine': optax.sgd, learning_rate=0.0625, step 123456>"
    )


@pytest.mark.quick
def test_repr_in_a_compiled_step(mode, backend):
    """JAX knows no numbers there. TensorFlow reads those of the variables."""
    optimizer = jaxwrap.OptaxOptimizer(optax.sgd, learning_rate=0.5, name="mine")
    printed = []

    def step(x):
        pairs = []
        if backend.name == "jax":  # as in `fit`
            pairs = [(v, keras.ops.cast(x[0], v.dtype)) for v in optimizer.variables]
        with keras.StatelessScope(pairs):
            printed.append(repr(optimizer))
        return x

    x = np.ones(2, "float32")
    backend.compile(step, mode, [x])(keras.ops.convert_to_tensor(x))
    rate, number = ("1", "1") if backend.name == "jax" else ("0.5", "0")
    if (backend.name, mode) == ("jax", "jit"):
        rate = number = "unknown"
    assert f"<OptaxOptimizer 'mine': optax.sgd, learning_rate={rate}, step {number}>" in printed


@pytest.mark.only("jax")
def test_repr_when_buffers_were_donated():
    optimizer = jaxwrap.OptaxOptimizer(optax.sgd, learning_rate=0.5, name="mine")
    for variable in optimizer.variables:
        variable.value.delete()
    assert "optax.sgd, learning_rate=unknown, step unknown" in repr(optimizer)
