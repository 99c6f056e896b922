"""Checks of layers on eight virtual devices of JAX. Prints what each gives: None, or the error."""

import contextlib
import itertools
import json
import os
import re
import sys
import tempfile
import threading
import traceback

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["KERAS_BACKEND"] = "jax"

import flax.linen as nn
import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from keras.distribution import DataParallel, DeviceMesh, LayoutMap, ModelParallel

from jaxwrap import FlaxLayer, JaxLayer, Rule, reparametrizations

MESH = DeviceMesh((2, 4), ("batch", "model"))
CHECKS = {}


def check(function):
    """Add a check under its name, in words."""
    CHECKS[function.__name__.replace("_", " ")] = function
    return function


def x(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def spec(variable):
    """Return how the value of a variable is divided."""
    sharding = variable.value.sharding
    return tuple(sharding.spec) if isinstance(sharding, NamedSharding) else ()


class MLP(nn.Module):
    """Names on one kernel, so that rules are for the other one."""

    @nn.compact
    def __call__(self, inputs, training=False):
        init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
        hidden = nn.relu(nn.Dense(16, kernel_init=init, name="up")(inputs))
        hidden = nn.Dropout(0.3, deterministic=not training)(hidden)
        return nn.Dense(3, name="down")(hidden)


def mlp():
    rules = {"params/down/kernel": Rule(layout=(("batch", "model"), None))}
    return FlaxLayer(MLP(), rules=rules, name="mlp", seed=1)


@check
def data_and_model_parallel_fit_is_equal_to_one_device():
    def trained():
        model = keras.Sequential([keras.Input((6,)), mlp()])
        model.compile(keras.optimizers.SGD(0.1), "mse")
        model.fit(x(16, 6), x(16, 3, seed=1), batch_size=8, epochs=2, shuffle=False, verbose=0)
        return model

    expected = trained().get_weights()
    layouts = mlp().layout_map(MESH, (None, 6), axes={"embed": None, "mlp": "model"})
    with ModelParallel(layout_map=layouts, batch_dim_name="batch").scope():
        model = trained()
        specs = {v.path.partition("mlp/")[2]: spec(v) for v in model.layers[-1].weights}
        assert specs["params/up/kernel"] == (None, "model"), specs
        assert specs["params/down/kernel"][:1] == (("batch", "model"),), specs
        for one, two in zip(expected, model.get_weights(), strict=True):
            np.testing.assert_allclose(two, one, 1e-5, 1e-6)


@check
def a_rule_counts_more_than_a_layout_map():
    layouts = LayoutMap(MESH)
    layouts["d/params/kernel"] = ("model", None)
    layouts["d/params/bias"] = ("model",)
    layer = FlaxLayer(nn.Dense(8), rules={".*/kernel": Rule(layout=(None, "batch"))}, name="d")
    with ModelParallel(layout_map=layouts).scope():
        layer.build((None, 4))
    assert spec(layer.params["params"]["kernel"]) == (None, "batch")
    assert spec(layer.params["params"]["bias"]) == ("model",)
    assert [row.layout for row in layer.weight_table()] == [("model",), (None, "batch")]
    layer.set_variables(jax.tree.map(np.ones_like, layer.get_variables()))
    assert spec(layer.params["params"]["kernel"]) == (None, "batch")


@check
def a_map_of_the_layer_holds_where_a_model_builds_it():
    layer = FlaxLayer(nn.Dense(8), rules={".*/kernel": Rule(layout=(None, "model"))}, name="d")
    layouts = layer.layout_map(MESH, (None, 4))
    plain = FlaxLayer(nn.Dense(8), name="d")
    with ModelParallel(layout_map=layouts).scope():
        model = keras.Sequential([plain], name="outer")
        model(x(2, 4))
    assert spec(plain.params["params"]["kernel"]) == (None, "model")


@check
def a_rule_for_an_axis_that_the_mesh_lacks_raises():
    layer = FlaxLayer(nn.Dense(8), rules={".*/kernel": Rule(layout=(None, "model"))}, name="d")
    with (
        DataParallel().scope(),
        pytest.raises(ValueError, match=r"d/params/kernel, of shape \(4, 8\)") as error,
    ):
        layer.build((None, 4))
    assert "batch=8: the mesh has no axis 'model'" in str(error.value), error
    assert not layer.weights


@check
def parts_are_divided_as_their_leaf():
    form = reparametrizations.LoRA(2, base=reparametrizations.Int8())
    rules = {".*/kernel": Rule(layout=("batch", "model"), reparametrize=form)}
    layer = FlaxLayer(nn.Dense(8), rules=rules, name="d")
    with ModelParallel(layout_map=LayoutMap(MESH)).scope():
        layer.build((None, 4))
    found = {v.path.removeprefix("d/params/kernel/"): spec(v) for v in layer.weights}
    assert found["base/values"] == ("batch", "model"), found
    assert found["base/scale"] == (None, "model"), found
    assert found["a"][:1] == ("batch",), found
    assert found["b"] == (None, "model"), found


@check
def parts_that_come_later_are_divided_as_their_leaf_was():
    layer = FlaxLayer(nn.Dense(8), name="d")
    layouts = LayoutMap(MESH)
    layouts["d/params/kernel"] = ("batch", "model")
    given = jax.device_put(x(4, 8), NamedSharding(Mesh(jax.devices(), ("d",)), P(None, "d")))
    spread = JaxLayer(lambda params, inputs: inputs @ params, params=given, name="s")
    with ModelParallel(layout_map=layouts).scope():
        layer.build((None, 4))
        layer.reparametrize(".*/kernel", reparametrizations.LoRA(2, base=reparametrizations.Int8()))
        found = {v.name: spec(v) for v in layer.weights}
        assert (found["values"], found["b"]) == (("batch", "model"), (None, "model")), found
        layer.merge()
    assert spec(layer.params["params"]["kernel"]) == ("batch", "model")
    spread.build((None, 4))
    spread.quantize("int8")
    assert spec(spread.params["values"]) == (None, "d")


@check
def a_saved_model_comes_back_divided():
    layer = FlaxLayer(nn.Dense(8), rules={".*/kernel": Rule(layout=(None, "model"))}, name="d")
    model = keras.Sequential([keras.Input((4,)), layer])
    with tempfile.TemporaryDirectory() as folder:
        model.save(f"{folder}/model.keras")
        with ModelParallel(layout_map=LayoutMap(MESH)).scope():
            again = keras.models.load_model(f"{folder}/model.keras")
            outputs = again.predict(x(8, 4), verbose=0)
    assert spec(again.layers[-1].params["params"]["kernel"]) == (None, "model")
    np.testing.assert_allclose(outputs, model.predict(x(8, 4), verbose=0), 1e-5, 1e-6)


# Building.


class Peak:
    """Bytes of live arrays on device 0, the most that there were, without those from before."""

    def __enter__(self):
        self.known = {id(array): array for array in jax.live_arrays()}
        self.most, self.ends = 0, threading.Event()
        self.thread = threading.Thread(target=self.poll)
        self.thread.start()
        self.original = keras.Variable.__init__

        def sampled(variable, *args, **kwargs):
            self.sample()
            self.original(variable, *args, **kwargs)
            self.sample()

        keras.Variable.__init__ = sampled
        return self

    def __exit__(self, *_):
        keras.Variable.__init__ = self.original
        self.sample()
        self.ends.set()
        self.thread.join()

    def poll(self):
        while not self.ends.wait(0.001):
            self.sample()

    def sample(self):
        arrays = [array for array in jax.live_arrays() if id(array) not in self.known]
        self.most = max(self.most, on_first_device(arrays))


def on_first_device(arrays):
    """Return the bytes of arrays on device 0."""
    shards = [
        shard.data
        for array in arrays
        if not array.is_deleted()
        for shard in array.addressable_shards
        if shard.device == jax.devices()[0]
    ]
    # To look at a shard makes an array of it, in the same place.
    return sum({shard.unsafe_buffer_pointer(): shard.nbytes for shard in shards}.values())


def shards_of(layer):
    return on_first_device(variable.value for variable in layer.weights)


def large_init(rng, inputs):
    keys = jax.random.split(rng, 6)
    return {f"w{n}": jax.random.normal(key, (512, 512)) for n, key in enumerate(keys)}


def large_call(params, inputs):
    return inputs + sum(leaf[0, 0] for leaf in params.values())


LARGEST = 512 * 512 * 4
DIVIDED = {".*": Rule(layout=(None, ("batch", "model")))}


@check
def initial_values_are_made_in_their_places():
    layer = JaxLayer(large_call, large_init, rules=DIVIDED, seed=3)
    compiled = []
    with ModelParallel(layout_map=LayoutMap(MESH)).scope(), Peak() as peak:
        jax.monitoring.register_event_duration_secs_listener(
            lambda name, *_, **__: "backend_compile" in name and compiled.append(name)
        )
        layer.build((None, 2))
    assert len(compiled) == 1, compiled
    assert shards_of(layer) == 6 * LARGEST / 8
    # The results are the variables: no copy, and a few bytes for keys.
    assert peak.most <= shards_of(layer) + 4096, (peak.most, shards_of(layer))


@check
def initial_values_are_those_of_one_device():
    def init(rng, inputs):
        params = {
            "kernel": jax.random.normal(rng, (8, 16)),
            "orthogonal": jax.nn.initializers.orthogonal()(rng, (8, 8)),
            "low": jax.random.uniform(rng, (16,)),
            "number": 3.0,
            "table": np.arange(8),
        }
        return params, {"key": jax.random.key(5), "count": jnp.zeros((), "int32"), "name": "static"}

    def call(params, state, inputs):
        return inputs @ params["kernel"] * params["number"], state

    def made():
        rules = {
            "params/kernel": Rule(
                layout=("batch", "model"), reparametrize=reparametrizations.LoRA(2)
            ),
            "params/orthogonal": Rule(
                layout=("batch", None), reparametrize=reparametrizations.Int8()
            ),
            "params/low": Rule(dtype="bfloat16"),
        }
        layer = JaxLayer(call, init, rules=rules, seed=3, name="same")
        layer(x(2, 8))
        return layer

    expected = made()
    with ModelParallel(layout_map=LayoutMap(MESH)).scope():
        layer = made()
    assert [v.path for v in layer.weights] == [v.path for v in expected.weights]
    for one, two in zip(expected.weights, layer.weights, strict=True):
        assert one.dtype == two.dtype
        np.testing.assert_array_equal(np.asarray(two.value), np.asarray(one.value), two.path)
    np.testing.assert_allclose(layer(x(2, 8)), expected(x(2, 8)), 1e-6)


@check
def given_values_go_to_their_places_and_stay_the_user_s():
    given = {"host": x(64, 512), "device": jnp.asarray(x(512, seed=1)), "number": 2.0}
    rules = {"params/host": DIVIDED[".*"], "params/device": Rule(layout=(("batch", "model"),))}

    def call(params, inputs):
        return inputs @ params["host"] * params["device"] * params["number"]

    expected = call(given, x(8, 64))
    with ModelParallel(layout_map=LayoutMap(MESH)).scope(), Peak() as peak:
        layer = JaxLayer(call, params=given, rules=rules)
        assert peak.most <= shards_of(layer) + given["host"].nbytes
        model = keras.Sequential([keras.Input((64,)), layer])
        np.testing.assert_allclose(model.predict(x(8, 64), verbose=0), expected, 1e-5, 1e-5)
        model.compile(keras.optimizers.SGD(0.1), "mse")
        model.fit(x(8, 64), x(8, 512), verbose=0)
    np.testing.assert_array_equal(given["host"], x(64, 512))
    np.testing.assert_array_equal(given["device"], x(512, seed=1))
    assert spec(layer.params["host"]) == (None, ("batch", "model"))


@check
def given_shards_keep_their_places():
    given = jax.device_put(x(4, 8), NamedSharding(Mesh(jax.devices(), ("d",)), P(None, "d")))
    layer = JaxLayer(lambda params, inputs: inputs @ params, params=given)
    model = keras.Sequential([keras.Input((4,)), layer])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.fit(x(8, 4), x(8, 8), verbose=0)
    assert spec(layer.params) == (None, "d")
    layer.set_variables({"params": np.ones((4, 8), "float32"), "state": None})
    assert spec(layer.params) == (None, "d")
    np.testing.assert_array_equal(given, x(4, 8))


@check
def a_collective_in_init_works_in_traces_too():
    mesh = Mesh(jax.devices(), ("d",))
    total = jax.shard_map(lambda v: jax.lax.psum(v, "d"), mesh=mesh, in_specs=P("d"), out_specs=P())

    def made():
        return JaxLayer(
            lambda params, inputs: inputs * params, lambda rng, inputs: total(jnp.arange(8.0))
        )

    for build in (lambda layer: layer(x(2, 1)), lambda layer: jax.jit(layer)(x(2, 1))):
        layer = made()
        np.testing.assert_allclose(build(layer), 28 * x(2, 1), 1e-6)
        np.testing.assert_array_equal(layer.params.value, [28.0])
    # Inside a distribution, functions see its mesh, and JAX lets them have no other one.
    with ModelParallel(layout_map=LayoutMap(MESH)).scope():
        total = jax.shard_map(
            lambda v: jax.lax.psum(v, "model"), in_specs=P("model"), out_specs=P(None)
        )
        layer = made()
        layer.build((None, 1))
    np.testing.assert_array_equal(layer.params.value, [12.0, 16.0])


@check
def a_divided_layer_is_built_inside_a_trace():
    layer = FlaxLayer(nn.Dense(8), rules={".*/kernel": Rule(layout=(None, "model"))}, seed=0)
    with ModelParallel(layout_map=LayoutMap(MESH)).scope():
        outputs = jax.jit(layer)(x(2, 4))
    np.testing.assert_allclose(outputs, layer(x(2, 4)), 1e-5, 1e-6)
    assert spec(layer.params["params"]["kernel"]) == (None, "model")


@check
def values_of_a_trace_cannot_be_initial_values():
    scopes = (contextlib.nullcontext, ModelParallel(layout_map=LayoutMap(MESH)).scope)
    for scope, use in itertools.product(scopes, (lambda tracer: tracer, lambda tracer: 2 * tracer)):

        def call(outer, use=use):
            layer = JaxLayer(lambda params, inputs: inputs * params, lambda rng, inputs: use(outer))
            return layer(outer)

        with scope(), pytest.raises(ValueError, match=r"built inside a JAX trace.*Build it before"):
            jax.jit(call)(x(2, 1))


# Reports.


class Columns(nn.Module):
    """Columns of one kernel and rows of the other are on different devices."""

    @nn.compact
    def __call__(self, inputs):
        def kernel(*names):
            return nn.with_partitioning(nn.initializers.lecun_normal(), names)

        up = nn.Dense(64, use_bias=False, kernel_init=kernel(None, "model"), name="up")(inputs)
        return nn.Dense(16, use_bias=False, kernel_init=kernel("model", None), name="down")(up)


@check
def a_report_agrees_with_what_is_compiled():
    layer = FlaxLayer(Columns(), name="columns", seed=0)
    report = layer.shard_report(MESH, (8, 32))
    with ModelParallel(layout_map=layer.layout_map(MESH, (8, 32))).scope():
        layer.build((8, 32))
    assert report.bytes_per_device == shards_of(layer), report
    params = {name: part["kernel"].value for name, part in layer.params["params"].items()}
    rows = NamedSharding(MESH.backend_mesh, P("batch", None))
    inputs = jax.device_put(x(8, 32), rows)

    layouts = {name: value.sharding for name, value in params.items()}
    forward = jax.jit(lambda params, x: x @ params["up"] @ params["down"], out_shardings=rows)
    flops = forward.lower(params, inputs).compile().cost_analysis()["flops"]
    assert report.flops_per_device <= flops <= 1.1 * report.flops_per_device, (flops, report)

    def step(params, inputs):
        outputs, backward = jax.vjp(lambda p, x: x @ p["up"] @ p["down"], params, inputs)
        return outputs, backward(outputs)

    step = jax.jit(step, out_shardings=(rows, (layouts, rows)))
    text = step.lower(params, inputs).compile().as_text()
    sent = 0
    for line in text.splitlines():
        if found := re.search(r"= (.*) all-reduce\(.*replica_groups=(\S+)", line):
            sizes = re.findall(r"f32\[([\d,]+)\]", found[1])
            # Either {{0,1,2,3},...} or [groups,size]<=...
            group = re.match(r"\{\{([\d,]+)\}|\[\d+,(\d+)\]", found[2])
            count = len(group[1].split(",")) if group[1] else int(group[2])
            numbers = sum(np.prod([int(n) for n in size.split(",")]) for size in sizes)
            sent += 2 * (count - 1) / count * 4 * numbers
    assert sent == report.gradients + report.partial_sums, (sent, report, text)


def run(function):
    """Return None, or what went wrong."""
    try:
        function()
    except Exception:
        return traceback.format_exc()
    return None


if __name__ == "__main__":
    sys.stdout.write(json.dumps({name: run(function) for name, function in CHECKS.items()}))
