"""Leaves that are computed from parts: every built-in over models of every library, files, and a class of one's own."""

import dataclasses
import gc
import itertools
import re
import tracemalloc
import weakref
import zlib
from collections.abc import Callable

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import keras
import models
import numpy as np
import optax
import pytest
from backends import to_numpy
from flax import nnx
from models import once_except
from zoo import ZOO

import jaxwrap
from jaxwrap import (
    EquinoxLayer,
    FlaxLayer,
    HaikuLayer,
    JaxLayer,
    NNXLayer,
    OptaxOptimizer,
    Rule,
    checkpoints,
)
from jaxwrap._weights._variables import to_host
from jaxwrap.reparametrizations import (
    Float8,
    Int4,
    Int8,
    LoRA,
    Masked,
    SpectralNorm,
    Tied,
    WeightNorm,
)


@jaxwrap.register_serializable("tests")
def keeps_half(leaf):
    return jnp.abs(leaf) >= jnp.median(jnp.abs(leaf))


@jaxwrap.register_serializable("tests")
@dataclasses.dataclass(frozen=True)
class Scaled(jaxwrap.Reparametrization):
    frozen = ("direction",)

    def init(self, leaf, key):
        return {"direction": leaf, "scale": jnp.ones((), leaf.dtype)}

    def apply(self, parts, shape):
        return parts["direction"] * parts["scale"]


# The form, the relative error of a leaf at the start (None if it is another leaf), and the parts that are trained.
FORMS = {
    "lora": (LoRA(2), 0.0, {"a", "b"}),
    "lora with alpha": (LoRA(2, alpha=8, inputs=1), 0.0, {"a", "b"}),
    "qlora": (LoRA(2, base=Int8()), 2e-2, {"a", "b"}),
    "int8": (Int8(), 2e-2, set()),
    "int4": (Int4(), 0.2, set()),
    "float8": (Float8(), 0.1, set()),
    "weight norm": (WeightNorm(), 0.0, {"direction", "scale"}),
    "spectral norm": (SpectralNorm(), None, {"weight"}),
    "masked": (Masked(keeps_half), None, {"weight"}),
    "own": (Scaled(), 0.0, {"scale"}),
}
LIBRARIES = {
    "function": (
        lambda **kw: JaxLayer(models.mlp_call, models.mlp_init, **kw),
        models.x(4, 5),
    ),
    "linen": (ZOO["linen transformer"].make, ZOO["linen transformer"].inputs),
    "nnx": (ZOO["nnx attention"].make, ZOO["nnx attention"].inputs),
    "haiku": (ZOO["haiku lstm"].make, ZOO["haiku lstm"].inputs),
    "equinox": (ZOO["equinox mlp"].make, ZOO["equinox mlp"].inputs),
}


def kernels(layer):
    """The paths of the float parameters with two axes or more, without biases of attention heads."""
    leaves = layer._engine.built_weights().params.leaves
    return [leaf.path for leaf in leaves if len(leaf.shape) > 1 and "bias" not in leaf.path]


def mixed(library, turn):
    """A layer of a library without parts, the same one with one form after the other for its kernels, and inputs.

    The forms by path begin with the one at `turn`.
    """
    make, inputs = LIBRARIES[library]
    base = make(seed=0)
    base(inputs)
    names = [*FORMS][turn:] + [*FORMS][:turn]
    forms = dict(zip(kernels(base), names, strict=False))
    assert len(forms) == KERNELS[library]
    rules = [(re.escape(path), Rule(reparametrize=FORMS[name][0])) for path, name in forms.items()]
    changed = make(seed=0, rules=rules)
    changed(inputs)
    return base, changed, forms, inputs


# The kernels of each. So many turns meet each form in each library.
KERNELS = {"function": 2, "linen": 7, "nnx": 6, "haiku": 2, "equinox": 3}
# On the first backend. Linen alone meets each form on the others.
TURNS = [
    pytest.param(library, turn, marks=[pytest.mark.once] * bool(turn and library != "linen"))
    for library, count in KERNELS.items()
    for turn in range(0, len(FORMS), count)
]


def leaves_of(layer):
    weights = layer._engine.built_weights()
    return {leaf.path: weights.params.read_leaf(n) for n, leaf in enumerate(weights.params.leaves)}


def values(layer):
    return {variable.path: to_host(variable) for variable in layer.weights}


def train(layer, inputs, steps=2, optimizer=None):
    # `keras.Sequential` would know the layer as its own, and give the variables other paths.
    start = keras.Input(inputs.shape[1:], batch_size=len(inputs), dtype=str(inputs.dtype))
    model = keras.Model(start, layer(start, training=True))
    model.compile(optimizer or keras.optimizers.SGD(0.1), "mse")
    outputs = to_numpy(model(inputs))
    for _ in range(steps):
        model.train_on_batch(inputs, np.ones_like(outputs))
    return model


@pytest.mark.parametrize(("library", "turn"), TURNS)
def test_leaves_and_outputs_at_the_start(library, turn):
    base, changed, forms, inputs = mixed(library, turn)
    before, after = leaves_of(base), leaves_of(changed)
    assert before.keys() == after.keys()
    for path in before:
        error = FORMS[forms[path]][1] if path in forms else 0
        if error is not None:
            scale = error * np.abs(before[path]).max()
            np.testing.assert_allclose(after[path], before[path], 0, scale, err_msg=path)
    # A layer without parts and with these leaves.
    base.set_variables(changed.get_variables())
    expected = to_numpy(base(inputs))
    np.testing.assert_allclose(to_numpy(changed(inputs)), expected, 1e-5, 1e-6)
    changed.merge()
    np.testing.assert_allclose(to_numpy(changed(inputs)), expected, 1e-6, 1e-6)
    assert [v.path for v in changed.weights] == [
        v.path.replace(base.name, changed.name, 1) for v in base.weights
    ]


@pytest.mark.trains
@pytest.mark.parametrize(("library", "turn"), TURNS)
def test_training_moves_the_named_parts_alone(library, turn):
    _, layer, forms, inputs = mixed(library, turn)
    before = values(layer)
    # `keras.Sequential` would know the layer as its own, and give the variables other paths.
    start = keras.Input(inputs.shape[1:], dtype=str(inputs.dtype))
    model = keras.Model(start, layer(start))
    model.compile(keras.optimizers.Adam(0.01), "mse")
    outputs = to_numpy(model(inputs))
    model.fit(inputs, np.ones_like(outputs), epochs=2, verbose=0)
    after = values(layer)
    moved = {path for path in before if (before[path] != after[path]).any()}
    for path, name in forms.items():
        _, _, trained = FORMS[name]
        parts = {variable for variable in before if f"/{path}/" in f"/{variable}"}
        named = {variable for variable in parts if variable.rpartition("/")[2] in trained}
        assert len(named) == len(trained)
        updated = {variable for variable in parts if variable.endswith(("/left", "/right"))}
        assert named <= moved
        assert moved & parts <= named | updated
    # Adam keeps two numbers of each that is trained, the number of its steps, and the rate.
    assert len(model.optimizer.variables) == 2 * len(layer.trainable_variables) + 2
    outputs = to_numpy(model(inputs))
    layer.merge()
    np.testing.assert_allclose(to_numpy(layer(inputs)), outputs, 1e-6, 1e-6)


@pytest.mark.each_jax
@pytest.mark.trains
@pytest.mark.parametrize(
    "name", once_except(["lora", "qlora", "weight norm", "masked", "own"], ["qlora", "own"])
)
def test_gradients_are_those_of_jax(name):
    form, _, trained = FORMS[name]
    inputs = models.x(4, 5)
    layer = JaxLayer(
        models.mlp_call, models.mlp_init, rules={".*/w": Rule(reparametrize=form)}, seed=0
    )
    layer(inputs)
    parts = jax.tree.map(jnp.asarray, layer.get_variables(merged=False))["params"]
    shapes = jax.tree.map(
        np.shape, layer.get_variables()["params"], is_leaf=lambda x: hasattr(x, "shape")
    )

    def fold(node, shape, form=form):
        if not isinstance(node, dict):
            return node
        inner = {k: fold(v, shape, getattr(form, k, None)) for k, v in node.items()}
        return form.apply(inner, shape)

    def loss(parts):
        params = [
            {key: fold(leaf[key], shape[key]) for key in leaf}
            for leaf, shape in zip(parts, shapes, strict=True)
        ]
        return ((models.mlp_call(params, inputs) - 1) ** 2).mean()

    gradients = jax.grad(loss, allow_int=True)(parts)
    before = layer.get_variables(merged=False)["params"]
    train(layer, inputs, steps=1, optimizer=keras.optimizers.SGD(1.0))
    after = layer.get_variables(merged=False)["params"]
    for (path, gradient), old, new in zip(
        jax.tree_util.tree_leaves_with_path(gradients),
        jax.tree.leaves(before),
        jax.tree.leaves(after),
        strict=True,
    ):
        part = path[-1].key
        if part in trained or (part == "b" and len(path) == 2):
            np.testing.assert_allclose(old - new, gradient, 1e-4, 1e-5, err_msg=str(path))
        else:
            np.testing.assert_array_equal(old, new, err_msg=str(path))


@pytest.mark.parametrize("name", once_except(FORMS, ["qlora", "float8", "own"]))
def test_a_keras_file_keeps_the_parts(name, tmp_path):
    layer = FlaxLayer(
        nn.Dense(4), name="dense", rules={".*/kernel": Rule(reparametrize=FORMS[name][0])}
    )
    model = keras.Sequential([keras.Input((6,)), layer])
    for variable in layer.trainable_variables:
        variable.assign(to_numpy(variable.value) + 0.5)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for one, two in zip(layer.weights, loaded.layers[-1].weights, strict=True):
        assert one.path.endswith(two.path.partition("dense/")[2])
        np.testing.assert_array_equal(to_host(one), to_host(two), err_msg=one.path)
    inputs = models.x(3, 6)
    np.testing.assert_allclose(to_numpy(loaded(inputs)), to_numpy(model(inputs)), 1e-6, 1e-6)


def dense(form=None, seed=0):
    rules = {".*/kernel": Rule(reparametrize=form)} if form else None
    layer = FlaxLayer(nn.Dense(4), name="dense", rules=rules, seed=seed)
    return keras.Sequential([keras.Input((6,)), layer], name="model"), layer


@pytest.mark.parametrize("form", [LoRA(2), Int8(), LoRA(2, base=Int4())])
def test_a_base_file_loads_into_parts_and_a_merged_one_back(form, tmp_path):
    path, inputs = tmp_path / "base.weights.h5", models.x(3, 6)
    base, _ = dense()
    base.save_weights(path)
    changed, layer = dense(form, seed=1)
    changed.load_weights(path)
    error = 0.2 if isinstance(form, LoRA) and form.base else 2e-2 * (not isinstance(form, LoRA))
    np.testing.assert_allclose(
        to_numpy(changed(inputs)), to_numpy(base(inputs)), error, error + 1e-6
    )
    own = tmp_path / "own.weights.h5"
    changed.save_weights(own)
    before = values(base.layers[-1])
    with pytest.raises(
        ValueError, match=r"(?s)missing: params/kernel\n.*unexpected: params/kernel/"
    ):
        base.load_weights(own)
    for name, value in values(base.layers[-1]).items():
        np.testing.assert_array_equal(value, before[name])
    layer.merge()
    changed.save_weights(own)
    base.load_weights(own)
    np.testing.assert_allclose(to_numpy(base(inputs)), to_numpy(changed(inputs)), 1e-6, 1e-6)


def test_variables_are_read_and_written_as_leaves():
    _, layer = dense(LoRA(2, base=Int8()))
    folded = layer.get_variables()["params"]["kernel"]
    assert (folded.shape, folded.dtype) == ((6, 4), "float32")
    parts = layer.get_variables(merged=False)["params"]["kernel"]
    assert jax.tree.map(np.shape, parts, is_leaf=lambda x: hasattr(x, "shape")) == {
        "base": {"values": (6, 4), "scale": (1, 4)},
        "a": (6, 2),
        "b": (2, 4),
    }
    new = {"params": {"kernel": models.x(6, 4), "bias": np.ones(4, "float32")}}
    layer.set_variables(new)
    np.testing.assert_allclose(
        layer.get_variables()["params"]["kernel"], new["params"]["kernel"], 0, 2e-2
    )
    before = values(layer)
    with pytest.raises(ValueError, match=r"shape: params/kernel is \(6, 4\); received \(4, 6\)"):
        layer.set_variables({"params": {**new["params"], "kernel": models.x(4, 6)}})
    for path, value in values(layer).items():
        np.testing.assert_array_equal(value, before[path])


@pytest.mark.parametrize(
    "suffix", once_except(["npz", "safetensors", "msgpack", "eqx"], ["safetensors"])
)
def test_checkpoints_hold_leaves(suffix, tmp_path):
    _, base = dense(seed=3)
    _, layer = dense(LoRA(2, base=Int8()))
    path = tmp_path / f"base.{suffix}"
    checkpoints.save(base, path)
    checkpoints.load(layer, path)
    kernel = base.get_variables()["params"]["kernel"]
    np.testing.assert_allclose(layer.get_variables()["params"]["kernel"], kernel, 0, 2e-2)
    checkpoints.save(layer, path)
    checkpoints.load(base, path)
    np.testing.assert_allclose(
        base.get_variables()["params"]["kernel"], layer.get_variables()["params"]["kernel"], 1e-6
    )


@pytest.mark.parametrize("suffix", once_except(["npz", "safetensors", "msgpack", "orbax"], ["npz"]))
@pytest.mark.parametrize("whole", [False, True])
def test_adapters_alone(suffix, whole, tmp_path):
    def make(seed):
        rules = {".*/kernel": Rule(reparametrize=LoRA(2)), ".*/bias": Rule(trainable=False)}
        layer = FlaxLayer(nn.Dense(64), name="dense", rules=rules, seed=seed)
        model = keras.Sequential([keras.Input((64,)), layer], name="model")
        return model if whole else layer, layer

    (one, layer), (two, other) = make(0), make(1)
    for variable in layer.trainable_variables:
        variable.assign(models.x(*variable.shape))
    full, part = tmp_path / f"full.{suffix}", tmp_path / f"part.{suffix}"
    checkpoints.save(one, full)
    checkpoints.save(one, part, trainable_only=True)
    if suffix != "orbax":
        assert part.stat().st_size <= full.stat().st_size / 4
    before = values(other)
    checkpoints.load(two, part)
    for path, value in values(other).items():
        expected = values(layer)[path] if path.endswith(("/a", "/b")) else before[path]
        np.testing.assert_array_equal(value, expected)
    _, base = dense()
    before = values(base)
    with pytest.raises(ValueError, match=r"unexpected: trainable/(dense/)?params/kernel/a"):
        checkpoints.load(base, part)
    for path, value in values(base).items():
        np.testing.assert_array_equal(value, before[path])


@pytest.mark.once
def test_adapters_alone_need_names(tmp_path):
    _, layer = dense(LoRA(2))
    with pytest.raises(ValueError, match=r"FlaxLayer 'dense'.*without names.*safetensors"):
        checkpoints.save(layer, tmp_path / "part.eqx", trainable_only=True)


@pytest.mark.once
def test_unfreezing_everything_thaws_no_frozen_part():
    _, layer = dense(LoRA(2))
    layer.freeze(".*")
    assert not layer.trainable_variables
    layer.unfreeze(".*")
    assert {v.name for v in layer.trainable_variables} == {"a", "b", "bias"}
    layer.trainable = False
    layer.trainable = True
    assert {v.name for v in layer.trainable_variables} == {"a", "b", "bias"}


@pytest.mark.once
def test_parts_keep_the_path_of_a_layer_that_is_older_than_its_model():
    layer = jaxwrap.wrap(nnx.Linear(6, 4, rngs=nnx.Rngs(0)), name="linear")
    keras.Sequential([keras.Input((6,)), layer])
    layer.reparametrize(".*kernel", LoRA(2))
    paths = {variable.path for variable in layer.weights}
    assert paths == {
        f"linear/params/{name}" for name in ("bias", "kernel/base", "kernel/a", "kernel/b")
    }


@pytest.mark.parametrize("form", [LoRA(2), Int8(), Masked(keeps_half)])
def test_after_building_and_back(form, tmp_path):
    model, layer = dense()
    inputs = models.x(3, 6)
    kernel = layer.get_variables()["params"]["kernel"]
    layer.reparametrize(".*/kernel", form)
    made = dense(form)[1]
    assert [v.path for v in made.weights] == [v.path for v in layer.weights]
    np.testing.assert_allclose(
        layer.get_variables()["params"]["kernel"], made.get_variables()["params"]["kernel"], 1e-6
    )
    outputs = to_numpy(model(inputs))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(to_numpy(loaded(inputs)), outputs, 1e-6, 1e-6)
    layer.merge(".*/kernel")
    assert [v.path for v in layer.weights] == [
        "model/dense/params/bias",
        "model/dense/params/kernel",
    ]
    np.testing.assert_allclose(to_numpy(model(inputs)), outputs, 1e-6, 1e-6)
    if isinstance(form, LoRA):
        np.testing.assert_array_equal(layer.get_variables()["params"]["kernel"], kernel)
    with pytest.raises(ValueError, match=r"FlaxLayer 'dense': none of the leaves .* has parts"):
        layer.merge()


@pytest.mark.once
def test_what_cannot_be_is_refused_and_changes_nothing():
    _, layer = dense()
    before = values(layer)
    for pattern, form, problem in (
        (".*", LoRA(2), r"params/bias, of shape \(4,\): LoRA needs a leaf of two axes"),
        (".*/kernel", LoRA(2, inputs=2), r"params/kernel, .* inputs=2"),
        (".*/krnl", LoRA(2), "does not match any.*params/kernel"),
        (".*/kernel", Masked(np.ones(3, bool)), r"the leaf's shape, \(6, 4\); received \(3,\)"),
        (".*/kernel", Tied("params/other"), "tied to 'params/other', which is no leaf"),
        (".*/kernel", Tied("params/bias"), r"float32\(6, 4\).*float32\(4,\)"),
    ):
        with pytest.raises(ValueError, match=f"(?s)FlaxLayer 'dense': .*{problem}"):
            layer.reparametrize(pattern, form)
        assert {path: v.tobytes() for path, v in values(layer).items()} == {
            path: v.tobytes() for path, v in before.items()
        }
    rules = {".*/kernel": Rule(reparametrize=LoRA(2), regularizer="l2")}
    with pytest.raises(ValueError, match=r"params/kernel set a regularizer and LoRA.*CallResult"):
        FlaxLayer(nn.Dense(4), rules=rules).build((1, 6))
    with pytest.raises(TypeError, match=r"must be a `jaxwrap.Reparametrization`.*received 8"):
        Rule(reparametrize=8)


class LanguageModel(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        return nn.Dense(11, use_bias=False, name="head")(nn.Embed(11, 4, name="embed")(tokens))


jaxwrap.register_serializable("tests")(LanguageModel)


def test_tied_leaves_are_one(tmp_path, backend):
    rules = {"params/head/kernel": Rule(reparametrize=Tied("params/embed/embedding", True))}
    layer = FlaxLayer(LanguageModel(), name="lm", rules=rules)
    inputs = np.arange(6, dtype="int32").reshape(2, 3)
    start = keras.Input((3,), dtype="int32")
    model = keras.Model(start, layer(start))
    assert [v.path for v in layer.weights] == ["lm/params/embed/embedding"]

    def expected():
        embedding = layer.get_variables()["params"]["embed"]["embedding"]
        np.testing.assert_array_equal(
            layer.get_variables()["params"]["head"]["kernel"], embedding.T
        )
        return embedding[inputs] @ embedding.T

    np.testing.assert_allclose(to_numpy(model(inputs)), expected(), 1e-5, 1e-5)
    if backend.trains:
        model.compile("sgd", "mse")
        model.train_on_batch(inputs, np.ones((2, 3, 11), "float32"))
        np.testing.assert_allclose(to_numpy(model(inputs)), expected(), 1e-5, 1e-5)
    model.save(tmp_path / "lm.keras")
    loaded = keras.models.load_model(tmp_path / "lm.keras")
    np.testing.assert_allclose(to_numpy(loaded(inputs)), to_numpy(model(inputs)), 1e-6)
    other = layer.get_variables()
    other["params"]["head"]["kernel"] = other["params"]["head"]["kernel"] + 1
    with pytest.raises(ValueError, match="tied: params/head/kernel must be equal to params/embed/"):
        layer.set_variables(other)
    checkpoints.save(layer, tmp_path / "lm.npz")
    checkpoints.load(layer, tmp_path / "lm.npz")
    arrays = dict(np.load(tmp_path / "lm.npz"))
    arrays["params/head/kernel"] = arrays["params/head/kernel"] + 1
    np.savez(tmp_path / "lm.npz", **arrays)
    before = values(layer)
    with pytest.raises(ValueError, match=r"No weight has been changed\.\n  tied: params/head"):
        checkpoints.load(layer, tmp_path / "lm.npz")
    del arrays["params/head/kernel"]
    np.savez(tmp_path / "lm.npz", **arrays)
    checkpoints.load(layer, tmp_path / "lm.npz")
    for path, value in values(layer).items():
        np.testing.assert_array_equal(value, before[path])


def modulus(params, inputs):
    return abs(inputs * params["w"])


@pytest.mark.trains
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_complex_parameters_descend_as_two_real_ones(optimizer):
    w = np.array([1 + 2j, -3 + 0.5j, 2 - 1j], "complex64")
    layer = JaxLayer(modulus, params={"w": w})
    inputs, target = models.x(8, 3), np.zeros((8, 3), "float32")
    rate, make = {"sgd": (0.1, optax.sgd), "adam": (0.01, optax.adam)}[optimizer]
    made = {"sgd": keras.optimizers.SGD, "adam": keras.optimizers.Adam}[optimizer](rate)
    parts, transformation = (jnp.real(w), jnp.imag(w)), make(rate)
    state = transformation.init(parts)
    for _ in range(3):
        gradients = jax.grad(
            lambda parts: (modulus({"w": jax.lax.complex(*parts)}, inputs) ** 2).mean()
        )(parts)
        updates, state = transformation.update(gradients, state)
        parts = optax.apply_updates(parts, updates)
    model = keras.Sequential([keras.Input((3,)), layer])
    model.compile(made, "mse")
    for _ in range(3):
        model.train_on_batch(inputs, target)
    result = layer.get_variables()["params"]["w"]
    assert result.dtype == "complex64"
    np.testing.assert_allclose(result, parts[0] + 1j * parts[1], 1e-4, 1e-4)


def test_keras_quantizes_a_mixed_model(tmp_path):
    def make():
        start = keras.Input((64,))
        hidden = keras.layers.Dense(64, name="keras")(start)
        rules = {"params/kernel": Rule(reparametrize=False)}
        hidden = FlaxLayer(nn.Dense(64), name="plain", rules=rules)(hidden)
        return keras.Model(start, FlaxLayer(nn.Dense(64, use_bias=False), name="own")(hidden))

    def size(layer):
        return sum(np.dtype(v.dtype).itemsize * int(np.prod(v.shape)) for v in layer.weights)

    for mode, dtype, most in (("int8", "int8", 0.27), ("int4", "uint8", 0.17)):
        model = make()
        inputs = models.x(3, 64)
        before = to_numpy(model(inputs))
        full = size(model.get_layer("own"))
        model.quantize(mode)
        own, plain = model.get_layer("own"), model.get_layer("plain")
        assert [v.dtype for v in own.weights] == [dtype, "float32"]
        assert {v.dtype for v in plain.weights} == {"float32"}
        assert size(own) <= most * full
        after = to_numpy(model(inputs))
        assert (
            np.abs(after - before).max() < {"int8": 0.1, "int4": 0.5}[mode] * np.abs(before).max()
        )
        model.save(tmp_path / "q.keras")
        loaded = keras.models.load_model(tmp_path / "q.keras")
        np.testing.assert_allclose(to_numpy(loaded(inputs)), after, 1e-5, 1e-5)


def test_mixed_precision_leaves_scales_alone():
    rules = {".*/kernel": Rule(reparametrize=Int8())}
    seen = []

    def call(params, inputs):
        seen.append(str(params["kernel"].dtype))
        return inputs @ params["kernel"]

    layer = JaxLayer(call, params={"kernel": models.x(6, 4)}, rules=rules, dtype="mixed_bfloat16")
    layer(models.x(3, 6))
    assert [v.dtype for v in layer.weights] == ["int8", "float32"]
    assert set(seen) == {"bfloat16"}


@pytest.mark.trains
def test_optax_by_part():
    _, layer = dense(LoRA(2))

    def labels(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "slow" if path[-1].key == "a" else "fast", params
        )

    optimizer = OptaxOptimizer(
        optax.multi_transform({"slow": optax.set_to_zero(), "fast": optax.sgd(0.1)}, labels)
    )
    before = values(layer)
    train(layer, models.x(3, 6), optimizer=optimizer)
    moved = {
        path.rpartition("/")[2]
        for path, value in values(layer).items()
        if (value != before[path]).any()
    }
    assert moved == {"b", "bias"}


@pytest.mark.trains
def test_a_compiled_model_has_to_be_compiled_again():
    model, layer = dense()
    inputs, target = models.x(3, 6), np.ones((3, 4), "float32")
    model.compile("adam", "mse")
    model.fit(inputs, target, verbose=0)
    layer.reparametrize(".*/kernel", LoRA(2))
    before = to_numpy(model(inputs))
    np.testing.assert_allclose(model.predict(inputs, verbose=0), before, 1e-6, 1e-6)
    with pytest.raises(ValueError, match="compile"):
        model.fit(inputs, target, verbose=0)
    np.testing.assert_array_equal(to_numpy(model(inputs)), before)
    model.compile("adam", "mse")
    model.fit(inputs, target, verbose=0)


def dropout_of_rows(parts, key, path, rate):
    """The leaf of `LoRA(dropout=rate)` in training, in plain JAX."""
    own = jax.random.fold_in(key, zlib.crc32(path.encode()))
    rows = jax.random.bernoulli(own, 1 - rate, (len(parts["a"]), 1))
    return parts["base"] + jnp.where(rows, parts["a"] / (1 - rate), 0) @ parts["b"]


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_lora_of_a_kernel_with_its_inputs_last(rate):
    layer = JaxLayer(
        lambda params, inputs: inputs @ params["w"].T,
        params={"w": models.x(4, 6)},
        rules={".*": Rule(reparametrize=LoRA(2, inputs=-1, dropout=rate))},
    )
    inputs = models.x(3, 6)
    layer.build(inputs.shape)
    for variable in layer.trainable_variables:
        variable.assign(models.x(*variable.shape))
    parts = layer.get_variables(merged=False)["params"]["w"]
    assert {name: part.shape for name, part in parts.items()} == {
        "base": (4, 6),
        "a": (6, 2),
        "b": (2, 4),
    }
    # The rows that are left out are input features: those of the transposed kernel.
    key = jax.random.wrap_key_data(jnp.asarray(part_state(layer))) if rate else jax.random.key(0)
    expected = dropout_of_rows({**parts, "base": parts["base"].T}, key, "params/w", rate)
    outputs = to_numpy(layer(inputs, training=True))
    np.testing.assert_allclose(outputs, inputs @ expected, 1e-5, 1e-5)


def part_state(layer):
    return to_numpy(layer._engine.seeds.states()["parts"].value).astype("uint32")


def test_dropout_of_lora_draws_in_training_alone():
    form = LoRA(2, dropout=0.5)
    layer = JaxLayer(
        lambda params, inputs: inputs @ params["w"],
        params={"w": models.x(6, 4)},
        rules={".*": Rule(reparametrize=form)},
    )
    inputs = models.x(3, 6)
    layer.build(inputs.shape)
    for variable in layer.trainable_variables:
        variable.assign(models.x(*variable.shape))
    base = to_numpy(layer(inputs))
    np.testing.assert_allclose(base, inputs @ layer.get_variables()["params"]["w"], 1e-5, 1e-5)
    parts = layer.get_variables(merged=False)["params"]["w"]
    start = part_state(layer)
    assert start[1] == 0
    for count in range(3):
        key = jax.random.wrap_key_data(jnp.array([start[0], count], "uint32"))
        expected = inputs @ dropout_of_rows(parts, key, "params/w", 0.5)
        np.testing.assert_allclose(to_numpy(layer(inputs, training=True)), expected, 1e-5, 1e-5)
        assert np.abs(expected - base).max() > 0.1
        assert part_state(layer)[1] == count + 1
    np.testing.assert_array_equal(to_numpy(layer(inputs)), base)
    assert part_state(layer)[1] == 3


@pytest.mark.trains
def test_gradients_with_dropout_of_lora_are_those_of_jax(backend):
    layer = dense(LoRA(2, dropout=0.5))[1]
    inputs = models.x(3, 6)
    for variable in layer.trainable_variables:
        variable.assign(models.x(*variable.shape))
    params = layer.get_variables(merged=False)["params"]
    key = jax.random.wrap_key_data(jnp.asarray(part_state(layer)))

    def loss(params):
        kernel = dropout_of_rows(params["kernel"], key, "params/kernel", 0.5)
        return (inputs @ kernel + params["bias"]).sum()

    gradients = jax.grad(loss)(jax.tree.map(jnp.asarray, params))
    expected = [gradients["bias"], gradients["kernel"]["a"], gradients["kernel"]["b"]]
    assert [v.name for v in layer.trainable_variables] == ["bias", "a", "b"]
    ones = [np.ones((3, 4), "float32")]
    _, (found, _) = backend.layer_vjp(layer, inputs, True, ones)
    for one, two in zip(found, expected, strict=True):
        np.testing.assert_allclose(to_numpy(one), two, 1e-5, 1e-5)
    assert (np.asarray(expected[1]) == 0).all(axis=1).any()


def test_a_seed_for_parts_is_there_while_a_leaf_draws(tmp_path):
    model, layer = dense(LoRA(2))
    states = {path: v.path for path, v in layer._engine.seeds.states().items()}
    assert "parts" not in states
    count = len(layer.variables)
    layer.reparametrize(".*/kernel", LoRA(2, dropout=0.5))
    assert len(layer.variables) == count + 1
    inputs = models.x(3, 6)
    model(inputs, training=True)
    assert part_state(layer)[1] == 1
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras").layers[-1]
    np.testing.assert_array_equal(part_state(loaded), part_state(layer))
    outputs = to_numpy(model(inputs))
    layer.merge()
    assert len(layer.variables) == count - 2
    np.testing.assert_allclose(to_numpy(model(inputs, training=True)), outputs, 1e-6, 1e-6)


@pytest.mark.trains
def test_dropout_of_lora_draws_anew_in_each_step_of_fit():
    model, layer = dense(LoRA(2, dropout=0.5))
    for variable in layer.trainable_variables:
        variable.assign(models.x(*variable.shape))
    model.compile(keras.optimizers.SGD(0.0), "mse")
    inputs = np.repeat(models.x(1, 6), 8, axis=0)
    # No weight moves, so losses differ by their draws.
    losses = [model.train_on_batch(inputs, np.zeros((8, 4))) for _ in range(6)]
    assert len(set(losses)) > 1
    assert part_state(layer)[1] == 6


@pytest.mark.once
def test_dropout_of_what_is_no_probability_is_refused():
    for dropout in (1.0, -0.1, "half"):
        with pytest.raises(ValueError, match=f"`dropout` must be a number .* received {dropout!r}"):
            LoRA(2, dropout=dropout)


def spectral_step(parts, steps):
    """The parts after the power iteration of one training call, in NumPy."""
    matrix = parts["weight"].reshape(-1, parts["weight"].shape[-1])
    left, right = parts["left"], parts["right"]
    for _ in range(steps):
        left = matrix @ right
        left = left / np.linalg.norm(left)
        right = matrix.T @ left
        right = right / np.linalg.norm(right)
    return {**parts, "left": left, "right": right}


def spectral_leaf(weight, parts):
    matrix = weight.reshape(-1, weight.shape[-1])
    return weight / (parts["left"] @ matrix @ parts["right"])


@pytest.mark.parametrize("steps", [1, 3])
def test_spectral_norm_iterates_in_training(steps, backend):
    layer = JaxLayer(
        lambda params, inputs: jnp.tensordot(inputs, params["w"], 2),
        params={"w": models.x(2, 3, 4)},
        rules={".*": Rule(reparametrize=SpectralNorm(steps))},
    )
    inputs = models.x(5, 2, 3)

    def parts():
        return layer.get_variables(merged=False)["params"]["w"]

    layer.build(inputs.shape)
    expected = parts()
    sigma = np.linalg.norm(expected["weight"].reshape(6, 4), 2)
    np.testing.assert_allclose(layer.get_variables()["params"]["w"] * sigma, models.x(2, 3, 4), 0.1)
    weight, *_ = layer.trainable_variables
    assert [v.name for v in layer.non_trainable_variables] == ["left", "right"]
    for _ in range(2):
        # A weight that moves, so that the vectors do.
        weight.assign(to_numpy(weight.value) + models.x(2, 3, 4, seed=3))
        expected = spectral_step({**expected, "weight": to_numpy(weight.value)}, steps)

        def call(weight, expected=expected):
            return jnp.tensordot(inputs, spectral_leaf(weight, expected), 2)

        cotangent = models.x(5, 4, seed=2)
        outputs, gradients = backend.layer_vjp(layer, inputs, True, [cotangent])
        value, pullback = jax.vjp(call, expected["weight"])
        np.testing.assert_allclose(to_numpy(outputs), value, 1e-4, 1e-5)
        if backend.trains:
            np.testing.assert_allclose(
                to_numpy(gradients[0][0]), pullback(cotangent)[0], 1e-4, 1e-5
            )
        jax.tree.map(
            lambda one, two: np.testing.assert_allclose(one, two, 1e-4, 1e-5), parts(), expected
        )
    before = parts()
    np.testing.assert_allclose(to_numpy(layer(inputs)), value, 1e-4, 1e-5)
    jax.tree.map(np.testing.assert_array_equal, parts(), before)


@pytest.mark.only("torch")
def test_spectral_norm_is_that_of_torch():
    import torch

    layer = JaxLayer(
        lambda params, inputs: inputs @ params,
        params=models.x(6, 4),
        rules={".*": Rule(reparametrize=SpectralNorm())},
    )
    inputs, target = models.x(3, 6), models.x(3, 4, seed=1)
    layer.build(inputs.shape)
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(torch.tensor(models.x(6, 4)))
    norm = torch.nn.utils.parametrizations.spectral_norm(module).parametrizations.weight[0]
    parts = layer.get_variables(merged=False)["params"]
    norm._u.copy_(torch.tensor(parts["left"]))
    norm._v.copy_(torch.tensor(parts["right"]))
    (own,) = layer.trainable_variables
    calls = (
        (lambda: layer(inputs, training=True), [own.value]),
        (lambda: torch.tensor(inputs) @ module.weight, list(module.parameters())),
    )
    for call, parameters in calls:
        optimizer = torch.optim.SGD(parameters, 0.5)
        for _ in range(3):
            optimizer.zero_grad()
            ((call() - torch.tensor(target)) ** 2).mean().backward()
            optimizer.step()
    parts = layer.get_variables(merged=False)["params"]
    for found, expected in (
        (parts["weight"], module.parametrizations.weight.original),
        (parts["left"], norm._u),
        (parts["right"], norm._v),
        (to_numpy(layer(inputs)), torch.tensor(inputs) @ module.eval().weight),
    ):
        np.testing.assert_allclose(found, expected.detach().numpy(), 1e-5, 1e-5)


def test_nested_parts_get_new_values_too():
    layer = dense(LoRA(2, base=SpectralNorm()))[1]
    weight = next(v for v in layer.weights if v.path.endswith("base/weight"))
    weight.assign(models.x(6, 4))
    before = values(layer)
    layer(models.x(3, 6), training=True)
    moved = {p.partition("kernel/")[2] for p, v in values(layer).items() if (v != before[p]).any()}
    assert moved == {"base/left", "base/right"}


@pytest.mark.once
def test_new_values_of_other_parts_are_refused():
    @dataclasses.dataclass(frozen=True)
    class Moving(Scaled):
        name: str
        value: float | tuple

        def apply_training(self, parts, shape, key):
            return self.apply(parts, shape), {self.name: jnp.asarray(self.value)}

    for form, problem in (
        (Moving("scale", 1.0), r"new values of frozen parts.*'scale': 'float32\(\)'"),
        (Moving("direction", (1.0, 2.0)), r"new values of frozen parts.*float32\(2,\)"),
        (Moving("velocity", 1.0), r"\['velocity'\]; the parts are .*direction"),
    ):
        _, layer = dense()
        with pytest.raises(ValueError, match=rf"params/kernel, .*Moving.apply_training.*{problem}"):
            layer.reparametrize(".*/kernel", form)


def stack_of(count, size, **kwargs):
    def init(rng, inputs):
        return [jax.random.normal(key, (size, size)) for key in jax.random.split(rng, count)]

    def call(params, inputs):
        for kernel in params:
            inputs = inputs @ kernel
        return inputs

    return JaxLayer(call, init, **kwargs)


@dataclasses.dataclass(frozen=True)
class Watched(Int8):
    watch: Callable[[], None] = None

    def init(self, leaf, key):
        self.watch()
        return super().init(leaf, key)


@pytest.mark.once
def test_leaves_are_quantized_one_after_the_other():
    count = 4
    layer = stack_of(count, 8)
    start = keras.Input((8,))
    model = keras.Model(start, layer(start))
    model.predict(models.x(2, 8), verbose=0)
    layer(models.x(2, 8), training=True)
    variables = [weakref.ref(variable) for variable in layer.weights]
    living = []
    layer.reparametrize(
        ".*", Watched(watch=lambda: living.append(sum(ref() is not None for ref in variables)))
    )
    # First a look at all, then the change.
    assert living == [*[count] * count, *range(count, 0, -1)]
    assert not any(ref() for ref in variables)


def live_bytes():
    """The bytes of all arrays of JAX, memory that several share counted once, and of all arrays of NumPy."""
    arrays = {array.unsafe_buffer_pointer(): array.nbytes for array in jax.live_arrays()}
    only = tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)
    traces = tracemalloc.take_snapshot().filter_traces([only]).traces
    return sum(arrays.values()) + sum(trace.size for trace in traces)


@pytest.mark.only("jax")
def test_memory_holds_a_base_once(tmp_path):
    count, size, most = 12, 64, []
    file, checkpoint = tmp_path / "base.weights.h5", tmp_path / "base.safetensors"
    turns = itertools.count(1)

    def watch():
        # Not at each leaf, since the snapshots take long.
        if next(turns) % 4 == 0:
            most.append(live_bytes())

    watched = Watched(watch=watch)

    def peak():
        highest = (max(most) - before) / (count * size * size * 4)
        most.clear()
        return highest

    tracemalloc.start()
    try:
        before = live_bytes()
        model = keras.Sequential([keras.Input((size,)), stack_of(count, size)])
        model.save_weights(file)
        checkpoints.save(model.layers[0], checkpoint)
        model.layers[0].reparametrize(".*", watched)
        assert 1 < peak() < 1.5
        del model
        gc.collect()
        layer = stack_of(count, size, rules={".*": Rule(reparametrize=watched)})
        model = keras.Sequential([keras.Input((size,)), layer])
        assert 1 < peak() < 1.5
        checkpoints.load(layer, checkpoint)
        assert peak() < 0.75
        model.load_weights(file)
        assert 1 < peak() < 1.75
    finally:
        tracemalloc.stop()


def complex_linen():
    class Modulus(nn.Module):
        @nn.compact
        def __call__(self, x):
            return abs(x * self.param("w", lambda key: COMPLEX))

    return FlaxLayer(Modulus())


def complex_nnx():
    class Modulus(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(COMPLEX)

        def __call__(self, x):
            return abs(x * self.w[...])

    return NNXLayer(Modulus())


def complex_haiku():
    def call(x):
        return abs(x * hk.get_parameter("w", (3,), "complex64", init=lambda *_: COMPLEX))

    return HaikuLayer(hk.transform(call))


def complex_equinox():
    class Modulus(eqx.Module):
        w: jax.Array

        def __call__(self, x):
            return abs(x * self.w)

    return EquinoxLayer(Modulus(COMPLEX))


COMPLEX = jnp.array([1 + 2j, -3 + 0.5j, 2 - 1j], "complex64")
COMPLEX_LAYERS = {
    "function": lambda: JaxLayer(modulus, params={"w": COMPLEX}),
    "linen": complex_linen,
    "nnx": complex_nnx,
    "haiku": complex_haiku,
    "equinox": complex_equinox,
}


@pytest.mark.parametrize("library", once_except(COMPLEX_LAYERS, ["linen"]))
def test_complex_leaves_have_two_parts_in_each_library(library):
    layer, inputs = COMPLEX_LAYERS[library](), models.x(2, 3)
    np.testing.assert_allclose(to_numpy(layer(inputs)), abs(inputs * np.asarray(COMPLEX)), 1e-6)
    assert [v.name for v in layer.trainable_variables] == ["real", "imaginary"]
    (leaf,) = jax.tree.leaves(layer.get_variables())
    np.testing.assert_array_equal(leaf, COMPLEX)
    layer.set_variables(jax.tree.map(lambda leaf: 2 * leaf, layer.get_variables()))
    np.testing.assert_allclose(to_numpy(layer(inputs)), 2 * abs(inputs * np.asarray(COMPLEX)), 1e-6)


# Two leaves of one shape in each library.
TIES = {
    "function": ("params/second", "params/first"),
    "linen": ("params/layers_1/kernel", "params/layers_0/kernel"),
    "nnx": ("params/attention/query/kernel", "params/attention/key/kernel"),
    "haiku": ("params/linear_1/w", "params/linear/w"),
    "equinox": ("params/layers/2/weight", "params/layers/1/weight"),
}


def hk_twice(x):
    return hk.Linear(4)(hk.Linear(4)(x))


TIED_LAYERS = {
    "function": lambda **kw: JaxLayer(
        lambda params, x: x @ params["first"] @ params["second"],
        params={"first": models.x(4, 4), "second": models.x(4, 4, seed=1)},
        **kw,
    ),
    "linen": lambda **kw: FlaxLayer(nn.Sequential([nn.Dense(4), nn.Dense(4)]), **kw),
    "nnx": lambda **kw: ZOO["nnx attention"].make(**kw),
    "haiku": lambda **kw: HaikuLayer(hk.transform(hk_twice), **kw),
    "equinox": lambda **kw: EquinoxLayer(
        eqx.nn.MLP(4, 4, 4, 2, key=jax.random.key(0)), batch=True, **kw
    ),
}


@pytest.mark.parametrize("library", once_except(TIED_LAYERS, ["nnx"]))
def test_leaves_are_tied_in_each_library(library):
    make, inputs = TIED_LAYERS[library], models.x(2, 4)
    if library == "nnx":
        inputs = ZOO["nnx attention"].inputs
    base = make(seed=0)
    base(inputs)
    paths = list(leaves_of(base))
    tied, other = TIES[library]
    assert {tied, other} <= set(paths), paths
    base.reparametrize(re.escape(tied), Tied(other))
    layer = make(seed=0, rules=[(re.escape(tied), Rule(reparametrize=Tied(other)))])
    outputs = to_numpy(layer(inputs))
    np.testing.assert_allclose(outputs, to_numpy(base(inputs)), 1e-6, 1e-6)
    assert len(layer.trainable_weights) == len(base.trainable_weights) == len(paths) - 1
    leaves = leaves_of(layer)
    np.testing.assert_array_equal(leaves[tied], leaves[other])
    # The same without a tie, and with equal leaves.
    base.merge()
    np.testing.assert_allclose(to_numpy(base(inputs)), outputs, 1e-6, 1e-6)
    assert len(base.trainable_weights) == len(paths)


@pytest.mark.each_jax
@pytest.mark.trains
@pytest.mark.parametrize(
    "name",
    once_except(["lora", "qlora", "weight norm", "spectral norm", "masked"], ["weight norm"]),
)
def test_second_order_is_that_of_jax(name, backend):
    """The gradient, for the parts, of the squared norm of the gradient for the inputs."""
    form, inputs = FORMS[name][0], models.x(3, 6)
    layer = JaxLayer(
        lambda params, x: jnp.tanh(x @ params).sum(),
        params=models.x(6, 4),
        rules={".*": Rule(reparametrize=form)},
    )
    layer(inputs)
    for variable in layer.trainable_variables:
        variable.assign(to_numpy(variable.value) + models.x(*variable.shape, seed=4))
    parts = jax.tree.map(jnp.asarray, layer.get_variables(merged=False)["params"])
    trained = {v.name: parts[v.name] for v in layer.trainable_variables}

    def penalty(trained):
        own = {**parts, **trained}
        if "base" in own and isinstance(own["base"], dict):
            own["base"] = form.base.apply(own["base"], (6, 4))
        leaf = form.apply(own, (6, 4))
        return (jax.grad(lambda x: jnp.tanh(x @ leaf).sum())(inputs) ** 2).sum()

    expected = jax.grad(penalty)(trained)
    found = backend.layer_penalty(layer, inputs)
    for one, two in zip(found, expected.values(), strict=True):
        np.testing.assert_allclose(to_numpy(one), two, 1e-4, 1e-4)


@pytest.mark.trains
def test_mixed_precision_trains_parts_in_float32():
    rules = {".*/kernel": Rule(reparametrize=LoRA(2, base=Int8()))}
    layer = FlaxLayer(nn.Dense(4), rules=rules, dtype="mixed_bfloat16")
    model = keras.Sequential([keras.Input((6,)), layer])
    model.compile("sgd", "mse")
    before = values(layer)
    model.fit(models.x(8, 6), np.ones((8, 4)), verbose=0)
    after = values(layer)
    moved = {path.rpartition("/")[2] for path in before if (before[path] != after[path]).any()}
    # The gradient of `a` is zero while `b` is.
    assert {"b", "bias"} <= moved <= {"a", "b", "bias"}
    assert {v.name: v.dtype for v in layer.weights} == {
        **dict.fromkeys(["bias", "scale", "a", "b"], "float32"),
        "values": "int8",
    }
    assert keras.backend.standardize_dtype(layer(models.x(8, 6)).dtype) == "bfloat16"


@pytest.mark.only("jax")
def test_a_merged_layer_compiles_to_what_a_plain_one_does():
    def program(layer):
        layer(models.x(3, 6), training=True)
        values = [[v.value for v in part] for part in (layer.trainable_variables, [])]
        return jax.jit(layer.stateless_call).lower(*values, models.x(3, 6)).as_text()

    _, plain = dense()
    _, merged = dense(LoRA(2, dropout=0.5))
    merged.merge()
    assert program(merged) == program(plain)


@jaxwrap.register_serializable("tests")
@dataclasses.dataclass(frozen=True)
class Logarithm(jaxwrap.Reparametrization):
    def init(self, leaf, key):
        if (leaf <= 0).any():
            raise ValueError("a logarithm is for positive numbers.")
        return {"log": jnp.log(leaf)}

    def apply(self, parts, shape):
        return jnp.exp(parts["log"])


def test_a_value_that_cannot_be_split_changes_nothing(tmp_path):
    def make(**kwargs):
        params = {"a": models.x(3), "b": abs(models.x(2, 3))}
        layer = JaxLayer(lambda params, x: x + params["a"], params=params, name="own", **kwargs)
        return keras.Sequential([keras.Input((3,)), layer]), layer

    base, own = make()
    own.set_variables({"params": {"a": models.x(3) + 1, "b": -abs(models.x(2, 3))}, "state": None})
    base.save_weights(tmp_path / "base.weights.h5")
    checkpoints.save(own, tmp_path / "base.npz")
    model, layer = make(rules={"params/b": Rule(reparametrize=Logarithm())})
    before = values(layer)
    for load in (
        lambda: model.load_weights(tmp_path / "base.weights.h5"),
        lambda: checkpoints.load(layer, tmp_path / "base.npz"),
        lambda: layer.set_variables(own.get_variables()),
    ):
        with pytest.raises(ValueError, match=r"params/b, of shape \(2, 3\): a logarithm is for"):
            load()
        for path, value in values(layer).items():
            np.testing.assert_array_equal(value, before[path])


@pytest.mark.parametrize("form", [Int8(), Int4(), LoRA(2, base=Int8())])
def test_leaves_that_are_read_and_written_again_stay(form):
    _, layer = dense(form)
    before = values(layer)
    layer.set_variables(layer.get_variables())
    for path, value in values(layer).items():
        if value.dtype.kind in "iu":
            np.testing.assert_array_equal(value, before[path])
        np.testing.assert_allclose(value, before[path], 1e-6)


@pytest.mark.parametrize("library", ["nnx", "equinox"])
def test_modules_with_the_weights_have_leaves(library):
    _, layer, _, inputs = mixed(library, 0)
    module = layer.module_with_weights()
    if library == "nnx":
        module.eval()
        outputs = module(inputs)
    else:
        outputs = jax.vmap(eqx.nn.inference_mode(module))(inputs)
    np.testing.assert_allclose(to_numpy(layer(inputs)), outputs, 1e-5, 1e-5)
