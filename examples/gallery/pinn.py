"""
A physics-informed network
==========================

Solve two equations by networks that never see a solution: Poisson's, on
a square, and Burgers', whose wave steepens to a shock. The loss is the
equation itself, with second derivatives by JAX.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import keras
import matplotlib.pyplot as plt
import numpy as np

import jaxwrap

keras.utils.set_random_seed(0)
rng = np.random.default_rng(0)

# %%
# The network and its losses
# --------------------------
# The network takes one point. The layer maps it over a batch, and over
# points of the border, where the values are known. It returns the
# field, and two losses by name in a ``CallResult``.


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(3):
            x = jnp.tanh(nn.Dense(32)(x))
        return nn.Dense(1)(x)[0]


network = Network()


def init(rng, inputs):
    return network.init(rng, inputs[0])


def make_model(residual, border, values, weight, name):
    def call(params, inputs, training):
        def u(x):
            return network.apply(params, x)

        field = jax.vmap(u)(inputs)
        if not training:
            return field
        equation = jax.vmap(lambda x: residual(u, x))(inputs)
        losses = {
            "equation": weight * (equation**2).mean(),
            "border": ((jax.vmap(u)(border) - values) ** 2).mean(),
        }
        return jaxwrap.CallResult(field, losses=losses)

    layer = jaxwrap.JaxLayer(call, init, name=name)
    return keras.Sequential([keras.Input((2,)), layer])


# %%
# There are no labels, so ``compile`` needs no loss. ``fit`` minimizes
# those of the layer, and shows each by its name.


def train(model, points, epochs):
    schedule = keras.optimizers.schedules.CosineDecay(
        5e-3, epochs * len(points) // 128
    )
    model.compile(keras.optimizers.Adam(schedule))
    history = model.fit(
        points, epochs=epochs, batch_size=128, verbose=0
    ).history
    for name, values in history.items():
        print(f"{name:<20}{values[0]:9.2e} -> {values[-1]:8.2e}")
    return history


# %%
# Poisson's equation
# ------------------
# ``u_xx + u_yy = f``, with ``u = 0`` at the border. The right side is
# chosen so that the solution is known, for the pictures below.


def solution(x):
    return jnp.sin(jnp.pi * x[0]) * jnp.sin(2 * jnp.pi * x[1])


def poisson(u, x):
    right_side = -5 * jnp.pi**2 * solution(x)
    return jnp.trace(jax.hessian(u)(x)) - right_side


line = np.linspace(0, 1, 64, dtype="float32")
zero, one = np.zeros_like(line), np.ones_like(line)
sides = [(line, zero), (line, one), (zero, line), (one, line)]
border = np.concatenate([np.stack(side, axis=-1) for side in sides])

square = make_model(poisson, border, 0.0, 1e-3, "poisson")
points = rng.uniform(size=(4096, 2)).astype("float32")
poisson_losses = train(square, points, epochs=50)

# %%
# Burgers' equation
# -----------------
# ``u_t + u u_x = nu u_xx`` for ``x`` from -1 to 1 and ``t`` from 0 to
# 1. It starts as a wave, ``-sin(pi x)``, and is zero at both ends.
# Its fast parts catch up with the slow ones.

viscosity = 0.02


def burgers(u, point):
    u_x, u_t = jax.grad(u)(point)
    u_xx = jax.hessian(u)(point)[0, 0]
    return u_t + u(point) * u_x - viscosity * u_xx


x = np.linspace(-1, 1, 128, dtype="float32")
sides = [(x, 0 * x), (0 * line - 1, line), (0 * line + 1, line)]
border = np.concatenate([np.stack(side, axis=-1) for side in sides])
values = np.where(border[:, 1] == 0, -np.sin(np.pi * border[:, 0]), 0)

wave = make_model(burgers, border, values, 0.1, "burgers")
points = rng.uniform((-1, 0), (1, 1), (4096, 2)).astype("float32")
burgers_losses = train(wave, points, epochs=80)

# %%
# The truth of the wave is an integral, as Cole and Hopf found: by
# Gauss-Hermite quadrature in float64.


def cole_hopf(x, t):
    nodes, weights = np.polynomial.hermite.hermgauss(100)
    place = x[..., None] - np.sqrt(4 * viscosity * t)[..., None] * nodes
    power = -np.cos(np.pi * place) / (2 * np.pi * viscosity)
    power = np.exp(power - power.max(axis=-1, keepdims=True)) * weights
    mean = (np.sin(np.pi * place) * power).sum(axis=-1)
    return -mean / power.sum(axis=-1)


# %%
# Fields and errors
# -----------------


def on_grid(model, first, second):
    grid = np.stack(np.meshgrid(first, second, indexing="ij"), axis=-1)
    points = grid.reshape(-1, 2).astype("float32")
    field = model.predict(points, batch_size=2000, verbose=0)
    return grid, field.reshape(grid.shape[:2])


line, x = np.linspace(0, 1, 100), np.linspace(-1, 1, 200)
grid, field = on_grid(square, line, line)
error = field - jax.vmap(jax.vmap(solution))(grid)
grid, wave_field = on_grid(wave, x, line)
truth = cole_hopf(grid[..., 0], grid[..., 1])
wave_error = wave_field - truth
print(f"Poisson: largest error {np.abs(error).max():.4f}")
print(f"Burgers: largest error {np.abs(wave_error).max():.4f}")

# %%

figure, rows = plt.subplots(2, 3, figsize=(10, 6), layout="constrained")


def show(axes, values, title, labels, extent):
    limit = np.abs(values).max()
    image = axes.imshow(
        values.T,
        extent=extent,
        origin="lower",
        aspect="auto",
        cmap="RdBu_r",
        vmin=-limit,
        vmax=limit,
    )
    figure.colorbar(image, ax=axes, shrink=0.8)
    axes.set(title=title, xlabel=labels[0], ylabel=labels[1])


show(rows[0, 0], field, "Poisson", "xy", (0, 1, 0, 1))
show(rows[0, 1], error, "Error", "xy", (0, 1, 0, 1))
show(rows[1, 0], wave_field, "Burgers", "xt", (-1, 1, 0, 1))
show(rows[1, 1], wave_error, "Error", "xt", (-1, 1, 0, 1))

for losses, style in ((poisson_losses, "-"), (burgers_losses, ":")):
    for name, values in losses.items():
        if "/" in name:
            rows[0, 2].plot(values, style, label=name)
rows[0, 2].set(title="Losses", xlabel="epoch", yscale="log")
rows[0, 2].legend(fontsize=8)

for index in (0, 33, 66, 99):
    rows[1, 2].plot(x, truth[:, index], color="#cccccc", lw=4)
    label = f"t = {line[index]:.2f}"
    rows[1, 2].plot(x, wave_field[:, index], lw=1.5, label=label)
rows[1, 2].set(title="The wave, and the truth in grey", xlabel="x")
rows[1, 2].legend(fontsize=8)
plt.show()
