"""Layouts on several devices: names of axes in models, rules, layout maps, reports."""

import json
import pathlib
import subprocess
import sys

import flax.linen as nn
import flax.serialization
import jax
import keras
import numpy as np
import pytest
from backends import to_numpy
from flax import nnx
from flax.core import meta
from models import x

import jaxwrap
from jaxwrap import FlaxLayer, NNXLayer, Rule, reparametrizations

pytestmark = pytest.mark.each_jax


@jaxwrap.register_serializable("sharding")
class Block(nn.Module):
    @nn.compact
    def __call__(self, carry, _):
        init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
        return nn.Dense(8, kernel_init=init, use_bias=False, name="one")(carry), None


@jaxwrap.register_serializable("sharding")
class Boxed(nn.Module):
    """Names of the axes of a kernel, of a running mean, and of the layers of a scan."""

    @nn.compact
    def __call__(self, inputs, training=False):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
        hidden = nn.Dense(8, kernel_init=init, name="up")(inputs)

        def make_mean(shape):
            return nn.LogicallyPartitioned(jax.numpy.zeros(shape), ("mlp",))

        mean = self.variable("stats", "mean", make_mean, (8,))
        if training:
            mean.value = 0.9 * mean.value + 0.1 * hidden.mean(0)
        stack = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
            metadata_params={meta.PARTITION_NAME: "layers"},
        )
        return stack(name="blocks")(hidden - mean.value, None)[0]


def boxed(**kwargs):
    return FlaxLayer(Boxed(), name="boxed", seed=0, **kwargs)


def native():
    return Boxed().init(jax.random.key(1), x(4, 3))


@pytest.mark.quick
def test_boxes_of_flax_are_no_part_of_paths():
    layer = boxed()
    layer(x(4, 3))
    paths = {v.path for v in layer.variables if "seed" not in v.path}
    below = ["params/blocks/one/kernel", "params/up/bias", "params/up/kernel", "stats/mean"]
    assert paths == {f"boxed/{path}" for path in below}
    values = layer.get_variables()
    assert not any(
        meta.is_axis_metadata(leaf)
        for leaf in jax.tree.leaves(values, is_leaf=meta.is_axis_metadata)
    )
    outputs, changed = Boxed().apply(values, x(4, 3), training=True, mutable="stats")
    np.testing.assert_allclose(to_numpy(layer(x(4, 3), training=True)), outputs, 1e-5, 1e-6)
    np.testing.assert_allclose(
        layer.get_variables()["stats"]["mean"], changed["stats"]["mean"], 1e-5, 1e-6
    )


@pytest.mark.parametrize("form", ["boxed", "plain"])
def test_values_load_with_boxes_and_without(form, tmp_path):
    variables = native() if form == "boxed" else meta.unbox(native())
    expected = Boxed().apply(variables, x(4, 3))
    file = tmp_path / "variables.msgpack"
    file.write_bytes(flax.serialization.to_bytes(variables))
    layers = [boxed(variables=variables), boxed(), boxed()]
    for layer in layers[1:]:
        layer(x(4, 3))
    layers[1].set_variables(variables)
    jaxwrap.checkpoints.load(layers[2], file)
    for layer in layers:
        np.testing.assert_allclose(to_numpy(layer(x(4, 3))), expected, 1e-5, 1e-6)


@pytest.mark.trains
def test_a_module_with_boxes_trains_and_is_saved(tmp_path):
    model = keras.Sequential([keras.Input((3,)), boxed()])
    model.compile("sgd", "mse")
    model.fit(x(8, 3), x(8, 8), verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    expected = model.predict(x(4, 3), verbose=0)
    np.testing.assert_allclose(again.predict(x(4, 3), verbose=0), expected, 1e-5, 1e-6)


class Annotated(nnx.Module):
    def __init__(self, rngs):
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"))
        self.up = nnx.Linear(3, 8, kernel_init=init, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, inputs):
        return self.drop(self.up(inputs))


@pytest.mark.parametrize("made", ["instance", "factory"])
def test_nnx_metadata_needs_no_mesh_and_comes_back(made):
    if made == "factory":
        layer = NNXLayer.from_factory(Annotated, name="annotated")
    else:
        with nnx.use_eager_sharding(False):
            layer = NNXLayer(Annotated(nnx.Rngs(0)), name="annotated")
    layer(x(4, 3), training=True)
    with nnx.use_eager_sharding(True):
        module = layer.module_with_weights()
    assert module.up.kernel.get_metadata("out_sharding") == (None, "model")
    module.eval()
    np.testing.assert_allclose(module(x(4, 3)), to_numpy(layer(x(4, 3))), 1e-5, 1e-6)


# Layout maps, which are metadata on every backend.


def mesh(*sizes, names=("data", "model")):
    devices = [f"cpu:{number}" for number in range(int(np.prod(sizes)))]
    return keras.distribution.DeviceMesh(sizes, names, devices=devices)


def axes_in(layouts):
    return {path.replace("\\", ""): layout.axes for path, layout in layouts.items()}


MEANINGS = (("mlp", "model"), ("embed", None), ("layers", None))
OF_BOXES = {
    "boxed/params/blocks/one/kernel": (None, None, "model"),
    "boxed/params/up/kernel": (None, "model"),
    "boxed/stats/mean": ("model",),
}


@pytest.mark.quick
@pytest.mark.parametrize("built", [True, False])
def test_layouts_come_from_the_names_in_a_module(built):
    layer = boxed()
    shape = (None, 3)
    if built:
        layer(x(4, 3))
        shape = None
    layouts = layer.layout_map(mesh(2, 4), shape, axes=MEANINGS)
    assert isinstance(layouts, keras.distribution.LayoutMap)
    assert axes_in(layouts) == OF_BOXES
    assert layer.built is built
    # One exact path: an optimizer's state of the same name has no layout.
    assert layouts["adam/boxed/params/up/kernel"] is None


def test_pretrained_plain_values_have_the_names_of_the_module():
    layer = boxed(variables=meta.unbox(native()))
    assert axes_in(layer.layout_map(mesh(2, 4), (None, 3), axes=MEANINGS)) == OF_BOXES


def test_a_rule_counts_more_than_a_name():
    rules = {
        "params/up/kernel": Rule(layout=("model", None)),
        "params/up/bias": Rule(layout=[["data", "model"]]),
        "stats/.*": Rule(layout=(None,)),
    }
    layer = FlaxLayer(nn.Dense(8), rules={"params/kernel": Rule(layout=("model", None))}, name="d")
    assert axes_in(layer.layout_map(mesh(2, 4), (None, 4))) == {"d/params/kernel": ("model", None)}
    layer = boxed(rules=rules)
    with pytest.raises(ValueError, match=r"up/kernel, of shape \(3, 8\).*data=2, model=4.*divide"):
        layer.layout_map(mesh(2, 4), (None, 3), axes=MEANINGS)
    layouts = axes_in(layer.layout_map(mesh(2, 4), (None, 4), axes=MEANINGS))
    assert layouts == {
        "boxed/params/blocks/one/kernel": (None, None, "model"),
        "boxed/params/up/kernel": ("model", None),
        "boxed/params/up/bias": (("data", "model"),),
    }


def test_the_first_free_meaning_of_a_name_counts():
    meanings = [("mlp", "data"), ("embed", "data"), ("embed", "model"), ("layers", None)]
    layer = boxed()
    layouts = axes_in(layer.layout_map(mesh(2, 4), (None, 3), axes=meanings))
    assert layouts["boxed/params/blocks/one/kernel"] == (None, "model", "data")
    layouts = layer.layout_map(mesh(2, 4), (None, 3), dict(MEANINGS) | {"mlp": ("data", "model")})
    assert layouts["boxed/stats/mean"].axes == (("data", "model"),)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("layout", "problem"),
    [
        (("model",), "expected an entry for each of its 2 axes, received 1"),
        ((None, "tensor"), "no axis 'tensor'"),
        (("model", None), "3 does not divide by the 4 devices"),
        ((None, ("data", "model")), "12 does not divide by the 8 devices"),
        ((None, ("model", "model")), "'model' twice"),
    ],
)
def test_a_layout_that_does_not_fit_names_leaf_shape_and_mesh(layout, problem):
    layer = FlaxLayer(nn.Dense(12), rules={"params/kernel": Rule(layout=layout)}, name="dense")
    with pytest.raises(ValueError, match="params/kernel, of shape") as error:
        layer.layout_map(mesh(2, 4), (None, 3))
    assert problem in str(error.value)
    assert "(3, 12)" in str(error.value)
    assert "data=2, model=4" in str(error.value)


def test_names_that_do_not_fit_say_what_to_do():
    layer = boxed()
    with pytest.raises(ValueError, match=r"no axis 'embed'.*axes=\(\('embed', None\), ...\)"):
        layer.layout_map(mesh(2, 4), (None, 3), axes=MEANINGS[:1] + MEANINGS[2:])
    with pytest.raises(ValueError, match=r"add \('embed', None\) to `axes`"):
        layer.layout_map(mesh(2, 4), (None, 3), [("mlp", "model"), ("embed", "model"), MEANINGS[2]])
    with pytest.raises(ValueError, match=r"has not been built.*Pass `input_shape`"):
        layer.layout_map(mesh(2, 4))
    with pytest.raises(TypeError, match="must be a `keras"):
        layer.layout_map({"model": 4}, (None, 3))
    with pytest.raises(TypeError, match="`axes` must be pairs"):
        layer.layout_map(mesh(2, 4), (None, 3), axes="mlp")
    layer = FlaxLayer(nn.Dense(8), rules={"params/kernel": Rule(layout=("model",))})
    with pytest.raises(ValueError, match="an entry for each of its 2 axes, received 1"):
        layer.build((None, 3))
    assert layer.weights == []
    with pytest.raises(TypeError, match=r"Rule: `layout` must be a tuple"):
        Rule(layout="model")


@pytest.mark.quick
def test_a_layout_map_allocates_nothing():
    """Of a model of terabytes, with integers for inputs."""

    class Large(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            return nn.Dense(2**21)(nn.Embed(2**20, 2**20)(tokens))

    layer = FlaxLayer(
        Large(), rules={".*/(kernel|embedding)": Rule(layout=(None, "model"))}, name="l"
    )
    layouts = layer.layout_map(mesh(2, 4), keras.KerasTensor((None, 3), "int32"))
    assert layouts["l/params/Embed_0/embedding"].axes == (None, "model")
    assert len(layouts) == 2


def test_parts_have_the_layout_of_their_leaf():
    lora = reparametrizations.LoRA(2, base=reparametrizations.Int8())
    rule = Rule(layout=("data", "model"), reparametrize=lora)
    layer = FlaxLayer(nn.Dense(8), rules={".*/kernel": rule}, name="d")
    for shape in ((None, 4), None):
        assert axes_in(layer.layout_map(mesh(2, 4), shape)) == {
            "d/params/kernel/base/values": ("data", "model"),
            "d/params/kernel/base/scale": (None, "model"),
            "d/params/kernel/a": ("data", None),
            "d/params/kernel/b": (None, "model"),
        }
        layer.build((None, 4))


def test_nnx_names_become_layouts():
    layer = NNXLayer.from_factory(Annotated, name="annotated")
    layouts = layer.layout_map(mesh(2, 4), (None, 3))
    assert axes_in(layouts) == {"annotated/params/up/kernel": (None, "model")}


def test_rules_with_layouts_are_saved_and_listed():
    layer = FlaxLayer(
        nn.Dense(8), rules={".*/kernel": Rule(layout=(None, ("data", "model")))}, name="d"
    )
    again = FlaxLayer.from_config(layer.get_config())
    again.build((None, 4))
    table = again.weight_table()
    assert [row.layout for row in table] == [None, (None, ("data", "model"))]
    assert "layout" in str(table)
    assert "(None, ('data', 'model'))" in str(table)
    layer = FlaxLayer(nn.Dense(8), name="d")
    layer.build((None, 4))
    assert "layout" not in str(layer.weight_table())


# Reports.


@pytest.mark.quick
@pytest.mark.parametrize("built", [True, False])
def test_a_report_counts_what_the_formulae_say(built):
    """A layer with rows of one kernel and columns of the other on four devices, and a batch on two."""

    class MLP(nn.Module):
        @nn.compact
        def __call__(self, inputs):
            up = nn.Dense(32, use_bias=False, name="up")(inputs)
            return nn.Dense(16, use_bias=False, name="down")(nn.relu(up))

    rules = {
        "params/up/.*": Rule(layout=(None, "model")),
        "params/down/.*": Rule(layout=("model", None)),
    }
    layer = FlaxLayer(MLP(), rules=rules, name="mlp")
    if built:
        layer.build((None, 8))
    report = layer.shard_report({"batch": 2, "model": 4}, (6, 8))
    assert [row.bytes for row in report.rows] == [32 * 16 * 4, 8 * 32 * 4]
    assert report.bytes_per_device == report.bytes / 4 == (8 * 32 + 32 * 16)
    assert report.flops == 2 * 6 * (8 * 32 + 32 * 16)
    assert report.flops_per_device == report.flops / 8
    assert report.gathered == 0
    # A gradient of each weight over 2 devices; sums over 4 of the output, and of the gradient of the input.
    assert report.gradients == 2 * (1 / 2) * report.bytes_per_device
    assert report.partial_sums == 2 * (3 / 4) * (6 / 2) * (16 + 8) * 4
    lines = str(report).splitlines()
    assert "mesh: batch=2, model=4 (8 devices); inputs: (6, 8)" in lines
    assert layer.built is built


def test_a_report_gathers_weights_that_the_data_axes_divide():
    rules = {".*/kernel": Rule(layout=("fsdp", None))}
    layer = FlaxLayer(nn.Dense(32, use_bias=False), rules=rules, name="dense")
    axes = (("batch", ("data", "fsdp")),)
    report = layer.shard_report(
        jax.sharding.AbstractMesh((2, 4), ("data", "fsdp")), (None, 8), axes
    )
    size = 8 * 32 * 4
    assert (report.bytes, report.bytes_per_device) == (size, size / 4)
    assert report.batch == (8, 8)
    assert report.flops_per_device == 2 * 8 * 32
    assert report.gathered == 2 * (3 / 4) * size
    assert report.gradients == (3 / 4) * size + 2 * (1 / 2) * size / 4
    assert report.partial_sums == 0
    layer.trainable = False
    report = layer.shard_report(mesh(2, 4, names=("data", "fsdp")), (None, 8), axes)
    assert (report.gathered, report.gradients) == ((3 / 4) * size, 0)


class Attention(nn.Module):
    """A block of a transformer, in a scan."""

    @nn.compact
    def __call__(self, hidden, _):
        def dense(features, names, name):
            init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), names)
            return nn.Dense(features, use_bias=False, kernel_init=init, name=name)

        width = hidden.shape[-1]
        parts = [dense(width, ("embed", "heads"), name)(hidden) for name in "qkv"]
        heads = [part.reshape(*part.shape[:-1], 8, width // 8) for part in parts]
        mixed = jax.nn.dot_product_attention(*heads).reshape(hidden.shape)
        hidden += dense(width, ("heads", "embed"), "o")(nn.Dropout(0.1, deterministic=False)(mixed))
        up = nn.silu(dense(4 * width, ("embed", "mlp"), "up")(hidden))
        return hidden + dense(width, ("mlp", "embed"), "down")(up), None


class Transformer(nn.Module):
    width: int
    depth: int

    @nn.compact
    def __call__(self, tokens):
        init = nn.with_logical_partitioning(nn.initializers.normal(), ("vocab", "embed"))
        embed = nn.Embed(1024, self.width, embedding_init=init, name="embed")
        blocks = nn.scan(
            Attention,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=self.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        hidden, _ = blocks(name="blocks")(embed(tokens), None)
        return embed.attend(hidden)


def test_a_report_plans_more_than_this_machine_holds():
    """A transformer of 81 billion parameters on 256 devices: operations divide evenly, products of heads included."""
    layer = FlaxLayer(Transformer(8192, 100), name="large")
    meanings = [("embed", "data"), ("vocab", "model"), ("heads", "model"), ("mlp", "model")]
    tokens = keras.KerasTensor((64, 128), "int32")
    report = layer.shard_report(
        {"data": 32, "model": 8}, tokens, [*meanings, ("layers", None), ("batch", "data")]
    )
    weights = 100 * (4 + 8) * 8192**2
    assert report.bytes == 4 * (weights + 1024 * 8192)
    assert report.bytes_per_device == report.bytes / 256
    attention = 100 * 2 * 2 * 64 * 128 * 128 * 8192
    assert report.flops == 2 * 64 * 128 * (weights + 1024 * 8192) + attention
    assert report.flops_per_device == report.flops / 256


def test_a_report_counts_convolutions():
    class Cnn(nn.Module):
        @nn.compact
        def __call__(self, images):
            return nn.Conv(12, (3, 3), use_bias=False)(images).mean((1, 2))

    layer = FlaxLayer(Cnn(), rules={".*/kernel": Rule(layout=(None, None, None, "model"))})
    report = layer.shard_report({"batch": 2, "model": 4}, (4, 8, 8, 3))
    assert report.flops == 2 * (4 * 8 * 8) * (3 * 3 * 3 * 12)
    assert report.flops_per_device == report.flops / 8


def test_a_report_says_what_it_needs():
    layer = FlaxLayer(nn.Dense(8), name="dense")
    with pytest.raises(TypeError, match="a dict of the sizes of its axes; received 8"):
        layer.shard_report(8, (None, 3))
    with pytest.raises(ValueError, match=r"dense.*has not been built.*Pass `input_shape`"):
        layer.shard_report({"batch": 8})


# On eight virtual devices, in a process of their own.

SCRIPT = pathlib.Path(__file__).parent / "helpers" / "sharding_script.py"
CHECKS = [
    "data and model parallel fit is equal to one device",
    "a rule counts more than a layout map",
    "a map of the layer holds where a model builds it",
    "a rule for an axis that the mesh lacks raises",
    "parts are divided as their leaf",
    "parts that come later are divided as their leaf was",
    "a saved model comes back divided",
    "initial values are made in their places",
    "initial values are those of one device",
    "given values go to their places and stay the user s",
    "given shards keep their places",
    "a collective in init works in traces too",
    "a divided layer is built inside a trace",
    "values of a trace cannot be initial values",
    "a report agrees with what is compiled",
]


@pytest.fixture(scope="module")
def results():
    run = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.only("jax")
def test_all_checks_run(results):
    assert list(results) == CHECKS


@pytest.mark.only("jax")
@pytest.mark.parametrize("name", CHECKS)
def test_on_eight_devices(results, name):
    assert results[name] is None, results[name]
