"""
An NNX transformer, LoRA-tuned for new classes
==============================================

A small transformer has learned the digits 0 to 4. Teach it 5 to 9, and
train as few numbers as possible: LoRA adds to each kernel a product of
two thin matrices, and leaves the kernel alone.

``layer.reparametrize`` does this for any library. The transformer is
written in Flax NNX, and knows nothing of LoRA.
"""

import keras
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jaxwrap
from jaxwrap.reparametrizations import LoRA

keras.utils.set_random_seed(0)

# %%
# Digits as tokens
# ----------------
# An image of 8 by 8 pixels is a sentence of 16 words: patches of 2 by 2
# pixels.

digits = load_digits()
patches = digits.images.reshape(-1, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4)
patches = patches.reshape(-1, 16, 4).astype("float32") / 16
labels = digits.target

# %%
# The transformer
# ---------------


class Block(nnx.Module):
    def __init__(self, width, rngs):
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            num_heads=4, in_features=width, decode=False, rngs=rngs
        )
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 2 * width, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class Transformer(nnx.Module):
    def __init__(self, rngs, width=48):
        self.embed = nnx.Linear(4, width, rngs=rngs)
        self.places = nnx.Param(0.1 * rngs.normal((16, width)))
        self.block = Block(width, rngs)
        self.norm = nnx.LayerNorm(width, rngs=rngs)

    def __call__(self, x):
        x = self.block(self.embed(x) + self.places[...])
        return self.norm(x).mean(axis=1)


# %%
# The base: digits 0 to 4
# -----------------------


def data(classes):
    chosen = np.isin(labels, classes)
    return train_test_split(
        patches[chosen],
        labels[chosen] - classes[0],
        test_size=0.3,
        random_state=0,
    )


def make_model(module):
    layer = jaxwrap.wrap(module, name="encoder")
    head = keras.layers.Dense(5, activation="softmax", name="head")
    return keras.Sequential([keras.Input((16, 4)), layer, head])


def fit(model, classes):
    train_x, test_x, train_y, test_y = data(classes)
    model.compile(
        keras.optimizers.Adam(5e-3),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    model.fit(train_x, train_y, batch_size=64, epochs=12, verbose=0)
    return model.evaluate(test_x, test_y, verbose=0)[1]


base = make_model(Transformer(nnx.Rngs(0)))
accuracy = fit(base, range(5))
print(f"digits 0 to 4: {accuracy:.3f}")
pretrained = base.get_layer("encoder").module_with_weights()

# %%
# LoRA
# ----
# A pattern chooses the kernels. Attention kernels have three axes, and
# ``inputs`` says how many of the first ones are inputs. ``freeze``
# stops the other parameters of the encoder. The head is new.


def reparametrize(layer, rank):
    for projection in ("query", "key", "value"):
        layer.reparametrize(
            f".*{projection}/kernel", LoRA(rank, inputs=1)
        )
    layer.reparametrize(".*(out|up|down|embed)/kernel", LoRA(rank))
    layer.freeze(".*(bias|scale|places)")


# %%
# Accuracy by trained numbers
# ---------------------------
# From the new head alone to the whole network.

cases = {
    "head": lambda layer: layer.freeze(".*"),
    "LoRA(1)": lambda layer: reparametrize(layer, 1),
    "LoRA(8)": lambda layer: reparametrize(layer, 8),
    "all": lambda layer: None,
}
sizes, accuracies, tuned = {}, {}, {}
for name, prepare in cases.items():
    keras.utils.set_random_seed(1)
    model = tuned[name] = make_model(pretrained)
    prepare(model.get_layer("encoder"))
    trained = model.trainable_variables
    sizes[name] = sum(np.prod(weight.shape) for weight in trained)
    accuracies[name] = fit(model, range(5, 10))
    print(f"{name:<9}{sizes[name]:>7,} numbers  {accuracies[name]:.3f}")

# %%
# The parts have the path of their leaf:

for row in tuned["LoRA(1)"].get_layer("encoder").weight_table():
    if "block/attention/query" in row.path:
        trained = "trained" if row.trainable else "frozen"
        print(f"{row.path:<50}{row.size:>6,}  {trained}")

# %%
# Merge
# -----
# ``merge`` adds the product to the kernel. What comes out is a plain
# NNX module again, without a trace of LoRA.

layer = tuned["LoRA(8)"].get_layer("encoder")
_, test_x, _, _ = data(range(5, 10))
before = layer(test_x)
layer.merge()
merged = layer.module_with_weights()
before = keras.ops.convert_to_numpy(before)
difference = np.abs(merged(test_x) - before)
print(type(merged).__name__, f"{difference.max():.0e}")

# %%

figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
axes.plot(
    sizes.values(), accuracies.values(), "o-", color="#08519c", lw=2
)
for name in cases:
    axes.annotate(
        name,
        (sizes[name], accuracies[name]),
        xytext=(6, -14),
        textcoords="offset points",
    )
axes.set(title="The digits 5 to 9, by what was trained")
axes.set(xlabel="trained numbers", ylabel="held-out accuracy")
axes.set(xscale="log", xlim=(180, 60_000), ylim=(0.7, 1))
axes.grid(alpha=0.3)
axes.spines[["top", "right"]].set_visible(False)
plt.show()
