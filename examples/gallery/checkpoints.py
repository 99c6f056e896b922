"""
Native checkpoint to Keras and back
===================================

Five libraries have trained a network each, and each has saved it by its
own means: ``.msgpack`` of Flax, Orbax, ``.npz``, ``.eqx`` of Equinox,
``.safetensors``. Load all five into Keras layers, and write them back.
"""

import pathlib
import tempfile

import equinox as eqx
import flax.linen as nn
import flax.serialization
import haiku as hk
import jax
import jax.numpy as jnp
import keras
import matplotlib.pyplot as plt
import numpy as np
import optax
import orbax.checkpoint as ocp
import safetensors.numpy
from flax import nnx
from sklearn.datasets import make_moons

import jaxwrap

folder = pathlib.Path(tempfile.mkdtemp())
key = jax.random.key(0)

# %%
# Five programs
# -------------
# They have nothing to do with Keras. All fit the same points by Optax.

x, y = make_moons(400, noise=0.15, random_state=0)
x = x.astype("float32")


@jax.jit(static_argnums=0)
def fit(apply, params):
    optimizer = optax.adam(1e-2)

    def loss(params):
        logits = apply(params, x)[:, 0]
        return optax.losses.sigmoid_binary_cross_entropy(
            logits, y
        ).mean()

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    carry = params, optimizer.init(params)
    (params, _), _ = jax.lax.scan(step, carry, length=400)
    return params


# %%
# Flax Linen, with Flax's own ``.msgpack``:


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in (32, 32):
            x = jnp.tanh(nn.Dense(width)(x))
        return nn.Dense(1)(x)


linen = MLP()
linen_params = fit(linen.apply, linen.init(key, x))
content = flax.serialization.to_bytes(linen_params)
(folder / "linen.msgpack").write_bytes(content)

# %%
# Flax NNX, with Orbax:


class NnxMLP(nnx.Module):
    def __init__(self, rngs):
        self.one = nnx.Linear(2, 32, rngs=rngs)
        self.two = nnx.Linear(32, 32, rngs=rngs)
        self.out = nnx.Linear(32, 1, rngs=rngs)

    def __call__(self, x):
        return self.out(jnp.tanh(self.two(jnp.tanh(self.one(x)))))


graph, state = nnx.split(NnxMLP(nnx.Rngs(1)))


def nnx_apply(state, x):
    return nnx.merge(graph, state)(x)


state = fit(nnx_apply, state)
with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(folder / "nnx.orbax", nnx.to_pure_dict(state))

# %%
# Haiku, with ``.npz``:

haiku = hk.without_apply_rng(
    hk.transform(
        lambda x: hk.nets.MLP([32, 32, 1], activation=jnp.tanh)(x)
    )
)
haiku_params = fit(haiku.apply, haiku.init(key, x))
flat = {
    f"{module}/{name}": value
    for module, names in haiku_params.items()
    for name, value in names.items()
}
np.savez(folder / "haiku.npz", **flat)

# %%
# Equinox, with ``.eqx``:

mlp = eqx.nn.MLP(2, 1, 32, 2, activation=jnp.tanh, key=key)
arrays, static = eqx.partition(mlp, eqx.is_array)


def eqx_apply(arrays, x):
    return jax.vmap(eqx.combine(arrays, static))(x)


arrays = fit(eqx_apply, arrays)
trained_mlp = eqx.combine(arrays, static)
eqx.tree_serialise_leaves(folder / "equinox.eqx", trained_mlp)

# %%
# Plain JAX, with ``.safetensors`` and names that nobody else uses:


def plain(params, inputs):
    *hidden, last = params
    for layer in hidden:
        inputs = jnp.tanh(inputs @ layer["w"] + layer["b"])
    return inputs @ last["w"] + last["b"]


def plain_init(rng, inputs):
    sizes = [inputs.shape[-1], 32, 32, 1]
    return [
        {
            "w": jax.random.normal(key, (rows, columns)) / rows**0.5,
            "b": jnp.zeros(columns),
        }
        for key, rows, columns in zip(
            jax.random.split(rng, 3), sizes[:-1], sizes[1:]
        )
    ]


plain_params = fit(plain, plain_init(key, x))
flat = {
    f"net.{index}.{name}": np.asarray(value)
    for index, layer in enumerate(plain_params)
    for name, value in layer.items()
}
safetensors.numpy.save_file(flat, folder / "plain.safetensors")

# %%
# Into Keras
# ----------
# A layer each, with random weights. Names in a file are found by
# themselves if they are those of the library. Others are patterns and
# replacements. ``dry_run`` prints the plan and changes nothing.

layers = {
    "linen.msgpack": jaxwrap.FlaxLayer(MLP()),
    "nnx.orbax": jaxwrap.wrap(NnxMLP(nnx.Rngs(7))),
    "haiku.npz": jaxwrap.HaikuLayer(haiku),
    "equinox.eqx": jaxwrap.EquinoxLayer(mlp, batch=True),
    "plain.safetensors": jaxwrap.JaxLayer(plain, plain_init),
}
names = {
    "plain.safetensors": {r"net\.(\d)\.(\w)": r"params/\1/\2"},
}
for file, layer in layers.items():
    layer.build(x.shape)
    print(file)
    jaxwrap.checkpoints.load(
        layer, folder / file, names=names.get(file), dry_run=True
    )
    print()

# %%
# Load, and compare with the programs that wrote the files.

native = {
    "linen.msgpack": lambda x: linen.apply(linen_params, x),
    "nnx.orbax": lambda x: nnx_apply(state, x),
    "haiku.npz": lambda x: haiku.apply(haiku_params, x),
    "equinox.eqx": lambda x: eqx_apply(arrays, x),
    "plain.safetensors": lambda x: plain(plain_params, x),
}
for file, layer in layers.items():
    jaxwrap.checkpoints.load(
        layer, folder / file, names=names.get(file)
    )
    loaded = keras.ops.convert_to_numpy(layer(x))
    difference = np.abs(loaded - native[file](x)).max()
    print(f"{file:<19}largest difference {difference:.0e}")

# %%
# A file that does not fit
# ------------------------
# One error lists all that is wrong, and no weight has changed.

try:
    jaxwrap.checkpoints.load(
        layers["linen.msgpack"], folder / "plain.safetensors"
    )
except ValueError as error:
    print(str(error).replace(". ", ".\n"))

# %%
# And back
# --------
# ``save`` writes each format, and the library reads the file. Any layer
# goes into any format that has names.

layer = layers["linen.msgpack"]
jaxwrap.checkpoints.save(layer, folder / "back.msgpack")
content = (folder / "back.msgpack").read_bytes()
back = flax.serialization.from_bytes(linen_params, content)
same = jax.tree.map(np.array_equal, back, linen_params)
print("equal:", all(jax.tree.leaves(same)))

# %%
# Five networks, twice
# --------------------
# The colour is Keras's answer, the lines are those of the programs that
# wrote the files.

xs = np.linspace(-1.6, 2.6, 120, dtype="float32")
ys = np.linspace(-1.1, 1.6, 100, dtype="float32")
grid = np.stack(np.meshgrid(xs, ys), axis=-1).reshape(-1, 2)
figure, all_axes = plt.subplots(
    1, 5, figsize=(12, 2.6), layout="constrained", sharey=True
)
for axes, (file, layer) in zip(all_axes, layers.items()):
    answer = keras.ops.convert_to_numpy(layer(grid))
    answer = 1 / (1 + np.exp(-answer)).reshape(100, 120)
    axes.contourf(xs, ys, answer, 12, cmap="RdBu", vmin=-0.6, vmax=1.6)
    logits = np.asarray(native[file](grid)).reshape(100, 120)
    axes.contour(xs, ys, logits, [-4, 0, 4], colors="k", linewidths=1)
    axes.scatter(*x.T, c=y, cmap="RdBu", s=4)
    axes.set_title(file)
    axes.set_axis_off()
plt.show()
