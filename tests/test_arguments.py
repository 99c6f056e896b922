"""What a layer is called with: several arguments, masks, train flags, and what `init_fn` sees of them."""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import keras
import models
import numpy as np
import pytest
from backends import to_numpy
from flax import nnx
from models import x

import jaxwrap
from jaxwrap import EquinoxLayer, FlaxLayer, HaikuLayer, JaxLayer, NNXLayer

pytestmark = pytest.mark.each_jax

# `call_arguments`.


def attend_init(rng, query):
    size = query.shape[-1]
    return jax.random.normal(rng, (size, size))


def attend(params, query, key, mask=None, *, scale=1.0, causal=False):
    scores = (query @ params) @ jnp.swapaxes(key, -1, -2) * scale
    if mask is not None:
        scores = jnp.where(mask[:, None], scores, -1e9)
    if causal:
        scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -1e9)
    return jax.nn.softmax(scores) @ key


def attention(**kwargs):
    names = ("query", "key", "mask", "scale", "causal")
    return JaxLayer(attend, attend_init, call_arguments=names, seed=1, **kwargs)


def oracle(layer, *args, **kwargs):
    return attend(jnp.asarray(to_numpy(layer.params.value)), *args, **kwargs)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        (("query", "key"), {}),
        (("query",), {"key": "key"}),
        ((), {"key": "key", "query": "query"}),
        (("query", "key"), {"mask": "mask"}),
        (("query", "key", "mask"), {"scale": 0.5}),
        (("query", "key"), {"scale": "tensor", "causal": True}),
    ],
)
def test_arguments_by_position_and_by_keyword(args, kwargs):
    given = {
        "query": x(2, 3, 4),
        "key": x(2, 3, 4, seed=1),
        "mask": x(2, 3) > 0,
        "tensor": np.float32(0.7),
    }
    args = [given[name] for name in args]
    kwargs = {n: given.get(v, v) if isinstance(v, str) else v for n, v in kwargs.items()}
    layer = attention()
    tensors = [keras.ops.convert_to_tensor(value) for value in args]
    outputs = to_numpy(layer(*tensors, **kwargs))
    np.testing.assert_allclose(outputs, oracle(layer, *args, **kwargs), 1e-5, 1e-5)


def test_the_same_layer_with_and_without_what_is_optional():
    layer, query, mask = attention(), x(2, 3, 4), x(2, 3) > 0
    for kwargs in ({}, {"mask": mask}, {"causal": True}, {}, {"scale": 0.5, "mask": mask}):
        outputs = to_numpy(layer(query, query, **kwargs))
        np.testing.assert_allclose(outputs, oracle(layer, query, query, **kwargs), 1e-5, 1e-5)


def test_arguments_in_a_functional_model(tmp_path):
    query, key = keras.Input((3, 4)), keras.Input((5, 4))
    mask = keras.Input((5,), dtype="bool")
    layer = attention()
    model = keras.Model([query, key, mask], layer(query, key, mask=mask, scale=0.5))
    values = (x(2, 3, 4), x(2, 5, 4, seed=1), x(2, 5) > 0)
    assert model.output_shape == (None, 3, 4)
    expected = oracle(layer, *values, scale=0.5)
    np.testing.assert_allclose(to_numpy(model(list(values))), expected, 1e-5, 1e-5)
    np.testing.assert_allclose(model.predict(list(values), verbose=0), expected, 1e-5, 1e-5)


@pytest.mark.trains
def test_gradients_of_several_arguments(backend):
    layer, query, key = attention(), x(2, 3, 4), x(2, 3, 4, seed=1)
    layer(query, key)
    params = jnp.asarray(to_numpy(layer.params.value))
    cotangent = x(2, 3, 4, seed=2)
    _, pullback = jax.vjp(attend, params, query, key)

    def call(query, key):
        return (layer(query, key),)

    gradients = backend.vjp(call, [query, key], [0, 1], [cotangent])
    for one, two in zip(gradients, pullback(cotangent)[1:], strict=True):
        np.testing.assert_allclose(to_numpy(one), two, 1e-5, 1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: JaxLayer(attend, attend_init, call_arguments=("query", "value")),
            "unsupported argument in `call_fn`.*`key`.*call_arguments",
        ),
        (
            lambda: JaxLayer(lambda query: query, call_arguments=("query", "value")),
            "missing required argument in `call_fn`.*`value`",
        ),
        (
            lambda: JaxLayer(lambda a, b=1: a, call_arguments=("b", "a")),
            "those without a default must come first",
        ),
        (lambda: JaxLayer(lambda rng: rng, call_arguments=()), "at least one argument"),
        (lambda: JaxLayer(lambda x: x, call_arguments="x"), "a tuple of names"),
    ],
)
def test_wrong_call_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_missing_and_unknown_arguments_of_a_call():
    layer = attention()
    with pytest.raises(TypeError, match="missing a required argument: 'key'"):
        layer(x(2, 3, 4))
    with pytest.raises(TypeError, match="unexpected keyword argument 'value'"):
        layer(x(2, 3, 4), x(2, 3, 4), value=1)
    assert not layer.built


def test_init_sees_all_arguments():
    seen = {}

    def init(rng, tokens, bias, scale, flag):
        seen.update(tokens=tokens, bias=bias, scale=scale, flag=flag)
        return jnp.zeros(1)

    def call(params, tokens, bias, scale=2, flag="a"):
        return bias * params + tokens.sum() * scale

    layer = JaxLayer(call, init, call_arguments=("tokens", "bias", "scale", "flag"))
    layer(
        keras.KerasTensor((None, 3), "int32"),
        {"b": keras.KerasTensor((2, None))},
        flag="text",
        scale=3,
    ) if False else layer(
        keras.KerasTensor((None, 3), "int32"), keras.KerasTensor((2, None)), flag="text", scale=3
    )
    assert (seen["tokens"].shape, str(seen["tokens"].dtype)) == ((1, 3), "int32")
    assert (seen["bias"].shape, str(seen["bias"].dtype)) == ((2, 1), "float32")
    assert (seen["scale"], seen["flag"]) == (3, "text")
    config = layer.get_build_config()
    again = JaxLayer(call, init, call_arguments=("tokens", "bias", "scale", "flag"))
    seen.clear()
    again.build_from_config(config)
    assert (seen["bias"].shape, seen["scale"]) == ((2, 1), 3)
    assert again.get_build_config() == config


@keras.saving.register_keras_serializable(package="tests")
class Embedded(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        return nn.Embed(7, 4)(tokens)

    def get_config(self):
        return {}

    @classmethod
    def from_config(cls, config):
        return cls()


def test_embed_from_an_int_input_and_from_a_file(tmp_path):
    inputs = keras.Input((5,), dtype="int32")
    model = keras.Model(inputs, FlaxLayer(Embedded())(inputs))
    tokens = np.random.default_rng(0).integers(0, 7, (3, 5)).astype("int32")
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_allclose(to_numpy(loaded(tokens)), to_numpy(model(tokens)), 1e-6, 1e-6)


# Linen's own signatures.


def test_linen_attention_takes_what_it_takes():
    module = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=4)
    layer = FlaxLayer(module, seed=0)
    query, key = x(2, 3, 4), x(2, 5, 4, seed=1)
    mask = np.random.default_rng(0).random((2, 1, 3, 5)) > 0.3
    for args, kwargs in (
        ((query, key), {}),
        ((query,), {"inputs_k": key, "mask": mask}),
        ((query,), {}),
    ):
        outputs = to_numpy(layer(*args, **kwargs))
        native = module.apply(layer.get_variables(), *args, **kwargs)
        np.testing.assert_allclose(outputs, native, 1e-5, 1e-5)


def test_linen_static_keywords():
    class Power(nn.Module):
        @nn.compact
        def __call__(self, x, power: int, name_of_op: str = "mul", *, bias=None):
            assert isinstance(power, int)
            x = nn.Dense(2)(x) ** power
            return x if bias is None else (x + bias if name_of_op == "add" else x * bias)

    layer = FlaxLayer(Power())
    inputs = x(2, 3)
    for kwargs in ({"power": 2}, {"power": 3, "name_of_op": "add", "bias": np.float32(3)}):
        native = Power().apply(layer.get_variables(), inputs, **kwargs) if layer.built else None
        outputs = to_numpy(layer(inputs, **kwargs))
        native = Power().apply(layer.get_variables(), inputs, **kwargs)
        np.testing.assert_allclose(outputs, native, 1e-5, 1e-5)


@pytest.mark.parametrize("name", ["state", "params", "rng", "method", "rngs", "mutable", "self_"])
def test_linen_arguments_of_any_name(name):
    namespace = {"nn": nn}
    exec(  # a module per name
        "class Named(nn.Module):\n"
        "    @nn.compact\n"
        f"    def __call__(self, {name}, other=None):\n"
        f"        return nn.Dense(2)({name}) + (0 if other is None else other)\n",
        namespace,
    )
    module = namespace["Named"]()
    layer = FlaxLayer(module)
    inputs = x(3, 4)
    outputs = layer(inputs, other=np.float32(2))
    np.testing.assert_allclose(
        to_numpy(outputs), module.apply(layer.get_variables(), inputs, np.float32(2)), 1e-5, 1e-5
    )
    # Keras's own layer calls its argument `inputs`.
    np.testing.assert_allclose(to_numpy(layer(inputs=inputs)), to_numpy(layer(inputs)), 1e-6)


def test_linen_sequential():
    module = nn.Sequential([nn.Dense(3), nn.relu, nn.Dense(2)])
    layer = FlaxLayer(module)
    outputs = to_numpy(layer(x(2, 4)))
    np.testing.assert_allclose(outputs, module.apply(layer.get_variables(), x(2, 4)), 1e-5, 1e-5)


# Masks.


def masked_mean(inputs, mask):
    if mask is None:
        return inputs.mean(1)
    mask = mask[..., None].astype(inputs.dtype)
    return (inputs * mask).sum(1) / mask.sum(1)


@pytest.mark.parametrize("kind", ["function", "linen"])
def test_the_mask_of_the_inputs_arrives(kind):
    class Mean(nn.Module):
        def __call__(self, x, mask=None):
            return masked_mean(x, mask)

    layer = JaxLayer(masked_mean) if kind == "function" else FlaxLayer(Mean())
    tokens = np.array([[1, 2, 0, 0], [3, 0, 0, 0], [1, 1, 1, 1]], "int32")
    embedding = keras.layers.Embedding(5, 3, mask_zero=True)
    inputs = keras.Input((4,), dtype="int32")
    model = keras.Model(inputs, layer(embedding(inputs)))
    table = to_numpy(embedding(tokens))
    expected = masked_mean(jnp.asarray(table), jnp.asarray(tokens != 0))
    np.testing.assert_allclose(to_numpy(model(tokens)), expected, 1e-5, 1e-5)
    np.testing.assert_allclose(to_numpy(layer(table, mask=tokens != 0)), expected, 1e-5, 1e-5)
    np.testing.assert_allclose(to_numpy(layer(table)), table.mean(1), 1e-5, 1e-5)


def test_masks_pass_where_the_time_axis_is_kept():
    def call(inputs):
        return {
            "same": inputs * 2,
            "wide": jnp.stack([inputs, inputs], -1),
            "pooled": inputs.mean(1),
        }

    embedding = keras.layers.Embedding(5, 3, mask_zero=True)
    inputs = keras.Input((4,), dtype="int32")
    outputs = JaxLayer(call, supports_masking=True)(embedding(inputs))
    masks = {name: getattr(output, "_keras_mask", None) for name, output in outputs.items()}
    assert masks["same"] is not None
    assert masks["wide"] is not None
    assert masks["pooled"] is None
    model = keras.Model(inputs, JaxLayer(masked_mean)(outputs["same"]))
    tokens = np.array([[1, 2, 0, 0], [3, 0, 0, 0]], "int32")
    expected = masked_mean(2 * jnp.asarray(to_numpy(embedding(tokens))), jnp.asarray(tokens != 0))
    np.testing.assert_allclose(to_numpy(model(tokens)), expected, 1e-5, 1e-5)
    assert JaxLayer.from_config(
        JaxLayer(models.function_call, supports_masking=True).get_config()
    ).supports_masking


# Train flags.


@pytest.mark.parametrize(
    "flag",
    ["training", "train", "is_training", "deterministic", "inference", "use_running_average"],
)
@pytest.mark.parametrize("kind", ["function", "linen"])
def test_train_flags(flag, kind):
    inverted = flag in ("deterministic", "inference", "use_running_average")
    namespace = {"nn": nn}
    exec(  # a function and a module per name
        f"def call(inputs, {flag}): return inputs * (2 if {flag} else 1)\n"
        "class Flagged(nn.Module):\n"
        f"    def __call__(self, x, {flag}): return call(x, {flag})\n",
        namespace,
    )
    layer = JaxLayer(namespace["call"]) if kind == "function" else FlaxLayer(namespace["Flagged"]())
    for training in (False, True):
        expected = 2 if training != inverted else 1
        assert to_numpy(layer(np.ones(1, "float32"), training=training)) == expected
    assert to_numpy(layer(np.ones(1, "float32"))) == (2 if inverted else 1)


def test_a_flag_named_by_hand():
    def call(inputs, frozen, training=None):
        assert training is None
        return inputs * (2 if frozen else 1)

    for argument, in_training in (("frozen", 2), ("!frozen", 1)):
        layer = JaxLayer(call, training_argument=argument)
        assert to_numpy(layer(np.ones(1, "float32"), training=True)) == in_training
        assert JaxLayer.from_config is not None
    with pytest.raises(ValueError, match=r"has no argument `frozen`; it has `inputs`"):
        JaxLayer(lambda inputs: inputs, training_argument="!frozen")
    with pytest.raises(ValueError, match="has no argument `frozen`"):
        FlaxLayer(nn.Dense(2), training_argument="frozen")


def test_no_flag_leaves_the_module_s_default_alone():
    class Flagged(nn.Module):
        @nn.compact
        def __call__(self, x, train=True):
            return x * (2 if train else 1)

    assert to_numpy(FlaxLayer(Flagged(), training_argument=None)(np.ones(1, "float32"))) == 2
    assert to_numpy(FlaxLayer(Flagged())(np.ones(1, "float32"))) == 1

    def call(inputs, training=True):
        return inputs * (2 if training else 1)

    assert to_numpy(JaxLayer(call, training_argument=None)(np.ones(1, "float32"))) == 2
    with pytest.raises(ValueError, match="needs a default"):
        JaxLayer(lambda inputs, training: inputs, training_argument=None)


def test_linen_dropout_and_batch_norm_themselves():
    dropout = FlaxLayer(nn.Dropout(0.5))
    ones = np.ones((50, 4), "float32")
    np.testing.assert_array_equal(to_numpy(dropout(ones)), ones)
    first, second = (to_numpy(dropout(ones, training=True)) for _ in range(2))
    assert (first == 0).any()
    assert (first != second).any()
    norm = FlaxLayer(nn.BatchNorm(momentum=0.5))
    norm(x(20, 3) + 5, training=True)
    mean = to_numpy(norm.state["batch_stats"]["mean"].value)
    np.testing.assert_allclose(mean, 0.5 * (x(20, 3) + 5).mean(0), 1e-4)
    norm(x(20, 3))
    np.testing.assert_array_equal(to_numpy(norm.state["batch_stats"]["mean"].value), mean)


def test_a_flag_that_the_module_was_made_with_stays():
    layer = FlaxLayer(nn.Dropout(0.5, deterministic=True))
    np.testing.assert_array_equal(to_numpy(layer(np.ones(9, "float32"), training=True)), np.ones(9))
    layer = FlaxLayer(nn.BatchNorm(use_running_average=False))
    layer(x(20, 3) + 5)
    assert to_numpy(layer.state["batch_stats"]["mean"].value).max() > 0


# Who passes an argument is decided by the library, or by its place, and not by its name.


def haiku_policy(state, rng):
    return hk.Linear(2)(state) * rng


@pytest.mark.parametrize("without_rng", [True, False])
@pytest.mark.parametrize("with_state", [True, False])
def test_haiku_arguments_called_as_haiku_s_own(without_rng, with_state):
    transform = hk.transform_with_state if with_state else hk.transform
    transformed = transform(haiku_policy)
    if without_rng:
        transformed = hk.without_apply_rng(transformed)
    layer = HaikuLayer(transformed)
    state, rng = x(5, 3), x(5, 2, seed=1)
    output = to_numpy(layer(state, rng))
    variables = layer.get_variables()
    own = [variables["params"], *([variables["state"]] if with_state else [])]
    own += [] if without_rng else [None]
    expected = transformed.apply(*own, state, rng)
    np.testing.assert_allclose(output, expected[0] if with_state else expected, 1e-5)


class Attention(eqx.Module):
    weight: jax.Array

    def __call__(self, query, key, value):
        return (query * self.weight) * key + value


class Drops(eqx.Module):
    def __call__(self, x, key):
        return x * jax.random.uniform(key, x.shape)


def test_an_equinox_key_that_is_data_and_one_that_is_not():
    module = Attention(jnp.asarray(x(3)))
    query, key, value = (x(5, 3, seed=seed) for seed in range(3))
    layer = EquinoxLayer(module)
    assert layer.adapter.draws == "never"
    np.testing.assert_allclose(to_numpy(layer(query, key, value)), module(query, key, value), 1e-5)
    layer = EquinoxLayer(Drops(), seed=1)
    first, second = (to_numpy(layer(x(4))) for _ in range(2))
    assert (first != second).any()


def test_call_arguments_called_as_our_own():
    def critic(params, state, rng):
        return jnp.concatenate([state, rng], -1) @ params

    layer = JaxLayer(critic, params=x(6, 1), call_arguments=("state", "rng"))
    assert layer.seed_generator is None
    state, rng = x(7, 4), x(7, 2, seed=1)
    expected = np.concatenate([state, rng], -1) @ x(6, 1)
    np.testing.assert_allclose(to_numpy(layer(state, rng)), expected, 1e-5, 1e-5)


def test_nnx_rngs_at_the_call():
    layer = NNXLayer(nnx.Dropout(0.5), seed=4)
    given = np.ones((50,), "float32")
    first, second = (to_numpy(layer(given, training=True)) for _ in range(2))
    assert (first != second).any()
    assert set(np.unique(first)) == {0.0, 2.0}
    np.testing.assert_array_equal(to_numpy(layer(given)), given)
    own = NNXLayer(nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
    assert own.adapter.draws == "never"
    assert (to_numpy(own(given, training=True)) != given).any()


def test_keys_in_inference():
    def call(inputs, rng):
        return inputs + jax.random.normal(rng, inputs.shape)

    with pytest.raises(TypeError, match=r"JaxLayer 'sampler': `rng` is None in inference.*rng_in_"):
        JaxLayer(call, name="sampler")(x(3))
    layer = JaxLayer(call, seed=1, rng_in_inference=True)
    first, second = (to_numpy(layer(x(3))) for _ in range(2))
    assert (first != second).any()
    again = JaxLayer.from_config(JaxLayer(models.dropout_call, rng_in_inference=True).get_config())
    assert again.get_config()["rng_in_inference"] is True


# Functions whose arguments have other names.


def test_the_only_unknown_argument_is_the_input():
    np.testing.assert_allclose(to_numpy(jaxwrap.wrap(jnp.tanh)(x(3))), np.tanh(x(3)), 1e-5)
    layer = JaxLayer(lambda params, x: x * params, params=2.0)
    np.testing.assert_allclose(to_numpy(layer(x(3))), 2 * x(3), 1e-6)
    np.testing.assert_allclose(to_numpy(layer(x=x(3))), 2 * x(3), 1e-6)

    def init(key, sample):
        return jax.random.normal(key, sample.shape[-1:])

    def call(params, batch, key, training):
        return batch * params + (jax.random.normal(key, batch.shape) if training else 0)

    layer = JaxLayer(call, init, seed=1)
    weights = to_numpy(layer(np.ones((1, 3), "float32")))[0]
    np.testing.assert_allclose(to_numpy(layer(x(5, 3))), x(5, 3) * weights, 1e-5)
    assert (to_numpy(layer(x(5, 3), training=True)) != x(5, 3) * weights).all()
    with pytest.raises(ValueError, match=r"unsupported argument.*`a`.*call_arguments"):
        JaxLayer(lambda params, a, b: a + b, params=1.0)


def test_update_stats_is_a_train_flag():
    class Normed(nn.Module):
        @nn.compact
        def __call__(self, inputs, update_stats):
            return nn.SpectralNorm(nn.Dense(3))(inputs, update_stats=update_stats)

    layer = FlaxLayer(Normed(), seed=1)
    layer(x(4, 5))
    before = layer.get_variables()["batch_stats"]
    layer(x(4, 5))
    np.testing.assert_array_equal(
        *(jax.tree.leaves(tree)[0] for tree in (before, layer.get_variables()["batch_stats"]))
    )
    layer(x(4, 5), training=True)
    after = layer.get_variables()["batch_stats"]
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    assert any((one != two).any() for one, two in pairs)


class Home:
    def init(self, key, x):
        return {"w": jax.random.normal(key, (x.shape[-1], 2))}

    def apply(self, params, x):
        return x @ params["w"]


def test_wrap_takes_objects_with_init_and_apply():
    layer = jaxwrap.wrap(Home(), name="home")
    output = to_numpy(layer(x(3, 4)))
    np.testing.assert_allclose(output, x(3, 4) @ layer.get_variables()["params"]["w"], 1e-5, 1e-5)
    assert [v.path for v in layer.trainable_variables] == ["home/params/w"]


class Counts(eqx.Module):
    index: eqx.nn.StateIndex

    def __init__(self):
        self.index = eqx.nn.StateIndex(jnp.zeros(()))

    def __call__(self, x, state):
        count = state.get(self.index) + 1
        return x * count, state.set(self.index, count)


def test_wrap_takes_stateful_equinox_modules_and_maps_those_of_eqx_nn():
    layer = jaxwrap.wrap(eqx.nn.make_with_state(Counts)())
    for step in (1, 2, 3):
        np.testing.assert_allclose(to_numpy(layer(x(3))), step * x(3), 1e-6)
    linear = eqx.nn.Linear(4, 2, key=jax.random.key(0))
    np.testing.assert_allclose(
        to_numpy(jaxwrap.wrap(linear)(x(5, 4))), jax.vmap(linear)(x(5, 4)), 1e-5, 1e-5
    )
    norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(4, "batch", mode="batch")
    assert jaxwrap.wrap((norm, state))(x(5, 4), training=True).shape == (5, 4)
    with pytest.raises(ValueError, match=r"EquinoxLayer 'one': .*did you mean `batch=True`"):
        EquinoxLayer(linear, name="one")(x(5, 4))
