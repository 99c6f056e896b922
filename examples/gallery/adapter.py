"""
Write an adapter
================

A JAX library that jaxwrap has never heard of becomes a family of Keras
layers by two functions. The library here has thirty lines: networks of
sine waves, which learn a picture as a function of the place.
"""

import dataclasses

import jax
import jax.numpy as jnp
import keras
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_sample_image

import jaxwrap
from jaxwrap.testing import check_adapter

keras.utils.set_random_seed(0)

# %%
# The library
# -----------
# Imagine that it is somebody else's. A model is data, ``create`` makes
# its weights and ``run`` computes.


@jaxwrap.register_serializable("waves")
@dataclasses.dataclass(frozen=True)
class Waves:
    widths: tuple[int, ...]
    frequency: float = 20.0

    def create(self, key, size):
        weights, bound = [], 1 / size
        for width in self.widths:
            key, one, two = jax.random.split(key, 3)
            weights.append(
                {
                    "w": jax.random.uniform(
                        one, (size, width), minval=-bound, maxval=bound
                    ),
                    "b": jax.random.uniform(two, (width,), maxval=0.1),
                }
            )
            size, bound = width, (6 / width) ** 0.5 / self.frequency
        return weights

    def run(self, weights, x):
        *hidden, last = weights
        for layer in hidden:
            x = jnp.sin(self.frequency * (x @ layer["w"] + layer["b"]))
        return x @ last["w"] + last["b"]


# %%
# The adapter
# -----------
# ``init`` returns parameters and state, ``call`` a ``CallResult``. This
# library has no state and draws nothing, so two arguments are unused.


@jaxwrap.register_serializable("waves")
@dataclasses.dataclass(frozen=True)
class WavesAdapter(jaxwrap.Adapter):
    model: Waves

    def init(self, keys, inputs):
        return self.model.create(keys, inputs.shape[-1]), None

    def call(self, params, state, keys, inputs, training):
        return jaxwrap.CallResult(self.model.run(params, inputs))


jaxwrap.register_adapter(
    lambda obj: isinstance(obj, Waves), WavesAdapter
)

# %%
# That is all. ``wrap`` knows the library now:

layer = jaxwrap.wrap(Waves((64, 64, 64, 3)), name="picture")
model = keras.Sequential([keras.Input((2,)), layer])
print(layer.weight_table())

# %%
# The check
# ---------
# ``check_adapter`` tries what Keras may do with a layer: gradients,
# seeds, files, clones, checkpoints. It compares with the library, which
# ``native`` runs by its own means. Put it into the tests of your
# library.


def make():
    return WavesAdapter(Waves((8, 3)))


def native(variables, x):
    return Waves((8, 3)).run(variables["params"], x)


points = np.random.default_rng(0).uniform(size=(16, 2))
check_adapter(make, points.astype("float32"), native=native)
print("the adapter keeps its contract")

# %%
# A picture as a function
# -----------------------
# A photo of scikit-learn: 96 by 96 pixels, places in, colours out.

photo = load_sample_image("flower.jpg")[60:348:3, 210:498:3]
photo = photo.astype("float32") / 255
axis = np.linspace(-1, 1, 96, dtype="float32")
places = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1)
x, y = places.reshape(-1, 2), photo.reshape(-1, 3)

schedule = keras.optimizers.schedules.CosineDecay(3e-3, 40 * 18)
model.compile(keras.optimizers.Adam(schedule), "mse")
history = model.fit(x, y, epochs=40, batch_size=512, verbose=0)
error = history.history["loss"][-1]
print(f"error: {error:.5f}, {-10 * np.log10(error):.1f} dB")
print(f"{model.count_params():,} numbers for {photo.size:,}")

# %%
# The network is a function, so it has a value between the pixels: the
# last picture asks it for sixteen times as many.

fine = np.linspace(-0.4, 0.3, 192, dtype="float32")
between = np.stack(np.meshgrid(fine, fine, indexing="ij"), axis=-1)
learned = model.predict(x, batch_size=4096, verbose=0)
zoomed = model.predict(
    between.reshape(-1, 2), batch_size=4096, verbose=0
)

first, last = np.searchsorted(axis, [-0.4, 0.3])
crop = slice(first, last)
pictures = {
    "The photo": photo,
    "The network": learned.reshape(photo.shape),
    "A part of the photo": photo[crop, crop],
    "The network, between pixels": zoomed.reshape(192, 192, 3),
}
figure, all_axes = plt.subplots(
    2, 2, figsize=(7, 7), layout="constrained"
)
for axes, (title, picture) in zip(all_axes.flat, pictures.items()):
    axes.imshow(np.clip(picture, 0, 1))
    axes.set_title(title)
    axes.set_axis_off()
plt.show()
