"""Eager inference: a layer called on a tensor of the backend, beside the jitted call of its module."""

import functools

import jax
import jax.numpy as jnp
import keras
import numpy as np
from flax import nnx

import jaxwrap
from benchmarks import rows
from benchmarks.backends import BACKEND, no_gradients, ready, tensor
from benchmarks.bridges import bridges
from benchmarks.models import MODELS, tree
from benchmarks.native_models import own_layers
from benchmarks.timing import race

NATIVE = "jitted JAX"
TARGETS = {
    "mlp": {"jax": 1.2, "tensorflow": 1.8, "torch": 1.3, "numpy": 1.3},
    "tree": {"tensorflow": 2.5, "torch": 1.5, "numpy": 1.5},
    "resnet": dict.fromkeys(("jax", "tensorflow", "torch", "numpy"), 1.05),
}


def eager(rounds, seconds):
    for name, model in MODELS.items():
        module, inputs = model.make(), model.inputs()
        layers = {
            "jaxwrap": lambda module=module, model=model: jaxwrap.FlaxLayer(
                module, variables=model.variables()
            ),
            "keras.layers.FlaxLayer": lambda module=module, model=model: keras.layers.FlaxLayer(
                module, variables=model.variables()
            ),
        }
        own = own_layers(name)
        run = _race(name, model.title, module.apply, model.variables, layers, inputs, own, module)
        yield from run(rounds, seconds)


def eager_tree(rounds, seconds):
    params, call = tree(2000)
    layers = {
        "jaxwrap": lambda: jaxwrap.JaxLayer(call, params=params),
        "keras.layers.JaxLayer": lambda: keras.layers.JaxLayer(call, params=params),
    }
    inputs = np.ones((1, 4), "float32")
    yield from _race("tree", "2,000 leaves", call, lambda: params, layers, inputs)(rounds, seconds)


def _race(name, title, apply, variables, layers, inputs, own=None, module=None):
    """All that can be called on these inputs, the native call first and jaxwrap beside it."""

    def native():
        call, values, x = jax.jit(apply), variables(), jnp.asarray(inputs)
        return lambda: jax.block_until_ready(call(values, x))

    def layer(make):
        def prepare():
            made, x = make(), tensor(inputs)
            return lambda: ready(made(x, training=False))

        return prepare

    def bridge(make):
        def prepare():
            (call, _), x = make(apply, variables()), tensor(inputs)
            return lambda: ready(call(x))

        return prepare

    makers = {NATIVE: native}
    makers |= {label: layer(make) for label, make in layers.items()}
    makers |= {label: bridge(make) for label, make in bridges().items()}
    if BACKEND == "jax" and module is not None:
        makers["flax.nnx.bridge"] = functools.partial(_nnx_bridge, module, variables, inputs)
    if own is not None:
        makers[own[0]] = _own_layers(own, inputs)
    expected = np.asarray(native()())

    def check(label, outputs):
        # The backend's own layers begin with weights of their own.
        if own is None or label != own[0]:
            outputs = keras.ops.convert_to_numpy(outputs)
            np.testing.assert_allclose(outputs, expected, atol=1e-3, rtol=1e-3)

    def run(rounds, seconds):
        with no_gradients():
            done = race(makers, rounds, seconds, check)
        target = TARGETS.get(name, {}).get(BACKEND)
        targets = {("jaxwrap", NATIVE): target}
        yield from rows.compare("eager", f"eager inference, {title}", done, [NATIVE], targets)

    return run


def _nnx_bridge(module, variables, inputs):
    """The Linen module as an NNX module, jitted."""
    x = jnp.asarray(inputs)
    bridged = nnx.bridge.ToNNX(module, rngs=nnx.Rngs(0)).lazy_init(x)
    for name, value in nnx.bridge.variables.linen_vars_to_nnx_attrs(variables()).items():
        setattr(bridged, name, value)
    call = nnx.jit(lambda bridged, x: bridged(x))
    return lambda: jax.block_until_ready(call(bridged, x))


def _own_layers(own, inputs):
    def prepare():
        model = own[1]()
        if BACKEND == "torch":
            x = in_torch_order(tensor(inputs))
            model.to(x.device).eval()
            return lambda: ready(model(x))
        x = tensor(inputs)
        return lambda: ready(model(x, training=False))

    return prepare


def in_torch_order(images):
    """Torch has the channels before height and width."""
    return images.permute(0, 3, 1, 2).contiguous() if images.ndim == 4 else images
