"""The contract of JaxLayer: signatures, building, models of every kind, state, RNG, ownership."""

import inspect

import jax
import jax.numpy as jnp
import keras
import models
import numpy as np
import pytest
from backends import to_numpy
from models import MODELS, once_except, x

import jaxwrap
from jaxwrap import JaxLayer

pytestmark = pytest.mark.each_jax


def mlp(**kwargs):
    return JaxLayer(models.mlp_call, models.mlp_init, **kwargs)


def norm(**kwargs):
    return JaxLayer(models.norm_call, models.norm_init, **kwargs)


def weights(layer):
    return [to_numpy(v.value) for v in layer.variables]


# Signatures.


def test_constructors_are_keras_s():
    for ours, theirs in (
        (jaxwrap.JaxLayer, keras.layers.JaxLayer),
        (jaxwrap.FlaxLayer, keras.layers.FlaxLayer),
    ):
        *names, _ = inspect.signature(theirs.__init__).parameters  # the last is **kwargs
        parameters = inspect.signature(ours.__init__).parameters
        assert list(parameters)[: len(names)] == names
        assert all(
            p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD)
            for p in list(parameters.values())[len(names) :]
        )


@pytest.mark.parametrize(
    ("call_fn", "init_fn", "message"),
    [
        (
            lambda params: params,
            models.mlp_init,
            "missing required argument in `call_fn`.*`inputs`",
        ),
        (
            lambda params, inputs, other: inputs,
            models.mlp_init,
            "unsupported argument in `call_fn`.*`other`",
        ),
        (
            lambda *args: args,
            models.mlp_init,
            r"unsupported argument in `call_fn`.*`\*args`.*by name",
        ),
        (
            lambda inputs, **kw: inputs,
            models.mlp_init,
            r"unsupported argument in `call_fn`.*`\*\*kw`",
        ),
        (models.mlp_call, lambda rng: rng, "missing required argument in `init_fn`.*`inputs`"),
        (
            models.mlp_call,
            lambda params, inputs: inputs,
            "unsupported argument in `init_fn`.*`params`",
        ),
        (models.mlp_call, None, "`call_fn` takes `params`, but `init_fn`, `params` and `state`"),
        (models.norm_call, None, "`call_fn` takes `params` and `state`, but"),
    ],
)
def test_wrong_signature(call_fn, init_fn, message):
    with pytest.raises(ValueError, match=message):
        JaxLayer(call_fn, init_fn)


def test_what_is_no_function():
    with pytest.raises(TypeError, match="`call_fn` must be a function; received 3"):
        JaxLayer(3)


def test_wrong_seed():
    with pytest.raises(ValueError, match="`seed` must be an integer or None; received 'a'"):
        mlp(seed="a")


# Variables.


def test_params_and_state_are_the_user_s_pytrees_of_variables():
    params = {"list": [np.ones(2), (np.float32(3), 4.5)], "none": None, "name": "n", "flag": True}
    layer = JaxLayer(
        lambda params, state, inputs: (inputs, state),
        params=params,
        state=models.Affine(np.zeros((1, 2)), 7),
    )
    assert jax.tree.structure(layer.params) == jax.tree.structure(params)
    assert layer.params["none"] is None
    assert layer.params["name"] == "n"
    assert isinstance(layer.params["list"][1][1], keras.Variable)
    assert isinstance(layer.state, models.Affine)
    assert layer.state.bias.dtype == "int32"
    assert len(layer.trainable_variables) == 3  # not the bool
    assert {v.path for v in layer.variables} == {
        f"{layer.name}/{path}"
        for path in (
            "params/list/0",
            "params/list/1/0",
            "params/list/1/1",
            "params/flag",
            "state/weight",
            "state/bias",
        )
    }


def test_init_sees_the_dtype_shape_and_structure_of_the_inputs():
    seen = {}

    def init(rng, inputs, training):
        seen.update(inputs)
        assert training is True
        return

    layer = JaxLayer(lambda params, inputs: inputs["x"], init)
    layer(
        {
            "x": keras.KerasTensor((None, 3)),
            "tokens": keras.KerasTensor((None, None), "int32"),
            "mask": keras.KerasTensor((2, 1), "bool"),
        }
    )
    assert {name: (value.shape, value.dtype.name) for name, value in seen.items()} == {
        "x": ((1, 3), "float32"),
        "tokens": ((1, 1), "int32"),
        "mask": ((2, 1), "bool"),
    }
    assert seen["x"].min() == 1
    assert seen["tokens"].max() == 0


def test_the_user_s_arrays_are_left_alone(backend):
    params = {"w": jnp.ones((3, 2)), "b": np.zeros(2, "float32")}
    state = jnp.float32(1.0)

    def call(params, state, inputs):
        return inputs @ params["w"] + params["b"], state + 1

    model = keras.Sequential([JaxLayer(call, params=params, state=state)])
    if backend.trains:
        model.compile("sgd", "mse")
        model.fit(x(8, 3), x(8, 2), verbose=0, batch_size=4)
    else:
        model.predict(x(8, 3), verbose=0)
    np.testing.assert_array_equal(params["w"], np.ones((3, 2)))
    np.testing.assert_array_equal(params["b"], np.zeros(2))
    assert state == 1
    params["b"] += 5
    assert to_numpy(model.layers[0].params["b"].value).max() < 4


def test_state_that_is_changed_in_place_is_kept():
    def call(state, inputs):
        state["count"] = state["count"] + 1
        return inputs, state

    layer = JaxLayer(call, state={"count": np.zeros((), "int32")})
    for step in (1, 2):
        layer(x(3))
        assert int(to_numpy(layer.state["count"].value)) == step


# Models of every kind.


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.first = mlp(name="first")
        self.norm = norm(name="norm")

    def call(self, inputs, training=False):
        return self.norm(self.first(inputs), training=training)


def functional():
    inputs = keras.Input((4,))
    return keras.Model(inputs, norm()(mlp()(inputs)))


def shared():
    inputs = keras.Input((4,))
    layer, scale = mlp(), norm()
    return keras.Model(inputs, scale(layer(inputs)) + scale(layer(-inputs)))


def nested():
    inputs = keras.Input((4,))
    return keras.Model(inputs, keras.Sequential([functional(), keras.layers.Dense(3)])(inputs))


KINDS = {
    "functional": functional,
    "sequential": lambda: keras.Sequential([mlp(), norm()]),
    "sequential with input": lambda: keras.Sequential([keras.Input((4,)), mlp(), norm()]),
    "subclassed": Subclassed,
    "shared": shared,
    "nested": nested,
}


@pytest.mark.parametrize("kind", once_except(KINDS, ["subclassed", "shared"]))
def test_predict_and_summary(kind, capsys):
    model = KINDS[kind]()
    inputs = x(6, 4)
    outputs = model.predict(inputs, verbose=0, batch_size=4)
    assert outputs.shape == (6, 3)
    np.testing.assert_allclose(outputs, to_numpy(model(inputs)), 1e-5, 1e-5)
    model.summary(expand_nested=True)
    assert "Total params" in capsys.readouterr().out


@pytest.mark.trains
@pytest.mark.parametrize("kind", once_except(KINDS, ["subclassed", "shared", "nested"]))
def test_fit_evaluate_and_train_on_batch(kind):
    model = KINDS[kind]()
    model.compile(keras.optimizers.Adam(0.03), "mse")
    inputs = x(32, 4)
    targets = np.tanh(inputs[:, :3])
    before = model.evaluate(inputs, targets, verbose=0)
    history = model.fit(
        inputs, targets, epochs=12, batch_size=10, verbose=0, validation_data=(inputs, targets)
    )
    assert history.history["loss"][-1] < history.history["loss"][0]
    assert model.evaluate(inputs, targets, verbose=0) != before
    assert np.isfinite(model.train_on_batch(inputs, targets))
    counts = [v for v in model.non_trainable_variables if v.path.endswith("state/count")]
    calls = 2 if kind == "shared" else 1
    assert [int(to_numpy(v.value)) for v in counts] == [(12 * 4 + 1) * calls]


@pytest.mark.trains
def test_run_eagerly():
    model = functional()
    model.compile("sgd", "mse", run_eagerly=True)
    first, second = (model.train_on_batch(x(8, 4), x(8, 3)) for _ in range(2))
    assert second < first


@pytest.mark.trains
def test_a_frozen_layer_does_not_change():
    layer = mlp()
    model = keras.Sequential([layer, keras.layers.Dense(3)])
    model(x(2, 4))
    layer.trainable = False
    model.compile("sgd", "mse")
    before = weights(layer)
    model.fit(x(8, 4), x(8, 3), verbose=0)
    for one, two in zip(before, weights(layer), strict=True):
        np.testing.assert_array_equal(one, two)
    layer.trainable = True
    model.compile("sgd", "mse")
    model.fit(x(8, 4), x(8, 3), verbose=0)
    assert any((one != two).any() for one, two in zip(before, weights(layer), strict=True))


def test_clone_model():
    model = functional()
    clone = keras.models.clone_model(model)
    assert [v.shape for v in clone.variables] == [v.shape for v in model.variables]
    clone.set_weights(model.get_weights())
    np.testing.assert_allclose(
        clone.predict(x(2, 4), verbose=0), model.predict(x(2, 4), verbose=0), 1e-6, 1e-6
    )


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy, backend):
    seen = {}

    def call(params, state, inputs):
        seen.update(params=params["w"].dtype, state=state.dtype, inputs=inputs.dtype)
        return inputs @ params["w"], state + inputs.mean()

    def init(rng, inputs):
        assert inputs.dtype == "float32"
        return {"w": jnp.ones((inputs.shape[-1], 2))}, jnp.zeros(())

    layer = JaxLayer(call, init, dtype=policy)
    half = policy.removeprefix("mixed_")
    symbol = layer(keras.KerasTensor((None, 3)))
    assert symbol.dtype == half
    outputs = layer(x(4, 3))
    assert seen == {"params": half, "state": "float32", "inputs": half}
    assert keras.backend.standardize_dtype(outputs.dtype) == half
    assert [v.dtype for v in layer.weights] == ["float32", "float32"]
    if backend.trains:
        model = keras.Sequential([layer])
        model.compile("sgd", "mse")
        model.fit(x(8, 3), x(8, 2), verbose=0)


# Shapes.


def test_more_than_26_unknown_dimensions():
    count = 30

    def total(inputs):
        return sum(value.sum((1, 2)) for value in inputs)

    symbols = [keras.Input((None, None)) for _ in range(count)]
    model = keras.Model(symbols, JaxLayer(total)(symbols))
    assert model.output_shape == (None,)
    arrays = [x(3, 1 + index % 4, 1 + index % 3, seed=index) for index in range(count)]
    expected = total(arrays)
    np.testing.assert_allclose(model.predict(arrays, verbose=0), expected, 1e-4, 1e-4)


@pytest.mark.parametrize(
    ("fn", "shapes", "expected"),
    [
        (lambda inputs: inputs[0] + inputs[1], [(None, None), (None, None)], (None, None)),
        (lambda inputs: inputs[0] @ inputs[1], [(None, 3, None), (None, None, 5)], (None, 3, 5)),
        (lambda inputs: jnp.concatenate(inputs), [(None, 3), (None, 3)], (None, 3)),
        (lambda inputs: inputs[0].reshape(-1, 4, 3), [(None, 3)], (None, 4, 3)),
        (lambda inputs: jnp.ones((7, 2)), [(None, 3)], (7, 2)),
    ],
)
def test_unknown_dimensions_of_the_outputs(fn, shapes, expected):
    layer = JaxLayer(fn)
    assert layer([keras.KerasTensor(shape) for shape in shapes]).shape == expected


def test_no_data_is_computed_to_infer_a_shape():
    def call(params, inputs):
        assert isinstance(inputs, jax.core.Tracer)
        return inputs @ params

    def init(rng, inputs):
        return jnp.ones((inputs.shape[-1], 2))

    assert JaxLayer(call, init)(keras.KerasTensor((None, 3))).shape == (None, 2)
    layer = JaxLayer(call, init)
    assert layer.compute_output_shape((5, 3)) == (5, 2)
    assert not layer.built


def test_zero_size_batch(backend):
    layer = mlp()
    assert layer(np.zeros((0, 4), "float32")).shape == (0, 3)
    model = keras.Sequential([layer])
    assert model(np.zeros((0, 4), "float32")).shape == (0, 3)


# State.


def test_state_is_threaded_as_in_a_loop():
    layer = JaxLayer(
        lambda state, inputs: (
            inputs * state["count"],
            {"count": state["count"] + 1, "note": None},
        ),
        state={"count": 0, "note": None},
    )
    for count in range(4):
        np.testing.assert_allclose(to_numpy(layer(np.ones(2, "float32"))), np.ones(2) * count)
    assert int(to_numpy(layer.state["count"].value)) == 4


@pytest.mark.parametrize(
    ("new", "difference"),
    [
        (lambda s: {"a": s["a"]}, "missing: b"),
        (lambda s: {**s, "c": s["a"]}, "unexpected: c"),
        (lambda s: {**s, "b": None}, "missing: b"),
        (lambda s: {**s, "b": "text"}, "changed: b was <array>, is 'text'"),
        (lambda s: {**s, "b": jnp.ones(3)}, r"shape: state/b was \(2,\), is \(3,\)"),
        (lambda s: None, "missing: a"),
    ],
)
def test_new_state_that_differs(new, difference):
    layer = JaxLayer(
        lambda state, inputs, rng: (inputs, new({**state, "a": state["a"] + 1})),
        state={"a": jnp.zeros(2), "b": jnp.zeros(2)},
        seed=1,
    )
    before = weights(layer)
    with pytest.raises(ValueError, match=difference):
        layer(x(3, 2), training=True)
    for one, two in zip(before, weights(layer), strict=True):
        np.testing.assert_array_equal(one, two)


def test_a_result_that_is_no_pair():
    layer = JaxLayer(lambda state, inputs: inputs, state=1.0)
    with pytest.raises(ValueError, match=r"`call_fn` must return \(outputs, new_state\)"):
        layer(x(2))


def test_an_output_that_is_no_array():
    layer = JaxLayer(lambda inputs: {"a": inputs, "b": "text"})
    with pytest.raises(TypeError, match="returned 'text', a str, as output b; expected arrays"):
        layer(x(2))


# RNG.


def draw(rng, inputs):
    return inputs if rng is None else jax.random.uniform(rng, inputs.shape)


def test_calls_in_training_differ_and_repeat_with_the_seed(mode, backend):
    inputs = x(3, 4)
    if backend.name == "jax":
        mode = "eager"  # Keras threads seeds through a JAX trace by `stateless_call` only

    def run(seed):
        layer = JaxLayer(draw, seed=seed)
        layer(inputs)
        call = backend.compile(lambda x: layer(x, training=True), mode, [inputs])
        return [to_numpy(call(backend.tensors(inputs))) for _ in range(3)]

    first, again, other = run(5), run(5), run(6)
    assert len({value.tobytes() for value in (*first, *other)}) == 6
    np.testing.assert_array_equal(first, again)


def test_the_numbers_are_those_of_every_backend():
    """The key is the seed and its counter: what any backend draws is what JAX draws from them."""
    layer = JaxLayer(draw, seed=5)
    for counter in range(3):
        expected = jax.random.uniform(jnp.array([5, counter], "uint32"), (3, 4))
        np.testing.assert_array_equal(to_numpy(layer(x(3, 4), training=True)), expected)
    np.testing.assert_array_equal(to_numpy(layer(x(3, 4))), x(3, 4))


def test_initial_values_follow_the_seed():
    def values(seed):
        layer = mlp(seed=seed)
        layer.build((None, 4))
        return np.concatenate([value.ravel() for value in weights(layer)])

    np.testing.assert_array_equal(values(3), values(3))
    assert (values(3) != values(4)).any()
    keras.utils.set_random_seed(9)
    first = values(None)
    assert (first != values(None)).any()
    keras.utils.set_random_seed(9)
    np.testing.assert_array_equal(first, values(None))


def test_a_failed_call_draws_nothing():
    layer = JaxLayer(lambda rng, inputs: inputs @ jax.random.uniform(rng, (4,)), seed=1)
    layer.build((None, 4))
    before = weights(layer)
    with pytest.raises(TypeError):
        layer(x(2, 3), training=True)
    np.testing.assert_array_equal(before, weights(layer))


def test_overridden_rng_hooks():
    class Streams(JaxLayer):
        def _get_init_rng(self):
            return {"a": self._get_init_seed(), "b": self._get_init_seed()}

        def _get_call_rng(self, training):
            return [self._get_call_seed(), self._get_call_seed()]

    def init(rng, inputs):
        assert (rng["a"] != rng["b"]).any()
        return jax.random.normal(rng["a"], (2,))

    def call(params, rng, inputs):
        return inputs * params + jax.random.normal(rng[0]) - jax.random.normal(rng[1])

    layer = Streams(call, init, seed=0)
    first, second = to_numpy(layer(x(3, 2))), to_numpy(layer(x(3, 2)))
    assert (first != second).all()
    assert to_numpy(layer.seed_generator.state.value)[1] == 4


# Building inside a trace.


def test_build_inside_a_trace(mode, backend):
    layer = mlp()

    def forward(inputs):
        return layer(inputs)

    inputs = x(3, 4)
    outputs = to_numpy(backend.compile(forward, mode, [inputs])(backend.tensors(inputs)))
    np.testing.assert_allclose(outputs, to_numpy(layer(inputs)), 1e-5, 1e-5)


# Custom loops.


@pytest.mark.trains
def test_custom_loop(backend):
    """A few steps of plain gradient descent, each against unwrapped JAX."""
    layer = mlp(seed=0)
    inputs, targets = x(8, 4), x(8, 3, seed=1)
    layer.build((None, 4))
    params = jax.tree.map(lambda v: jnp.asarray(to_numpy(v.value)), layer.params)

    def native(params):
        return ((models.mlp_call(params, inputs) - targets) ** 2).mean()

    for _ in range(3):
        if backend.name == "jax":

            def loss(trainable):
                outputs, _ = layer.stateless_call(trainable, [], inputs)
                return ((outputs - targets) ** 2).mean()

            gradients = jax.grad(loss)([v.value for v in layer.trainable_variables])
        elif backend.name == "tensorflow":
            import tensorflow as tf

            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((layer(inputs) - targets) ** 2)
            gradients = tape.gradient(loss, layer.trainable_weights)
        else:
            layer.zero_grad()
            loss = ((layer(inputs) - keras.ops.convert_to_tensor(targets)) ** 2).mean()
            loss.backward()
            gradients = [v.value.grad for v in layer.trainable_variables]
        for variable, gradient in zip(layer.trainable_variables, gradients, strict=True):
            variable.assign(variable.value - 0.1 * gradient)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(native)(params))
        for variable, value in zip(layer.trainable_variables, jax.tree.leaves(params), strict=True):
            np.testing.assert_allclose(to_numpy(variable.value), value, 1e-5, 1e-6)


def test_every_model_of_the_table_makes_readable_unique_paths():
    for name, model in MODELS.items():
        layer = model.make()
        layer(model.inputs(np.random.default_rng(0), 2))
        paths = [v.path for v in layer.variables]
        assert len(set(paths)) == len(paths), name
        assert not any("variable" in path for path in paths), name


@pytest.mark.only("torch")
def test_torch_compile():
    """The compiler leaves the layer to itself, and the rest of the model is right around it."""
    import torch

    model = functional()
    inputs = keras.ops.convert_to_tensor(x(6, 4))
    expected = to_numpy(model(inputs))
    compiled = torch.compile(model, backend="eager")
    np.testing.assert_allclose(to_numpy(compiled(inputs)), expected, 1e-6, 1e-6)
    model.zero_grad()
    compiled(inputs).sum().backward()
    gradients = [to_numpy(v.value.grad) for v in model.trainable_variables]
    model.zero_grad()
    model(inputs).sum().backward()
    for one, two in zip(gradients, model.trainable_variables, strict=True):
        np.testing.assert_allclose(one, to_numpy(two.value.grad), 1e-5, 1e-5)


@pytest.mark.only("torch")
def test_fit_in_a_compiled_step():
    """As a model compiled on JAX, whose `jit_compile` a `.keras` file keeps, trains on torch."""
    weights = []
    for jit_compile in (False, True):
        keras.utils.set_random_seed(1)
        model = functional()
        model.compile("sgd", "mse", jit_compile=jit_compile)
        model.fit(x(8, 4), x(8, 3), epochs=2, batch_size=4, shuffle=False, verbose=0)
        weights.append(model.get_weights())
    for one, two in zip(*weights, strict=True):
        np.testing.assert_allclose(one, two, 1e-5, 1e-5)
