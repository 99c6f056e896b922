"""Checks on eight virtual devices; `test_distribution.py` runs each in a process of its own.

Argument: the name of a function. Each compares with one device in the same process.
"""

import contextlib
import pathlib
import sys
import tempfile

import flax.linen as nn
import keras
import numpy as np
import optax

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


def spec(variable):
    """Returns the axes of a variable's value, with one for each dimension."""
    axes = tuple(variable.value.sharding.spec)
    return axes + (None,) * (len(variable.shape) - len(axes))


def assert_same(received, expected):
    assert received.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_allclose(received[path], value, err_msg=path, **CLOSE)


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


if __name__ == "__main__":
    globals()[sys.argv[1]]()
