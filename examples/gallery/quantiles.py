"""
Quantile regression in JAX
==========================

How much will the disease of a patient progress in a year, and how sure
is that? Train the 10%, 50% and 90% quantiles at once, by a loss and a
metric that are JAX functions.

The data are the 442 diabetes patients of scikit-learn.
"""

import functools

import jax.numpy as jnp
import keras
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_diabetes
from sklearn.model_selection import train_test_split

import jaxwrap

keras.utils.set_random_seed(0)
data = load_diabetes()
target = (data.target / 100).astype("float32")[:, None]
train_x, test_x, train_y, test_y = train_test_split(
    (20 * data.data).astype("float32"), target, random_state=0
)

# %%
# The loss
# --------
# A function of labels and predictions that returns the loss of each
# example. It costs nine times as much to be above the 90% quantile as
# to be below it. ``JaxLoss`` makes a Keras loss of it, with sample
# weights, masks and reductions.

LEVELS = (0.1, 0.5, 0.9)


@jaxwrap.register_serializable("gallery")
def pinball(labels, predictions, levels=LEVELS):
    error = labels - predictions
    level = jnp.array(levels)
    return jnp.maximum(level * error, (level - 1) * error).mean(axis=-1)


# %%
# The metric
# ----------
# Three functions make, update and read a state. This one counts how
# often the truth is below each quantile, and how wide the band is.


def update(state, labels, predictions):
    width = predictions[:, -1] - predictions[:, 0]
    return {
        "below": state["below"] + (labels < predictions).sum(axis=0),
        "width": state["width"] + width.sum(),
        "seen": state["seen"] + labels.shape[0],
    }


def compute(state):
    below = state["below"] / state["seen"]
    return {
        "covered": below[2] - below[0],
        "width": state["width"] / state["seen"],
    }


calibration = jaxwrap.JaxMetric(
    init=lambda: {
        "below": jnp.zeros(3),
        "width": jnp.zeros(()),
        "seen": jnp.zeros(()),
    },
    update=update,
    compute=compute,
    name="calibration",
)

# %%
# The model
# ---------
# Quantiles must not cross. So a last layer without weights adds
# positive steps: one function is enough.


def increasing(inputs):
    first, *steps = jnp.split(inputs, 3, axis=-1)
    steps = [jnp.logaddexp(step, 0.0) for step in steps]
    return jnp.cumsum(jnp.concatenate([first, *steps], -1), axis=-1)


model = keras.Sequential(
    [
        keras.Input((10,)),
        keras.layers.Dense(32, activation="gelu"),
        keras.layers.Dropout(0.2),
        keras.layers.Dense(3),
        jaxwrap.JaxLayer(increasing),
    ]
)
model.compile(
    keras.optimizers.Adam(3e-3),
    jaxwrap.JaxLoss(pinball),
    metrics=[calibration],
)
history = model.fit(train_x, train_y, epochs=100, verbose=0).history

for name, values in history.items():
    print(f"{name:<10}{values[0]:.3f} -> {values[-1]:.3f}")

# %%
# On the patients that were held out:

held_out = model.evaluate(test_x, test_y, verbose=0, return_dict=True)
for name, value in held_out.items():
    print(f"{name:<10}{value:.3f}")

# %%
# Other levels are a ``functools.partial``, which a file can hold too.

narrow = functools.partial(pinball, levels=(0.25, 0.5, 0.75))
loss = jaxwrap.JaxLoss(narrow)(test_y, model.predict(test_x, verbose=0))
print(f"{float(loss):.3f}")

# %%
# Bands
# -----
# Each patient, in the order of the prediction.

low, middle, high = 100 * model.predict(test_x, verbose=0).T
order = np.argsort(middle)
truth = 100 * test_y[order, 0]
inside = (truth >= low[order]) & (truth <= high[order])
place = np.arange(len(order))

figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
axes.fill_between(
    place, low[order], high[order], color="#9ecae1", alpha=0.6
)
axes.plot(place, middle[order], color="#08519c", lw=2, label="median")
for mask, color, name in (
    (inside, "#08519c", "in the band"),
    (~inside, "#cb181d", "outside"),
):
    label = f"{name}: {mask.mean():.0%}"
    axes.plot(
        place[mask], truth[mask], "o", ms=4, color=color, label=label
    )
axes.set(title="The middle 80%, for patients not seen in training")
axes.set(xlabel="patient", ylabel="progression of the disease")
axes.legend(loc="upper left")
axes.spines[["top", "right"]].set_visible(False)
plt.show()
