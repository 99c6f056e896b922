"""
A physics-informed network
==========================

Solve Poisson's equation, ``u_xx + u_yy = f`` with ``u = 0`` at the
border of a square, by a network that never sees a solution. Its loss is
the equation itself, with second derivatives by JAX.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import keras
import matplotlib.pyplot as plt
import numpy as np

import jaxwrap

keras.utils.set_random_seed(0)

# %%
# The problem
# -----------
# The right side is chosen so that the solution is known, for the
# pictures below.


def solution(x):
    return jnp.sin(jnp.pi * x[0]) * jnp.sin(2 * jnp.pi * x[1])


def right_side(x):
    return -5 * jnp.pi**2 * solution(x)


# %%
# The network and its losses
# --------------------------
# The network takes one point. The layer maps it over a batch, and
# computes the Laplacian of each point from the Hessian of the network.
# It returns the field, and two losses by name in a ``CallResult``.


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(3):
            x = jnp.tanh(nn.Dense(32)(x))
        return nn.Dense(1)(x)[0]


network = Network()
border = np.linspace(0, 1, 64, dtype="float32")
zero, one = np.zeros_like(border), np.ones_like(border)
border = np.concatenate(
    [
        np.stack(pair, axis=-1)
        for pair in (
            (border, zero),
            (border, one),
            (zero, border),
            (one, border),
        )
    ]
)


def init(rng, inputs):
    return network.init(rng, inputs[0])


def call(params, inputs, training):
    def u(x):
        return network.apply(params, x)

    field = jax.vmap(u)(inputs)
    if not training:
        return field

    def residual(x):
        return jnp.trace(jax.hessian(u)(x)) - right_side(x)

    losses = {
        "equation": 1e-3 * (jax.vmap(residual)(inputs) ** 2).mean(),
        "border": (jax.vmap(u)(border) ** 2).mean(),
    }
    return jaxwrap.CallResult(field, losses=losses)


layer = jaxwrap.JaxLayer(call, init, name="poisson")
model = keras.Sequential([keras.Input((2,)), layer])

# %%
# Training
# --------
# There are no labels, so ``compile`` needs no loss. ``fit`` minimizes
# those of the layer, and shows each by its name.

rng = np.random.default_rng(0)
points = rng.uniform(size=(4096, 2)).astype("float32")
epochs = 60
schedule = keras.optimizers.schedules.CosineDecay(
    5e-3, epochs * len(points) // 128
)
model.compile(keras.optimizers.Adam(schedule))
history = model.fit(points, epochs=epochs, batch_size=128, verbose=0)
for name, values in history.history.items():
    print(f"{name:<20}{values[0]:9.2e} -> {values[-1]:8.2e}")

# %%
# The field
# ---------

axis = np.linspace(0, 1, 100, dtype="float32")
grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1)
field = model.predict(grid.reshape(-1, 2), batch_size=1000, verbose=0)
field = field.reshape(100, 100)
truth = np.asarray(jax.vmap(jax.vmap(solution))(grid))
error = field - truth
print(f"largest error: {np.abs(error).max():.4f}")

# %%

figure, all_axes = plt.subplots(
    1, 3, figsize=(10, 3.4), layout="constrained"
)
for axes, values, title in zip(
    all_axes[:2], (field, error), ("The network", "Its error")
):
    limit = np.abs(values).max()
    image = axes.imshow(
        values.T,
        extent=(0, 1, 0, 1),
        origin="lower",
        cmap="RdBu_r",
        vmin=-limit,
        vmax=limit,
    )
    figure.colorbar(image, ax=axes, shrink=0.8)
    axes.set(title=title, xlabel="x", ylabel="y")
for name, values in history.history.items():
    if "/" in name:
        all_axes[2].plot(values, label=name.partition("/")[2])
all_axes[2].set(title="Losses", xlabel="epoch", yscale="log")
all_axes[2].legend()
plt.show()
