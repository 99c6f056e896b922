"""
A variational autoencoder
=========================

A VAE in Flax Linen. Its noise comes from a stream of its own, and one
of its losses from inside the module. The layer finds both.

The data are the digits of scikit-learn.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import keras
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits

import jaxwrap

keras.utils.set_random_seed(0)
x, labels = load_digits(return_X_y=True)
x = (x / 16).astype("float32")

# %%
# The module
# ----------
# ``make_rng("latent")`` draws in training only. What the module sows as
# ``losses`` is added to the loss of the Keras model, and shown by its
# name, like what it sows as ``metrics``.


class VAE(nn.Module):
    def setup(self):
        self.encoder = nn.Sequential(
            [nn.Dense(256), nn.gelu, nn.Dense(64), nn.gelu, nn.Dense(4)]
        )
        self.decoder = nn.Sequential(
            [
                nn.Dense(64),
                nn.gelu,
                nn.Dense(256),
                nn.gelu,
                nn.Dense(64),
            ]
        )

    def encode(self, x):
        mean, log_scale = jnp.split(self.encoder(x), 2, axis=-1)
        return mean, log_scale

    def decode(self, code):
        return nn.sigmoid(self.decoder(code))

    def __call__(self, x, training: bool = False):
        mean, log_scale = self.encode(x)
        code = mean
        if training:
            noise = jax.random.normal(
                self.make_rng("latent"), code.shape
            )
            code = mean + jnp.exp(log_scale) * noise
        square = mean**2 + jnp.exp(2 * log_scale)
        divergence = 0.5 * (square - 1 - 2 * log_scale).sum(axis=-1)
        self.sow("losses", "divergence", 1e-3 * divergence.mean())
        self.sow("metrics", "nats", divergence)
        return self.decode(code)


# %%
# Training
# --------
# ``mse`` is the reconstruction, ``nats`` what the code says about a
# digit.

layer = jaxwrap.FlaxLayer(VAE(), name="vae")
model = keras.Sequential([keras.Input((64,)), layer])
schedule = keras.optimizers.schedules.CosineDecay(2e-3, 60 * 29)
model.compile(keras.optimizers.Adam(schedule), "mse", metrics=["mse"])
history = model.fit(x, x, batch_size=64, epochs=60, verbose=0).history
for name, values in history.items():
    print(f"{name:<18}{values[0]:.4f} -> {values[-1]:.4f}")

# %%
# Parts of the module
# -------------------
# ``method`` calls something other than ``__call__``. Both layers get
# the trained weights.

variables = {"params": layer.get_variables()["params"]}
encode = jaxwrap.FlaxLayer(VAE(), method="encode", variables=variables)
decode = jaxwrap.FlaxLayer(VAE(), method="decode", variables=variables)
mean, _ = encode(x)
mean = keras.ops.convert_to_numpy(mean)

# %%
# A map of all digits
# -------------------
# A code is two numbers. On the left is where the digits lie, on the
# right what the decoder makes of a grid over that plane.

steps = 12
axis = np.linspace(-2.2, 2.2, steps, dtype="float32")
codes = np.stack(np.meshgrid(axis, axis[::-1]), axis=-1)
grid = keras.ops.convert_to_numpy(decode(codes.reshape(-1, 2)))
grid = np.pad(grid.reshape(-1, 8, 8), [(0, 0), (1, 1), (1, 1)])
grid = grid.reshape(steps, steps, 10, 10).transpose(0, 2, 1, 3)

figure, (left, right) = plt.subplots(
    1, 2, figsize=(10, 4.6), layout="constrained"
)
points = left.scatter(*mean.T, c=labels, cmap="tab10", s=8)
figure.colorbar(points, ax=left, ticks=range(10), shrink=0.8)
left.set(title="Where the digits lie", aspect="equal")
left.set(xlim=(-3, 3), ylim=(-3, 3))
right.imshow(
    grid.reshape(10 * steps, 10 * steps),
    cmap="gray_r",
    extent=(-2.2, 2.2, -2.2, 2.2),
)
right.set(title="What the decoder draws there")
plt.show()
