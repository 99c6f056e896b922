"""`jaxwrap.export` to LiteRT and ONNX, which converters write: in their runtimes, compared with unwrapped JAX."""

import os

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from backends import to_numpy
from exports import MODELS
from flax import linen as nn
from jax import lax
from jax.extend.core import jaxpr_as_fun
from models import x

import jaxwrap
from jaxwrap import FlaxLayer, JaxLayer
from jaxwrap._export import _litert_rules, _onnx_rules
from jaxwrap._export._rewriting import rewrite

pytestmark = [pytest.mark.each_jax, pytest.mark.lowered]


@pytest.fixture(autouse=True)
def _quiet():
    keras.config.disable_interactive_logging()
    yield
    keras.config.enable_interactive_logging()


def run_litert(path):
    from ai_edge_litert.interpreter import Interpreter

    return Interpreter(str(path)).get_signature_runner("serving_default")


def run_onnx(path):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path))
    names = [output.name for output in session.get_outputs()]
    return lambda **inputs: dict(zip(names, session.run(None, inputs), strict=True))


RUNNERS = {"litert": run_litert, "onnx": run_onnx}


# The converters see the same function on every backend.
@pytest.mark.parametrize("kind", RUNNERS)
@pytest.mark.parametrize(
    "name",
    [name if name == "mixed" else pytest.param(name, marks=pytest.mark.once) for name in MODELS],
)
def test_one_file_for_any_batch(name, kind, tmp_path, capfd):
    row = MODELS[name]
    model = row.make()
    jaxwrap.export(model, tmp_path / "model", kind)
    assert os.listdir(tmp_path) == ["model"]
    assert capfd.readouterr() == ("", "")
    run = RUNNERS[kind](tmp_path / "model")
    for batch in (1, 2, 5):
        inputs = row.inputs(batch)
        (outputs,) = run(**{model.inputs[0].name: inputs}).values()
        np.testing.assert_allclose(outputs, row.native(model, inputs), 1e-4, 1e-4)


@pytest.mark.only("jax")
@pytest.mark.parametrize("kind", RUNNERS)
def test_int8_stays_int8(kind, tmp_path):
    layer = FlaxLayer(nn.Dense(512))
    model = keras.Sequential([keras.Input((512,), name="rows"), layer])
    layer.quantize("int8")
    jaxwrap.export(model, tmp_path / "int8", kind)
    assert (tmp_path / "int8").stat().st_size < 0.3 * 4 * 512 * 512  # bytes of the float kernel
    (outputs,) = RUNNERS[kind](tmp_path / "int8")(rows=x(3, 512)).values()
    np.testing.assert_allclose(outputs, to_numpy(model(x(3, 512))), 1e-4, 1e-4)


def nested(left, right):
    twice = left["a"] * 2
    return {"sum": twice + right, "pair": (twice, left["b"].sum(-1)), "again": twice, "same": right}


NESTED = {"left_a": x(2, 4), "left_b": x(2, 3, seed=1), "right": x(2, 4, seed=2)}


def built():
    layer = JaxLayer(nested, call_arguments=("left", "right"))
    layer({"a": NESTED["left_a"], "b": NESTED["left_b"]}, NESTED["right"])
    return layer


@pytest.mark.once
@pytest.mark.only("jax")
@pytest.mark.parametrize("kind", RUNNERS)
def test_outputs_have_names(kind, tmp_path):
    """Also one that is an input, and two that are one tensor."""
    jaxwrap.export(built(), tmp_path / "model", kind, batch_size=2)
    outputs = RUNNERS[kind](tmp_path / "model")(**NESTED)
    left = {"a": NESTED["left_a"], "b": NESTED["left_b"]}
    expected = nested(left, NESTED["right"])
    assert set(outputs) == {"again", "pair_0", "pair_1", "same", "sum"}
    for name in ("again", "same", "sum"):
        np.testing.assert_allclose(outputs[name], expected[name], 1e-5, 1e-5)
    np.testing.assert_allclose(outputs["pair_0"], expected["pair"][0], 1e-5, 1e-5)
    np.testing.assert_allclose(outputs["pair_1"], expected["pair"][1], 1e-5, 1e-5)


@pytest.mark.once
@pytest.mark.only("jax")
def test_onnx_keeps_the_order(tmp_path):
    import onnxruntime

    jaxwrap.export(built(), tmp_path / "model", "onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model"))
    assert [port.name for port in session.get_inputs()] == ["left_a", "left_b", "right"]
    names = [port.name for port in session.get_outputs()]
    assert names == ["again", "pair_0", "pair_1", "same", "sum"]


@pytest.mark.once
@pytest.mark.only("jax")
def test_a_name_of_an_input_and_an_output(tmp_path):
    layer = JaxLayer(lambda inputs: {"inputs": inputs * 2})
    layer(x(2, 4))
    with pytest.raises(ValueError, match="'inputs' names an input and an output"):
        jaxwrap.export(layer, tmp_path / "model", "onnx")
    spec = keras.InputSpec(shape=(None, 4), name="rows")
    jaxwrap.export(layer, tmp_path / "model", "onnx", input_signature=[spec])
    outputs = run_onnx(tmp_path / "model")(rows=x(3, 4))
    np.testing.assert_allclose(outputs["inputs"], x(3, 4) * 2)


@pytest.mark.once
@pytest.mark.only("jax")
def test_jax_stays_as_it_was(tmp_path):
    before = {name: getattr(jnp, name) for name in dir(jnp)}
    jaxwrap.export(MODELS["equinox mlp"].make(), tmp_path / "model", "onnx", check=False)
    assert [name for name in before if getattr(jnp, name) is not before[name]] == []


# What is refused.


def sorted_rows(inputs):
    return jnp.sort(inputs, -1)


def cropped(inputs):
    return lax.pad(inputs, 0.0, ((0, 0, 0), (-1, -1, 0)))


def in_bfloat16(inputs):
    return (inputs.astype("bfloat16") @ jnp.ones((4, 2), "bfloat16")).astype("float32")


def drawn(inputs):
    return inputs + jax.random.normal(jax.random.key(0), inputs.shape)


REFUSED = {
    "litert": (sorted_rows, "`sort` in `sorted_rows`"),
    "litert, whose converter dies": (cropped, "`slice`"),
    "litert in bfloat16": (in_bfloat16, "computes in bfloat16"),
    "onnx": (drawn, "`random_bits` in `drawn`"),
}


@pytest.mark.once
@pytest.mark.only("jax")
@pytest.mark.parametrize("name", REFUSED)
def test_what_a_format_cannot_hold(name, tmp_path):
    function, message = REFUSED[name]
    model = keras.Sequential([keras.Input((4,)), JaxLayer(function)])
    with pytest.raises(NotImplementedError, match=message):
        jaxwrap.export(model, tmp_path / "model", name[:6].rstrip(","))
    assert not os.listdir(tmp_path)


@pytest.mark.once
@pytest.mark.only("jax")
def test_a_nan_that_the_model_has_not(tmp_path):
    """LiteRT has no cube root, and its power has no negative base."""
    model = keras.Sequential([keras.Input((4,)), JaxLayer(jnp.cbrt)])
    with pytest.raises(ValueError, match=r"output '.*' .* is NaN in"):
        jaxwrap.export(model, tmp_path / "model", "litert")
    assert not os.listdir(tmp_path)


# What is rewritten for a converter.

TAKEN = np.array([2, 0])


def gathers(rows):
    image = rows.reshape(rows.shape[0], 2, 3)
    return [
        image[:, 0],
        image[..., -1],
        image[:, TAKEN % 2, TAKEN],
        image[:, :, TAKEN],
        rows[:, ::2],
        jnp.argmax(rows, -1),
        jnp.argmin(image, 1),
        (rows > 0) ^ (rows > 1),
        lax.broadcasted_iota("int32", image.shape, 0),
    ]


def pools(rows):
    image = rows.reshape(rows.shape[0], 3, 2, 1)
    return [
        nn.max_pool(image, (2, 2), (1, 2), "SAME"),
        lax.reduce_window(image, jnp.inf, lax.min, (1, 2, 2, 1), (1, 1, 1, 1), "VALID"),
        nn.max_pool(image[:, None], (1, 2, 2), (1, 2, 1)),
        lax.pad(rows, 0.5, ((0, 0, 0), (1, 2, 0))),
        lax.pad(rows, 0.5, ((1, 0, 0), (-1, 2, 1))),
        lax.rem(rows * 9, jnp.full_like(rows, 0.7)),
        lax.rem((rows * 9).astype("int32"), jnp.full(rows.shape, 4)),
        jnp.where(rows > 0, rows > 1, rows < -1),
        lax.cond(rows.sum() > 0, lambda: rows > 0, lambda: rows > 1),
        lax.select_n(rows[0, 0] > 0, True, False),
        lax.fori_loop(0, 2, lambda _, row: jnp.pad(row, ((0, 0), (1, 0)))[:, :-1], rows),
    ]


RULES = {"litert": (gathers, _litert_rules.RULES), "onnx": (pools, _onnx_rules.RULES)}


@pytest.mark.quick
@pytest.mark.once
@pytest.mark.parametrize("kind", RULES)
def test_rules_change_no_value(kind):
    function, rules = RULES[kind]
    struct = jax.ShapeDtypeStruct(jax.export.symbolic_shape("batch, 6"), "float32")
    rewritten = rewrite(jax.make_jaxpr(function)(struct), rules)
    exported = jax.export.export(jax.jit(jaxpr_as_fun(rewritten)))(struct)
    assert "jit" not in {equation.primitive.name for equation in rewritten.jaxpr.eqns}
    for batch in (1, 4):
        expected = function(jnp.asarray(x(batch, 6)))
        for one, two in zip(exported.call(x(batch, 6)), expected, strict=True):
            np.testing.assert_allclose(one, two, 1e-5, 1e-5)


@pytest.mark.once
@pytest.mark.only("jax")
@pytest.mark.parametrize("kind", RULES)
def test_converters_take_what_is_rewritten(kind, tmp_path):
    layer = JaxLayer(RULES[kind][0])
    layer(x(2, 6))
    jaxwrap.export(layer, tmp_path / "model", kind)
    outputs = RUNNERS[kind](tmp_path / "model")(rows=x(4, 6))
    for index, expected in enumerate(RULES[kind][0](jnp.asarray(x(4, 6)))):
        np.testing.assert_allclose(outputs[f"output_{index}"], expected, 1e-4, 1e-4)
