"""AdamW of optax as a Keras optimizer, beside Keras's own: a step of training, and the update of it alone."""

import functools

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax

import jaxwrap
from benchmarks import rows
from benchmarks.backends import BACKEND, ready, tensor
from benchmarks.models import MODELS
from benchmarks.timing import race
from benchmarks.training import LOOP, epoch, loop, wrapped

NATIVE = "optax"
OWN = "keras.optimizers.AdamW"
OURS = "jaxwrap.OptaxOptimizer"


def optimizer(rounds, seconds):
    model = MODELS["transformer"]
    ours = functools.partial(jaxwrap.OptaxOptimizer, optax.adamw)
    own = functools.partial(keras.optimizers.AdamW, weight_decay=1e-4)
    layer = functools.partial(wrapped, model, jaxwrap.FlaxLayer)
    makers = {
        OWN: functools.partial(epoch, model, layer, own),
        OURS: functools.partial(epoch, model, layer, ours),
    }
    targets = {(OURS, OWN): 1.0}
    if BACKEND == "jax":
        makers[LOOP] = functools.partial(loop, model, optax.adamw)
        targets[OURS, LOOP] = 1.05
    done = race(makers, rounds, seconds)
    what = f"step of `fit` with AdamW, {model.title}"
    yield from rows.compare("optimizer", what, done, [OWN, *makers.keys() & {LOOP}], targets)

    leaves, structure = jax.tree_util.tree_flatten(model.variables()["params"])
    rng = np.random.default_rng(0)
    gradients = [rng.normal(size=leaf.shape).astype("float32") for leaf in leaves]
    update = {"jax": _stateless, "tensorflow": _graph, "torch": _eager}[BACKEND]
    makers = {
        OWN: functools.partial(update, own, leaves, gradients),
        OURS: functools.partial(update, ours, leaves, gradients),
    }
    if BACKEND == "jax":
        makers[NATIVE] = functools.partial(_native, structure, leaves, gradients)
    done = race(makers, rounds, seconds)
    # Of a step, the small part that an optimizer is. Here optax and Keras differ by what they compute.
    what = f"the update alone, {model.title}"
    yield from rows.compare("optimizer", what, done, [OWN])


def _made(make, leaves):
    variables = [keras.Variable(leaf, name=f"leaf_{i}") for i, leaf in enumerate(leaves)]
    made = make(learning_rate=1e-3)
    made.build(variables)
    return made, variables


def _stateless(make, leaves, gradients):
    made, variables = _made(make, leaves)
    gradients = list(map(jnp.asarray, gradients))
    # Their own, since they are given away at each step.
    values = [[jnp.array(v.value) for v in part] for part in (variables, made.variables)]

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, gradients):  # XLA reuses memory in the order of the arguments
        return made.stateless_apply(state, gradients, params)

    return _repeated(step, values, gradients)


def _native(structure, leaves, gradients):
    made = optax.adamw(1e-3)
    params = structure.unflatten([jnp.array(leaf) for leaf in leaves])
    gradients = structure.unflatten(list(map(jnp.asarray, gradients)))
    values = [params, made.init(params)]

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, gradients):
        updates, state = made.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return _repeated(step, values, gradients)


def _repeated(step, values, gradients):
    def run():
        values[:] = step(*values, gradients)
        jax.block_until_ready(values)

    return run


def _graph(make, leaves, gradients):
    import tensorflow as tf

    made, variables = _made(make, leaves)
    gradients = list(map(tensor, gradients))
    step = tf.function(lambda: made.apply(gradients, variables))

    def run():
        step()
        ready(variables[0].value)

    return run


def _eager(make, leaves, gradients):
    import torch

    made, variables = _made(make, leaves)
    gradients = list(map(tensor, gradients))

    def run():
        with torch.no_grad():
            made.apply(gradients, variables)

    return run
