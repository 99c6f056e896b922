"""Checks on eight virtual devices; `test_distribution.py` runs each in a process of its own.

Arguments: names of functions, with an argument after "=". Each compares with one device in the same process.
"""

import contextlib
import pathlib
import sys
import tempfile

import flax.linen as nn
import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
from flax import nnx
from jax.sharding import PartitionSpec as P

import jaxwrap

register = jaxwrap.register_serializable("tests_on_devices")
# SGD: Adam turns the rounding noise of zero gradients into whole steps.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
SHARDED = {"up/kernel": (None, "model"), "up/bias": ("model",), "down/kernel": ("model", None)}


@register
class Net(nn.Module):
    """A perceptron with a mask and a running mean."""

    @nn.compact
    def __call__(self, x, training=False):
        x = nn.Dense(16, name="up")(x)
        x = nn.BatchNorm(use_running_average=not training, name="norm")(nn.tanh(x))
        x = nn.Dropout(0.3, deterministic=not training)(x)
        return nn.Dense(2, name="down")(x)


def devices(shape=(2, 4), sharded=SHARDED, **kwargs):
    """Returns a scope in which variables with these names are sharded, over no axis else."""
    mesh = keras.distribution.DeviceMesh(shape, ("batch", "model"))
    layouts = keras.distribution.LayoutMap(mesh)
    for name, axes in sharded.items():
        # The path and nothing more: `.*` in front would match optimizer state too.
        layouts[f"net/params/{name}"] = axes
    return keras.distribution.ModelParallel(
        layout_map=layouts, batch_dim_name="batch", **kwargs
    ).scope()


def data():
    rng = np.random.default_rng(0)
    return rng.standard_normal((32, 8)).astype("f4"), rng.standard_normal((32, 2)).astype("f4")


def make(optimizer, scope=None):
    keras.utils.clear_session(free_memory=False)  # equal names
    with scope or contextlib.nullcontext():
        keras.utils.set_random_seed(0)
        inputs = keras.Input((8,))
        model = keras.Model(inputs, jaxwrap.FlaxLayer(Net(), seed=1, name="net")(inputs))
        model.compile(optimizer(), "mse")
    return model


def fit(model, scope=None, epochs=2, **kwargs):
    with scope or contextlib.nullcontext():
        return model.fit(
            *data(), batch_size=8, epochs=epochs, shuffle=False, verbose=0, **kwargs
        ).history["loss"]


def values(model):
    """Returns variables and optimizer state by path."""
    variables = [*model.variables, *model.optimizer.variables]
    return {v.path: keras.ops.convert_to_numpy(v.value) for v in variables}


def flat(variables):
    """Returns the arrays of nested dicts by path."""
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    return {"/".join(key.key for key in path): leaf for path, leaf in leaves}


def spec(variable):
    """Returns the axes of a variable's value, with one for each dimension."""
    axes = tuple(variable.value.sharding.spec)
    return axes + (None,) * (len(variable.shape) - len(axes))


def assert_same(received, expected):
    assert received.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_allclose(received[path], value, err_msg=path, **CLOSE)


RULES = (("rows", "batch"), ("mlp", "model"))


@register
class Constrained(nn.Module):
    """A perceptron that says where its activations are: in JAX's words, in Flax's, and by a function for each shard."""

    says: bool = True

    @nn.compact
    def __call__(self, x):
        if self.says:
            x = jax.lax.with_sharding_constraint(x, P("batch", None))
        x = nn.tanh(nn.Dense(16, name="up")(x))
        if self.says:
            x = nn.with_logical_constraint(x, ("rows", "mlp"))
            x = x - jax.shard_map(
                lambda part: jax.lax.pmean(part.mean(0, keepdims=True), "batch"),
                in_specs=P("batch", "model"),
                out_specs=P(None, "model"),
            )(x)
        else:
            x = x - x.mean(0, keepdims=True)
        return nn.Dense(2, name="down")(x)


@register
class ConstrainedNNX(nnx.Module):
    def __init__(self, *, rngs):
        self.up = nnx.Linear(8, 16, rngs=rngs)

    def __call__(self, x):
        return nn.with_logical_constraint(self.up(x), ("rows", "mlp"))


def constraints(layer, x):
    """Returns how many constraints the HLO of a call has, by what they say, and how many functions of shards."""
    arguments = [[v.value for v in layer.trainable_variables]]
    arguments.append([v.value for v in layer.non_trainable_variables])
    text = jax.jit(lambda *values: layer.stateless_call(*values, x)[0]).lower(*arguments).as_text()
    found = [
        line.split("<@mesh, ")[1].split(">")[0]
        for line in text.splitlines()
        if "sdy.sharding_constraint" in line
    ]
    return found, text.count("sdy.manual_computation")


def momentum():
    return jaxwrap.OptaxOptimizer(optax.sgd, 0.05, momentum=0.9)


def optimizer_state():
    """State that belongs to a variable lies as the variable does, before and after training."""
    model = make(lambda: jaxwrap.OptaxOptimizer(optax.adam, 0.01), devices())
    with devices():
        model.optimizer.build(model.trainable_variables)
    for _ in range(2):
        adam, *_ = model.optimizer.state
        layer = model.get_layer("net")
        for name, axes in SHARDED.items():
            one, two = name.split("/")
            assert spec(layer.params["params"][one][two]) == axes
            for moments in (adam.mu, adam.nu):
                assert spec(moments["net"]["params"][one][two]) == axes, name
        assert spec(adam.mu["net"]["params"]["down"]["bias"]) == (None,)
        assert adam.count.value.sharding.is_fully_replicated
        fit(model, devices(), epochs=1)
    # Of the shapes of factors no variable is.
    factored = make(
        lambda: jaxwrap.OptaxOptimizer(optax.adafactor, 0.01, min_dim_size_to_factor=2), devices()
    )
    with devices():
        factored.optimizer.build(factored.trainable_variables)
    specs = {v.path: spec(v) for v in factored.optimizer.variables}
    assert specs["optax_optimizer/opt_state/0/v/net/params/up/bias"] == ("model",)
    assert specs["optax_optimizer/opt_state/0/v_row/net/params/up/kernel"] == (None,)
    fit(factored, devices(), epochs=1)
    assert specs == {v.path: spec(v) for v in factored.optimizer.variables}


def optimizer_values():
    """Training is equal to one device, masks and Adam's first moments included, and goes on from files."""
    one, many = make(momentum), make(momentum, devices())
    np.testing.assert_allclose(fit(many, devices()), fit(one), rtol=1e-5)
    assert_same(values(many), values(one))
    fit(one)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "model.keras")
        many.save(path)
        with devices():
            again = keras.models.load_model(path)
    fit(again, devices())
    trace, *_ = again.optimizer.state
    assert spec(trace.trace["net"]["params"]["up"]["kernel"]) == (None, "model")
    assert_same(values(again), values(one))

    def adam():
        return jaxwrap.OptaxOptimizer(optax.adam, 0.0)

    # The rate is 0, so the noise that Adam makes does not reach the variables.
    one, many = make(adam), make(adam, devices())
    fit(one), fit(many, devices())
    assert_same(values(many), values(one))


def optimizer_again():
    """An optimizer that is built again keeps the state of variables that stay, where it is."""
    model = make(momentum, devices())
    fit(model, devices(), epochs=1)
    before = values(model)
    model.get_layer("net").freeze("params/up/.*")
    with devices():
        model.optimizer.build(model.trainable_variables)
    path = "optax_optimizer/opt_state/0/trace/net/params/down/kernel"
    np.testing.assert_array_equal(values(model)[path], before[path])
    variables = {v.path: v for v in model.optimizer.variables}
    assert spec(variables[path]) == ("model", None)
    assert not any("up" in path for path in variables)


def constraints_inside():
    """What a module says about its activations holds, in every kind of layer, and in shapes."""
    x, y = data()
    histories = []
    for says, scope in ((False, contextlib.nullcontext()), (True, devices())):
        with scope:
            keras.utils.set_random_seed(0)
            inputs = keras.Input((8,))
            layer = jaxwrap.FlaxLayer(Constrained(says), seed=1, axis_rules=RULES)
            model = keras.Model(inputs, layer(inputs))
            assert model.output_shape == (None, 2)
            model.compile(keras.optimizers.SGD(0.1), "mse")
            histories.append(model.fit(x, y, batch_size=8, shuffle=False, epochs=2, verbose=0))
    np.testing.assert_allclose(
        histories[0].history["loss"], histories[1].history["loss"], rtol=1e-5
    )
    rows, both = '[{"batch"}, {}]', '[{"batch"}, {"model"}]'
    with devices():
        assert constraints(layer, x) == ([rows, both], 1)
        again = jaxwrap.FlaxLayer.from_config(layer.get_config())
        again(x)
        assert constraints(again, x) == ([rows, both], 1)
        again.set_weights(layer.get_weights())
        np.testing.assert_allclose(again(x), layer(x), **CLOSE)
        # The other rules of Flax's context hold if the layer has none.
        plain = jaxwrap.FlaxLayer(Constrained())
        plain(x)
        assert constraints(plain, x) == ([rows], 1)
        with nn.logical_axis_rules((("mlp", "model"),)):
            assert constraints(plain, x) == ([rows, '[{}, {"model"}]'], 1)
        modules = jaxwrap.NNXLayer(ConstrainedNNX(rngs=nnx.Rngs(0)), axis_rules=RULES)
        assert modules(x).sharding.spec == P("batch", "model")
        assert constraints(modules, x) == ([both], 0)


def functions_of_shards():
    """Functions see the mesh of the moment: with parameters or without, after calls without a distribution too."""

    def halved(inputs):
        if jax.sharding.get_abstract_mesh().empty:
            return inputs / 2
        return jax.shard_map(lambda part: part / 2, in_specs=P("batch"), out_specs=P("batch"))(
            inputs
        )

    x, _ = data()
    layer, fn = jaxwrap.JaxLayer(halved), jaxwrap.wrap_function(halved)
    for _ in range(2):
        for call in (layer, fn):
            assert len(call(jnp.asarray(x)).sharding.device_set) == 1
            with devices():
                received = call(jnp.asarray(x))
            assert received.sharding.spec == P("batch")
            np.testing.assert_array_equal(received, x / 2)
    with devices():
        assert layer.compute_output_shape((None, 4)) == (None, 4)
        # Inside a trace, without a tracer.
        mesh = keras.distribution.distribution().device_mesh.backend_mesh
        x = jax.device_put(x[:8], jax.NamedSharding(mesh, P()))
        np.testing.assert_array_equal(jax.jit(lambda x: fn(jnp.ones((8, 8))) + x)(x), x + 0.5)


def loaded_elsewhere(folder):
    """What two processes have written loads onto another mesh, and onto one device."""
    expected = dict(np.load(pathlib.Path(folder, "expected.npz")))
    for scope in (contextlib.nullcontext, lambda: devices((4, 2))):
        model = make(momentum, scope())
        layer = model.get_layer("net")
        for path in sorted(pathlib.Path(folder).glob("weights.*")):
            layer.set_variables(jax.tree.map(np.zeros_like, layer.get_variables()))
            jaxwrap.checkpoints.load(layer, path)
            received = flat(layer.get_variables())
            assert received.keys() == expected.keys()
            for name, value in expected.items():
                np.testing.assert_array_equal(received[name], value, err_msg=f"{path} {name}")
        with scope():
            again = keras.models.load_model(pathlib.Path(folder, "model.keras"))
        assert len(
            again.get_layer("net").params["params"]["up"]["kernel"].value.sharding.device_set
        ) in (1, 8)


if __name__ == "__main__":
    for check in sys.argv[1:]:
        name, *arguments = check.split("=")
        globals()[name](*arguments)
