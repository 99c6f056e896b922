"""What each adapter does beside computing its module; `wrap`, and adapters that users write."""

import sys

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
from models import x
from zoo import ZOO, EqxConvNet, NnxAttention, NnxCnn

import jaxwrap
from jaxwrap import EquinoxLayer, FlaxLayer, HaikuLayer, JaxLayer, NNXLayer

pytestmark = pytest.mark.each_jax


def paths(variables):
    return {v.path.partition("/")[2] for v in variables}


# NNX.


def test_nnx_variables_and_their_paths():
    layer = NNXLayer(NnxCnn(nnx.Rngs(0)), name="cnn")
    assert paths(layer.trainable_variables) == {
        f"params/{path}"
        for path in (
            "conv/kernel",
            "conv/bias",
            "norm/scale",
            "norm/bias",
            "blocks/0/kernel",
            "blocks/0/bias",
            "blocks/1/kernel",
            "blocks/1/bias",
        )
    }
    assert "state/norm/mean" in paths(layer.non_trainable_variables)
    assert "params/tied/kernel" not in paths(layer.variables)  # shared with a block


def test_nnx_instance_is_never_changed():
    module = NnxCnn(nnx.Rngs(0))
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.split(module, nnx.Param, ...)[1]))
    layer = NNXLayer(module)
    layer(x(3, 6, 6, 2), training=True)
    layer.set_variables(jax.tree.map(lambda leaf: leaf, layer.get_variables()))
    after = nnx.to_pure_dict(nnx.split(module, nnx.Param, ...)[1])
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert int(module.dropout.rngs.count.get_value()) == 0


def test_nnx_factory_is_built_with_the_layer_s_seed():
    one, two, other = (NNXLayer.from_factory(NnxCnn, seed=seed) for seed in (1, 1, 2))
    inputs = x(3, 6, 6, 2)
    outputs = [to_numpy(layer(inputs)) for layer in (one, two, other)]
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert (outputs[0] != outputs[2]).any()
    first, second = (to_numpy(one(inputs, training=True)) for _ in range(2))
    assert (first != second).any()


def test_nnx_trainable_filter():
    class Adapted(nnx.Module):
        def __init__(self, rngs):
            self.base = nnx.Linear(3, 2, rngs=rngs)
            self.lora = nnx.LoRA(3, 1, 2, rngs=rngs)

        def __call__(self, x):
            return self.base(x) + self.lora(x)

    layer = NNXLayer(Adapted(nnx.Rngs(0)), trainable=nnx.LoRAParam)
    assert paths(layer.trainable_variables) == {"params/lora/lora_a", "params/lora/lora_b"}
    assert layer(x(4, 3)).shape == (4, 2)


def test_nnx_methods():
    class Two(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(3, 2, rngs=rngs)

        def __call__(self, x):
            return self.linear(x)

        def double(self, x, *, factor=2):
            return factor * self.linear(x)

    module = Two(nnx.Rngs(0))
    plain = to_numpy(NNXLayer(module)(x(4, 3)))
    for method in ("double", module.double, lambda module, x: 2 * module(x)):
        np.testing.assert_allclose(to_numpy(NNXLayer(module, method)(x(4, 3))), 2 * plain, 1e-6)
    np.testing.assert_allclose(
        to_numpy(NNXLayer(module, "double")(x(4, 3), factor=3)), 3 * plain, 1e-5
    )


@pytest.mark.filterwarnings("ignore:Using 'Module.sow")
def test_nnx_sowing():
    class Loss(nnx.Variable):
        pass

    class Sowing(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(3, 2, rngs=rngs)

        def __call__(self, x):
            hidden = self.linear(x)
            self.sow(nnx.Intermediate, "hidden", hidden)
            self.sow(Loss, "size", (hidden**2).mean())
            return hidden

    module = Sowing(nnx.Rngs(0))
    module(x(4, 3))  # what is sown already is no state
    layer = NNXLayer(module, collections={nnx.Intermediate: "output", Loss: "loss"})
    outputs, extra = to_numpy(layer(x(4, 3)))
    np.testing.assert_array_equal(extra["intermediates"]["hidden"][0], outputs)
    np.testing.assert_allclose(to_numpy(layer.losses[0]), (outputs**2).mean(), 1e-5)
    assert set(layer.get_variables()["state"]) == set()
    assert layer(x(4, 3))[0].shape == (4, 2)


def as_arrays(tree):
    return jax.tree.map(
        lambda leaf: np.asarray(
            jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        ),
        tree,
    )


@pytest.mark.quick
@pytest.mark.parametrize("form", ["state", "split", "arrays"])
def test_nnx_states_are_variables(form):
    other = NnxCnn(nnx.Rngs(7))
    other(x(3, 6, 6, 2))
    layer = NNXLayer(NnxCnn(nnx.Rngs(0)), name="cnn")
    if form == "split":
        _, params, rest = nnx.split(other, nnx.Param, ...)
        layer.set_variables({"params": params, "state": rest})
    else:
        state = nnx.state(other)
        if form == "arrays":  # as `State` holds them after a map over variables
            flat = [(path, leaf.get_value()) for path, leaf in nnx.to_flat_state(state)]
            state = nnx.from_flat_state(flat)
        layer.set_variables(state)
    expected = as_arrays(nnx.to_pure_dict(nnx.state(other)))
    again = as_arrays(nnx.to_pure_dict(nnx.state(layer.module_with_weights())))
    jax.tree.map(np.testing.assert_array_equal, again, expected)
    other.eval()
    np.testing.assert_allclose(
        to_numpy(layer(x(3, 6, 6, 2), training=False)), other(x(3, 6, 6, 2)), 1e-4, 1e-5
    )


@pytest.mark.quick
def test_nnx_states_that_do_not_fit():
    layer = NNXLayer(NnxCnn(nnx.Rngs(0)), name="cnn")
    before = as_arrays(layer.get_variables())
    params = nnx.state(NnxCnn(nnx.Rngs(7)), nnx.Param)
    with pytest.raises(ValueError, match=r"NNXLayer 'cnn': .*[\s\S]*missing: norm/mean"):
        layer.set_variables(params)
    state = nnx.state(NnxCnn(nnx.Rngs(7)))
    state["conv"]["bias"] = nnx.Param(jnp.zeros(5))
    with pytest.raises(ValueError, match=r"shape: params/conv/bias"):
        layer.set_variables(state)
    state = nnx.state(NnxCnn(nnx.Rngs(7)))
    state["head"] = nnx.State({"kernel": nnx.Param(jnp.zeros(5))})
    with pytest.raises(ValueError, match=r"unexpected: head/kernel"):
        layer.set_variables(state)
    jax.tree.map(np.testing.assert_array_equal, as_arrays(layer.get_variables()), before)


@pytest.mark.filterwarnings("ignore:Using 'Module.sow")
def test_nnx_states_with_sown_variables():
    class Sowing(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(3, 2, rngs=rngs)

        def __call__(self, x):
            hidden = self.linear(x)
            self.sow(nnx.Intermediate, "hidden", hidden)
            return hidden

    module = Sowing(nnx.Rngs(3))
    outputs = module(x(4, 3))
    layer = NNXLayer(Sowing(nnx.Rngs(0)))
    layer.set_variables(nnx.state(module))
    np.testing.assert_allclose(to_numpy(layer(x(4, 3))), outputs, 1e-5, 1e-6)


def test_nnx_decode_cache():
    module = nnx.MultiHeadAttention(2, 4, decode=True, rngs=nnx.Rngs(0))
    module.init_cache((2, 5, 4))
    layer = NNXLayer(module)
    steps = x(2, 5, 4)
    for step in range(5):
        part = steps[:, step : step + 1]
        np.testing.assert_allclose(to_numpy(layer(part)), module(part), 1e-4, 1e-5)


def test_what_is_no_nnx_module():
    with pytest.raises(TypeError, match="from_factory"):
        NNXLayer(lambda rngs: NnxCnn(rngs))


# Haiku.


def test_haiku_transforms():
    inputs = x(4, 3)
    plain = hk.transform(lambda x: hk.nets.MLP([5, 2])(x))
    for transformed, extra in ((plain, (None,)), (hk.without_apply_rng(plain), ())):
        layer = HaikuLayer(transformed, seed=0)
        outputs = to_numpy(layer(inputs))
        native = transformed.apply(layer.get_variables()["params"], *extra, inputs)
        np.testing.assert_allclose(outputs, native, 1e-5, 1e-5)
        assert set(layer.get_variables()) == {"params"}


def test_haiku_given_values():
    transformed = hk.transform_with_state(lambda x, train: hk.BatchNorm(True, True, 0.9)(x, train))
    params, state = transformed.init(jax.random.key(0), x(4, 3), True)
    layer = HaikuLayer(transformed, params, state)
    assert layer.weights
    layer(x(4, 3), training=True)
    _, expected = transformed.apply(params, state, None, x(4, 3), True)
    jax.tree.map(
        lambda one, two: np.testing.assert_allclose(one, two, 1e-5, 1e-6),
        layer.get_variables()["state"],
        expected,
    )


def test_haiku_multi_transform():
    def build():
        encoder, decoder = hk.Linear(2), hk.Linear(3)

        def both(x):
            return decoder(encoder(x))

        return both, {"encode": encoder, "decode": decoder}

    transformed = hk.multi_transform(build)
    params = transformed.init(jax.random.key(0), x(4, 3))
    encode = HaikuLayer(transformed, params, method="encode")
    decode = HaikuLayer(transformed, params, method="decode")
    np.testing.assert_allclose(
        to_numpy(decode(encode(x(4, 3)))),
        transformed.apply["decode"](
            params, None, transformed.apply["encode"](params, None, x(4, 3))
        ),
        1e-5,
        1e-5,
    )
    with pytest.raises(ValueError, match=r"one of \[.decode., .encode.\]; received None"):
        HaikuLayer(transformed, params)
    with pytest.raises(ValueError, match=r"`method` is for `hk.multi_transform`"):
        HaikuLayer(hk.transform(lambda x: x), method="encode")


def test_haiku_draws_in_inference_and_says_when_it_has_not():
    transformed = hk.transform(lambda x: x + jax.random.normal(hk.next_rng_key(), x.shape))
    layer = HaikuLayer(transformed, seed=3)
    first, second = (to_numpy(layer(x(4))) for _ in range(2))
    assert (first != second).any()
    still = HaikuLayer(hk.transform(lambda x: hk.Linear(2)(x)), seed=3)
    still(x(4, 3))
    assert still.seed_generator is None


# Equinox.


def test_equinox_shared_arrays_stay_shared():
    class Tied(eqx.Module):
        embed: jax.Array
        scale: jax.Array
        out: jax.Array

        def __call__(self, x):
            return self.scale * (x @ self.embed) @ self.out.T

    weight = jnp.asarray(x(3, 2))
    module = Tied(weight, jnp.ones(()), weight)
    layer = EquinoxLayer(module)
    assert paths(layer.trainable_variables) == {"params/embed", "params/scale"}
    np.testing.assert_allclose(to_numpy(layer(x(4, 3))), module(x(4, 3)), 1e-5, 1e-5)
    back = layer.module_with_weights()
    np.testing.assert_array_equal(back.out, back.embed)


def test_equinox_filter_spec():
    mlp = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
    nothing = jax.tree.map(lambda _: False, mlp)
    spec = eqx.tree_at(lambda m: m.layers[-1].weight, nothing, replace=True)
    layer = EquinoxLayer(mlp, filter_spec=spec, batch=True)
    assert paths(layer.trainable_variables) == {"params/layers/1/weight"}
    assert len(layer.weights) == 4
    np.testing.assert_allclose(to_numpy(layer(x(5, 3))), jax.vmap(mlp)(x(5, 3)), 1e-5, 1e-5)


def test_equinox_keys_differ_by_example_and_by_call():
    layer = EquinoxLayer(eqx.nn.Dropout(0.5), batch=True, seed=1)
    ones = np.ones((4, 50), "float32")
    first, second = (to_numpy(layer(ones, training=True)) for _ in range(2))
    assert (first != second).any()
    assert (first[0] != first[1]).any()
    np.testing.assert_array_equal(to_numpy(layer(ones)), ones)


def test_equinox_without_batch_and_with_several_arguments():
    class Bilinear(eqx.Module):
        weight: jax.Array

        def __call__(self, left, right, *, scale=1.0, power: int = 1):
            assert isinstance(power, int)
            return scale * (left @ self.weight * right) ** power

    module = Bilinear(jnp.asarray(x(3, 3)))
    for batch in (False, True):
        layer = EquinoxLayer(module, batch=batch)
        outputs = to_numpy(layer(x(4, 3), x(4, 3, seed=1), power=2))
        np.testing.assert_allclose(outputs, module(x(4, 3), x(4, 3, seed=1), power=2), 1e-4, 1e-5)


def test_what_is_no_equinox_module():
    with pytest.raises(TypeError, match="can be called"):
        EquinoxLayer(np.ones(3))


# Back to the library.


@pytest.mark.parametrize("name", ["nnx cnn", "equinox convnet", "equinox mlp"])
def test_module_with_weights_gives_the_layer_s_outputs(name):
    entry = ZOO[name]
    layer = entry.make(seed=5)
    layer(entry.inputs, training=True)
    outputs = to_numpy(layer(entry.inputs))
    native = layer.module_with_weights()
    if name == "nnx cnn":
        native.eval()
        expected = native(entry.inputs)
    elif name == "equinox mlp":
        native = eqx.nn.inference_mode(native)
        expected = jax.vmap(native)(entry.inputs)
    else:
        module, state = native
        module = eqx.nn.inference_mode(module)
        expected, _ = jax.vmap(module, (0, None), (0, None), axis_name="batch")(entry.inputs, state)
    np.testing.assert_allclose(outputs, expected, 1e-5, 1e-5)


# wrap.


def test_wrap_picks_by_type():
    transformed = hk.transform(lambda x: x)
    assert type(jaxwrap.wrap(nn.Dense(2))) is FlaxLayer
    assert type(jaxwrap.wrap(NnxAttention(nnx.Rngs(0)))) is NNXLayer
    assert type(jaxwrap.wrap(transformed)) is HaikuLayer
    assert (
        type(jaxwrap.wrap(hk.without_apply_rng(hk.transform_with_state(lambda x: x)))) is HaikuLayer
    )
    module, state = eqx.nn.make_with_state(EqxConvNet)(jax.random.key(0))
    assert type(jaxwrap.wrap(module, state=state, batch=True)) is EquinoxLayer
    assert type(jaxwrap.wrap(models.function_call)) is JaxLayer
    pair = jaxwrap.wrap((models.mlp_init, models.mlp_call), name="pair", seed=1)
    assert (type(pair), pair.name) == (JaxLayer, "pair")
    assert pair(x(2, 3)).shape == (2, 3)
    dense = keras.layers.Dense(2)
    assert jaxwrap.wrap(dense) is dense
    with pytest.raises(TypeError, match="is a Keras layer already, and takes no name"):
        jaxwrap.wrap(dense, name="a")


def test_wrap_of_what_nobody_knows():
    with pytest.raises(TypeError, match="there is no adapter for 3, a int") as raised:
        jaxwrap.wrap(3)
    message = str(raised.value)
    for name in (
        "FlaxLayer",
        "NNXLayer",
        "HaikuLayer",
        "EquinoxLayer",
        "JaxLayer",
        "register_adapter",
    ):
        assert name in message


def test_wrap_imports_nothing():
    import os
    import subprocess

    code = (
        "import jaxwrap, sys\n"
        "jaxwrap.wrap(lambda inputs: inputs)\n"
        "assert not {'flax', 'haiku', 'equinox'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], env=dict(os.environ), check=True)


def test_register_adapter():
    class Mine:
        def __init__(self, factor):
            self.factor = factor

    def mine_layer(mine, **kwargs):
        return JaxLayer(lambda inputs: inputs * mine.factor, **kwargs)

    jaxwrap.register_adapter(lambda obj: isinstance(obj, Mine), mine_layer)
    layer = jaxwrap.wrap(Mine(3), name="mine")
    assert layer.name == "mine"
    np.testing.assert_allclose(to_numpy(layer(np.ones(2, "float32"))), [3, 3])
    with pytest.raises(TypeError, match="expected a function"):
        jaxwrap.register_adapter(Mine, "layer")


# What is not installed, or old.


@pytest.mark.parametrize(
    ("make", "library"),
    [
        (lambda: FlaxLayer(None), "flax"),
        (lambda: NNXLayer(None), "flax"),
        (lambda: HaikuLayer(None), "haiku"),
        (lambda: EquinoxLayer(None), "equinox"),
    ],
)
def test_what_to_install(make, library, monkeypatch):
    import importlib.metadata
    import importlib.util

    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(
            ImportError, match=rf"needs '{library}'.*pip install jaxwrap\[{library}\]"
        ):
            make()
    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "version", lambda name: "0.0.1")
        with pytest.raises(ImportError, match=r"or newer; 0\.0\.1 is installed"):
            make()


# Methods and axes of Equinox modules.


class Euler(eqx.Module):
    """Integrates for one example, over times that all examples share."""

    rate: jax.Array

    def __init__(self, key):
        self.rate = jax.random.normal(key, (3,))

    def __call__(self, y, ts):
        def step(y, dt):
            y = y + dt * jnp.tanh(self.rate * y)
            return y, y

        return jax.lax.scan(step, y, jnp.diff(ts))[1]

    def rates(self, y):
        return self.rate * y


def test_equinox_leaves_arguments_unbatched():
    module = Euler(jax.random.key(0))
    layer = EquinoxLayer(module, batch=True, unbatched=("ts",))
    ys, ts = x(5, 3), np.linspace(0, 1, 4).astype("float32")
    expected = jax.vmap(module, (0, None))(ys, ts)
    np.testing.assert_allclose(
        to_numpy(layer(ys, ts=keras.ops.convert_to_tensor(ts))), expected, 1e-5
    )
    again = EquinoxLayer.from_config(
        EquinoxLayer(
            eqx.nn.Linear(3, 2, key=jax.random.key(0)), batch=True, unbatched=()
        ).get_config()
    )
    assert again.adapter.unbatched == ()
    with pytest.raises(ValueError, match=r"`unbatched` names \['t'\].*It takes y, ts"):
        EquinoxLayer(module, batch=True, unbatched=("t",))
    with pytest.raises(ValueError, match="`unbatched` must be a tuple of names"):
        EquinoxLayer(module, batch=True, unbatched="ts")


def test_equinox_methods():
    module = Euler(jax.random.key(0))
    ys = x(5, 3)
    for method in ("rates", module.rates, lambda module, y: module.rates(y)):
        layer = EquinoxLayer(module, method=method, batch=True)
        np.testing.assert_allclose(to_numpy(layer(ys)), jax.vmap(module.rates)(ys), 1e-6)


@jaxwrap.register_serializable("adapters")
class Bound(nn.Module):
    features: int = 2

    @nn.compact
    def __call__(self, inputs):
        return self.double(inputs)

    @nn.compact
    def double(self, inputs):
        return 2 * nn.Dense(self.features)(inputs)


def test_a_bound_method_of_an_equal_module_is_saved(tmp_path):
    layer = FlaxLayer(Bound(), method=Bound().double)
    config = layer.get_config()
    assert config["method"] == "double"
    again = FlaxLayer.from_config(config)
    given = x(3, 4)
    layer(given)
    again(given)
    again.set_variables(layer.get_variables())
    np.testing.assert_array_equal(to_numpy(again(given)), to_numpy(layer(given)))
    other = FlaxLayer(Bound(), method=Bound(features=3).double)
    model = keras.Sequential([keras.Input((4,)), other])
    with pytest.raises(TypeError, match=r"`layer\.method` is a method that a file cannot name"):
        model.save(tmp_path / "model.keras")
