"""
A Hugging Face Flax model fine-tuned, frozen, saved, exported
=============================================================

Take a vision transformer of Hugging Face as it comes from a folder,
freeze its body, train a new head with ``fit``, and go back: to a file
of Keras, to a folder of Hugging Face, to ONNX.

The data are the 1,797 handwritten digits of scikit-learn.
"""

import pathlib
import tempfile

import keras
import matplotlib.pyplot as plt
import numpy as np
import onnxruntime
import transformers
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from transformers import FlaxViTForImageClassification, ViTConfig

import jaxwrap

keras.utils.set_random_seed(0)
transformers.logging.set_verbosity_error()
folder = pathlib.Path(tempfile.mkdtemp())

# %%
# The data
# --------
# Models of Hugging Face take images with the channels first.

digits = load_digits()
images = digits.images[:, None].astype("float32") / 8 - 1
labels = digits.target.astype("int32")
train_x, test_x, train_y, test_y = train_test_split(
    images, labels, test_size=0.25, random_state=0
)
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def keras_model(vit):
    inputs = keras.Input((1, 8, 8), name="pixels")
    return keras.Model(inputs, vit(inputs))


def train(model, epochs, rate, digits=10):
    optimizer = keras.optimizers.Adam(rate)
    model.compile(optimizer, loss, metrics=["accuracy"])
    x, y = train_x[train_y < digits], train_y[train_y < digits]
    model.fit(x, y, batch_size=64, epochs=epochs, verbose=0)
    weights = model.trainable_weights
    trained = sum(int(np.prod(weight.shape)) for weight in weights)
    x, y = test_x[test_y < digits], test_y[test_y < digits]
    _, accuracy = model.evaluate(x, y, verbose=0)
    return f"{trained:>8,}{accuracy:>10.3f}"


# %%
# A pretrained model
# ------------------
# With a network you would name one of the hub. This page has none, so
# it makes a small one that has only seen the digits 0 to 5, and saves
# it as Hugging Face does.

config = ViTConfig(
    image_size=8,
    patch_size=2,
    num_channels=1,
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_labels=6,
    initializer_range=0.1,
)
hf_model = FlaxViTForImageClassification(config, (1, 8, 8, 1))
old = jaxwrap.from_transformers(hf_model, output="logits", name="old")
results = train(keras_model(old), epochs=20, rate=2e-3, digits=6)
print(f"{'trained':<12}{'numbers':>8}{'accuracy':>10}")
print(f"{'on 0 to 5':<12}{results}")
hf_model.params = old.get_variables()
hf_model.save_pretrained(folder / "pretrained")

# %%
# Go in
# -----
# Hugging Face gives the body as it was, and a new head for ten
# classes.

hf_model = FlaxViTForImageClassification.from_pretrained(
    folder / "pretrained",
    num_labels=10,
    ignore_mismatched_sizes=True,
    input_shape=(1, 8, 8, 1),
)
vit = jaxwrap.from_transformers(hf_model, output="logits", name="vit")
model = keras_model(vit)
print(vit.weight_table(depth=3))

# %%
# Freeze, and train the head
# --------------------------
# ``freeze`` takes a regular expression for the paths of weights.

vit.freeze("vit/.*")
print(f"{'trained':<12}{'numbers':>8}{'accuracy':>10}")
print(f"{'the head':<12}{train(model, epochs=10, rate=1e-2)}")

# %%
# The body has never seen the digits 6 to 9. It does better with the
# last block trained too, and then with all.

vit.unfreeze("vit/encoder/layer/1/.*|vit/layernorm/.*")
print(f"{'and a block':<12}{train(model, epochs=10, rate=1e-3)}")
vit.unfreeze(".*")
print(f"{'everything':<12}{train(model, epochs=10, rate=1e-3)}")

# %%
# Save
# ----
# The file of Keras holds the configuration as data. No program that
# loads it needs the code above, on any backend.

expected = model.predict(test_x, verbose=0)
model.save(folder / "vit.keras")
again = keras.saving.load_model(folder / "vit.keras")
difference = np.abs(again.predict(test_x, verbose=0) - expected).max()
print(f"loaded by Keras, largest difference: {difference:.0e}")

# %%
# Two lines put the weights back and write a folder of Hugging Face.

hf_model.params = vit.get_variables()
hf_model.save_pretrained(folder / "trained")

native = FlaxViTForImageClassification.from_pretrained(
    folder / "trained", input_shape=(1, 8, 8, 1)
)
outputs = native(test_x, output_attentions=True)
difference = np.abs(outputs.logits - expected).max()
print(f"Hugging Face's own, largest difference: {difference:.0e}")

# %%
# Export
# ------
# ONNX Runtime needs none of these libraries.

jaxwrap.export(model, folder / "vit.onnx", "onnx")
session = onnxruntime.InferenceSession(folder / "vit.onnx")
(logits,) = session.run(None, {"pixels": test_x})
difference = np.abs(logits - expected).max()
print(f"ONNX Runtime, largest difference: {difference:.0e}")

# %%
# Where it looks
# --------------
# Attention from the first token, which the head reads, back to the 16
# patches. The blocks' means over heads are multiplied, each with one
# half of the identity for what goes past the attention.

flow = np.eye(17)
for attention in outputs.attentions:
    mean = np.asarray(attention).mean(axis=1)
    flow = (mean + np.eye(17)) / 2 @ flow
maps = flow[:, 0, 1:].reshape(-1, 4, 4)
predicted = expected.argmax(axis=-1)

figure, rows = plt.subplots(
    2, 10, figsize=(10, 2.6), layout="constrained"
)
for digit, (above, below) in enumerate(rows.T):
    index = np.flatnonzero(test_y == digit)[0]
    image, heat = test_x[index, 0], maps[index]
    above.imshow(image, cmap="gray_r")
    above.set_title(f"{predicted[index]}")
    below.imshow(image, cmap="gray_r", extent=(0, 8, 8, 0))
    below.imshow(
        heat,
        cmap="inferno",
        alpha=0.65,
        interpolation="bicubic",
        extent=(0, 8, 8, 0),
    )
    above.set_axis_off()
    below.set_axis_off()
figure.suptitle("What it says, and where it looks")
plt.show()
