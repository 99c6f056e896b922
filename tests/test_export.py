"""`jaxwrap.export`: files that other processes run, compared with unwrapped JAX."""

import os
import pathlib
import re
import subprocess
import sys
import warnings

import exports
import flax.linen as nn
import jax
import jax.numpy as jnp
import keras
import models
import numpy as np
import pytest
from backends import to_numpy
from exports import MODELS
from models import once_except, x

import jaxwrap
from jaxwrap import FlaxLayer, JaxLayer

pytestmark = [pytest.mark.each_jax, pytest.mark.lowered]


@pytest.fixture(autouse=True)
def _quiet():
    keras.config.disable_interactive_logging()
    yield
    keras.config.enable_interactive_logging()


def read_stablehlo(path):
    return jax.export.deserialize(bytearray(pathlib.Path(path).read_bytes()))


def run_stablehlo(path):
    exported = read_stablehlo(path)
    return lambda name, inputs: np.asarray(exported.call(inputs))


def tf_load(path):
    import tensorflow as tf

    return tf.saved_model.load(str(path))


def run_saved_model(path):
    import tensorflow as tf

    served = tf_load(path)

    def run(name, inputs):
        (named,) = served.signatures["serving_default"](**{name: tf.constant(inputs)}).values()
        np.testing.assert_array_equal(named, served.serve(inputs))
        return named.numpy()

    return run


RUNNERS = {"stablehlo": run_stablehlo, "tf_saved_model": run_saved_model}


@pytest.mark.parametrize("kind", RUNNERS)
@pytest.mark.parametrize("name", once_except(MODELS, ["mixed"]))
def test_one_file_for_any_batch(name, kind, tmp_path):
    row = MODELS[name]
    model = row.make()
    jaxwrap.export(model, tmp_path / "model", kind)
    assert os.listdir(tmp_path) == ["model"]
    run = RUNNERS[kind](tmp_path / "model")
    for batch in (1, 2, 5):
        inputs = row.inputs(batch)
        outputs = run(model.inputs[0].name, inputs)
        np.testing.assert_allclose(outputs, row.native(model, inputs), 1e-4, 1e-4)


def sequence(length):
    return np.arange(2 * length).reshape(2, length).astype("int32") % 11


@pytest.mark.once
@pytest.mark.quick
def test_any_length(tmp_path):
    row = MODELS["transformer block"]
    model = row.make()
    jaxwrap.export(model, tmp_path / "model")
    exported = read_stablehlo(tmp_path / "model")
    assert exported.platforms == ("cpu", "cuda", "tpu")
    for length in (1, 3, 9):
        outputs = exported.call(sequence(length))
        np.testing.assert_allclose(outputs, row.native(model, sequence(length)), 1e-4, 1e-4)


ALONE = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("keras", "jaxwrap", "flax", "tensorflow", "torch"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
import jax, numpy as np
exported = jax.export.deserialize(bytearray(open("model.stablehlo", "rb").read()))
np.save("outputs.npy", exported.call(np.load("inputs.npy")))
"""


@pytest.mark.quick
@pytest.mark.once
def test_jax_and_numpy_alone_run_stablehlo(tmp_path):
    row = MODELS["linen cnn"]
    model = row.make()
    jaxwrap.export(model, tmp_path / "model.stablehlo")
    # JAX 0.10 reads no newer version.
    assert b"StableHLO_v1.9.0" in (tmp_path / "model.stablehlo").read_bytes()
    np.save(tmp_path / "inputs.npy", row.inputs(3))
    subprocess.run([sys.executable, "-c", ALONE], cwd=tmp_path, check=True)
    outputs = np.load(tmp_path / "outputs.npy")
    np.testing.assert_allclose(outputs, row.native(model, row.inputs(3)), 1e-4, 1e-4)


@pytest.mark.once
@pytest.mark.quick
@pytest.mark.parametrize("name", ["linen cnn", "equinox mlp"])
def test_weights_as_arguments(name, tmp_path):
    """One file serves every checkpoint, those with weights that nothing depends on too."""
    row = MODELS[name]
    model, inputs = row.make(), row.inputs(2)
    jaxwrap.export(model, tmp_path / "model", keep_params=True)
    exported = read_stablehlo(tmp_path / "model")
    for scale in (1, 2):
        model.set_weights([weight * scale for weight in model.get_weights()])
        jaxwrap.checkpoints.save(model, tmp_path / "weights.npz")
        with np.load(tmp_path / "weights.npz") as weights:
            outputs = exported.call(dict(weights), inputs)
        np.testing.assert_allclose(outputs, to_numpy(model(inputs)), 1e-4, 1e-4)
    assert len((tmp_path / "model").read_bytes()) < 30_000


@pytest.mark.once
@pytest.mark.quick
@pytest.mark.parametrize("name", ["linen cnn", "transformer block"])
def test_no_random_numbers(name, tmp_path):
    jaxwrap.export(MODELS[name].make(), tmp_path / "model", check=False)
    text = read_stablehlo(tmp_path / "model").mlir_module()
    assert not re.search("threefry|random_bits|rng_bit|xor", text)


def nested(left, right):
    return {"sum": left["a"] + right, "pair": (left["a"] * 2, left["b"].sum(-1))}


@pytest.mark.quick
def test_nests_keep_their_structure_and_names(tmp_path):
    layer = JaxLayer(nested, call_arguments=("left", "right"))
    left, right = {"a": x(2, 4), "b": x(2, 3, seed=1)}, x(2, 4, seed=2)
    layer(left, right)
    jaxwrap.export(layer, tmp_path / "model")
    outputs = read_stablehlo(tmp_path / "model").call(left, right)
    expected = nested(left, right)
    assert jax.tree.structure(outputs) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_allclose, outputs, expected)


@pytest.mark.once
def test_names_in_a_saved_model(tmp_path):
    import tensorflow as tf

    layer = JaxLayer(nested, call_arguments=("left", "right"))
    left, right = {"a": x(2, 4), "b": x(2, 3, seed=1)}, x(2, 4, seed=2)
    layer(left, right)
    jaxwrap.export(layer, tmp_path / "model", "tf_saved_model")
    served = tf.saved_model.load(str(tmp_path / "model"))
    outputs = served.signatures["serving_default"](left_a=left["a"], left_b=left["b"], right=right)
    assert set(outputs) == {"sum", "pair_0", "pair_1"}
    np.testing.assert_allclose(outputs["sum"], left["a"] + right)
    np.testing.assert_allclose(served.serve(left, right)["pair"][1], left["b"].sum(-1), 1e-6)


@pytest.mark.once
@pytest.mark.quick
def test_a_fixed_batch_size(tmp_path):
    jaxwrap.export(MODELS["equinox mlp"].make(), tmp_path / "model", batch_size=2)
    assert read_stablehlo(tmp_path / "model").in_avals[0].shape == (2, 4)


@keras.saving.register_keras_serializable("tests")
class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.layer = JaxLayer(models.norm_call, models.norm_init)
        self.counter = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def call(self, left, right):
        self.counter.assign_add(1.0)
        return {"sum": self.layer(left) + right, "count": self.counter + 0}


@pytest.mark.only("jax")
def test_a_subclassed_model_and_its_state(tmp_path):
    import tensorflow as tf

    model = Subclassed()
    with pytest.raises(ValueError, match="no weights yet"):
        jaxwrap.export(model, tmp_path / "model", "tf_saved_model")
    expected = model(x(3, 4), x(3, 4))
    with pytest.raises(ValueError, match="input_signature"):
        jaxwrap.export(model, tmp_path / "model", "tf_saved_model")
    spec = keras.InputSpec(shape=(None, 4))
    jaxwrap.export(model, tmp_path / "model", "tf_saved_model", input_signature=[spec, spec])
    served = tf.saved_model.load(str(tmp_path / "model"))
    for count in (2, 3):  # what a call changes stays changed, as in the model
        outputs = served.serve(x(3, 4), x(3, 4))
        np.testing.assert_allclose(outputs["sum"], expected["sum"], 1e-5, 1e-5)
        assert outputs["count"].numpy() == count
    assert float(model.counter.value) == 1
    with pytest.warns(UserWarning, match="inference reads and changes"):
        jaxwrap.export(model, tmp_path / "one", input_signature=[spec, spec])
    assert float(read_stablehlo(tmp_path / "one").call(x(3, 4), x(3, 4))["count"]) == 2


def counted(params, state, inputs):
    return inputs * params["scale"] + state["count"], {"count": state["count"] + 1}


def test_one_layer_and_its_state(tmp_path):
    import tensorflow as tf

    layer = JaxLayer(
        counted,
        params={"scale": np.full(4, 2, "float32"), "unused": np.zeros(3, "float32")},
        state={"count": np.float32(0)},
        update_state_in_inference=True,
    )
    model = keras.Sequential([keras.Input((4,)), layer])
    jaxwrap.export(model, tmp_path / "model", "tf_saved_model")
    served = tf.saved_model.load(str(tmp_path / "model"))
    for count in range(3):
        np.testing.assert_allclose(served.serve(x(3, 4)), 2 * x(3, 4) + count, 1e-6)


# What is refused.


def with_lapack(inputs):
    return jnp.linalg.eigh(inputs @ jnp.swapaxes(inputs, -1, -2))[0]


REFUSED = {
    "stablehlo": (exports.with_callback, "`pure_callback` in `with_callback`"),
    "tf_saved_model": (with_lapack, "`eigh` in `with_lapack`"),
}


@pytest.mark.once
@pytest.mark.quick
@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_format_cannot_hold(kind, tmp_path):
    function, message = REFUSED[kind]
    model = keras.Sequential([keras.Input((3, 3), 2), JaxLayer(function)])
    with pytest.raises(NotImplementedError, match=message):
        jaxwrap.export(model, tmp_path / "model", kind)
    assert not os.listdir(tmp_path)


@pytest.mark.once
@pytest.mark.quick
def test_lapack_in_stablehlo(tmp_path):
    model = keras.Sequential([keras.Input((3, 3), 2), JaxLayer(with_lapack)])
    jaxwrap.export(model, tmp_path / "model")
    outputs = read_stablehlo(tmp_path / "model").call(x(2, 3, 3))
    np.testing.assert_allclose(outputs, with_lapack(x(2, 3, 3)), 1e-4, 1e-4)


BAD = {
    "format": ({"format": "pickle"}, "'stablehlo', 'tf_saved_model'"),
    "keep_params": ({"format": "tf_saved_model", "keep_params": True}, "keep_params"),
    "modules": ({"modules": "mine"}, "list of names"),
    "batch_size": ({"batch_size": 0}, "positive integer"),
}


@pytest.mark.once
@pytest.mark.quick
@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name, tmp_path):
    options, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        jaxwrap.export(MODELS["equinox mlp"].make(), tmp_path / "model", **options)


@pytest.mark.once
@pytest.mark.quick
def test_a_file_that_is_off_is_not_kept(tmp_path, monkeypatch):
    from jaxwrap._export import _stablehlo

    model = MODELS["equinox mlp"].make()
    (tmp_path / "model").write_text("the one before")
    for change, message in (
        (lambda output: output + 0.1, "'.*' of what was written as 'stablehlo' is off by 0.1 from"),
        (lambda output: output * np.nan, "is NaN in 6 of 6 places"),
        (lambda output: output[:1], "has the shape"),
    ):
        load = _stablehlo.load

        def wrong(path, ports, load=load, change=change):
            run = load(path, ports)
            return lambda inputs: [change(output) for output in run(inputs)]

        with monkeypatch.context() as patch:
            patch.setattr(_stablehlo, "load", wrong)
            with pytest.raises(ValueError, match=message):
                jaxwrap.export(model, tmp_path / "model")
            jaxwrap.export(model, tmp_path / "unchecked", check=False)
    assert (tmp_path / "model").read_text() == "the one before"
    assert sorted(os.listdir(tmp_path)) == ["model", "unchecked"]


@pytest.mark.once
@pytest.mark.quick
def test_a_missing_runtime_is_said(tmp_path, monkeypatch):
    from jaxwrap._export import FORMATS

    monkeypatch.setitem(FORMATS, "stablehlo", FORMATS["stablehlo"]._replace(runtime="not_there"))
    with pytest.warns(UserWarning, match="not checked, since not_there"):
        jaxwrap.export(MODELS["equinox mlp"].make(), tmp_path / "model")
    assert (tmp_path / "model").exists()


@pytest.mark.once
@pytest.mark.quick
def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch):
    from jaxwrap._export import _stablehlo

    def interrupted(inference, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(_stablehlo, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        jaxwrap.export(MODELS["equinox mlp"].make(), tmp_path / "model")
    assert not os.listdir(tmp_path)


@pytest.mark.quick
@pytest.mark.only("tensorflow", "torch", "numpy")
def test_classes_of_main_are_refused_early(tmp_path, monkeypatch):
    monkeypatch.setattr(exports.Pooled, "__module__", "__main__")
    inputs = keras.Input((8, 8, 2))
    model = keras.Model(inputs, keras.layers.Dense(2)(FlaxLayer(exports.Pooled())(inputs)))
    with pytest.raises(ValueError, match="exports>Pooled from `__main__`"):
        jaxwrap.export(model, tmp_path / "model")
    assert not os.listdir(tmp_path)


@pytest.mark.only("torch")
def test_errors_of_the_other_process(tmp_path):
    inputs = keras.Input((3, 3), 2)
    layer = JaxLayer(exports.with_callback)
    model = keras.Model(inputs, keras.layers.Dense(2)(layer(inputs)))
    with pytest.raises(NotImplementedError, match="`pure_callback` in `with_callback`"):
        jaxwrap.export(model, tmp_path / "model")
    assert not os.listdir(tmp_path)


@pytest.mark.only("torch")
def test_the_other_process_imports_what_registers_classes(tmp_path):
    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.layers.Dense(2)(JaxLayer(jax.scipy.special.i0e)(inputs)))
    jaxwrap.export(model, tmp_path / "model", modules=["exports"], keep_params=True)
    jaxwrap.checkpoints.save(model, tmp_path / "weights.npz")
    with np.load(tmp_path / "weights.npz") as weights:
        outputs = read_stablehlo(tmp_path / "model").call(dict(weights), x(3, 4))
    np.testing.assert_allclose(outputs, to_numpy(model(x(3, 4))), 1e-4, 1e-4)


@pytest.mark.quick
@pytest.mark.only("torch")
@pytest.mark.parametrize("way", ["model.export", "torch.export", "torch.jit.trace", "function"])
def test_exports_of_pytorch_name_ours(way, tmp_path):
    import torch

    model = MODELS["mixed"].make()
    inputs = torch.ones(2, 4)
    model(inputs)
    ways = {
        "model.export": lambda: model.export(tmp_path / "model.onnx", format="onnx"),
        "torch.export": lambda: torch.export.export(model, (inputs,)),
        "torch.jit.trace": lambda: torch.jit.trace(model, (inputs,)),
        "function": lambda: torch.jit.trace(jaxwrap.wrap_function(jnp.sin), (inputs,)),
    }
    with pytest.raises(NotImplementedError, match=r"`jaxwrap\.export\(model, path, format="):
        ways[way]()
    model(inputs)


# int8, LoRA.


@pytest.mark.parametrize("kind", RUNNERS)
def test_int8_stays_int8(kind, tmp_path):
    def size(path):
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        return sum(file.stat().st_size for file in files)

    layer = FlaxLayer(nn.Dense(512))
    model = keras.Sequential([keras.Input((512,), name="rows"), layer])
    jaxwrap.export(model, tmp_path / "float", kind)
    layer.quantize("int8")
    jaxwrap.export(model, tmp_path / "int8", kind)
    assert size(tmp_path / "int8") < 0.3 * size(tmp_path / "float")
    outputs = RUNNERS[kind](tmp_path / "int8")("rows", x(3, 512))
    np.testing.assert_allclose(outputs, to_numpy(model(x(3, 512))), 1e-4, 1e-4)


def test_lora_as_it_is(tmp_path):
    rule = jaxwrap.Rule(reparametrize=jaxwrap.reparametrizations.LoRA(2))
    layer = FlaxLayer(nn.Dense(3), rules={".*/kernel": rule})
    model = keras.Sequential([keras.Input((4,)), layer])
    model.set_weights([weight + 0.5 for weight in model.get_weights()])
    jaxwrap.export(model, tmp_path / "model")
    outputs = read_stablehlo(tmp_path / "model").call(x(3, 4))
    np.testing.assert_allclose(outputs, to_numpy(model(x(3, 4))), 1e-4, 1e-4)


@pytest.mark.only("tensorflow")
def test_int8_in_what_keras_exports(tmp_path):
    inputs = keras.Input((256,), name="rows")
    model = keras.Model(inputs, FlaxLayer(nn.Dense(256))(inputs))
    sizes = []
    for mode in (None, "int8"):
        if mode:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Layer InputLayer does not have")
                model.quantize(mode)
        model(x(3, 256))
        path = tmp_path / str(mode)
        model.export(path, format="tf_saved_model", verbose=False)
        sizes.append((path / "variables" / "variables.data-00000-of-00001").stat().st_size)
    assert sizes[1] < 0.3 * sizes[0]
    served = tf_load(tmp_path / "int8")
    np.testing.assert_allclose(served.serve(x(3, 256)), model(x(3, 256)), 1e-4, 1e-4)


@pytest.mark.once
@pytest.mark.parametrize("kind", RUNNERS)
def test_several_unknown_sizes(kind, tmp_path):
    layer = FlaxLayer(nn.Conv(3, (3, 3), strides=2))
    inputs = keras.Input((None, None, 2), name="image")
    model = keras.Model(inputs, layer(inputs))
    jaxwrap.export(model, tmp_path / "model", kind)
    run = RUNNERS[kind](tmp_path / "model")
    for shape in ((1, 5, 8, 2), (3, 9, 4, 2)):
        outputs = run("image", x(*shape))
        expected = nn.Conv(3, (3, 3), strides=2).apply(layer.get_variables(), x(*shape))
        np.testing.assert_allclose(outputs, expected, 1e-4, 1e-4)


@pytest.mark.once
@pytest.mark.quick
def test_mixed_precision(tmp_path):
    layer = FlaxLayer(nn.Dense(3, dtype=jnp.bfloat16), dtype="mixed_bfloat16")
    model = keras.Sequential([keras.Input((4,)), layer])
    jaxwrap.export(model, tmp_path / "model")
    exported = read_stablehlo(tmp_path / "model")
    assert exported.out_avals[0].dtype == jnp.bfloat16
    expected = layer.adapter.module.apply(layer.get_variables(), jnp.asarray(x(2, 4), "bfloat16"))
    outputs = exported.call(x(2, 4))
    np.testing.assert_allclose(*(np.asarray(y, "float32") for y in (outputs, expected)), 2e-2, 2e-2)
