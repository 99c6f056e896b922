"""What saving asks to be registered, and what works without."""

import copy
import dataclasses
import functools
import gc
import json
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest
from backends import to_numpy
from flax import nnx
from models import x

import jaxwrap
from jaxwrap import EquinoxLayer, FlaxLayer, HaikuLayer, JaxLayer, NNXLayer
from jaxwrap._serialization import _local
from jaxwrap._serialization._names import find, name_of

pytestmark = pytest.mark.quick

register = jaxwrap.register_serializable("tests_registration")


@register
class Block(nn.Module):
    width: int
    act: Callable[..., Any] = nn.gelu
    names: Any = ()
    kernel_init: Any = nn.initializers.ones

    @nn.compact
    def __call__(self, x):
        return self.act(nn.Dense(self.width, kernel_init=self.kernel_init)(x))

    def _private(self, x):
        return x


@register
def make_nnx(rngs):
    return nnx.Linear(4, 2, rngs=rngs)


@register
def params_call(params, state, inputs):
    return inputs, state


class Unregistered(nn.Module):
    inner: Any = None

    @nn.compact
    def __call__(self, x):
        return x if self.inner is None else self.inner(x)

    def twice(self, x):
        return 2 * self(x)


class UnregisteredBlock(eqx.Module):
    linear: eqx.nn.Linear
    act: Any

    def __init__(self, key):
        self.linear = eqx.nn.Linear(4, 2, key=key)
        self.act = lambda x: 2 * x

    def __call__(self, x):
        return self.act(self.linear(x))


class Stateful(eqx.Module):
    norm: eqx.nn.BatchNorm

    def __init__(self):
        self.norm = eqx.nn.BatchNorm(4, "batch", mode="batch")

    def __call__(self, x, state):
        return self.norm(x, state)


@dataclasses.dataclass(frozen=True)
class Scale(jaxwrap.Adapter):
    factor: Any

    def init(self, keys, inputs):
        return {"scale": jnp.ones(())}, None

    def call(self, params, state, keys, inputs, training):
        return jaxwrap.CallResult(params["scale"] * self.factor(inputs))


def unregistered(x):
    return x + 1


def save(layers, tmp_path):
    """Save a model of layers, which need not be built."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You are saving a model that has not yet been built")
        keras.Sequential(layers).save(tmp_path / "model.keras")


# What cannot be saved.

FAILURES = {
    "class": (
        lambda: FlaxLayer(Unregistered()),
        r"`layer.module` is an object of the class Unregistered",
    ),
    "inner class": (
        lambda: FlaxLayer(nn.Sequential([nn.relu, Unregistered()])),
        r"`layer.module.layers\[1\]` is an object of the class Unregistered(?s:.*)register_serializable",
    ),
    "lambda": (
        lambda: FlaxLayer(Block(3, act=lambda x: x)),
        r"^FlaxLayer 'a': cannot be saved:\n  `layer.module.act`, a field of Block, is a lambda.*register_serializable",
    ),
    "function": (
        lambda: FlaxLayer(Block(3, act=unregistered)),
        r"`layer.module.act`, a field of Block, is a function that has not been registered"
        r"(?s:.*)register_serializable\(.*\)\(unregistered\)",
    ),
    "object": (
        lambda: FlaxLayer(Block(1, names=(1, object()))),
        r"`layer.module.names\[1\]` is not data",
    ),
    "deep": (
        lambda: FlaxLayer(Block(3, act=functools.reduce(lambda x, _: [x], range(200), 1))),
        "nested deeper",
    ),
    "dict": (
        lambda: FlaxLayer(Block(1, names={"x": {"y": unregistered}})),
        r"`layer.module.names\['x'\]\['y'\]` is a function",
    ),
    "partial": (
        lambda: FlaxLayer(Block(1, act=functools.partial(unregistered, 1))),
        r"`layer.module.act.fn` is a function",
    ),
    "nnx instance": (
        lambda: NNXLayer(nnx.Linear(4, 2, rngs=nnx.Rngs(0))),
        "`layer.module` is an instance.*from_factory",
    ),
    "nnx factory": (
        lambda: NNXLayer.from_factory(lambda rngs: nnx.Linear(4, 2, rngs=rngs)),
        "`layer.factory` is a lambda",
    ),
    "nnx filter": (
        lambda: NNXLayer.from_factory(make_nnx, trainable=lambda path, value: True),
        "`layer.trainable` is a lambda",
    ),
    "equinox": (
        lambda: EquinoxLayer(UnregisteredBlock(jax.random.key(0))),
        "`layer.module` is an object of the class UnregisteredBlock",
    ),
    "equinox state": (
        lambda: EquinoxLayer(*eqx.nn.make_with_state(Stateful)(), batch=True),
        "`layer.module` .also `layer.state`. belongs to a stateful module.*from_factory",
    ),
    "haiku": (
        lambda: HaikuLayer(hk.transform(lambda x: x)),
        "`layer.transformed` has not been registered.*register_serializable",
    ),
    "static leaf": (
        lambda: JaxLayer(params_call, params={"f": unregistered}, state={}),
        r"`layer.params\['f'\]` is a function",
    ),
    "private method": (
        lambda: FlaxLayer(Block(1), method="_private"),
        r"a public function that the class of the module defines; Block has .*__call__.*'_private'",
    ),
    "method of flax": (lambda: FlaxLayer(nn.Dense(2), method="tabulate"), "public function"),
}


@pytest.mark.once
@pytest.mark.parametrize("name", FAILURES)
def test_what_cannot_be_saved_says_so_when_it_is_saved(name, tmp_path):
    make, message = FAILURES[name]
    layer = make()
    layer.name = "a"
    with pytest.raises((TypeError, ValueError), match=message) as error:
        save([layer], tmp_path)
    assert str(error.value).startswith(f"{type(layer).__name__} 'a': ")


@pytest.mark.once
def test_the_error_lists_all_that_is_missing_once(tmp_path):
    inner = Block(3, act=unregistered, names=(len, unregistered))
    layer = FlaxLayer(Unregistered(nn.Sequential([Unregistered(inner), inner])), name="net")
    with pytest.raises(TypeError) as error:
        save([layer], tmp_path)
    lines = str(error.value).splitlines()
    assert lines[0] == "FlaxLayer 'net': cannot be saved:"
    assert lines[1] == (
        "  `layer.module` (also `layer.module.inner.layers[0]`) is an object of the class Unregistered, which has not "
        "been registered."
    )
    assert lines[2].startswith(
        "  `layer.module.inner.layers[0].inner.act`, a field of Block, (also "
    )
    assert "unregistered" in lines[2]
    assert "`layer.module.inner.layers[0].inner.names[0]`" in lines[3]
    assert lines[4] == (
        "A file holds names. Register these before saving, and under the same names before loading:"
    )
    own = 'jaxwrap.register_serializable("my_package")'
    assert lines[5:8] == [f"  {own}({name})" for name in ("Unregistered", "unregistered", "len")]
    assert lines[8] == f"Or all in one call: `{own}(layer)`."
    assert len(lines) == 9


def test_the_error_is_about_the_whole_model(tmp_path, backend):
    layers = [
        keras.Input((4,)),
        FlaxLayer(Unregistered(), name="one"),
        keras.Sequential([FlaxLayer(Block(2, act=unregistered), name="two")]),
        JaxLayer(Scale(unregistered), name="three"),
    ]
    with pytest.raises(TypeError) as error:
        save(layers, tmp_path)
    message = str(error.value)
    assert message.startswith("FlaxLayer 'one': cannot be saved:\n")
    assert "`layer.module` of FlaxLayer 'one' is an object of the class Unregistered" in message
    assert "`layer.module.act`, a field of Block, of FlaxLayer 'two'" in message
    assert "`layer.adapter` of JaxLayer 'three' is an object of the class Scale" in message
    assert message.endswith(
        'Or all in one call: `jaxwrap.register_serializable("my_package")(model)`.'
    )


@pytest.mark.once
def test_expressions_go_into_objects_with_configs_of_their_own(tmp_path):
    rules = {".*": jaxwrap.Rule(regularizer=lambda x: keras.ops.sum(x))}
    layer = FlaxLayer(nn.Dense(2), rules=rules, name="dense")
    message = r"^`layer.rules\['\.\*'\].regularizer` is a lambda, .*`safe_mode=False`"
    with pytest.warns(UserWarning, match=message):
        save([layer], tmp_path)


def orbax(model, folder):
    callback = keras.callbacks.OrbaxCheckpoint(folder)
    callback.set_model(model)
    callback.on_epoch_end(0)


WRITERS = {
    "keras": lambda model, folder: model.save(folder / "model.keras"),
    "folder": lambda model, folder: model.save(folder / "model", zipped=False),
    "h5": lambda model, folder: model.save(folder / "model.h5"),
    "function": lambda model, folder: keras.saving.save_model(model, folder / "model.keras"),
    **({"orbax": orbax} if hasattr(keras.callbacks, "OrbaxCheckpoint") else {}),
}


@pytest.mark.once
@pytest.mark.parametrize("way", WRITERS)
def test_every_way_to_write_a_file_asks_for_names(way, tmp_path):
    model = keras.Sequential([keras.Input((4,)), FlaxLayer(Unregistered(nn.Dense(2)))])
    model.compile("sgd", "mse")
    with pytest.raises(TypeError, match=r"cannot be saved:\n  `layer.module` is an object"):
        WRITERS[way](model, tmp_path)
    model.save_weights(tmp_path / "model.weights.h5")


def fresh():
    """A module of classes and functions that nobody has registered."""

    def act(x):
        return 3 * x

    class Inner(nn.Module):
        act: Any

        @nn.compact
        def __call__(self, x):
            return self.act(nn.Dense(2)(x))

    class Outer(nn.Module):
        inner: nn.Module

        def __call__(self, x):
            return self.inner(x)

    return Outer(Inner(act))


@pytest.mark.once
@pytest.mark.parametrize("what", ["module", "layer", "model"])
def test_one_call_registers_all(what, tmp_path, monkeypatch):
    module = fresh()
    layer = FlaxLayer(module)
    # Keras saves the lambda, with a warning, and has no name for it.
    model = keras.Sequential([keras.Input((4,)), layer, JaxLayer(lambda inputs: inputs + 1)])
    obj = {"module": module, "layer": layer, "model": model}[what]
    package = f"one_call_{what}"
    assert jaxwrap.register_serializable(package)(obj) is obj
    assert find(f"{package}>Outer") is type(module)
    assert find(f"{package}>Inner") is type(module.inner)
    assert find(f"{package}>act") is module.inner.act
    with pytest.warns(UserWarning, match="is a lambda"):
        model.save(tmp_path / "model.keras")
    # As another program sees it.
    monkeypatch.setattr(_local, "_OBJECTS", weakref.WeakValueDictionary())
    loaded = keras.saving.load_model(tmp_path / "model.keras", safe_mode=False)
    expected = module.apply(layer.get_variables(), x(3, 4)) + 1
    np.testing.assert_allclose(to_numpy(loaded(x(3, 4))), expected, 1e-5, 1e-5)
    # Again, for the same and for one that a notebook has made again.
    jaxwrap.register_serializable(package)(obj)
    again = fresh()
    jaxwrap.register_serializable(package)(again)
    assert find(f"{package}>Outer") is type(again)


@pytest.mark.once
def test_one_call_registers_all_or_nothing():
    module = fresh()
    message = r"not everything that the Outer is made of has a name:\n  `Outer.inner`.* is a lambda"
    with pytest.raises(TypeError, match=message):
        jaxwrap.register_serializable("all_or_none")(type(module)(lambda x: x))
    assert name_of(type(module)) is None
    both = nn.Sequential([module.inner.act, fresh().inner.act])
    with pytest.raises(ValueError, match=r"would both be 'all_or_none>act'"):
        jaxwrap.register_serializable("all_or_none")(both)
    assert name_of(module.inner.act) is None
    register_elsewhere = jaxwrap.register_serializable("all_or_none", "act")
    register_elsewhere(unregistered_elsewhere := lambda x: x)
    with pytest.raises(ValueError, match=r"would both be 'all_or_none>act'"):
        jaxwrap.register_serializable("all_or_none")(module)
    assert find("all_or_none>act") is unregistered_elsewhere


class Held:
    def method(self, x):
        return x


@pytest.mark.once
@pytest.mark.parametrize(
    ("arguments", "obj", "message"),
    [
        ((3,), unregistered, "a string for `package`"),
        ((unregistered,), unregistered, "a string for `package`.*@jaxwrap.register_serializable"),
        (("tests", 3), unregistered, "a string for `name`"),
        (("tests", ""), unregistered, "a string for `name`"),
        (("tests",), hk.transform(lambda x: x), "a string for `name`"),
        (("tests",), object(), "a string for `name`"),
        (("",), unregistered, "a string for `package`"),
        (("tests", "name"), 3, "is data"),
        (("tests", "name"), [unregistered], "is data"),
        (("tests", "name"), "name", "is data"),
        (("tests", "name"), Held().method, "is a method"),
        (("tests",), Held().method, "is a method"),
        (("tests",), lambda x: x, "is a lambda"),
        (("tests", "name"), JaxLayer(unregistered, call_arguments=("x",)), "by its class"),
        (("tests", "name"), keras.optimizers.SGD(), "by its class"),
    ],
)
def test_what_no_file_would_name_is_refused(arguments, obj, message):
    with pytest.raises(TypeError, match=f"^register_serializable: .*{message}"):
        jaxwrap.register_serializable(*arguments)(obj)


@pytest.mark.once
def test_registering_without_a_package_is_refused_at_once():
    with pytest.raises(TypeError, match="a string for `package`"):
        jaxwrap.register_serializable(Held)


@pytest.mark.once
def test_registering_gives_the_object_back():
    def function(x):
        return x

    assert jaxwrap.register_serializable("tests", "given")(function) is function
    assert find("tests>given") is function


@pytest.mark.once
def test_instances_that_are_registered_are_saved_by_name(tmp_path):
    name = jaxwrap.register_serializable
    module = name("tests_registration", "nnx")(nnx.Linear(4, 2, rngs=nnx.Rngs(0)))
    stateful, state = eqx.nn.make_with_state(Stateful)()
    name("tests_registration", "stateful")(stateful)
    name("tests_registration", "state")(state)
    layers = [EquinoxLayer(stateful, state, batch=True), NNXLayer(module)]
    model = keras.Sequential([keras.Input((4,)), *layers])
    model.set_weights([weight + 1 for weight in model.get_weights()])
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(to_numpy(loaded(x(3, 4))), to_numpy(model(x(3, 4))), 1e-6, 1e-6)


# What works without registration.

held = [3.0, object()]

FREE = {
    "linen": lambda: FlaxLayer(Unregistered(Block(2, act=unregistered))),
    "linen lambda": lambda: FlaxLayer(Unregistered(lambda x: 2 * x)),
    "linen method": lambda: FlaxLayer(Unregistered(), method=Unregistered().twice),
    "linen jit": lambda: FlaxLayer(Block(2, act=jax.jit(unregistered))),
    "linen object": lambda: FlaxLayer(Block(2, names=Held())),
    "function": lambda: JaxLayer(unregistered, call_arguments=("x",)),
    "lambda": lambda: JaxLayer(lambda inputs: 2 * inputs),
    "closure": lambda: JaxLayer((lambda held: lambda inputs: held[0] * inputs)(held)),
    "adapter": lambda: JaxLayer(Scale(unregistered)),
    "nnx": lambda: NNXLayer(nnx.Linear(4, 2, rngs=nnx.Rngs(0))),
    "nnx factory": lambda: NNXLayer.from_factory(lambda rngs: nnx.Linear(4, 2, rngs=rngs)),
    "equinox": lambda: EquinoxLayer(UnregisteredBlock(jax.random.key(0)), batch=True),
    "equinox stateful": lambda: EquinoxLayer(*eqx.nn.make_with_state(Stateful)(), batch=True),
    "haiku": lambda: HaikuLayer(hk.transform(lambda x: hk.Linear(2)(x))),
    "haiku multi": lambda: HaikuLayer(
        hk.multi_transform(lambda: (lambda x: hk.Linear(2)(x), (lambda x: x + 1, lambda x: x * 2))),
        method=1,
    ),
}


def by_json(model):
    return keras.models.model_from_json(model.to_json())


def by_pickle(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("way", [by_json, by_pickle, copy.deepcopy, keras.models.clone_model])
@pytest.mark.parametrize("name", FREE)
def test_copies_need_no_registration(name, way, backend):
    model = keras.Sequential([keras.Input((4,)), FREE[name]()])
    if backend.trains:
        model.compile(
            jaxwrap.OptaxOptimizer(optax.sgd(0.1)),
            jaxwrap.JaxLoss(lambda y_true, y_pred: abs(y_true - y_pred)),
            metrics=[jaxwrap.JaxMetric(lambda y_true, y_pred: y_pred.sum(-1))],
        )
        model.optimizer.build(model.trainable_variables)
    model.set_weights([weight + 1 for weight in model.get_weights()])
    expected = to_numpy(model(x(3, 4)))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = way(model)
    again.set_weights(model.get_weights())
    np.testing.assert_allclose(to_numpy(again(x(3, 4))), expected, 1e-6, 1e-6)
    for weight in again.weights:
        weight.assign(np.zeros(weight.shape, "float32"))
    np.testing.assert_allclose(to_numpy(model(x(3, 4))), expected, 1e-6, 1e-6)


@pytest.mark.once
def test_a_copy_of_a_dataclass_holds_methods_of_its_own_module():
    @dataclasses.dataclass(frozen=True)
    class Encode:
        module: Any
        method: Any

    module = Unregistered()
    layer = JaxLayer(params_call, params={"encode": Encode(module, module.twice)}, state={})
    again = JaxLayer.from_config(json.loads(json.dumps(layer.get_config())))
    encode = again.params["encode"]
    assert encode.module is not module
    assert encode.method.__self__ is encode.module
    assert encode.method.__func__ is Unregistered.twice


@pytest.mark.once
def test_a_config_of_another_process_names_what_it_lacks(monkeypatch):
    configs = {
        name: FREE[name]().get_config() for name in ("linen", "linen lambda", "function", "nnx")
    }
    monkeypatch.setattr(_local, "_OBJECTS", weakref.WeakValueDictionary())
    with pytest.raises(ValueError, match=r"in `module`, the name 'Unregistered' is not registered"):
        FlaxLayer.from_config(configs["linen"])
    objects = {"Unregistered": Unregistered, "unregistered": unregistered}
    with keras.saving.custom_object_scope(objects):
        assert FlaxLayer.from_config(configs["linen"]).module.inner.act is unregistered
        assert JaxLayer.from_config(configs["function"]).call_fn is unregistered
    with pytest.raises(ValueError, match="'unregistered' is not registered"):
        JaxLayer.from_config(configs["function"])
    with pytest.raises(ValueError, match="'<lambda>' is not registered"):
        FlaxLayer.from_config({**configs["linen lambda"], "module": lambda_field(configs)})
    with pytest.raises(ValueError, match="refers to an object that is not registered"):
        NNXLayer.from_config(configs["nnx"])


def lambda_field(configs):
    return configs["linen lambda"]["module"]["fields"]["inner"]


@pytest.mark.once
def test_a_pickle_holds_lambdas_and_registered_names_elsewhere(monkeypatch):
    layers = [FREE["lambda"](), FlaxLayer(Block(2))]
    model = keras.Sequential([keras.Input((4,)), *layers])
    pickled = pickle.dumps(model)
    monkeypatch.setattr(_local, "_OBJECTS", weakref.WeakValueDictionary())
    again = pickle.loads(pickled)
    np.testing.assert_allclose(to_numpy(again(x(3, 4))), to_numpy(model(x(3, 4))), 1e-6, 1e-6)


@pytest.mark.once
def test_a_config_keeps_nothing_alive():
    module = fresh()
    layer = FlaxLayer(module)
    config = layer.get_config()
    names = [weakref.ref(module.inner.act), weakref.ref(type(module))]
    assert FlaxLayer.from_config(config).module.inner.act is module.inner.act
    del module, layer
    gc.collect()
    assert names[0]() is None
    with pytest.raises(ValueError, match="is not registered"):
        FlaxLayer.from_config(config)


@pytest.mark.only("tensorflow")  # Keras's callback imports it
def test_tensorboard_writes_the_graph_of_a_model(tmp_path):
    model = keras.Sequential([keras.Input((4,)), FREE["linen"]()])
    board = keras.callbacks.TensorBoard(tmp_path, write_graph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        board.set_model(model)
    board.on_train_end()
    (events,) = (tmp_path / "train").iterdir()
    assert b"graph_keras_model" in events.read_bytes()


# NNX modules with values, and the function that makes such a module.


def linear_and_norm(rngs, width=3):
    return nnx.Sequential(nnx.Linear(4, width, rngs=rngs), nnx.BatchNorm(width, rngs=rngs))


register(linear_and_norm)


@pytest.mark.once
def test_an_nnx_module_with_a_factory_keeps_its_values_and_is_saved(tmp_path):
    module = linear_and_norm(nnx.Rngs(5))
    module.layers[0].kernel[...] = np.arange(12, dtype="float32").reshape(4, 3)
    layer = jaxwrap.wrap(module, factory=linear_and_norm)
    assert layer.module is module
    model = keras.Sequential([keras.Input((4,)), layer])
    module.eval()
    expected = module(jnp.asarray(x(3, 4)))
    np.testing.assert_allclose(to_numpy(model(x(3, 4))), expected, 1e-5, 1e-5)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(to_numpy(loaded(x(3, 4))), expected, 1e-5, 1e-5)
    loaded.save(tmp_path / "again.keras")
    again = keras.saving.load_model(tmp_path / "again.keras")
    np.testing.assert_allclose(to_numpy(again(x(3, 4))), expected, 1e-5, 1e-5)


@pytest.mark.once
def test_a_factory_that_makes_other_variables_is_refused():
    module = linear_and_norm(nnx.Rngs(0))
    with pytest.raises(
        ValueError, match=r"NNXLayer 'a': `factory` must make a module with the same"
    ):
        NNXLayer(module, factory=functools.partial(linear_and_norm, width=2), name="a")
    with pytest.raises(ValueError, match=r"layers/1/bias: the module has float32\[3\], .* None"):
        NNXLayer(module, factory=make_nnx)
