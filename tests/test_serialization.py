"""What layers are made of, saved as data and registered names; what cannot be saved says so."""

import collections
import copy
import dataclasses
import enum
import functools
import json
import warnings
from collections.abc import Callable
from typing import Any

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
from flax.core import FrozenDict
from hypothesis import given, settings
from hypothesis import strategies as st
from models import x

import jaxwrap
from jaxwrap import EquinoxLayer, FlaxLayer, HaikuLayer, JaxLayer, NNXLayer, Rule
from jaxwrap._serialization import deserialize, deserialize_fields, serialize, serialize_fields
from jaxwrap._serialization._allowed import FACTORIES, NAMES, NAMES_BY_MODULE
from jaxwrap._serialization._names import find, name_of

pytestmark = pytest.mark.quick

register = jaxwrap.register_serializable("tests_serialization")


def through_json(config):
    return json.loads(json.dumps(config))


def round_trip(value):
    return deserialize(through_json(serialize(value, "value")), "value")


@register
class Norm(enum.Enum):
    BATCH = 1
    LAYER = 2


@register
@dataclasses.dataclass(frozen=True)
class Size:
    width: int = 4
    depth: int = 1
    computed: int = dataclasses.field(init=False, default=7)


Point = register(collections.namedtuple("Point", ["x", "y"]))


@register
def double(x):
    return 2 * x


@register
class Block(nn.Module):
    width: int
    act: Callable[..., Any] = nn.gelu

    @nn.compact
    def __call__(self, x):
        return self.act(nn.Dense(self.width)(x))


@register
class Net(nn.Module):
    """A module as people write them: with no `get_config`."""

    size: Size
    block: nn.Module
    act: Callable[..., Any] = nn.relu
    norm: Any = functools.partial(nn.LayerNorm, epsilon=1e-3)
    kernel_init: Callable[..., Any] = nn.initializers.normal(0.3)
    dtype: Any = jnp.float32
    kind: Norm = Norm.LAYER
    names: Any = ()
    rates: Any = dataclasses.field(default_factory=dict)
    private: Any = lambda x: x

    @nn.compact
    def __call__(self, x, training=False):
        x = self.norm()(self.block(x))
        x = nn.Dense(self.size.width, kernel_init=self.kernel_init, dtype=self.dtype)(self.act(x))
        return nn.Dropout(self.rates.get("dropout", 0.0), deterministic=not training)(x)

    def features(self, x):
        return x

    def _private(self, x):
        return x


VALUES = [
    None,
    True,
    3,
    -(10**30),
    2.5,
    float("inf"),
    "text",
    (1, (2, [3, None]), "a"),
    [],
    {"a": 1, 2: ("b",), None: {"kind": "name", "name": "os.system"}},
    {"class_name": "function", "config": "os.system"},
    collections.OrderedDict(b=1, a=2),
    FrozenDict({"a": {"b": 1}}),
    set(),
    {"a", "b", 3, None},
    frozenset({(1, "a"), jnp.float32}),
    np.dtype("int8"),
    np.dtype(jnp.bfloat16),
    np.float32(1.5),
    np.arange(6, dtype="int16").reshape(2, 3),
    jnp.asarray([1.5, 2.5], jnp.bfloat16),
    np.array([], "complex64"),
    np.array(True),
    jnp.float32,
    jnp.bfloat16,
    np.int32,
    float,
    nn.relu,
    jax.nn.silu,
    jnp.tanh,
    jax.lax.Precision.HIGHEST,
    nn.Dense,
    double,
    Norm.BATCH,
    Size(3, depth=2),
    Point(1, (2, 3)),
    functools.partial(double, 1),
    functools.partial(nn.BatchNorm, momentum=0.9, dtype=jnp.bfloat16),
    nn.Dense(3, name="out"),
    nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(2)]),
    nn.MultiHeadDotProductAttention(num_heads=2),
    nn.RNN(nn.LSTMCell(3)),
    Net(Size(), Block(3), nn.silu, rates={"dropout": 0.5}),
]


def same(one, two):
    if isinstance(one, (np.ndarray, np.generic, jax.Array)):
        return (
            isinstance(two, jax.Array) == isinstance(one, jax.Array)
            and one.dtype == two.dtype
            and one.shape == two.shape
            and bool(np.all(np.asarray(one) == np.asarray(two)))
        )
    if isinstance(one, functools.partial):
        parts = [(p.func, p.args, p.keywords) for p in (one, two)]
        return parts[0] == parts[1]
    if isinstance(one, nn.Module):
        # Initializers are new functions.
        return serialize(one, "one") == serialize(two, "two")
    return one == two


@pytest.mark.once
@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_a_value_comes_back_equal_and_of_its_type(value):
    again = round_trip(value)
    if not isinstance(value, np.generic):  # an array of rank 0
        assert type(again) is type(value)
    assert same(value, again)


plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
leaves = plain | st.sampled_from(
    [nn.relu, jnp.bfloat16, np.dtype("int8"), double, Norm.LAYER, Size(2)]
)
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inner)
        | st.builds(Point, inner, inner)
    ),
    max_leaves=20,
)


@pytest.mark.once
@given(trees)
@settings(max_examples=200, deadline=None)
def test_any_nest_comes_back_equal(tree):
    again = round_trip(tree)
    assert again == tree
    assert serialize(again, "again") == serialize(tree, "tree")


INITIALIZERS = {
    "lecun": nn.initializers.lecun_normal(),
    "he": nn.initializers.he_uniform(in_axis=0, out_axis=1),
    "scaled": nn.initializers.variance_scaling(
        2.0, "fan_avg", "truncated_normal", dtype="bfloat16"
    ),
    "normal": nn.initializers.normal(0.5, dtype=jnp.bfloat16),
    "truncated": nn.initializers.truncated_normal(0.5, lower=-1.0),
    "uniform": nn.initializers.uniform(0.2),
    "constant": nn.initializers.constant(2.5),
    "constant array": nn.initializers.constant(np.arange(3.0)),
    "orthogonal": nn.initializers.orthogonal(2.0),
    "zeros": nn.initializers.zeros_init(),
    "ones": nn.initializers.ones,
    "partitioned": nn.with_partitioning(nn.initializers.lecun_normal(), ("in", None)),
    "logically partitioned": nn.with_logical_partitioning(nn.initializers.ones, ("in", "out")),
}


@pytest.mark.once
@pytest.mark.parametrize("name", INITIALIZERS)
def test_an_initializer_draws_the_same_numbers(name):
    initializer = INITIALIZERS[name]
    made = [
        nn.unbox(fn(jax.random.key(0), (3, 3))) for fn in (initializer, round_trip(initializer))
    ]
    assert same(*made)


@pytest.mark.once
def test_names_of_libraries_are_there_and_name_what_they_are():
    """In every version that is tested; a name that is gone would be an error only when a file is read."""
    assert set(NAMES) | set(FACTORIES)
    for name in NAMES:
        obj = find(name)
        assert name_of(obj) in NAMES
        assert find(name_of(obj)) is obj
    for name in FACTORIES:
        module, _, own = name.rpartition(".")
        assert callable(getattr(__import__(module, fromlist=[own]), own))
    for names in NAMES_BY_MODULE.values():
        assert names.split() == sorted(set(names.split()))


# Layers in files.


def save_and_load(layer, inputs, tmp_path, **kwargs):
    """Saves a model of the layer, after a change of all weights; the loaded one has to compute the same."""
    start = keras.Input(inputs.shape[1:], dtype=str(inputs.dtype))
    model = keras.Model(start, layer(start))
    rng = np.random.default_rng(1)
    for variable in layer.variables:
        if "float" in variable.dtype and "seed" not in variable.path:
            variable.assign(rng.uniform(0.5, 1, variable.shape).astype("float32"))
    path = tmp_path / "model.keras"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.save(path)
    loaded = keras.models.load_model(path, **kwargs)
    again = loaded.layers[-1]
    for training in (False, True):
        np.testing.assert_allclose(
            to_numpy(loaded(inputs, training=training)),
            to_numpy(model(inputs, training=training)),
            1e-6,
            1e-6,
        )
    assert through_json(again.get_config()) == through_json(layer.get_config())
    assert again.weight_table() == layer.weight_table()
    return again


@register
def make_nnx(rngs):
    return nnx.Sequential(
        nnx.Linear(4, 5, rngs=rngs), nnx.BatchNorm(5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
    )


@register
class NnxBlock(nnx.Module):
    def __init__(self, width, *, rngs):
        self.linear = nnx.Linear(4, width, rngs=rngs)

    def __call__(self, x):
        return self.linear(x)

    def twice(self, x):
        return 2 * self.linear(x)


@register
class EqxBlock(eqx.Module):
    linear: eqx.nn.Linear
    scale: jax.Array
    table: np.ndarray
    act: Callable[..., Any]
    name: str = eqx.field(static=True)

    def __init__(self, width, key):
        self.linear = eqx.nn.Linear(4, width, key=key)
        self.scale = jnp.ones(())
        self.table = np.arange(width, dtype="float32")
        self.act = jax.nn.gelu
        self.name = "block"

    def __call__(self, x):
        return self.act(self.linear(x)) * self.scale + self.table


class EqxShared(eqx.Module):
    one: eqx.nn.Linear
    two: eqx.nn.Linear

    def __init__(self, key):
        self.one = eqx.nn.Linear(4, 4, key=key)
        self.two = self.one

    def __call__(self, x):
        return self.two(self.one(x))


register(EqxShared)


class EqxStateful(eqx.Module):
    norm: eqx.nn.BatchNorm
    linear: eqx.nn.Linear

    def __init__(self, key):
        self.norm = eqx.nn.BatchNorm(4, "batch", mode="batch")
        self.linear = eqx.nn.Linear(4, 2, key=key)

    def __call__(self, x, state):
        x, state = self.norm(x, state)
        return self.linear(x), state


@register
def make_stateful(key):
    return eqx.nn.make_with_state(EqxStateful)(key)


@register
def haiku_net(x, is_training):
    x = hk.BatchNorm(True, True, 0.9)(hk.Linear(5)(x), is_training)
    return hk.dropout(hk.next_rng_key(), 0.5, x) if is_training else x


haiku_transform = jaxwrap.register_serializable("tests_serialization", "haiku")(
    hk.transform_with_state(haiku_net)
)
haiku_multi = jaxwrap.register_serializable("tests_serialization", "multi")(
    hk.multi_transform(lambda: (lambda x: hk.Linear(2)(x), (lambda x: x + 1, lambda x: x * 2)))
)


@register
def params_call(params, state, inputs):
    return params["act"](inputs @ params["w"]) * params["scale"].x + state["offset"], state


@register
def linear_init(rng, inputs):
    return {"w": jax.random.normal(rng, (inputs.shape[-1], 2))}


@register
def linear_call(params, inputs):
    return inputs @ params["w"]


def given_params():
    return {
        "params": {
            "w": jnp.ones((4, 3)),
            "act": jnp.tanh,
            "name": "net",
            "none": None,
            "scale": Point(2.0, np.float16(1)),
            "half": jnp.ones((2,), jnp.bfloat16),
            "key": jax.random.key(3),
            "ordered": collections.OrderedDict(z=1, a=2),
        },
        "state": {"offset": np.arange(3, dtype="float32"), "count": 0},
    }


def bfloat16_variables():
    variables = nn.Dense(2).init(jax.random.key(0), jnp.ones((1, 4)))
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables)


LAYERS = {
    "linen": lambda: FlaxLayer(
        Net(Size(3), Block(5), nn.silu, rates={"dropout": 0.5}),
        rngs={"dropout": 3},
        rules={
            ".*/bias": Rule(trainable=False),
            ".*/kernel": Rule(regularizer="l2", dtype="float16"),
        },
    ),
    "linen set": lambda: FlaxLayer(nn.WeightNorm(nn.Dense(2))),
    "linen of flax": lambda: FlaxLayer(nn.Sequential([nn.Dense(4), nn.tanh, nn.Dense(2)])),
    "linen with variables": lambda: FlaxLayer(nn.Dense(2), variables=bfloat16_variables()),
    "linen function as method": lambda: FlaxLayer(nn.Dense(2), method=call_twice),
    "nnx": lambda: NNXLayer.from_factory(make_nnx, seed=1, trainable=nnx.Param),
    "nnx partial": lambda: NNXLayer.from_factory(functools.partial(nnx.Linear, 4, 3)),
    "nnx method": lambda: NNXLayer.from_factory(functools.partial(NnxBlock, 3), method="twice"),
    "nnx trainable": lambda: NNXLayer.from_factory(make_nnx, trainable=(nnx.Param, nnx.BatchStat)),
    "equinox": lambda: EquinoxLayer(EqxBlock(3, jax.random.key(0)), batch=True),
    "equinox of equinox": lambda: EquinoxLayer(
        eqx.nn.MLP(4, 2, 3, 1, key=jax.random.key(0)), batch=True, filter_spec=eqx.is_inexact_array
    ),
    "equinox shared": lambda: EquinoxLayer(EqxShared(jax.random.key(0)), batch=True),
    "equinox factory": lambda: EquinoxLayer.from_factory(
        functools.partial(eqx.nn.MLP, 4, 2, 3, 1), batch=True, seed=3
    ),
    "equinox stateful": lambda: EquinoxLayer.from_factory(make_stateful, batch=True),
    "equinox frozen": lambda: EquinoxLayer(
        eqx.nn.Linear(4, 2, key=jax.random.key(0)),
        batch=True,
        filter_spec=jax.tree.map(lambda _: False, eqx.nn.Linear(4, 2, key=jax.random.key(0))),
    ),
    "haiku": lambda: HaikuLayer(haiku_transform),
    "haiku multi": lambda: HaikuLayer(haiku_multi, method=1),
    "params and state": lambda: JaxLayer(params_call, **given_params()),
    "init and params": lambda: JaxLayer(
        linear_call, linear_init, params={"w": jnp.ones((4, 2), jnp.float16)}
    ),
    "function of jax": lambda: JaxLayer(jax.nn.relu, call_arguments=("x",)),
}


@register
def call_twice(module, inputs):
    return 2 * module(inputs)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_saved_by_itself(name, tmp_path):
    layer = LAYERS[name]()
    save_and_load(layer, x(3, 4), tmp_path)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_copied_and_cloned(name):
    model = keras.Sequential([keras.Input((4,)), LAYERS[name]()])
    again = copy.deepcopy(model)
    np.testing.assert_allclose(to_numpy(again(x(3, 4))), to_numpy(model(x(3, 4))), 1e-6, 1e-6)
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    np.testing.assert_allclose(to_numpy(clone(x(3, 4))), to_numpy(model(x(3, 4))), 1e-6, 1e-6)


@pytest.mark.once
def test_what_is_shared_stays_shared(tmp_path):
    layer = LAYERS["equinox shared"]()
    again = save_and_load(layer, x(3, 4), tmp_path)
    assert len(again.weight_table()) == len(layer.weight_table()) == 2


@pytest.mark.once
def test_names_that_keras_has_registered_serve_too(tmp_path):
    save_and_load(FlaxLayer(models.Saved(3)), x(2, 6, 6, 2), tmp_path)
    save_and_load(JaxLayer(models.mlp_call, models.mlp_init), x(2, 4), tmp_path)


# Dataclasses with modules, methods and pytrees in them.


@register
@dataclasses.dataclass(frozen=True)
class Holder:
    module: Any
    method: Any = None
    collections: Any = dataclasses.field(default_factory=dict)
    streams: Any = ()
    act: Callable[..., Any] = nn.gelu


class HolderWithConfig(Holder):
    """Registered with jaxwrap only, so Keras does not know its name."""

    def get_config(self):
        return serialize_fields(self)

    @classmethod
    def from_config(cls, config):
        return deserialize_fields(cls, config)


register(HolderWithConfig)


@pytest.mark.once
@pytest.mark.parametrize("cls", [Holder, HolderWithConfig])
def test_a_frozen_dataclass_comes_back_with_what_its_fields_hold(cls):
    holder = cls(
        Block(3, nn.silu),
        call_twice,
        {"losses": "loss", "nested": {"a": (1, [2, None])}},
        (("dropout", 3), ("params", None)),
        nn.initializers.normal(0.3),
    )
    again = round_trip(holder)
    assert type(again) is cls
    assert dataclasses.replace(again, act=holder.act) == holder
    assert serialize(again, "again") == serialize(holder, "holder")


@pytest.mark.once
@pytest.mark.parametrize("cls", [Holder, HolderWithConfig])
def test_methods_of_a_module_in_a_dataclass_come_back_as_methods_of_the_new_module(cls):
    net = Net(Size(), Block(3))
    for holder in (cls(net, net.features), cls(net, Net(Size(), Block(3)).features)):
        again = round_trip(holder)
        assert again.method.__self__ is again.module
        assert again.method.__func__ is Net.features
        assert again.module is not net
    assert round_trip(cls(net, Net.features)).method is Net.features


@pytest.mark.once
def test_methods_that_a_file_cannot_name_are_refused_when_they_are_saved(tmp_path):
    net = Net(Size(), Block(3))
    other = Net(Size(7), Block(3))
    for method in (net._private, other.features, net.tabulate):
        layer = JaxLayer(params_call, params={"f": Holder(net, method)}, state={})
        message = r"`layer.params\['f'\].method`, a field of Holder, is a method"
        with pytest.raises(TypeError, match=message):
            keras.Sequential([layer]).save(tmp_path / "model.keras")


@pytest.mark.once
@pytest.mark.parametrize(
    "method",
    [
        {"field": "module", "name": "_private"},
        {"field": "module", "name": "__init__"},
        {"field": "module", "name": "tabulate"},
        {"field": "module", "name": "missing"},
        {"field": "module", "name": "act"},
        {"field": "streams", "name": "index"},
        {"field": "method", "name": "count"},
        {"field": "other", "name": "features"},
        {"field": "module", "name": 3},
        {"field": ["module"], "name": "features"},
        {"field": "module", "name": "features", "bound": "yes"},
        {"field": "module"},
    ],
)
def test_hostile_methods(method):
    net = Net(Size(), Block(3))
    config = through_json(serialize(Holder(net, net.features), "value"))
    assert config["fields"]["method"] == {
        "kind": "method",
        "field": "module",
        "name": "features",
        "bound": True,
    }
    config["fields"]["method"] = {"kind": "method", "bound": True, **method}
    with pytest.raises(ValueError, match="cannot be made from this config: in `value`"):
        deserialize(config, "value")


@pytest.mark.once
def test_a_config_holds_methods_only_in_fields_of_dataclasses():
    method = {"kind": "method", "field": "x", "name": "features", "bound": True}
    net = through_json(serialize(Net(Size(), Block(3)), "net"))
    point = through_json(serialize(Point(1, 2), "point"))
    point["fields"] = {"x": net, "y": method}
    for config in (method, [method], {"kind": "tuple", "items": [method]}, point):
        with pytest.raises(ValueError, match="cannot be made from this config"):
            deserialize(config, "value")


@pytest.mark.once
def test_fields_with_callables_that_are_not_registered():
    """As a program reads them that did not write them."""
    holder = Holder(Block(3), method=local_call)
    config = through_json(serialize_fields(holder, callables=("module", "method")))
    assert deserialize_fields(Holder, config) == holder
    config["method"]["registered_name"] = "local_call"
    with keras.saving.custom_object_scope({"local_call": local_call}):
        assert deserialize_fields(Holder, config) == holder
    with pytest.raises(ValueError, match="'local_call' is not registered"):
        deserialize_fields(Holder, config)


# The contract of Keras's own layers.


def local_call(inputs):
    return inputs + 1


@pytest.mark.once
def test_custom_objects_serve_for_what_is_not_registered(tmp_path):
    model = keras.Sequential([keras.Input((4,)), JaxLayer(local_call)])
    with pytest.warns(
        UserWarning, match=r"`layer.call_fn` is the function `local_call`.*custom_objects"
    ):
        model.save(tmp_path / "model.keras")
    with pytest.raises(Exception, match="'local_call' is not registered"):
        keras.models.load_model(tmp_path / "model.keras")
    loaded = keras.models.load_model(
        tmp_path / "model.keras", custom_objects={"local_call": local_call}
    )
    np.testing.assert_allclose(to_numpy(loaded(x(2, 4))), x(2, 4) + 1, 1e-6)


@pytest.mark.once
def test_a_lambda_is_loaded_as_keras_loads_it(tmp_path):
    model = keras.Sequential([keras.Input((4,)), JaxLayer(lambda inputs: inputs + 1)])
    message = r"^`layer.call_fn` is a lambda, .*`safe_mode=False`.*register_serializable"
    with pytest.warns(UserWarning, match=message) as warned:
        model.save(tmp_path / "model.keras")
    assert len(warned) == 1
    for safe_mode in ({}, {"safe_mode": True}):
        with pytest.raises(Exception, match="lambda"):
            keras.models.load_model(tmp_path / "model.keras", **safe_mode)
    config = model.layers[-1].get_config()
    assert config["call_fn"].pop("registered_name")  # which another program does not find
    with pytest.raises(Exception, match="lambda"):  # safe mode is unset
        JaxLayer.from_config(config)
    loaded = keras.models.load_model(tmp_path / "model.keras", safe_mode=False)
    np.testing.assert_allclose(to_numpy(loaded(x(2, 4))), x(2, 4) + 1, 1e-6)


class FixedArguments(JaxLayer):
    """A subclass in the manner of Keras: with a constructor and a config of its own."""

    def __init__(self, factor=2.0, name=None):
        super().__init__(self._times, name=name)
        self.factor = factor

    def _times(self, inputs):
        return inputs * self.factor

    def get_config(self):
        return {"factor": self.factor, "name": self.name}


@pytest.mark.once
def test_a_subclass_with_a_config_of_its_own():
    again = FixedArguments.from_config(FixedArguments(3.0, name="times").get_config())
    assert (again.factor, again.name) == (3.0, "times")
