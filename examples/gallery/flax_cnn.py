"""
Your Flax CNN in Keras, on four backends
========================================

Take a Flax module as it is, train it with ``fit``, save one file, and
use that file on JAX, TensorFlow, PyTorch and NumPy.

The data are the 1,797 handwritten digits of scikit-learn.
"""

import os
import pathlib
import subprocess
import sys
import tempfile

import keras
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.metrics import confusion_matrix
from sklearn.model_selection import train_test_split

import jaxwrap

keras.utils.set_random_seed(0)
digits = load_digits()
images = digits.images[..., None].astype("float32") / 16
train_x, test_x, train_y, test_y = train_test_split(
    images, digits.target, test_size=0.25, random_state=0
)

# %%
# The module
# ----------
# Batch norm has state, dropout needs random numbers, and both behave
# differently in training. jaxwrap takes care of all three. It finds
# the flag ``training``, the collection ``batch_stats`` and the stream
# ``dropout`` in the module.
#
# ``register_serializable`` gives the class a name that a file can
# hold. The class is in a Python file of its own, since other programs
# will import it.

folder = pathlib.Path(tempfile.mkdtemp())
(folder / "digits_cnn.py").write_text("""
import flax.linen as nn
import jaxwrap


@jaxwrap.register_serializable("gallery")
class CNN(nn.Module):
    @nn.compact
    def __call__(self, x, training: bool = False):
        x = nn.relu(nn.Conv(16, (3, 3), name="first")(x))
        x = nn.Conv(32, (3, 3), strides=2, use_bias=False)(x)
        x = nn.BatchNorm(use_running_average=not training)(x)
        x = nn.relu(x).reshape(x.shape[0], -1)
        return nn.Dropout(0.4, deterministic=not training)(x)
""")
sys.path.append(str(folder))

from digits_cnn import CNN

# %%
# A Keras model around it
# -----------------------
# The wrapped module is a layer like any other.

inputs = keras.Input((8, 8, 1))
features = jaxwrap.FlaxLayer(CNN(), name="cnn")(inputs)
outputs = keras.layers.Dense(10, activation="softmax")(features)
model = keras.Model(inputs, outputs)

print(model.get_layer("cnn").weight_table())

# %%
# ``fit`` does the rest.

model.compile(
    keras.optimizers.Adam(3e-3),
    "sparse_categorical_crossentropy",
    metrics=["accuracy"],
)
model.fit(train_x, train_y, epochs=6, verbose=0)
loss, accuracy = model.evaluate(test_x, test_y, verbose=0)
print(f"accuracy on held-out digits: {accuracy:.3f}")

# %%
# One file, four backends
# -----------------------
# Keras chooses its backend when a process imports it. So a fresh
# process for each backend loads the file and predicts. It imports
# the class, and needs nothing else of this program.

model.save(folder / "digits.keras")
np.save(folder / "digits.npy", test_x)

program = """
import keras, numpy as np
import digits_cnn

model = keras.saving.load_model("digits.keras", compile=False)
predictions = model.predict(np.load("digits.npy"), verbose=0)
np.save(keras.backend.backend(), predictions)
"""
trained = model.predict(test_x, verbose=0)
print(f"{'backend':<12}{'accuracy':>8}  largest difference")
for backend in ("jax", "tensorflow", "torch", "numpy"):
    command = [sys.executable, "-c", program]
    env = {**os.environ, "KERAS_BACKEND": backend}
    subprocess.run(command, env=env, cwd=folder, check=True)
    loaded = np.load(folder / f"{backend}.npy")
    accuracy = np.mean(loaded.argmax(axis=-1) == test_y)
    difference = np.abs(loaded - trained).max()
    print(f"{backend:<12}{accuracy:>8.3f}  {difference:.0e}")

# %%
# And back to Flax
# ----------------
# ``get_variables`` returns the weights as Flax keeps them. The plain
# module gives the same features with them.

variables = model.get_layer("cnn").get_variables()
native = CNN().apply(variables, test_x)
wrapped = keras.Model(inputs, features).predict(test_x, verbose=0)
print(f"largest difference: {np.abs(native - wrapped).max():.0e}")

# %%
# What it mixes up, and what it looks for
# ---------------------------------------

counts = confusion_matrix(test_y, trained.argmax(axis=-1))
kernels = variables["params"]["first"]["kernel"]

figure = plt.figure(figsize=(9, 4), layout="constrained")
left, right = figure.subfigures(1, 2)

left.suptitle("Confusion matrix")
axes = left.subplots()
axes.imshow(np.log1p(counts), cmap="Blues")
for row, column in np.argwhere(counts):
    color = "white" if row == column else "black"
    text = counts[row, column]
    axes.text(column, row, text, color=color, ha="center", va="center")
axes.set(xticks=range(10), yticks=range(10))
axes.set(xlabel="predicted", ylabel="true")

right.suptitle("The 16 filters of the first convolution")
limit = np.abs(kernels).max()
for axes, kernel in zip(
    right.subplots(4, 4).flat, kernels[:, :, 0].transpose(2, 0, 1)
):
    axes.imshow(kernel, cmap="RdBu", vmin=-limit, vmax=limit)
    axes.set_axis_off()
plt.show()
