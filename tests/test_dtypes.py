"""Leaves of every dtype, mixed precision, PRNG keys as leaves; and any pytree of them, by hypothesis."""

import dataclasses
import tempfile

import jax
import jax.numpy as jnp
import keras
import models
import numpy as np
import pytest
from backends import to_numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jaxwrap
from jaxwrap import JaxLayer

pytestmark = pytest.mark.each_jax

DTYPES = [
    "bool",
    "uint8",
    "int8",
    "int16",
    "uint32",
    "int32",
    "float16",
    "bfloat16",
    "float32",
    "float8_e4m3fn",
    "float8_e5m2",
    "complex64",
]


def leaf(dtype, shape=(2,)):
    return (np.arange(1, 1 + np.prod(shape, dtype=int)).reshape(shape) % 3).astype(jnp.dtype(dtype))


def identity(params, state, inputs):
    return inputs, state


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_leaf_keeps_its_dtype(dtype):
    seen = {}

    def call(params, state, inputs):
        seen.update(params=str(params.dtype), state=str(state.dtype))
        return inputs, state

    layer = JaxLayer(call, params=leaf(dtype), state=leaf(dtype))
    layer(np.ones(1, "float32"))
    assert seen == {"params": dtype, "state": dtype}
    if dtype == "complex64":  # two real parts, so that every optimizer trains it
        assert {part.dtype for part in layer.params.values()} == {"float32"}
        assert layer.state.dtype == dtype
    else:
        assert (layer.params.dtype, layer.state.dtype) == (dtype, dtype)
    read = layer.get_variables()
    assert read["params"].dtype == jnp.dtype(dtype)
    np.testing.assert_array_equal(read["params"], leaf(dtype))
    layer.set_variables(read)
    np.testing.assert_array_equal(layer.get_variables()["state"], leaf(dtype))


def test_float64_under_x64():
    with jax.enable_x64(True):
        layer = JaxLayer(
            lambda params, inputs: inputs * params.sum(), params=np.array([1 / 3], "float64")
        )
        assert layer.params.dtype == "float64"
        outputs = to_numpy(layer(np.ones(1, "float32")))
        assert outputs.dtype == np.float64
        assert outputs == np.float64(1 / 3)


def test_float64_inputs_warn_once(monkeypatch):
    monkeypatch.setattr("jaxwrap._dtypes._has_warned", False)
    double = keras.ops.convert_to_tensor(np.ones(3), "float64")
    if keras.backend.standardize_dtype(double.dtype) != "float64":
        double = np.ones(3)
    fn = jaxwrap.wrap_function(lambda x: x * 2)
    with pytest.warns(UserWarning, match=r"float64.*jax_enable_x64.*guide") as warned:
        [fn(double) for _ in range(2)]
    of_ours = [warning for warning in warned if "jax_enable_x64" in str(warning.message)]
    assert [warning.filename for warning in of_ours] == [__file__]


def test_float64_without_x64_is_float32():
    layer = JaxLayer(lambda params, inputs: inputs, params=np.ones(2, "float64"))
    assert layer.params.dtype == "float32"


@pytest.mark.parametrize("policy", ["float16", "bfloat16"])
def test_an_explicit_dtype_wins_for_float_leaves(policy):
    params = {name: leaf(name) for name in ("float32", "bfloat16", "int32", "bool")}
    layer = JaxLayer(lambda params, inputs: inputs, params=params, dtype=policy)
    assert {name: v.dtype for name, v in layer.params.items()} == {
        **{name: name for name in params},
        "float32": policy,
        "bfloat16": policy,
    }


def test_mixed_precision_casts_params_and_never_state():
    seen = {}

    def call(params, state, inputs):
        seen.update(
            jax.tree.map(lambda leaf: str(leaf.dtype), {"p": params, "s": state, "i": inputs})
        )
        return inputs, state

    tree = {"f": np.float32(1), "h": leaf("float16"), "n": 3}
    layer = JaxLayer(call, params=tree, state=tree, dtype="mixed_bfloat16")
    layer(np.ones(1, "float32"))
    assert seen == {
        "p": {"f": "bfloat16", "h": "bfloat16", "n": "int32"},
        "s": {"f": "float32", "h": "float32", "n": "int32"},
        "i": "bfloat16",
    }


def test_mixed_precision_by_the_global_policy_keeps_the_widths_of_leaves():
    keras.config.set_dtype_policy("mixed_bfloat16")
    layer = JaxLayer(identity, params=leaf("float16"), state={"h": leaf("float16"), "f": 1.0})
    assert layer.params.dtype == "float16"
    assert (layer.state["h"].dtype, layer.state["f"].dtype) == ("float16", "float32")


@pytest.mark.trains
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_gradients_under_mixed_precision_have_the_dtype_of_the_variables(policy, backend):
    layer = JaxLayer(models.mlp_call, models.mlp_init, dtype=policy, seed=1)
    inputs = np.ones((3, 4), "float32")
    outputs = layer(inputs)
    cotangent = np.ones(outputs.shape, to_numpy(outputs).dtype)
    _, (gradients, _) = backend.layer_vjp(layer, inputs, False, [cotangent])
    half = jnp.dtype(policy.removeprefix("mixed_"))
    params = jax.tree.map(lambda v: jnp.asarray(to_numpy(v.value)), layer.params)

    def native(params):
        return models.mlp_call(
            jax.tree.map(lambda leaf: leaf.astype(half), params), jnp.asarray(inputs, half)
        )

    (expected,) = jax.vjp(native, params)[1](jnp.asarray(cotangent))
    for one, two in zip(gradients, jax.tree.leaves(expected), strict=True):
        assert to_numpy(one).dtype == np.float32
        np.testing.assert_allclose(to_numpy(one), two, 3e-2, 3e-2)


# PRNG keys as leaves.


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_keys_as_leaves(impl, tmp_path):
    def call(params, state, inputs):
        new, sub = jax.random.split(state["key"])
        noise = jax.random.normal(sub, inputs.shape) + jax.random.normal(params, inputs.shape)
        return inputs + noise, {"key": new}

    def make():
        key = jax.random.key(1, impl=impl)
        return JaxLayer(call, params=jax.random.key(2, impl=impl), state={"key": key})

    layer = make()
    state, fixed = jax.random.key(1, impl=impl), jax.random.key(2, impl=impl)
    inputs = np.zeros(4, "float32")
    for _ in range(3):
        expected, new = call(fixed, {"key": state}, jnp.asarray(inputs))
        np.testing.assert_allclose(to_numpy(layer(inputs)), expected, 1e-5, 1e-6)
        state = new["key"]
    read = layer.get_variables()["state"]["key"]
    assert jax.random.key_impl(read) == jax.random.key_impl(state)
    np.testing.assert_array_equal(jax.random.key_data(read), jax.random.key_data(state))
    model = keras.Sequential([keras.Input((4,)), layer])
    model.save_weights(tmp_path / "w.weights.h5")
    again = keras.Sequential([keras.Input((4,)), make()])
    again.load_weights(tmp_path / "w.weights.h5")
    np.testing.assert_allclose(to_numpy(again(inputs[None])), to_numpy(model(inputs[None])), 1e-6)
    with pytest.raises(ValueError, match=r"key: state/key is a PRNG key.*received no PRNG key"):
        layer.set_variables({**layer.get_variables(), "state": {"key": np.zeros(2, "uint32")}})


# Any pytree.


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Node:
    left: object
    right: object


class Static:
    """A leaf that is no data, equal to itself only."""

    def __call__(self):
        return 1


STATIC = [None, "text", Static(), jnp.tanh]


def arrays():
    shapes = st.sampled_from([(), (1,), (0,), (2, 3)])
    return st.builds(leaf, st.sampled_from(DTYPES), shapes)


def leaves():
    numbers = st.one_of(st.integers(-5, 5), st.booleans(), st.floats(-2, 2, width=16), st.just(2j))
    keys = st.builds(
        lambda seed, impl: jax.random.key(seed, impl=impl),
        st.integers(0, 9),
        st.sampled_from(["threefry2x32", "rbg"]),
    )
    return st.one_of(arrays(), numbers, keys, st.sampled_from(STATIC))


def trees():
    names = st.text("ab/. _é7", min_size=0, max_size=4)
    return st.recursive(
        leaves(),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.tuples(inner, inner),
            st.dictionaries(names, inner, max_size=3),
            st.builds(Node, inner, inner),
            st.builds(models.Pair, inner, inner),
        ),
        max_leaves=8,
    )


def equal(one, two):
    if isinstance(one, jax.Array) and jax.dtypes.issubdtype(one.dtype, jax.dtypes.prng_key):
        return one.dtype == two.dtype and np.array_equal(*map(jax.random.key_data, (one, two)))
    if isinstance(one, (np.ndarray, jax.Array, bool, int, float, complex)):
        return np.array_equal(np.asarray(one, np.asarray(two).dtype), two)
    return one is two or one == two


PROPERTY = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.once
@PROPERTY
@given(tree=trees())
def test_any_pytree_flattens_names_uniquely_and_rebuilds_equal(tree):
    layer = JaxLayer(lambda state, inputs: (inputs, state), state=tree, params={"w": 1.0})
    names = [v.path for v in layer.variables]
    assert len(set(names)) == len(names)
    again = JaxLayer(lambda state, inputs: (inputs, state), state=tree, params={"w": 1.0})
    assert [n.partition("/")[2] for n in names] == [
        v.path.partition("/")[2] for v in again.variables
    ]
    read = layer.get_variables().get("state")
    assert jax.tree.structure(read) == jax.tree.structure(tree)
    assert all(map(equal, jax.tree.leaves(tree), jax.tree.leaves(read)))
    layer(np.ones(1, "float32"))  # through the function and back
    read = layer.get_variables().get("state")
    assert all(map(equal, jax.tree.leaves(tree), jax.tree.leaves(read)))


@PROPERTY
@given(tree=trees())
def test_any_pytree_survives_a_save_and_load(tree):
    def make(tree):
        layer = JaxLayer(lambda params, state, inputs: (inputs, state), params=tree, state={"n": 1})
        return keras.Sequential([keras.Input((1,)), layer])

    model, again = make(tree), make(tree)
    again.layers[0].set_variables(
        jax.tree.map(
            lambda leaf: np.zeros_like(leaf) if isinstance(leaf, np.ndarray) else leaf,
            again.layers[0].get_variables(),
        )
    )
    with tempfile.TemporaryDirectory() as folder:
        model.save_weights(f"{folder}/w.weights.h5")
        again.load_weights(f"{folder}/w.weights.h5")
    one, two = (m.layers[0].get_variables() for m in (model, again))
    assert jax.tree.structure(one) == jax.tree.structure(two)
    assert all(map(equal, jax.tree.leaves(one), jax.tree.leaves(two)))


OPERATIONS = {
    "count": lambda leaf, total: leaf + 1,
    "mean": lambda leaf, total: (leaf + total.astype(leaf.dtype)) / 2,
    "swap": lambda leaf, total: leaf[::-1] if leaf.ndim else leaf,
    "keep": lambda leaf, total: leaf,
}


@PROPERTY
@given(
    shapes=st.dictionaries(
        st.text("abc", min_size=1, max_size=2), st.sampled_from([(), (3,), (2, 2)]), min_size=1
    ),
    operations=st.lists(st.sampled_from(sorted(OPERATIONS)), min_size=1, max_size=4),
    steps=st.integers(1, 4),
)
def test_any_state_function_threads_what_a_python_loop_threads(shapes, operations, steps):
    def call(state, inputs):
        total = inputs.sum()
        names = sorted(state)
        new = {
            name: OPERATIONS[operations[index % len(operations)]](state[name], total)
            for index, name in enumerate(names)
        }
        return inputs + sum(leaf.sum() for leaf in state.values()), new

    state = {
        name: np.arange(np.prod(shape, dtype=int), dtype="float32").reshape(shape)
        for name, shape in shapes.items()
    }
    layer = JaxLayer(call, state=state)
    for step in range(steps):
        inputs = np.full(2, step, "float32")
        expected, state = call(jax.tree.map(jnp.asarray, state), jnp.asarray(inputs))
        np.testing.assert_allclose(to_numpy(layer(inputs)), expected, 1e-5, 1e-5)
        read = layer.get_variables()["state"]
        for name in state:
            np.testing.assert_allclose(read[name], state[name], 1e-5, 1e-5)
