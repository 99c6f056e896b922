"""What XLA says of the compiled train step: flops, and bytes read and written.

Compared are the same mathematics: the gradient of the mean squared error, and SGD without momentum, once by a Keras
layer and a Keras optimizer in their stateless forms, which `fit` compiles too, once by flax and optax.
"""

import jax
import jax.numpy as jnp
import keras
import optax

import jaxwrap
from benchmarks import rows
from benchmarks.models import MODELS
from benchmarks.training import parts, train_step


def cost(rounds, seconds):
    for model in MODELS.values():
        x, y = jnp.asarray(model.inputs()), jnp.asarray(model.targets())
        ours, theirs = _ours(model, x, y), _native(model, x, y)
        for key, what in (("flops", "flops"), ("bytes accessed", "bytes")):
            values = [ours[key]], [theirs[key]]
            title = f"{what} of the compiled train step, {model.title}"
            yield rows.ratio("cost", title, "jaxwrap", "flax + optax", *values, (0.99, 1.01))


def _analysis(step, *arguments):
    donated = (0, 1, 2)
    analysis = jax.jit(step, donate_argnums=donated).lower(*arguments).compile().cost_analysis()
    return analysis[0] if isinstance(analysis, list) else analysis


def _native(model, x, y):
    optimizer = optax.sgd(0.1)
    params, state = parts(model.variables())
    step = train_step(model.make(), optimizer)
    return _analysis(step, params, state, optimizer.init(params), x, y)


def _ours(model, x, y):
    layer = jaxwrap.FlaxLayer(model.make(), variables=model.variables())
    layer(x)
    optimizer = keras.optimizers.SGD(0.1)
    optimizer.build(layer.trainable_variables)

    def loss_of(trainable, others, x, y):
        outputs, others = layer.stateless_call(trainable, others, x, training=True)
        return jnp.mean((outputs - y) ** 2), others

    def step(trainable, others, moments, x, y):
        gradient = jax.value_and_grad(loss_of, has_aux=True)
        (loss, others), gradients = gradient(trainable, others, x, y)
        trainable, moments = optimizer.stateless_apply(moments, gradients, trainable)
        return trainable, others, moments, loss

    kinds = (layer.trainable_variables, layer.non_trainable_variables, optimizer.variables)
    values = ([variable.value for variable in kind] for kind in kinds)
    return _analysis(step, *values, x, y)
