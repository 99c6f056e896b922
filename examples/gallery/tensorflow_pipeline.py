"""
tf.data, TensorBoard, a SavedModel without JAX
==============================================

A Flax module in a TensorFlow program: fed by ``tf.data``, watched in
TensorBoard, and served by a process that has no JAX and no Keras.
"""

import os

# Keras reads this when it is imported.
os.environ["KERAS_BACKEND"] = "tensorflow"

import pathlib
import subprocess
import sys
import tempfile

import flax.linen as nn
import keras
import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits
from tensorboard.backend.event_processing import event_accumulator

import jaxwrap

keras.utils.set_random_seed(0)
folder = pathlib.Path(tempfile.mkdtemp())

# %%
# The data
# --------
# A pipeline that shifts each digit by up to a pixel.

digits = load_digits()
images = digits.images[..., None].astype("float32") / 16
labels = digits.target.astype("int32")


def shift(image, label):
    padded = tf.pad(image, [[1, 1], [1, 1], [0, 0]])
    return tf.image.random_crop(padded, (8, 8, 1), seed=0), label


train = tf.data.Dataset.from_tensor_slices(
    (images[:1400], labels[:1400])
)
train = train.shuffle(1400, seed=0).map(shift).batch(64).prefetch(2)
test = tf.data.Dataset.from_tensor_slices(
    (images[1400:], labels[1400:])
).batch(64)

# %%
# The module
# ----------
# What a module sows as ``metrics``, ``fit`` shows like any metric. Here
# that is the share of hidden units that are not zero.


class Classifier(nn.Module):
    @nn.compact
    def __call__(self, x, training: bool = False):
        x = nn.relu(nn.Conv(16, (3, 3))(x))
        x = nn.relu(nn.Conv(32, (3, 3), strides=2)(x))
        x = nn.relu(nn.Dense(64)(x.reshape(x.shape[0], -1)))
        self.sow("metrics", "active", (x > 0).mean())
        x = nn.Dropout(0.3, deterministic=not training)(x)
        return nn.Dense(10)(x)


layer = jaxwrap.FlaxLayer(Classifier(), name="cnn")
model = keras.Sequential([keras.Input((8, 8, 1)), layer])
model.compile(
    keras.optimizers.Adam(3e-3),
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
)

# %%
# Training
# --------
# TensorBoard gets the curves and the histograms of all weights, under
# their paths. Look at them with ``tensorboard --logdir logs``.

board = keras.callbacks.TensorBoard(folder / "logs", histogram_freq=1)
history = model.fit(
    train,
    validation_data=test,
    epochs=15,
    shuffle=False,
    callbacks=[board],
    verbose=0,
)
for name, values in history.history.items():
    print(f"{name:<20}{values[0]:.3f} -> {values[-1]:.3f}")

# %%
# The server
# ----------
# ``export`` writes a SavedModel. The process that serves it cannot
# import JAX, Keras or jaxwrap.

model.export(folder / "served", format="tf_saved_model", verbose=False)
np.save(folder / "images.npy", images[1400:])

program = """
import sys
sys.modules.update(jax=None, keras=None, jaxwrap=None)

import numpy as np, tensorflow as tf

served = tf.saved_model.load("served")
np.save("logits.npy", served.serve(np.load("images.npy")))
"""
command = [sys.executable, "-c", program]
subprocess.run(command, cwd=folder, check=True)

served = np.load(folder / "logits.npy")
own = model.predict(images[1400:], verbose=0)
print(f"largest difference: {np.abs(served - own).max():.0e}")

# %%
# What TensorBoard has, and what the server says
# ----------------------------------------------


def read(run):
    events = event_accumulator.EventAccumulator(
        str(folder / "logs" / run), size_guidance={"tensors": 0}
    )
    events.Reload()
    return events


def curve(run, tag):
    events = read(run).Tensors(tag)
    return [tf.make_ndarray(event.tensor_proto) for event in events]


tags = read("train").Tags()["tensors"]
print(*(tag for tag in tags if "kernel" in tag), sep="\n")

# %%

figure = plt.figure(figsize=(9, 4), layout="constrained")
left, right = figure.subfigures(1, 2)

upper, lower = left.subplots(2, 1, sharex=True)
for run, color in (("train", "#9ecae1"), ("validation", "#08519c")):
    upper.plot(curve(run, "epoch_accuracy"), color=color, label=run)
    lower.plot(curve(run, "epoch_cnn/active"), color=color)
upper.set(ylabel="accuracy")
upper.legend(loc="lower right")
lower.set(ylabel="active units", xlabel="epoch")

right.suptitle("Served: the least certain answers")
scores = tf.nn.softmax(served).numpy()
hardest = np.argsort(scores.max(axis=-1))[:12]
for axes, index in zip(right.subplots(3, 4).flat, hardest):
    answer, label = scores[index].argmax(), labels[1400 + index]
    axes.imshow(images[1400 + index, ..., 0], cmap="gray_r")
    color = "#238b45" if answer == label else "#cb181d"
    axes.set_title(f"{answer}: {scores[index].max():.0%}", color=color)
    axes.set_axis_off()
plt.show()
