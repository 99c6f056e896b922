"""Names, rules, freezing, and weights as a pytree."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import keras
import models
import numpy as np
import pytest
from backends import to_numpy
from models import x

from jaxwrap import FlaxLayer, JaxLayer, Rule
from jaxwrap.reparametrizations import LoRA

pytestmark = pytest.mark.quick


def images():
    return x(4, 6, 6, 2)


def cnn(**kwargs):
    layer = FlaxLayer(models.Cnn(), name="cnn", seed=0, **kwargs)
    layer(images())
    return layer


def paths(variables):
    return {v.path for v in variables}


def values(layer):
    return [to_numpy(v.value) for v in layer.variables]


# Names.


@pytest.mark.once
def test_paths_are_those_of_the_leaves():
    layer = JaxLayer(lambda params, inputs: inputs, params=[{"w": 1.0}, models.Affine(1.0, 2.0)])
    assert [v.path.partition("/")[2] for v in layer.variables] == [
        "params/0/w",
        "params/1/weight",
        "params/1/bias",
    ]


def test_odd_names_are_replaced_and_collisions_resolved():
    params = {"a/b": 1.0, "a.b": 2.0, "a b": 3.0, "": 4.0, "a": {"b": 5.0}, 7: 6.0}
    tree = {str(key): value for key, value in params.items()}
    one, two = (JaxLayer(lambda params, inputs: inputs, params=tree) for _ in range(2))
    names = [v.path.partition("/")[2] for v in one.variables]
    assert len(set(names)) == len(names)
    assert names == [v.path.partition("/")[2] for v in two.variables]
    assert "params/a/b" in names
    assert jax.tree.map(lambda v: float(to_numpy(v.value)), one.params) == tree


def test_summary_names_the_layer(capsys):
    model = keras.Sequential([keras.Input((6, 6, 2)), cnn()])
    lines = []
    model.summary(expand_nested=True, print_fn=lines.append)
    assert "cnn (FlaxLayer)" in "\n".join(lines)
    assert "variable_" not in "\n".join(lines)


@pytest.mark.once
def test_weight_table():
    layer = cnn(rules={".*/bias": Rule(trainable=False)})
    table = layer.weight_table()
    assert {row.path for row in table} == paths(layer.weights)
    assert {row.path for row in table if row.trainable} == paths(layer.trainable_variables)
    rows = {row.path: row for row in table}
    assert rows["cnn/params/Conv_0/kernel"][1:] == ((3, 3, 2, 4), "float32", True, 72, None)
    lines = [line.split() for line in str(table).splitlines()]
    assert ["cnn/params/Conv_0/kernel", "(3,", "3,", "2,", "4)", "float32", "yes", "72"] in lines
    assert str(sum(row.size for row in table)) in str(table).splitlines()[-1]
    with pytest.raises(ValueError, match="has no weights yet"):
        FlaxLayer(models.Cnn()).weight_table()


@pytest.mark.once
def test_weight_table_sums_by_module():
    rules = {".*/bias": Rule(trainable=False), "params/Conv_0/kernel": Rule(dtype="bfloat16")}
    layer = cnn(rules=rules)
    table = layer.weight_table(depth=2)
    rows = {row.path: row for row in table}
    assert rows["cnn/params/Conv_0"][1:] == (2, 72 + 4, 72 * 2 + 4 * 4, 72)
    assert rows["cnn/batch_stats/BatchNorm_0"][1:] == (2, 8, 32, 0)
    single = layer.weight_table()
    assert sum(row.size for row in table) == sum(row.size for row in single)
    assert sum(row.trained for row in table) == sum(row.size for row in single if row.trainable)
    assert [row.path for row in layer.weight_table(1)] == ["cnn/params", "cnn/batch_stats"]
    # The rows of a depth that no path has are the leaves.
    assert [row.path for row in layer.weight_table(9)] == [row.path for row in single]
    lines = [line.split() for line in str(table).splitlines()]
    assert lines[0] == ["path", "weights", "size", "bytes", "trained"]
    assert ["cnn/params/Conv_0", "2", "76", "160", "72"] in lines
    assert len({len(line) for line in str(table).splitlines()}) == 1
    with pytest.raises(ValueError, match=r"`depth` must be a positive number .* received 0"):
        layer.weight_table(depth=0)


@pytest.mark.once
def test_sums_count_below_the_layer_and_each_part_of_a_leaf():
    inner = FlaxLayer(nn.Dense(3), name="inner")
    model = keras.Sequential([keras.Input((2,)), inner], name="outer")
    inner.reparametrize(".*/kernel", LoRA(rank=1))
    assert {row[:3] for row in inner.weight_table(depth=2)} == {
        ("outer/inner/params/bias", 1, 3),
        ("outer/inner/params/kernel", 3, 6 + 2 + 3),
    }
    assert model.count_params() == sum(row.size for row in inner.weight_table(depth=1))


# Rules.


@pytest.mark.once
def test_later_rules_win_and_all_that_match_apply():
    layer = cnn(
        rules={
            "params/.*": Rule(trainable=False, regularizer="l1"),
            ".*/kernel": Rule(constraint="non_neg"),
            "params/Dense_0/.*": Rule(trainable=True),
        }
    )
    assert paths(layer.trainable_variables) == {
        "cnn/params/Dense_0/kernel",
        "cnn/params/Dense_0/bias",
    }
    kernel = layer.params["params"]["Dense_0"]["kernel"]
    assert isinstance(kernel.regularizer, keras.regularizers.L1)
    assert isinstance(kernel.constraint, keras.constraints.NonNeg)


@pytest.mark.once
def test_a_pattern_must_match_the_whole_path():
    with pytest.raises(ValueError, match=r"'kernel' does not match any of the 8 paths"):
        cnn(rules={"kernel": Rule(trainable=False)})


@pytest.mark.once
def test_a_pattern_that_matches_nothing_lists_near_paths():
    layer = FlaxLayer(models.Cnn(), rules={"params/Dense_0/kernal": Rule(trainable=False)})
    with pytest.raises(ValueError, match=r"Near it: .*params/Dense_0/kernel"):
        layer(images())
    assert not layer.weights


@pytest.mark.once
@pytest.mark.parametrize(
    ("rule", "path"),
    [
        (Rule(trainable=True), "state"),
        (Rule(regularizer="l2"), "state"),
        (Rule(constraint="non_neg"), "params/count"),
        (Rule(dtype="float16"), "params/count"),
        (Rule(dtype="int8"), "params/w"),
    ],
)
def test_a_rule_that_can_say_nothing(rule, path):
    with pytest.raises(ValueError, match=f"the rule for '{path}' sets .*{path}"):
        JaxLayer(
            lambda params, state, inputs: (inputs, state),
            params={"w": 1.0, "count": 3},
            state=0.5,
            rules={path if path != "state" else "state/value": rule}
            if path != "state"
            else {"state": rule},
        )


@pytest.mark.once
@pytest.mark.parametrize(
    "make",
    [
        lambda: Rule(trainable="no"),
        lambda: Rule(dtype="strings"),
        lambda: JaxLayer(models.mlp_call, models.mlp_init, rules={"a": "trainable"}),
    ],
)
def test_what_is_no_rule(make):
    with pytest.raises(TypeError):
        make()


@pytest.mark.once
def test_a_pattern_that_is_no_regular_expression():
    with pytest.raises(ValueError, match="is not a regular expression"):
        JaxLayer(models.mlp_call, models.mlp_init, rules={"(": Rule(trainable=False)})


@pytest.mark.trains
def test_regularizer_and_constraint_act_in_fit():
    def model(**kwargs):
        layer = JaxLayer(models.mlp_call, models.mlp_init, seed=1, **kwargs)
        made = keras.Sequential([keras.Input((4,)), layer])
        made.compile(keras.optimizers.SGD(0.1), "mse")
        made.fit(x(8, 4), x(8, 3), batch_size=4, shuffle=False, verbose=0)
        return layer

    plain = model()
    rules = {".*/w": Rule(regularizer=keras.regularizers.L2(0.3), constraint="non_neg")}
    ruled = model(rules=rules)
    for layer, bound in ((plain, False), (ruled, True)):
        smallest = min(to_numpy(entry["w"].value).min() for entry in layer.params)
        assert (smallest >= 0) == bound
    assert len(ruled.losses) == 2
    expected = sum(0.3 * (to_numpy(entry["w"].value) ** 2).sum() for entry in ruled.params)
    np.testing.assert_allclose(sum(map(to_numpy, ruled.losses)), expected, 1e-5)


@pytest.mark.trains
def test_the_loss_of_a_regularizer_has_the_gradient_it_should(backend):
    """One step of SGD, against JAX."""
    layer = JaxLayer(
        models.affine_call, models.affine_init, seed=1, rules={".*": Rule(regularizer="l2")}
    )
    model = keras.Sequential([keras.Input((4,)), layer])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    before = jax.tree.map(lambda v: jnp.asarray(to_numpy(v.value)), layer.params)
    inputs, targets = x(8, 4), x(8, 2, seed=1)

    def loss(params):
        error = ((models.affine_call(params, inputs) - targets) ** 2).mean()
        return error + 0.01 * sum((leaf**2).sum() for leaf in jax.tree.leaves(params))

    expected = jax.tree.map(lambda p, g: p - 0.1 * g, before, jax.grad(loss)(before))
    model.fit(inputs, targets, batch_size=8, verbose=0)
    jax.tree.map(
        lambda v, value: np.testing.assert_allclose(to_numpy(v.value), value, 1e-5, 1e-5),
        layer.params,
        expected,
    )


def test_dtype_of_a_rule():
    layer = cnn(
        rules={
            ".*/kernel": Rule(dtype="bfloat16"),
            ".*": Rule(dtype=jnp.float32),
            ".*Dense.*": Rule(dtype="float16"),
        }
    )
    assert {v.path.split("/", 1)[1]: v.dtype for v in layer.weights if "Dense" in v.path} == {
        "params/Dense_0/bias": "float16",
        "params/Dense_0/kernel": "float16",
    }
    assert layer.params["params"]["Conv_0"]["kernel"].dtype == "float32"


def test_autocast_of_a_rule():
    seen = {}

    def call(params, inputs):
        seen.update(jax.tree.map(lambda leaf: str(leaf.dtype), params))
        return inputs

    params = {"cast": np.float32(1), "kept": np.float32(1)}
    layer = JaxLayer(
        call, params=params, dtype="mixed_bfloat16", rules={".*/kept": Rule(autocast=False)}
    )
    layer(x(2))
    assert seen == {"cast": "bfloat16", "kept": "float32"}


# Freezing.


def test_freeze_and_unfreeze():
    layer = cnn()
    everything = paths(layer.trainable_variables)
    layer.freeze("params/Conv_0/.*")
    conv = {path for path in everything if "Conv_0" in path}
    assert paths(layer.trainable_variables) == everything - conv
    assert conv <= paths(layer.non_trainable_variables)
    layer.trainable = False
    assert layer.trainable_variables == []
    layer.trainable = True
    assert paths(layer.trainable_variables) == everything - conv
    layer.unfreeze(".*/kernel")
    assert paths(layer.trainable_variables) == everything - {"cnn/params/Conv_0/bias"}
    layer.unfreeze("params/.*")
    layer.trainable = False
    model = keras.Sequential([keras.Input((6, 6, 2)), layer])
    assert model.trainable_variables == []
    with pytest.raises(ValueError, match="Near it"):
        layer.freeze("params/Conv/.*")
    with pytest.raises(ValueError, match="sets trainable=True"):
        layer.unfreeze("batch_stats/.*")
    with pytest.raises(ValueError, match="no weights yet"):
        FlaxLayer(models.Cnn()).freeze(".*")


@pytest.mark.trains
def test_what_is_frozen_stays_and_the_rest_trains_as_without_it(backend):
    """Gradients of the others are those of JAX, and no gradient is asked of JAX for the frozen."""
    layer = JaxLayer(
        models.mlp_call, models.mlp_init, seed=1, rules={"params/0/.*": Rule(trainable=False)}
    )
    inputs = x(5, 4)
    outputs = to_numpy(layer(inputs))
    params = jax.tree.map(lambda v: jnp.asarray(to_numpy(v.value)), layer.params)
    cotangent = np.ones_like(outputs)
    (expected,) = jax.vjp(lambda second: models.mlp_call([params[0], second], inputs), params[1])[
        1
    ](cotangent)
    _, (gradients, _) = backend.layer_vjp(layer, inputs, False, [cotangent])
    assert len(gradients) == 2
    for one, two in zip(gradients, jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(to_numpy(one), two, 1e-5, 1e-5)


@pytest.mark.trains
def test_frozen_leaves_are_left_out_of_the_gradients_computed(monkeypatch):
    """The backward function returns no cotangent for them."""
    from jaxwrap._bridge import get_bridge

    roles = []
    original = get_bridge().wrap

    def wrap(fn, given, platforms):
        roles.append(given)
        return original(fn, given, platforms)

    monkeypatch.setattr(get_bridge(), "wrap", wrap)
    layer = JaxLayer(models.mlp_call, models.mlp_init, rules={"params/0/.*": Rule(trainable=False)})
    layer(x(2, 4))
    # Two of the params, and the inputs.
    assert [role.differentiable for role in roles[-1]].count(True) == 3


@pytest.mark.trains
def test_frozen_weights_stay_in_fit():
    layer = cnn()
    layer.freeze(".*/kernel")
    model = keras.Sequential([keras.Input((6, 6, 2)), layer])
    model.compile("sgd", "mse")
    before = {v.path: to_numpy(v.value).copy() for v in layer.weights}
    model.fit(images(), x(4, 3), verbose=0)
    after = {v.path: to_numpy(v.value) for v in layer.weights}
    changed = {path for path in before if (before[path] != after[path]).any()}
    assert changed == {path for path in before if not path.endswith("kernel")} - {
        "cnn/params/Conv_0/bias"  # batch norm takes it away
    } or changed == {path for path in before if not path.endswith("kernel")}


# As a pytree.


def test_get_variables_is_what_flax_applies():
    layer = cnn()
    variables = layer.get_variables()
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(variables))
    native = models.Cnn().apply(variables, images())
    np.testing.assert_allclose(to_numpy(layer(images())), native, 1e-5, 1e-5)


def test_get_and_set_variables_of_a_function():
    params = {"w": np.ones(2, "float32"), "none": None, "name": "n", "half": np.ones(1, "float16")}
    layer = JaxLayer(
        lambda params, state, inputs: (inputs, state), params=params, state=models.Pair(1, 2.0)
    )
    variables = layer.get_variables()
    assert set(variables) == {"params", "state"}
    assert variables["params"]["name"] == "n"
    assert variables["params"]["half"].dtype == np.float16
    assert isinstance(variables["state"], models.Pair)
    layer.set_variables(
        jax.tree.map(lambda leaf: leaf if isinstance(leaf, str) else leaf * 3, variables)
    )
    np.testing.assert_array_equal(layer.get_variables()["params"]["w"], [3, 3])
    layer.set_variables(
        {"params": {**params, "half": jnp.zeros(1, "float16")}, "state": models.Pair(5, 6)}
    )
    assert jax.tree.map(float, layer.get_variables()["state"]) == models.Pair(5.0, 6.0)
    # A host array is a copy: what is done to it does not reach the layer.
    layer.get_variables()["params"]["w"][:] = 9
    np.testing.assert_array_equal(layer.get_variables()["params"]["w"], [1, 1])


def test_set_variables_assigns_all_or_nothing():
    layer = cnn()
    before = values(layer)
    variables = layer.get_variables()
    wrong = jax.tree.map(lambda leaf: leaf + 1, variables)
    wrong["params"]["Dense_0"]["kernel"] = np.zeros((2, 3), "float32")
    wrong["params"]["Conv_0"]["bias"] = np.zeros(4, "float16")
    with pytest.raises(ValueError, match="No weight has been changed") as raised:
        layer.set_variables(wrong)
    assert "shape: params/Dense_0/kernel is (36, 3); received (2, 3)" in str(raised.value)
    assert "dtype: params/Conv_0/bias is float32; received float16" in str(raised.value)
    missing = jax.tree.map(lambda leaf: leaf, variables)
    del missing["params"]["Dense_0"]["bias"]
    missing["params"]["Dense_0"]["scale"] = np.zeros(3)
    with pytest.raises(
        ValueError, match=r"missing: params/Dense_0/bias\n  unexpected: params/Dense_0/scale"
    ):
        layer.set_variables(missing)
    with pytest.raises(ValueError, match="expected a dict"):
        layer.set_variables([1, 2])
    for one, two in zip(values(layer), before, strict=True):
        np.testing.assert_array_equal(one, two)
    layer.set_variables(jax.tree.map(lambda leaf: leaf + 1, variables))
    np.testing.assert_allclose(layer.get_variables()["params"]["Conv_0"]["bias"], np.ones(4))


@pytest.mark.once
def test_rules_are_in_the_config():
    rules = {".*/w": Rule(regularizer="l2", dtype="bfloat16"), ".*/b": Rule(trainable=False)}
    layer = JaxLayer(models.mlp_call, models.mlp_init, rules=rules)
    layer(x(2, 4))
    layer.freeze("params/0/.*")
    again = JaxLayer.from_config(layer.get_config())
    again(x(2, 4))
    assert [row[1:] for row in again.weight_table()] == [row[1:] for row in layer.weight_table()]
    assert again.params[1]["w"].regularizer.get_config() == keras.regularizers.L2().get_config()


@pytest.mark.once
def test_rules_reach_linen_modules_of_any_depth():
    class Deep(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Sequential([nn.Dense(3), nn.relu, nn.Dense(2)])(x)

    layer = FlaxLayer(Deep(), rules={"params/Dense_1/kernel": Rule(trainable=False)})
    layer(x(2, 3))
    assert len(layer.trainable_variables) == 3
