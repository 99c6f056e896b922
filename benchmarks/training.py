"""Training: a step of `fit`, and forward and backward on torch, beside JAX and optax."""

import functools

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax

import jaxwrap
from benchmarks import rows
from benchmarks.backends import BACKEND, ready, tensor
from benchmarks.bridges import bridges
from benchmarks.inference import in_torch_order
from benchmarks.models import MODELS
from benchmarks.native_models import keras_layers, own_layers
from benchmarks.timing import race, race_in_both_orders

LOOP = "flax + optax"
BUILT_IN = "keras.layers.FlaxLayer"
KERAS = "keras.layers"
BY_OPTAX = "jaxwrap with OptaxOptimizer"


def train_step(module, optimizer):
    """One step of flax and optax. The loss is one that Keras computes alike: the figures are of the layer."""

    def loss_of(params, state, x, y):
        variables = {"params": params, **state}
        outputs, state = module.apply(variables, x, training=True, mutable=list(state))
        return jnp.mean((outputs - y) ** 2), state

    def step(params, state, moments, x, y):
        gradient = jax.value_and_grad(loss_of, has_aux=True)
        (loss, state), gradients = gradient(params, state, x, y)
        updates, moments = optimizer.update(gradients, moments, params)
        return optax.apply_updates(params, updates), state, moments, loss

    return step


def parts(variables):
    """The params, and the other collections."""
    return variables["params"], {k: v for k, v in variables.items() if k != "params"}


def fit(rounds, seconds):
    """An epoch of `fit` on arrays in memory, beside a loop that takes its batches from the same arrays."""
    targets = {
        "jax": {("jaxwrap", LOOP): 1.1, ("jaxwrap", BUILT_IN): 1.0},
        "tensorflow": {("jaxwrap", BUILT_IN): 1.0},
        "torch": {(BY_OPTAX, KERAS): 1.0},
    }[BACKEND]
    for name, model in MODELS.items():
        makers = {LOOP: functools.partial(loop, model)}
        layers = {"jaxwrap": jaxwrap.FlaxLayer, BUILT_IN: keras.layers.FlaxLayer}
        for label, layer in layers.items():
            makers[label] = functools.partial(
                epoch, model, functools.partial(wrapped, model, layer)
            )
        make_keras = keras_layers(name)
        if make_keras is not None and (BACKEND != "torch" or name == "mlp"):
            makers[KERAS] = functools.partial(epoch, model, make_keras)
        if BACKEND == "torch":
            layer = functools.partial(wrapped, model, jaxwrap.FlaxLayer)
            adam = functools.partial(jaxwrap.OptaxOptimizer, optax.adam)
            makers[BY_OPTAX] = functools.partial(epoch, model, layer, adam)
        done = race_in_both_orders(makers, rounds, seconds, lasting=200 * seconds)
        what = f"step of `fit`, {model.title}"
        yield from rows.compare("fit", what, done, [LOOP, BUILT_IN, KERAS], targets)


def wrapped(model, layer):
    inputs = keras.Input(model.shape, dtype=model.dtype)
    layer = layer(model.make(), variables=model.variables())
    return keras.Model(inputs, layer(inputs))


def epoch(model, make, optimizer=keras.optimizers.Adam):
    """An epoch of `fit`."""
    made, x, y = make(), model.inputs(model.steps), model.targets(model.steps)
    made.compile(optimizer(learning_rate=1e-3), "mse")
    return lambda: made.fit(x, y, batch_size=model.batch, shuffle=False, verbose=0)


def loop(model, optimizer=optax.adam):
    """An epoch of flax and optax."""
    optimizer = optimizer(1e-3)
    step = jax.jit(train_step(model.make(), optimizer), donate_argnums=(0, 1, 2))
    x, y = model.inputs(model.steps), model.targets(model.steps)
    params, state = parts(model.variables())
    kept = [params, state, optimizer.init(params)]

    def run():
        for start in range(0, len(x), model.batch):
            batch = slice(start, start + model.batch)
            *kept[:], loss = step(*kept, x[batch], y[batch])
        return float(loss)

    return run


def gradient(rounds, seconds):
    """Forward and backward on torch, from inputs to gradients of all params."""
    native = "jax.value_and_grad"
    limits = {
        "mlp": {("jaxwrap", native): 1.8, ("jaxwrap", "torch.nn"): 1.0},
        "transformer": {},
        "resnet": {("jaxwrap", native): 1.1},
    }
    for name, model in MODELS.items():
        expected = []
        makers = {
            native: functools.partial(_native_gradient, model),
            "jaxwrap": functools.partial(_layer_gradient, model),
        }
        own = own_layers(name)
        if own is not None:
            makers[own[0]] = functools.partial(_own_gradient, model, own[1])
        for label, bridge in bridges().items():
            makers[label] = functools.partial(_bridge_gradient, model, bridge)

        def check(label, loss, expected=expected):
            expected.append(float(loss))
            # Torch's own layers begin with weights of their own.
            if label != "torch.nn":
                np.testing.assert_allclose(expected[-1], expected[0], rtol=1e-3)

        done = race(makers, rounds, seconds, check, lasting=200 * seconds)
        what = f"forward and backward, {model.title}"
        yield from rows.compare("gradient", what, done, [native, "torch.nn"], limits[name])


def _native_gradient(model):
    module, x = model.make(), jnp.asarray(model.inputs())
    params, state = parts(model.variables())

    def loss_of(params, state, x):
        variables = {"params": params, **state}
        outputs, state = module.apply(variables, x, training=True, mutable=list(state))
        return jnp.mean(outputs**2), state

    call = jax.jit(jax.value_and_grad(loss_of, has_aux=True))
    return lambda: jax.block_until_ready(call(params, state, x))[0][0]


def _backward(call, parameters, x):
    def step():
        for parameter in parameters:
            parameter.grad = None
        loss = call(x).square().mean()
        loss.backward()
        return ready(loss.detach())

    return step


def _layer_gradient(model):
    layer, x = jaxwrap.FlaxLayer(model.make(), variables=model.variables()), tensor(model.inputs())
    layer(x)
    parameters = [variable.value for variable in layer.trainable_variables]
    return _backward(lambda x: layer(x, training=True), parameters, x)


def _own_gradient(model, make):
    x = in_torch_order(tensor(model.inputs()))
    made = make().to(x.device).train()
    return _backward(made, list(made.parameters()), x)


def _bridge_gradient(model, bridge):
    module = model.make()
    params, state = parts(model.variables())

    def apply(params, x):
        # The new state is dropped, which no figure of a bridge suffers from.
        variables = {"params": params, **state}
        return module.apply(variables, x, training=True, mutable=list(state))[0]

    call, parameters = bridge(apply, params)
    return _backward(call, parameters, tensor(model.inputs()))
