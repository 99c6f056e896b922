"""Which weights of which owner a checkpoint goes to: models, parts of files, other spellings."""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import keras
import numpy as np
import pytest
import safetensors.numpy
from backends import to_numpy
from models import x
from test_checkpoints import NATIVE, assert_equal, flat, make

from jaxwrap import EquinoxLayer, FlaxLayer, HaikuLayer, checkpoints

KINDS = ["msgpack", "orbax", "safetensors", "npz", "eqx"]


@pytest.mark.quick
def test_parameters_alone_load_into_a_module_with_state(tmp_path, capsys):
    source, layer = make(seed=1), make(seed=2)
    for variable in layer.non_trainable_variables:
        variable.assign(np.full(variable.shape, 7, variable.dtype))
    params, path = source.get_variables()["params"], tmp_path / "w.safetensors"
    safetensors.numpy.save_file(flat(params), path)  # `Dense_0/kernel`, as Flax names them
    with pytest.raises(ValueError, match=r"missing: batch_stats/BatchNorm_0/mean"):
        checkpoints.load(layer, path)
    plan = checkpoints.load(layer, path, only="params/.*")
    assert_equal(flat(layer.get_variables()["params"]), flat(params))
    assert {float(v) for v in flat(layer.get_variables()["batch_stats"])["BatchNorm_0/mean"]} == {7}
    assert {row.target for row in plan if row.status == "left alone"} == {
        "batch_stats/BatchNorm_0/mean",
        "batch_stats/BatchNorm_0/var",
    }
    checkpoints.load(layer, path, only="params/.*", dry_run=True)
    assert "left alone" in capsys.readouterr().out


@pytest.mark.once
def test_only_takes_a_part_of_a_file(tmp_path):
    source, layer = make(seed=1), make(seed=2)
    before = flat(layer.get_variables())
    tree = {**source.get_variables(), "opt_state": {"mu": np.zeros(3)}, "step": 4}
    NATIVE["msgpack"][0](tmp_path / "w.msgpack", tree)
    plan = checkpoints.load(layer, tmp_path / "w.msgpack", only="params/Dense_0/.*")
    new, after = flat(source.get_variables()), flat(layer.get_variables())
    expected = {name: new[name] if "Dense_0" in name else before[name] for name in before}
    assert_equal(after, expected)
    status = {row.name: row.status for row in plan}
    assert status["opt_state/mu"] == status["step"] == "left out"
    assert status["params/Dense_1/kernel"] == "left alone"
    with pytest.raises(ValueError, match=r"'mixed': the pattern 'Dense_0/.\*' does not match"):
        checkpoints.load(layer, tmp_path / "w.msgpack", only="Dense_0/.*")


@pytest.mark.once
def test_haiku_spells_its_own_way(tmp_path):
    transformed = hk.transform_with_state(
        lambda x: hk.BatchNorm(True, True, 0.9)(hk.nets.MLP([3, 2])(x), True)
    )
    layer = HaikuLayer(transformed, name="mlp")
    layer(x(2, 4))
    params, state = transformed.init(jax.random.key(5), np.asarray(x(2, 4)))
    assert "mlp/~/linear_0" in params
    path = tmp_path / "w.msgpack"
    NATIVE["msgpack"][0](path, params)
    checkpoints.load(layer, path, only="params/.*")
    jax.tree.map(np.testing.assert_array_equal, layer.get_variables()["params"], params)
    np.savez(tmp_path / "w.npz", **flat({"params": params, "state": state}))
    assert {row.status for row in checkpoints.load(layer, tmp_path / "w.npz")} == {"match"}


@pytest.mark.once
def test_equinox_names_without_params(tmp_path):
    module = eqx.nn.MLP(4, 2, 3, 1, key=jax.random.key(1))
    layer = EquinoxLayer(eqx.nn.MLP(4, 2, 3, 1, key=jax.random.key(2)))
    arrays = {
        f"layers/{index}/{name}": np.asarray(getattr(linear, name))
        for index, linear in enumerate(module.layers)
        for name in ("weight", "bias")
    }
    np.savez(tmp_path / "w.npz", **arrays)
    checkpoints.load(layer, tmp_path / "w.npz")
    assert eqx.tree_equal(layer.module_with_weights(), module)


@pytest.mark.once
def test_two_spellings_of_one_weight(tmp_path):
    layer = FlaxLayer(nn.Dense(2, use_bias=False), name="dense")
    layer(x(2, 4))
    kernel = np.ones((4, 2), "float32")
    np.savez(tmp_path / "w.npz", **{"params/kernel": kernel, "kernel": kernel})
    with pytest.raises(ValueError, match=r"both .*kernel' turn into 'params/kernel'"):
        checkpoints.load(layer, tmp_path / "w.npz")


@pytest.mark.once
def test_names_by_a_function(tmp_path):
    layer, again = make(seed=1), make(seed=2)
    path = tmp_path / "w.safetensors"
    checkpoints.save(layer, path, names=lambda name: name.replace("/", "."))
    assert "params.Dense_0.kernel" in safetensors.numpy.load_file(path)
    checkpoints.load(again, path, names=lambda name: name.replace(".", "/"))
    assert_equal(flat(again.get_variables()), flat(layer.get_variables()))
    with pytest.raises(TypeError, match=r"'mixed': `names` must return a name or None.* 3 for"):
        checkpoints.load(again, path, names=lambda name: 3)
    with pytest.raises(ValueError, match=r"'mixed': both .* turn into 'one'"):
        checkpoints.load(again, path, names=lambda name: "one")


def make_model(seed):
    inputs = keras.Input((4,))
    hidden = FlaxLayer(nn.Dense(3), seed=seed, name="encoder")(inputs)
    outputs = keras.layers.Dense(2, kernel_initializer="ones", name="head")(hidden)
    return keras.Model(inputs, outputs)


@pytest.mark.quick
@pytest.mark.parametrize("kind", KINDS)
def test_a_model(kind, tmp_path):
    model, again = make_model(1), make_model(2)
    for variable in model.get_layer("head").weights:
        variable.assign(np.full(variable.shape, 3, "float32"))
    checkpoints.save(model, tmp_path / f"w.{kind}")
    plan = checkpoints.load(again, tmp_path / f"w.{kind}")
    assert {row.target for row in plan} == {
        "encoder/params/kernel",
        "encoder/params/bias",
        "head/kernel",
        "head/bias",
    }
    for one, two in zip(model.weights, again.weights, strict=True):
        np.testing.assert_array_equal(to_numpy(one.value), to_numpy(two.value))


@pytest.mark.once
def test_a_pretrained_encoder_in_a_model(tmp_path):
    model, encoder = make_model(1), make_model(2).get_layer("encoder")
    checkpoints.save(encoder, tmp_path / "w.npz")
    plan = checkpoints.load(
        model, tmp_path / "w.npz", names={"params/(.*)": r"encoder/\1"}, only="encoder/.*"
    )
    assert [row.target for row in plan if row.status == "left alone"] == [
        "head/kernel",
        "head/bias",
    ]
    loaded = model.get_layer("encoder").get_variables()
    assert_equal(flat(loaded), flat(encoder.get_variables()))
    assert {float(v) for v in to_numpy(model.get_layer("head").kernel.value).ravel()} == {1}


@pytest.mark.once
def test_a_model_that_cannot_be_named(tmp_path):
    model = keras.Sequential([keras.Sequential([FlaxLayer(nn.Dense(2), name="same")])])
    with pytest.raises(ValueError, match=r"FlaxLayer 'same': .*no weights yet"):
        checkpoints.save(model, tmp_path / "w.npz")
    model.add(keras.Sequential([FlaxLayer(nn.Dense(2), name="same")]))
    model(x(2, 4))
    with pytest.raises(ValueError, match=r"Sequential '.*': two weights .* 'same/params/"):
        checkpoints.save(model, tmp_path / "w.npz")
    assert not list(tmp_path.iterdir())


@pytest.mark.once
def test_progress(tmp_path, capsys):
    layer = make(seed=1)
    checkpoints.save(layer, tmp_path / "w.safetensors")
    checkpoints.load(layer, tmp_path / "w.safetensors")
    assert not capsys.readouterr().out
    checkpoints.load(layer, tmp_path / "w.safetensors", progress=True)
    count = 2 * len(layer.weights)
    assert f"{count}/{count}" in capsys.readouterr().out


@pytest.mark.once
def test_a_file_of_the_only_wrapped_layer_of_a_model(tmp_path):
    source, layer = (FlaxLayer(nn.Dense(3), seed=seed, name="encoder") for seed in (1, 2))
    source(x(2, 4))
    model = keras.Sequential([layer, keras.layers.Dense(2)])
    model(x(2, 4))
    checkpoints.save(source, tmp_path / "w.npz")
    checkpoints.load(model, tmp_path / "w.npz", only="encoder/.*")
    assert_equal(flat(layer.get_variables()), flat(source.get_variables()))
