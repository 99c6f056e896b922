"""Real models of every library, small and randomly initialised, each with its native run.

The rows of `models.py` test what a layer does. These rows test what libraries do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import jraph
import numpy as np
from flax import nnx

from jaxwrap import EquinoxLayer, FlaxLayer, HaikuLayer, JaxLayer, NNXLayer


@dataclasses.dataclass(frozen=True)
class Entry:
    """A model of the zoo.

    Attributes:
        make: Makes the layer; takes `seed`.
        native: `native(variables, key, inputs, training)`, on what `layer.get_variables()` returns, gives outputs and
            the new variables, by the library alone.
        inputs: The inputs, a NumPy array.
        tolerance: The error that three steps of training may have.
        rate: The learning rate.
    """

    make: Callable[..., Any]
    native: Callable[..., Any]
    inputs: np.ndarray
    tolerance: float = 1e-4
    rate: float = 0.05


def floats(*shape):
    return np.random.default_rng(1).standard_normal(shape).astype("float32")


def tokens(*shape):
    return np.random.default_rng(1).integers(0, 11, shape).astype("int32")


# Haiku.


def haiku(function, inputs, tolerance=1e-4, rate=0.05):
    transformed = hk.transform_with_state(function)

    def native(variables, key, inputs, training):
        outputs, state = transformed.apply(
            variables["params"], variables["state"], key, inputs, training
        )
        return outputs, {"params": variables["params"], "state": state}

    return Entry(lambda **kw: HaikuLayer(transformed, **kw), native, inputs, tolerance, rate)


def hk_resnet(x, is_training):
    return hk.nets.ResNet18(3)(x, is_training)


def hk_mobilenet(x, is_training):
    return hk.nets.MobileNetV1((1, 2, 1), (8, 16, 16), num_classes=3)(x, is_training)


def hk_lstm(x, is_training):
    core = hk.LSTM(6)
    outputs, _ = hk.dynamic_unroll(core, x, core.initial_state(x.shape[0]), time_major=False)
    outputs = hk.Linear(2)(outputs)
    return hk.dropout(hk.next_rng_key(), 0.3, outputs) if is_training else outputs


# Flax NNX.


def nnx_entry(model, inputs, tolerance=1e-4):
    def native(variables, key, inputs, training):
        module = model(nnx.Rngs(0))
        graphdef, _, _ = nnx.split(module, nnx.Param, ...)
        module = nnx.merge(graphdef, variables["params"], variables["state"])
        module.train() if training else module.eval()
        outputs = module(inputs)
        _, _, state = nnx.split(module, nnx.Param, ...)
        return outputs, {"params": variables["params"], "state": nnx.to_pure_dict(state)}

    def make(seed=None, **kwargs):
        return NNXLayer(model(nnx.Rngs(seed)), seed=seed, **kwargs)

    return Entry(make, native, inputs, tolerance)


class NnxCnn(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])
        self.tied = self.blocks[0]

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x))).mean((1, 2))
        for block in self.blocks:
            x = nnx.tanh(block(x))
        return self.tied(self.dropout(x))


class NnxAttention(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, dropout_rate=0.2, decode=False, rngs=rngs)
        self.out = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(self.attention(self.embed(x)))


class NnxRnn(nnx.Module):
    def __init__(self, rngs):
        self.rnn = nnx.RNN(nnx.GRUCell(3, 5, rngs=rngs))
        self.out = nnx.Linear(5, 2, rngs=rngs)

    def __call__(self, x):
        return self.out(self.rnn(x))


class NnxScanned(nnx.Module):
    """Layers made by `nnx.vmap`, applied by `nnx.scan`, recomputed by `nnx.remat`."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs):
            return nnx.Linear(4, 4, rngs=rngs)

        self.layers = make(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def apply(x, layer):
            return nnx.remat(lambda layer, x: nnx.tanh(layer(x)))(layer, x)

        return apply(x, self.layers)


# Equinox.


def equinox(make_module, inputs, stateful=False, tolerance=1e-4):
    def make(seed=None, **kwargs):
        key = jax.random.key(seed or 0)
        module, state = make_module(key) if stateful else (make_module(key), None)
        return EquinoxLayer(module, state, batch=True, seed=seed, **kwargs)

    def native(variables, key, inputs, training):
        module, state = (
            make_module(jax.random.key(0)) if stateful else (make_module(jax.random.key(0)), None)
        )
        module = eqx.nn.inference_mode(module, not training)
        arrays, static = eqx.partition(module, eqx.is_array)
        leaves = jax.tree.leaves((variables["params"], variables["state"]["module"]))
        order = jax.tree.leaves(eqx.partition(arrays, eqx.is_inexact_array))
        # The parameters stand before the other arrays.
        places = {id(leaf): value for leaf, value in zip(order, leaves, strict=True)}
        module = eqx.combine(jax.tree.map(lambda leaf: places[id(leaf)], arrays), static)
        keys = jax.random.split(key, len(inputs))
        if not stateful:
            return jax.vmap(lambda x, key: module(x, key=key))(inputs, keys), variables
        state = jax.tree.unflatten(
            jax.tree.structure(state), jax.tree.leaves(variables["state"]["state"])
        )
        outputs, state = jax.vmap(
            lambda x, key, state: module(x, state, key=key),
            (0, 0, None),
            (0, None),
            axis_name="batch",
        )(inputs, keys, state)
        new = {"module": variables["state"]["module"], "state": state}
        return outputs, {"params": variables["params"], "state": new}

    return Entry(make, native, inputs, tolerance)


class EqxMlp(eqx.Module):
    mlp: eqx.nn.MLP
    dropout: eqx.nn.Dropout

    def __init__(self, key):
        self.mlp = eqx.nn.MLP(4, 3, 8, 2, key=key)
        self.dropout = eqx.nn.Dropout(0.3)

    def __call__(self, x, *, key=None):
        return self.dropout(self.mlp(x), key=key)


class EqxConvNet(eqx.Module):
    conv: eqx.nn.Conv2d
    norm: eqx.nn.BatchNorm
    linear: eqx.nn.Linear

    def __init__(self, key):
        one, two = jax.random.split(key)
        self.conv = eqx.nn.Conv2d(2, 4, 3, key=one)
        self.norm = eqx.nn.BatchNorm(4, axis_name="batch", mode="batch")
        self.linear = eqx.nn.Linear(4, 3, key=two)

    def __call__(self, x, state, *, key=None):
        x, state = self.norm(self.conv(x), state)
        return self.linear(jax.nn.relu(x).mean((1, 2))), state


class EqxGru(eqx.Module):
    cell: eqx.nn.GRUCell
    linear: eqx.nn.Linear

    def __init__(self, key):
        one, two = jax.random.split(key)
        self.cell = eqx.nn.GRUCell(3, 5, key=one)
        self.linear = eqx.nn.Linear(5, 2, key=two)

    def __call__(self, x, *, key=None):
        def step(hidden, x):
            return self.cell(x, hidden), None

        hidden, _ = jax.lax.scan(step, jnp.zeros(5), x)
        return self.linear(hidden)


class NeuralOde(eqx.Module):
    """A diffrax neural ordinary differential equation."""

    field: eqx.nn.MLP

    def __init__(self, key):
        self.field = eqx.nn.MLP(2, 2, 8, 1, activation=jnp.tanh, key=key)

    def __call__(self, x, *, key=None):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: self.field(y)),
            diffrax.Tsit5(),
            t0=0.0,
            t1=1.0,
            dt0=0.25,
            y0=x,
            stepsize_controller=diffrax.ConstantStepSize(),
            throw=False,  # a check that raises calls back into Python, which no TensorFlow graph can
        )
        return solution.ys[0]


# Flax Linen.


def linen(module, inputs, tolerance=1e-4, flag=None):
    def native(variables, key, inputs, training):
        state = [name for name in variables if name != "params"]
        flags = {flag: training} if flag else {}
        streams = {"dropout": key, "params": jax.random.fold_in(key, 1)} if training else {}
        outputs, new = module.apply(variables, inputs, rngs=streams, mutable=state, **flags)
        return outputs, {**variables, **new}

    return Entry(lambda **kw: FlaxLayer(module, **kw), native, inputs, tolerance)


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Embed(11, 8)(x)
        mask = nn.make_causal_mask(x[..., 0])
        attended = nn.MultiHeadDotProductAttention(2, dropout_rate=0.1, deterministic=not train)(
            nn.LayerNorm()(x), mask=mask
        )
        x = x + nn.Dropout(0.1, deterministic=not train)(attended)
        hidden = nn.gelu(nn.Dense(16)(nn.LayerNorm()(x)))
        return x + nn.Dropout(0.1, deterministic=not train)(nn.Dense(8)(hidden))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return jnp.tanh(nn.Dense(x.shape[-1])(x)), None


class Scanned(nn.Module):
    """Layers stacked by `nn.scan`, each recomputed by `nn.remat`."""

    @nn.compact
    def __call__(self, x):
        scanned = nn.scan(
            nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return scanned()(x, None)[0]


class Spectral(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.SpectralNorm(nn.Dense(6))(x, update_stats=train)
        return nn.Dense(2)(nn.tanh(x))


# A graph network, as a pure function.


def graph_call(params, inputs):
    """Message passing on a ring of nodes."""

    def one(nodes):
        count = nodes.shape[0]
        senders = jnp.arange(count)
        graph = jraph.GraphsTuple(
            nodes=nodes,
            edges=None,
            senders=senders,
            receivers=(senders + 1) % count,
            globals=None,
            n_node=jnp.array([count]),
            n_edge=jnp.array([count]),
        )
        network = jraph.GraphConvolution(lambda nodes: jnp.tanh(nodes @ params["w"]))
        return network(graph).nodes @ params["out"]

    return jax.vmap(one)(inputs)


def graph_init(rng, inputs):
    one, two = jax.random.split(rng)
    return {
        "w": jax.random.normal(one, (inputs.shape[-1], 6)),
        "out": jax.random.normal(two, (6, 2)),
    }


def graph_native(variables, key, inputs, training):
    return graph_call(variables["params"], inputs), variables


ZOO = {
    "haiku resnet18": haiku(hk_resnet, floats(4, 32, 32, 3), 1e-3, rate=1e-4),
    "haiku mobilenet": haiku(hk_mobilenet, floats(4, 16, 16, 3), 1e-3),
    "haiku lstm": haiku(hk_lstm, floats(4, 5, 3)),
    "nnx cnn": nnx_entry(NnxCnn, floats(4, 6, 6, 2)),
    "nnx attention": nnx_entry(NnxAttention, tokens(4, 5)),
    "nnx rnn": nnx_entry(NnxRnn, floats(4, 5, 3)),
    "nnx scan, vmap and remat": nnx_entry(NnxScanned, floats(4, 4)),
    "equinox mlp": equinox(EqxMlp, floats(4, 4)),
    "equinox convnet": equinox(
        lambda key: eqx.nn.make_with_state(EqxConvNet)(key), floats(4, 2, 6, 6), stateful=True
    ),
    "equinox gru": equinox(EqxGru, floats(4, 5, 3)),
    "diffrax neural ode": equinox(NeuralOde, floats(4, 2)),
    "linen transformer": linen(Transformer(), tokens(4, 5), flag="train"),
    "linen rnn": linen(nn.RNN(nn.LSTMCell(5)), floats(4, 5, 3)),
    "linen scan and remat": linen(Scanned(), floats(4, 3)),
    "linen spectral norm": linen(Spectral(), floats(4, 3), flag="train"),
    "jraph": Entry(
        lambda **kw: JaxLayer(graph_call, graph_init, **kw), graph_native, floats(4, 5, 3)
    ),
}

# A row for each library, of those that compile soon.
QUICK = (
    "haiku lstm",
    "nnx attention",
    "equinox mlp",
    "linen scan and remat",
    "jraph",
)
# What else is lowered in a way of its own. The other rows differ from these only in what JAX makes of them.
EVERYWHERE = (*QUICK, "haiku mobilenet", "diffrax neural ode", "linen transformer")
