"""Files that somebody made to do harm, and files that are damaged: an error, soon, and nothing runs that they name."""

import contextlib
import copy
import functools
import io
import json
import math
import os
import random
import resource
import subprocess
import sys
import time
import tracemalloc
import zipfile

import equinox as eqx
import flax.linen as nn
import h5py
import jax
import keras
import models
import numpy as np
import optax
import pytest
from backends import to_numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from keras.src.saving.serialization_lib import ObjectSharingScope
from test_serialization import LAYERS, Block, Net, Size, x

import jaxwrap
from jaxwrap import EquinoxLayer, FlaxLayer, JaxLayer, Rule
from jaxwrap._serialization import deserialize

SECONDS = 20  # a machine may be busy; what hangs takes longer
MEGABYTES = 700
# Each backend has its own: six runs of the tests make more than 3,000 mutations of configs.
MUTATIONS = 600
RANDOM_SEED = f"{keras.config.backend()} {sys.version_info[:2]} {jax.__version__}"

# What Python tells of when it happens, and must not when a file is loaded.
FORBIDDEN = {
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.putenv",
    "subprocess.Popen",
    "socket.connect",
    "socket.getaddrinfo",
    "pickle.find_class",
    "shutil.rmtree",
    "urllib.Request",
    "code.__new__",
    "jaxwrap_canary",
}
_happened: list[str] = []
_watching = False


def _hook(event, arguments):
    if _watching and event in FORBIDDEN:
        _happened.append(event)


sys.addaudithook(_hook)


@contextlib.contextmanager
def watched():
    """In here, an attack that has succeeded, much time or much memory fails the test."""
    global _watching
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _happened.clear()
    _watching = True
    try:
        yield
    finally:
        _watching = False
        took = time.monotonic() - start
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert not _happened
    assert took < SECONDS
    assert grown < MEGABYTES


@pytest.mark.once
def test_the_canary_sings(tmp_path):
    for attack in (
        lambda: os.system("true"),
        lambda: subprocess.run(["true"], check=True),
        lambda: os.remove(tmp_path / "file"),
        lambda: sys.audit("jaxwrap_canary"),
    ):
        (tmp_path / "file").touch()
        with pytest.raises(AssertionError), watched():
            attack()
    with pytest.raises(AssertionError), watched():
        np.ones(2**28 // 2, "float64").sum()


@pytest.fixture(scope="module")
def canary(tmp_path_factory):
    """A module that can be imported and tells if it is: `jaxwrap_canary.fire` is a name in hostile files."""
    folder = tmp_path_factory.mktemp("canary")
    (folder / "jaxwrap_canary.py").write_text(
        "import sys\nsys.audit('jaxwrap_canary')\ndef fire(*args, **kwargs):\n    sys.audit('jaxwrap_canary')\n"
    )
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))


NAMES = [
    "os.system",
    "posix.system",
    "builtins.eval",
    "builtins.exec",
    "builtins.__import__",
    "builtins.getattr",
    "subprocess.Popen",
    "jaxwrap_canary.fire",
    "jaxwrap_canary",
    "keras.config.enable_unsafe_deserialization",
    "keras.utils.get_file",
    "keras.saving.load_model",
    "jax.debug.callback",
    "jax.pure_callback",
    "jax.experimental.io_callback",
    "jax.config.update",
    "jax.profiler.start_trace",
    "jax.distributed.initialize",
    "jax.numpy.save",
    "jax.numpy.load",
    "jax.numpy.fromfile",
    "jax.numpy.frombuffer",
    "jax.nn.initializers.__loader__",
    "jax._src.callback.pure_callback",
    "flax.linen.Module",
    "flax.linen.module.sys.modules",
    "flax.serialization.msgpack_restore",
    "haiku.transform",
    "equinox.filter_pure_callback",
    "numpy.load",
    "numpy.memmap",
    "numpy.ctypeslib.load_library",
    "tests_serialization>",
    "__main__.x",
    "",
    None,
    3,
    ["os.system"],
    {"class_name": "function"},
]


def keras_form(module, name, **more):
    return {"class_name": name, "config": {}, "module": module, "registered_name": name, **more}


def function_form(module, name):
    return {"class_name": "function", "config": name, "module": module, "registered_name": name}


def named(name):
    return {"kind": "name", "name": name}


NODES = [
    function_form("os", "system"),
    function_form("builtins", "eval"),
    function_form("jaxwrap_canary", "fire"),
    function_form("keras.config", "enable_unsafe_deserialization"),
    function_form("keras.utils", "get_file"),
    function_form("keras.saving", "load_model"),
    function_form("jax", "pure_callback"),
    {"class_name": "function", "config": ["os.system"], "module": None, "registered_name": {}},
    {"class_name": "__lambda__", "config": {"value": ["4wEAAAA=\n", None, None]}},
    {"class_name": "__lambda__", "config": {"value": "4wEAAAA="}, "module": "builtins"},
    {"class_name": "__typespec__", "config": [], "spec_name": "system", "module": "os"},
    keras_form("os", "system"),
    keras_form("subprocess", "Popen", config={"args": ["touch", "fired"]}),
    keras_form("keras.layers", "Lambda", config={"function": "os.system"}),
    keras_form("keras.layers", "TFSMLayer", config={"filepath": "/"}),
    keras_form("keras.src.saving.saving_lib", "H5IOStore", config={"path_or_io": "fired"}),
    keras_form("jaxwrap._serialization._names", "find"),
    keras_form("jaxwrap", "FlaxLayer", registered_name="jaxwrap>FlaxLayer"),
    {"kind": "partial", "fn": named("os.system"), "args": ["true"], "kwargs": {}},
    {"kind": "partial", "fn": function_form("os", "system"), "args": [], "kwargs": {}},
    {"kind": "partial", "fn": named("jax.nn.relu"), "args": {}, "kwargs": []},
    {"kind": "call", "name": "os.system", "arguments": {"command": "true"}},
    {"kind": "call", "name": "flax.linen.Dense", "arguments": {"features": 2}},
    {"kind": "call", "name": "jax.nn.initializers.normal", "arguments": {"command": "true"}},
    {"kind": "call", "name": "jax.nn.initializers.normal", "arguments": ["true"]},
    {"kind": "object", "class": "os.system", "fields": {}},
    {"kind": "object", "class": "jax.nn.relu", "fields": {}},
    {"kind": "object", "class": "numpy.float32", "fields": {"value": 1}},
    {"kind": "object", "class": "jaxwrap>FlaxLayer", "fields": {"module": None}},
    {"kind": "object", "class": "flax.linen.Dense", "fields": {"features": 1, "__class__": 2}},
    {"kind": "object", "class": "flax.linen.Dense", "fields": {"parent": {"kind": "os"}}},
    {"kind": "object", "class": "equinox.nn.Linear", "fields": {"__call__": 1}},
    {"kind": "enum", "class": "jax.lax.Precision", "member": "__class__"},
    {"kind": "enum", "class": "flax.linen.Dense", "member": "features"},
    {"kind": "dict", "class": "os.system", "items": []},
    {"kind": "dict", "class": "flax.linen.Dense", "items": []},
    {"kind": "dict", "items": [[[1], 2]]},
    {"kind": "dict", "items": [1, 2]},
    {"kind": "set", "items": [[1]]},
    {"kind": "set", "items": {"kind": "os"}},
    {"kind": "set"},
    {"kind": "name", "name": "unregistered>system>00"},
    {"kind": "name", "name": "unregistered>>"},
    {"kind": "object", "class": "unregistered>Dense>", "fields": {"features": 2}},
    {"class_name": "__lambda__", "config": {"value": ["", None, None]}, "registered_name": ["x"]},
    {"class_name": "function", "config": "system", "registered_name": "unregistered>os.system>00"},
    {"kind": "dtype", "name": "object"},
    {"kind": "dtype", "name": "O,O"},
    {"kind": "dtype", "name": ["f4"]},
    {"kind": "array", "library": "numpy", "dtype": "object", "shape": [1], "data": "AAAAAAAAAAA="},
    {"kind": "array", "library": "jax", "dtype": "float32", "shape": [10**15], "data": "AAAA"},
    {"kind": "array", "library": "jax", "dtype": "float32", "shape": [-1], "data": "%%%"},
    {"kind": "weight", "shape": [10**15], "dtype": "float32", "impl": None, "place": 0}
    | {"is_numpy": False},
    {"kind": "weight", "shape": [math.nan], "dtype": "float32", "impl": None, "place": 0}
    | {"is_numpy": False},
    {"kind": "weight", "shape": [2], "dtype": "float32", "impl": "os.system", "place": 0}
    | {"is_numpy": False},
    {"kind": "method", "field": "module", "name": "tabulate", "bound": True},
    {"kind": "method", "field": "os", "name": "system", "bound": False},
    {"kind": "partial", "fn": {"kind": "method", "field": "act", "name": "x", "bound": True}}
    | {"args": [], "kwargs": {}},
    {"kind": "problem"},
    {"kind": "keras"},
    {"kind": "__class__"},
    {"kind": ["tuple"], "items": []},
    {"kind": "tuple"},
    {},
    {"a": 1},
]


def built_config(name):
    """The config of a layer as a `.keras` file holds it."""
    layer = LAYERS[name]()
    layer(x(3, 4))
    return json.loads(json.dumps(keras.saving.serialize_keras_object(layer)))


@pytest.fixture(scope="module")
def configs():
    return {name: built_config(name) for name in LAYERS}


def positions(tree, path=()):
    """The path of each node of nested JSON."""
    yield path
    if isinstance(tree, list):
        tree = dict(enumerate(tree))
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from positions(value, (*path, key))


def at(tree, path):
    for key in path:
        tree = tree[key]
    return tree


def replaced(tree, path, value):
    tree = copy.deepcopy(tree)
    at(tree, path[:-1])[path[-1]] = copy.deepcopy(value)
    return tree


def load(config, backend):
    """What Keras does with the part of a file that describes a layer; it is called too."""
    layer = keras.saving.deserialize_keras_object(config)
    layer(x(3, 4))
    return layer


def names_in(config):
    """Where a name stands that is looked up."""
    for path in positions(config):
        node = at(config, path)
        if path[:1] == ("config",) and isinstance(node, dict):
            for key in ("name", "class"):
                if node.get("kind") in ("name", "call", "object", "enum", "dict") and key in node:
                    yield (*path, key)
            if "class_name" in node and len(path) > 1 and path[1] not in ("dtype",):
                yield (*path, "registered_name")


@pytest.mark.once
@pytest.mark.parametrize("name", LAYERS)
def test_hostile_names(name, configs, canary, backend):
    config = configs[name]
    places = list(names_in(config))
    assert places
    for place in places:
        for hostile in NAMES:
            if place[-1] == "registered_name":
                attack = replaced(config, place[:-1], {**at(config, place[:-1])} | {"module": "os"})
                attack = replaced(attack, place, hostile)
                attack = replaced(attack, (*place[:-1], "class_name"), hostile)
            else:
                attack = replaced(config, place, hostile)
            with watched(), pytest.raises(Exception):  # noqa: B017, PT011
                load(attack, backend)


SOURCES = ("call_fn", "init_fn", "module", "factory", "transformed", "filter_spec", "params")


@pytest.mark.once
@pytest.mark.parametrize("name", LAYERS)
def test_hostile_nodes(name, configs, canary, backend):
    config = configs[name]
    places = [("config", source) for source in SOURCES if config["config"].get(source) is not None]
    places += [
        path
        for path in positions(config)
        if path[-2:-1] == ("fields",) or path[-1:] in [("fn",), ("method",)]
    ][:6]
    assert places
    for place in places:
        for hostile in NODES:
            attack = replaced(config, place, hostile)
            with watched(), pytest.raises(Exception):  # noqa: B017, PT011
                load(attack, backend)


@pytest.mark.once
@pytest.mark.parametrize(
    "method",
    [
        "__class__",
        "__init__",
        "__reduce__",
        "__getattribute__",
        "__dict__",
        "_private",
        "apply",
        "init",
        "bind",
        "tabulate",
        "sow",
        "act",
        "block",
        "size",
        "missing",
        "act.__globals__",
        "features.__globals__",
        "",
        3,
        True,
        ["features"],
        {"class_name": "function", "config": "system", "module": "os"},
    ],
)
def test_method_names(method):
    config = FlaxLayer(Net(Size(), Block(3)), method="features").get_config()
    assert FlaxLayer.from_config(config).method == "features"
    with pytest.raises((TypeError, ValueError)):
        FlaxLayer.from_config({**config, "method": method})


@pytest.mark.once
@pytest.mark.parametrize("kind", ["lists", "tuples", "partials", "keras"])
@pytest.mark.parametrize("depth", [150, 3000, 200_000])
def test_deep_configs(kind, depth, tmp_path):
    node = {
        "lists": ("[", "1", "]"),
        "tuples": ('{"kind": "tuple", "items": [', "1", "]}"),
        "partials": ('{"kind": "partial", "args": [], "kwargs": {}, "fn": ', "1", "}"),
        "keras": ('{"class_name": "Rule", "config": ', "1", "}"),
    }[kind]
    text = node[0] * depth + node[1] + node[2] * depth
    config = json.dumps(keras.saving.serialize_keras_object(FlaxLayer(Block(3, act="DEEP"))))
    path = saved_model(tmp_path)
    model = json.loads(read_member(path, "config.json"))
    model["config"]["layers"][-1] |= json.loads(config)
    rewrite(path, "config.json", json.dumps(model).replace('"DEEP"', text).encode())
    with watched(), pytest.raises((ValueError, TypeError, RecursionError)):
        keras.models.load_model(path)


PATTERNS = [
    "(a+)+b",
    "(.*a){30}b",
    ".*.*.*.*.*.*.*.*.*.*.*x",
    "(a|aa)+$",
    "(?:(?:a{60000}){60000})",
    "(?:(?:(?:a{900}){900}){900})",
    "((((((((a{9}){9}){9}){9}){9}){9}){9}){9})",
    "|".join(f"(.*a){{{count}}}b" for count in range(900)),
    "(?:" * 5000 + "a" + "){2}" * 5000,
    "(?=a)a",
    r"(a)\1",
    "(",
    "\ud800",
    3,
    None,
    ["a"],
]


@pytest.mark.once
@pytest.mark.parametrize("pattern", PATTERNS)
def test_hostile_patterns(pattern):
    """Some regular expressions take longer than the universe has been there, and others all memory."""
    config = JaxLayer(
        multiply, params={"a" * 60: 1.0}, rules={".*": Rule(trainable=False)}
    ).get_config()
    config["rules"][0][0] = pattern
    with watched(), pytest.raises((TypeError, ValueError)):
        JaxLayer.from_config(config)


@jaxwrap.register_serializable("tests_hostile")
def multiply(params, inputs):
    return inputs * params["a" * 60]


# Wrong types everywhere.

WRONG = [
    None,
    True,
    -1,
    10**18,
    math.nan,
    math.inf,
    "",
    "text",
    "a" * 100_000,
    [],
    [None],
    [[[1]]],
    {},
    {"class_name": "text"},
    {"kind": "tuple", "items": [1]},
    {"kind": "name", "name": "jax.nn.relu"},
    {"kind": "name", "name": "flax.linen.Dense"},
    [10**12, 10**12],
    [math.nan, 4],
]


def mutations(configs, seed, count):
    """Configs with one node in the place of another."""
    rng = random.Random(seed)
    names = sorted(configs)
    for _ in range(count):
        config = configs[rng.choice(names)]
        path = rng.choice([path for path in positions(config) if path])
        action = rng.random()
        if action < 0.15:
            mutated = copy.deepcopy(config)
            parent = at(mutated, path[:-1])
            del parent[path[-1]]
        elif action < 0.3:
            other = configs[rng.choice(names)]
            mutated = replaced(config, path, at(other, rng.choice(list(positions(other)))))
        else:
            mutated = replaced(config, path, rng.choice(WRONG))
        yield path, mutated


@pytest.mark.once
def test_mutated_configs(configs, canary, backend):
    """Each gives an error, or a layer that is sound: it can be called and described."""
    errors = 0
    for path, config in mutations(configs, RANDOM_SEED, MUTATIONS):
        with watched():
            try:
                layer = load(config, backend)
            except Exception:
                errors += 1
                continue
            again = json.loads(json.dumps(layer.get_config()))
            assert type(layer).from_config(again) is not None, path
    assert errors > MUTATIONS / 3


@pytest.mark.once
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["kind", "name", "items", "class", "fields", "fn", "config", "a"]),
                inner | st.sampled_from(["tuple", "name", "call", "object", "partial", "weight"]),
            )
        ),
        max_leaves=8,
    )
)
@settings(max_examples=200, deadline=None)
def test_any_json_as_a_module(tree):
    config = FlaxLayer(nn.Dense(2)).get_config()
    with watched(), pytest.raises((TypeError, ValueError)):
        FlaxLayer.from_config({**config, "module": tree})


FIELDS = {
    "call_arguments": ["inputs", 3, [3], {"a": 1}, ["inputs", None]],
    "training_argument": [3, ["training"], "missing", {}],
    "seed": ["1", 1.5, [1], {}],
    "native_serialization_platforms": ["cpu", 3, [3]],
    "rules": [3, "ab", [["a"]], [[".*", None]], {"a": 1}, [[".*", {"kind": "tuple", "items": []}]]],
    "update_state_in_inference": [1, "yes", None, []],
    "supports_masking": [0, "no", None],
    "key_impl": [3, "os.system", ["rbg"]],
    "trainable": ["yes", 1, None],
    "name": [3, ["a"], {"a": 1}, "a/b"],
    "dtype": [3, "text", [1], {"class_name": "system", "module": "os", "config": {}}],
    "stored": [
        3,
        [],
        {"keep_dtypes": 1, "dtypes": {}},
        {"keep_dtypes": True, "dtypes": {"a": "O"}},
    ],
    "params": [{"kind": "os"}, {"kind": "tuple"}],
    "unknown": [1],
}
MODULE_FIELDS = {
    "collections": [3, ["a"], {"a": "b"}, {"a": 3}],
    "rngs": [3, "dropout", {"a": "b"}, [3], {"a": 1.5}],
    "training_argument": [3, "missing", ["training"]],
    "module": [None, 3, "Dense", [], {"kind": "name", "name": "flax.linen.Dense"}],
    "variables": [3, {"params": 1}],
}


@pytest.mark.once
@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        *[("function of jax", field, value) for field in FIELDS for value in FIELDS[field]],
        *[("linen", field, value) for field in MODULE_FIELDS for value in MODULE_FIELDS[field]],
    ],
)
def test_wrong_types_of_fields(name, field, value, configs):
    config = copy.deepcopy(configs[name])
    config["config"][field] = value
    # Of `dtype`, Keras says that a string has no attribute.
    with watched(), pytest.raises((TypeError, ValueError, AttributeError)):
        keras.saving.deserialize_keras_object(config)


@pytest.mark.once
@pytest.mark.parametrize(
    "shape",
    [
        [math.nan, 4],
        [1.5],
        ["4"],
        [None, -4],
        [3, 10**14],
        [10**9, 10**9],
        "(3, 4)",
        None,
        {"a": None},
        [[3, 4], None],
        [10**40, 4],
    ],
)
def test_wrong_shapes_of_inputs(shape, configs):
    config = copy.deepcopy(configs["linen of flax"])
    config["build_config"]["input_shape"] = shape
    with watched(), pytest.raises((TypeError, ValueError)):
        keras.saving.deserialize_keras_object(config)


# Archives.


def saved_model(tmp_path, layer=None):
    model = keras.Sequential([keras.Input((4,)), layer or LAYERS["linen"]()])
    path = tmp_path / "model.keras"
    model.save(path)
    return path


def read_member(path, name):
    with zipfile.ZipFile(path) as archive:
        return archive.read(name)


def rewrite(path, name, data):
    with zipfile.ZipFile(path) as archive:
        members = {member: archive.read(member) for member in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in {**members, name: data}.items():
            archive.writestr(member, content)


def values_of(model):
    return [to_numpy(variable.value) for variable in model.variables]


def value_places(h5):
    """Where the values are in the bytes of an HDF5 file.

    Only these are damaged: the HDF5 library believes everything of its own structure, and a flipped bit can make it
    crash or look for an end for ever, whoever has written the file.
    """
    places = []

    def visit(_, node):
        if isinstance(node, h5py.Dataset) and node.id.get_offset() is not None:
            start = node.id.get_offset()
            places.extend(range(start, start + node.id.get_storage_size()))

    with h5py.File(io.BytesIO(h5)) as file:
        file.visititems(visit)
    return places


def flipped(data, places, seed, count):
    """The bytes with one bit flipped, time and again."""
    rng = random.Random(seed)
    for _ in range(count):
        place = rng.choice(places)
        yield data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :]


def truncated(data, seed, count):
    rng = random.Random(seed)
    for _ in range(count):
        yield data[: rng.randrange(len(data))]


@pytest.mark.once
def test_damaged_archives(tmp_path):
    """A bit that is flipped gives an error, or stood for nothing: the model is the same."""
    path = saved_model(tmp_path)
    data = path.read_bytes()
    h5 = read_member(path, "model.weights.h5")
    start = data.index(h5)
    places = [*range(start), *range(start + len(h5), len(data))]
    places += [start + place for place in value_places(h5)]
    expected = values_of(keras.models.load_model(path))
    errors = 0
    for damaged in (*flipped(data, places, RANDOM_SEED, 60), *truncated(data, RANDOM_SEED, 20)):
        path.write_bytes(damaged)
        with watched():
            try:
                loaded = keras.models.load_model(path)
            except Exception:
                errors += 1
                continue
        for value, right in zip(values_of(loaded), expected, strict=True):
            np.testing.assert_array_equal(value, right)
    assert errors > 20


@pytest.mark.once
@pytest.mark.parametrize("name", ["linen", "params and state"])
def test_damaged_weights(name, tmp_path):
    """An error, and no weight has changed."""
    model = keras.Sequential([keras.Input((4,)), LAYERS[name]()])
    path = tmp_path / "model.weights.h5"
    model.save_weights(path)
    data = path.read_bytes()
    for variable in model.variables:
        variable.assign(keras.ops.zeros_like(variable.value))
    before = values_of(model)
    flips = flipped(data, value_places(data), RANDOM_SEED, 250)
    for damaged in (*flips, *truncated(data, RANDOM_SEED, 50)):
        path.write_bytes(damaged)
        with watched(), pytest.raises(Exception):  # noqa: B017, PT011
            model.load_weights(path)
        for value, right in zip(values_of(model), before, strict=True):
            np.testing.assert_array_equal(value, right)


def hostile_weights():
    """What is done to the group of a layer's variables."""

    def replace(name, **kwargs):
        def change(group):
            del group[name]
            group.create_dataset(name, **kwargs)

        return change

    def remove(name):
        return lambda group: group.pop(name)

    def link(name, target):
        def change(group):
            del group[name]
            group[name] = target

        return change

    bias = "params/bias"
    return {
        "huge": replace(bias, shape=(10**13,), dtype="float32", chunks=(1024,)),
        "huge manifest": replace("paths", shape=(10**13,), dtype="uint8", chunks=(1024,)),
        "no manifest": remove("paths"),
        "manifest of floats": replace("paths", data=np.array([math.nan, 1.0])),
        "manifest of lies": replace("paths", data=np.frombuffer(b"../../x\nparams/bias", "uint8")),
        "strings": replace(bias, data=np.array([b"a", b"b"])),
        "compound": replace(bias, data=np.zeros(2, [("a", "f4"), ("b", "i4")])),
        "complex": replace(bias, data=np.zeros(2, "complex64")),
        "other shape": replace(bias, data=np.zeros((2, 1), "float32")),
        "other values": replace(bias, data=np.full(2, 7, "float32")),
        "missing": remove(bias),
        "group": lambda group: (group.pop(bias), group.create_group(bias)),
        "external link": link(bias, h5py.ExternalLink("/etc/passwd", "/x")),
        "soft link": link(bias, h5py.SoftLink("/")),
        "checksum": replace("checksum", data=np.array([1.5, 2.5])),
    }


@pytest.mark.once
@pytest.mark.parametrize("attack", hostile_weights())
def test_hostile_weights(attack, tmp_path):
    model = keras.Sequential([keras.Input((4,)), FlaxLayer(nn.Dense(2), name="dense")])
    path = tmp_path / "model.weights.h5"
    model.save_weights(path)
    with h5py.File(path, "r+") as file:
        (group,) = (g["vars"] for g in file["layers"].values() if "vars" in g and len(g["vars"]))
        hostile_weights()[attack](group)
    before = values_of(model)
    with watched(), pytest.raises(Exception):  # noqa: B017, PT011
        model.load_weights(path)
    for value, right in zip(values_of(model), before, strict=True):
        np.testing.assert_array_equal(value, right)


@pytest.mark.once
def test_a_bomb_in_an_archive(tmp_path):
    path = saved_model(tmp_path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("metadata.json", "{}")
        archive.writestr("config.json", "[" * 10**6)
        archive.writestr("model.weights.h5", io.BytesIO(b"\0" * 10**6).getvalue())
    with watched(), pytest.raises((ValueError, RecursionError)):
        keras.models.load_model(path)


# Weights files that claim more than they hold.


def written(tmp_path):
    layer = FlaxLayer(models.Cnn(), seed=1, name="cnn")
    model = keras.Sequential([keras.Input((6, 6, 2)), layer])
    model.save_weights(tmp_path / "w.weights.h5")
    return model, tmp_path / "w.weights.h5"


def own_group(file):
    """The group that holds the weights of the layer."""
    found = []
    file.visit(lambda name: found.append(name) if name.endswith("/paths") else None)
    return file[found[0].removesuffix("/paths")]


@pytest.mark.once
@pytest.mark.parametrize("kind", ["links", "twice", "list"])
def test_files_that_claim_more_than_they_hold(kind, tmp_path):
    model, path = written(tmp_path)
    before = [to_numpy(variable.value) for variable in model.variables]
    with h5py.File(path, "a") as file:
        group = own_group(file)
        listed = bytes(group["paths"][()]).decode()
        if kind == "links":  # twenty names for 40 MB
            del group["paths"]
            group.create_dataset("large", data=np.ones(10**7, "float32"))
            for number in range(20):
                group[f"link{number}"] = group["large"]
                listed += f"\nlink{number}"
            group.create_dataset("paths", data=np.frombuffer(listed.encode(), "uint8"))
        elif kind == "list":
            del group["paths"]
            group.create_dataset("paths", (10**11,), "uint8", chunks=(10**6,))
        else:
            del group["paths"]
            twice = (listed + "\nparams/Dense_0/bias").encode()
            group.create_dataset("paths", data=np.frombuffer(twice, "uint8"))
    message = {"links": "unexpected: link0", "twice": "more than once", "list": "paths"}
    tracemalloc.start()
    with pytest.raises(ValueError, match=rf"FlaxLayer 'cnn': (?s:.)*{message[kind]}"):
        model.load_weights(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**24
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(to_numpy(variable.value), value)


@pytest.mark.once
@pytest.mark.parametrize("more", [True, False])
def test_an_optimizer_refuses_a_path_that_is_listed_twice(more):
    """As many paths as it has variables, or one more: files of other models only warn."""
    optimizer = jaxwrap.OptaxOptimizer(optax.adam, learning_rate=0.1, name="listed")
    optimizer.build([keras.Variable(np.ones(2, "float32"), name="w")])
    store = {}
    optimizer.save_own_variables(store)
    optimizer.load_own_variables(store)
    listed = bytes(store["paths"]).decode().split("\n")
    twice = "\n".join([*(listed if more else listed[1:]), listed[-1]]).encode()
    before = [to_numpy(variable.value) for variable in optimizer.variables]
    with pytest.raises(ValueError, match=r"OptaxOptimizer 'listed': .*more than once"):
        optimizer.load_own_variables({**store, "paths": np.frombuffer(twice, "uint8")})
    for variable, value in zip(optimizer.variables, before, strict=True):
        np.testing.assert_array_equal(to_numpy(variable.value), value)


# Numbers that ask for more than there is.

MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def partial_of(name, *args, **kwargs):
    return {"kind": "partial", "fn": named(name), "args": list(args)} | {
        "kwargs": {"kind": "dict", "items": [[key, value] for key, value in kwargs.items()]}
    }


@pytest.mark.once
@pytest.mark.parametrize("width", [10**6, 10**8])
def test_factories_of_more_than_fits(width):
    make = functools.partial(eqx.nn.MLP, 4, 4, 8, 1)
    config = EquinoxLayer.from_factory(make, batch=True).get_config()
    assert EquinoxLayer.from_config(config).get_config() == config
    config["factory"] = partial_of("equinox.nn.MLP", width, width, width, 1)
    with watched(), pytest.raises(ValueError, match=r"this config asks for arrays of .* bytes"):
        EquinoxLayer.from_config(config)


@pytest.mark.once
@pytest.mark.parametrize("size", [10**9, 10**14])
def test_optimizers_of_more_than_fits(size):
    source = functools.partial(optax.lbfgs, memory_size=3, linesearch=None)
    config = jaxwrap.OptaxOptimizer(source, learning_rate=0.1).get_config()
    variables = [keras.Variable(np.ones((100, 100), "float32"), name="w")]
    jaxwrap.OptaxOptimizer.from_config(config).build(variables)
    assert config["transformation"] == partial_of("optax.lbfgs", memory_size=3, linesearch=None)
    config["transformation"] = partial_of("optax.lbfgs", memory_size=size, linesearch=None)
    optimizer = jaxwrap.OptaxOptimizer.from_config(config)
    with watched(), pytest.raises(ValueError, match=r"this config asks for arrays of .* bytes"):
        optimizer.build(variables)


@pytest.mark.once
def test_many_arrays_that_fit_one_by_one():
    """Places in one config, and layers in one file."""
    size = MEMORY // 4 // 3
    weight = {"kind": "weight", "shape": [size], "dtype": "float32", "impl": None}
    nodes = [{**weight, "place": place, "is_numpy": True} for place in range(4)]
    with watched(), pytest.raises(ValueError, match=r"this config asks for arrays of .* bytes"):
        deserialize(nodes, "params")
    deserialize([nodes[0]] * 4, "params")  # one array
    with watched(), ObjectSharingScope():
        for node in nodes[:2]:
            deserialize([node], "params")
        with pytest.raises(ValueError, match=r"this config asks for arrays of .* bytes"):
            deserialize([nodes[2], nodes[3]], "params")
    deserialize([nodes[0]], "params")  # another file


@pytest.mark.once
@pytest.mark.parametrize(
    "node",
    [
        partial_of("equinox.nn.MLP", 4, 4, 8, 10**9),
        partial_of("equinox.nn.MLP", 4, 4, 8, depth=10**9),
        partial_of("optax.contrib.muon", 0.1, ns_steps=10**9),
        partial_of("flax.linen.SpectralNorm", n_steps=10**12),
        partial_of("jax.numpy.einsum", optimize="optimal"),
        {"kind": "object", "class": "flax.linen.SpectralNorm", "fields": {"n_steps": 10**12}},
    ],
)
def test_loops_without_end(node):
    with watched(), pytest.raises(ValueError, match=r"expected at most 1000|'jax.numpy.einsum'"):
        deserialize(node, "module")
