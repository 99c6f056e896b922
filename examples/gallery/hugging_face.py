"""
A Hugging Face Flax model fine-tuned, frozen, saved, exported
=============================================================

Take a vision transformer of Hugging Face as it comes from a folder,
freeze its body, train a new head with ``fit``, and go back: to a file
of Keras, to a folder of Hugging Face, to StableHLO. Then words, with
BERT.

The data are the handwritten digits of scikit-learn, and the
documentation strings of Python's standard library.
"""

import ast
import collections
import pathlib
import re
import sysconfig
import tempfile

import jax
import keras
import matplotlib.pyplot as plt
import numpy as np
import transformers
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from transformers import (
    BertConfig,
    FlaxBertForSequenceClassification,
    FlaxViTForImageClassification,
    ViTConfig,
)

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
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_labels=6,
    initializer_range=0.1,
)
hf_model = FlaxViTForImageClassification(config, (1, 8, 8, 1))
old = jaxwrap.from_transformers(hf_model, output="logits", name="old")
results = train(keras_model(old), epochs=10, rate=5e-3, digits=6)
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
print(f"{'the head':<12}{train(model, epochs=6, rate=2e-2)}")

# %%
# The body has never seen the digits 6 to 9. It does better when it is
# trained too.

vit.unfreeze(".*")
print(f"{'everything':<12}{train(model, epochs=8, rate=3e-3)}")

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
# JAX runs this file with none of the other libraries. ``"onnx"`` would
# write one for ONNX Runtime.

jaxwrap.export(model, folder / "vit.stablehlo", "stablehlo")
exported = jax.export.deserialize(
    bytearray((folder / "vit.stablehlo").read_bytes())
)
(logits,) = jax.tree.leaves(exported.call(test_x))
difference = np.abs(logits - expected).max()
print(f"StableHLO, largest difference: {difference:.0e}")

# %%
# Where it looks
# --------------
# Attention from the first token, which the head reads, to the 16
# patches: the mean over the heads.

attention = np.asarray(outputs.attentions[0]).mean(axis=1)
maps = attention[:, 0, 1:].reshape(-1, 4, 4)
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

# %%
# Words, with BERT
# ----------------
# First lines of documentation strings: is it a function or a class? The
# tokenizer is made by hand. It knows the 400 most common words.

LENGTH = 12
library = pathlib.Path(sysconfig.get_path("stdlib"))
lines = {ast.FunctionDef: set(), ast.ClassDef: set()}
for file in sorted(library.glob("*.py")):
    for node in ast.walk(ast.parse(file.read_bytes())):
        if type(node) in lines and (doc := ast.get_docstring(node)):
            lines[type(node)].add(doc.split("\n")[0])
functions, classes = (sorted(group) for group in lines.values())
np.random.default_rng(0).shuffle(functions)
texts = functions[: len(classes)] + classes
kinds = np.repeat([0, 1], [len(texts) - len(classes), len(classes)])


def split(text):
    return re.findall("[a-z]+", text.lower())[: LENGTH - 1]


common = collections.Counter(
    word for text in texts for word in split(text)
)
special = ["[PAD]", "[CLS]", "[UNK]"]
vocabulary = special + [word for word, _ in common.most_common(400)]
codes = {word: code for code, word in enumerate(vocabulary)}
ids = np.zeros((len(texts), LENGTH), "int32")
for row, text in zip(ids, texts):
    words = [codes.get(word, 2) for word in split(text)]
    row[: len(words) + 1] = [1, *words]

# %%
# The layer takes the mask of the padding as the model does, and fills
# in the rest: positions and token types.

config = BertConfig(
    vocab_size=len(vocabulary),
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=LENGTH,
    num_labels=2,
    initializer_range=0.1,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
hf_bert = FlaxBertForSequenceClassification(config, (1, LENGTH))
bert = jaxwrap.from_transformers(hf_bert, output="logits", name="bert")
tokens = keras.Input((LENGTH,), dtype="int32")
mask = keras.ops.cast(tokens > 0, "int32")
reader = keras.Model(tokens, bert(tokens, attention_mask=mask))

train_ids, test_ids, train_kinds, test_kinds = train_test_split(
    ids, kinds, test_size=0.25, random_state=0
)
reader.compile(keras.optimizers.Adam(3e-3), loss, metrics=["accuracy"])
reader.fit(train_ids, train_kinds, epochs=6, verbose=0)
_, accuracy = reader.evaluate(test_ids, test_kinds, verbose=0)
print(f"{len(train_ids)} lines, accuracy on others: {accuracy:.3f}")

# %%
# What it reads in some lines that it has not seen, by Hugging Face's
# own model with the trained weights.

hf_bert.params = bert.get_variables()
outputs = hf_bert(test_ids, test_ids > 0, output_attentions=True)
attention = np.asarray(outputs.attentions[0]).mean(axis=1)[:, 0]
says = outputs.logits.argmax(axis=-1)

figure, axes = plt.subplots(figsize=(10, 3), layout="constrained")
long = np.flatnonzero((test_ids > 2).sum(axis=1) == 7)
shown = [*long[says[long] == 0][:4], *long[says[long] == 1][:4]]
for place, index in enumerate(shown):
    kind = ("function", "class")[says[index]]
    axes.text(0, -place, kind, weight="bold", va="center")
    weights = attention[index] / attention[index, 1:].max()
    kept = np.flatnonzero(test_ids[index] > 0)[1:]
    for column, position in enumerate(kept, start=1):
        axes.text(
            column + 0.5,
            -place,
            vocabulary[test_ids[index, position]],
            ha="center",
            va="center",
            bbox={
                "facecolor": plt.cm.Oranges(0.7 * weights[position]),
                "edgecolor": "none",
            },
        )
axes.set(title="What BERT says, and the words that it looks at")
axes.set(xlim=(0, LENGTH), ylim=(-len(shown) + 0.4, 0.6))
axes.set_axis_off()
plt.show()
