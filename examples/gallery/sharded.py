"""
Sharded over eight virtual devices
==================================

Divide a Flax transformer over eight devices by the names of its axes,
train it with ``fit``, and see that it learns what one device learns
while each device holds a fraction of it.

The devices are virtual ones of one CPU, so it is not faster here. On
eight real ones nothing but the first cell changes. The text are the
documentation strings of Python's standard library.
"""

import os

# Keras and JAX read these when they are imported.
os.environ["KERAS_BACKEND"] = "jax"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import ast
import pathlib
import sysconfig
from collections import Counter

import flax.linen as nn
import jax
import keras
import matplotlib.pyplot as plt
import numpy as np

import jaxwrap

print(f"{jax.device_count()} devices")

# %%
# The text
# --------

library = pathlib.Path(sysconfig.get_path("stdlib"))
documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
texts = []
for file in sorted(library.glob("[a-f]*.py")):
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, documented):
            texts.append(ast.get_docstring(node) or "")
text = "\n\n".join(filter(str.isascii, texts)).encode()

LENGTH = 32
tokens = np.frombuffer(text, "uint8").astype("int32")
ends = len(tokens) // (LENGTH + 1) * (LENGTH + 1)
rows = tokens[:ends].reshape(-1, LENGTH + 1)
rows = np.random.default_rng(0).permutation(rows)[:5120]
print(f"{len(rows)} rows of {LENGTH} characters")

# %%
# A transformer that names its axes
# ---------------------------------
# The names say what an axis is, and not where it goes. So the module
# knows nothing of devices.

WIDTH, HEADS = 64, 4


def dense(features, names, name):
    init = nn.initializers.lecun_normal()
    init = nn.with_logical_partitioning(init, names)
    return nn.Dense(
        features, use_bias=False, kernel_init=init, name=name
    )


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm()(x)
        parts = [
            dense(WIDTH, ("embed", "heads"), name)(y)
            for name in ("query", "key", "value")
        ]
        shape = (*x.shape[:2], HEADS, WIDTH // HEADS)
        parts = [part.reshape(shape) for part in parts]
        y = jax.nn.dot_product_attention(*parts, is_causal=True)
        x += dense(WIDTH, ("heads", "embed"), "out")(y.reshape(x.shape))
        y = nn.LayerNorm()(x)
        y = nn.gelu(dense(4 * WIDTH, ("embed", "mlp"), "up")(y))
        return x + dense(WIDTH, ("mlp", "embed"), "down")(y)


class GPT(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        init = nn.with_logical_partitioning(
            nn.initializers.normal(0.02), ("vocab", "embed")
        )
        x = nn.Embed(128, WIDTH, embedding_init=init)(tokens)
        places = nn.initializers.normal(0.02)
        x += self.param("places", places, (LENGTH, WIDTH))
        for _ in range(2):
            x = Block()(x)
        return dense(128, ("embed", "vocab"), "head")(nn.LayerNorm()(x))


# %%
# One device first
# ----------------


def gpt_layer():
    return jaxwrap.FlaxLayer(GPT(), name="gpt")


def train():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((LENGTH,), dtype="int32")
    model = keras.Model(inputs, gpt_layer()(inputs))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(3e-3), loss)
    losses = []
    note = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda _, logs: losses.append(logs["loss"])
    )
    model.fit(
        rows[:, :-1],
        rows[:, 1:],
        batch_size=64,
        verbose=0,
        callbacks=[note],
    )
    return model, losses


def bytes_by_device(model):
    counts = Counter()
    for variable in model.weights + model.optimizer.variables:
        for shard in variable.value.addressable_shards:
            counts[shard.device.id] += shard.data.nbytes
    return counts


alone, alone_losses = train()
alone_bytes = bytes_by_device(alone)

# %%
# A plan for eight
# ----------------
# A mesh of two by four. Rows of a batch are divided along ``batch``,
# and heads, hidden units and characters along ``model``.
#
# ``shard_report`` says what that costs, before anything is allocated.

mesh = keras.distribution.DeviceMesh((2, 4), ("batch", "model"))
axes = (
    ("heads", "model"),
    ("mlp", "model"),
    ("vocab", "model"),
    ("embed", None),
)
print(
    gpt_layer().shard_report(
        mesh, keras.KerasTensor((64, LENGTH), "int32"), axes=axes
    )
)

# %%
# Train by the plan
# -----------------
# ``layout_map`` has a layout for each weight that is divided. With
# the distribution set, the same function trains on eight devices.

layouts = gpt_layer().layout_map(
    mesh, keras.KerasTensor((None, LENGTH), "int32"), axes=axes
)
keras.distribution.set_distribution(
    keras.distribution.ModelParallel(
        layout_map=layouts, batch_dim_name="batch"
    )
)
shared, shared_losses = train()
shared_bytes = bytes_by_device(shared)

head = shared.get_layer("gpt").get_variables()["params"]["head"]
print("the head, whole:", head["kernel"].shape)
for variable in shared.get_layer("gpt").weights:
    if variable.path.endswith("head/kernel"):
        part = variable.value.addressable_shards[0].data.shape
        print("the head, on a device:", part)

difference = np.abs(np.subtract(alone_losses, shared_losses)).max()
print(f"bytes on the one device:  {alone_bytes[0]:,}")
print(f"bytes on each of eight:   {max(shared_bytes.values()):,}")
print(
    f"mean loss of {len(shared_losses)} steps: {shared_losses[-1]:.4f}"
)
print(f"largest difference to one device: {difference:.0e}")
assert difference < 1e-3

# %%
# The bytes, and the loss
# -----------------------
# The optimizer's moments are divided like the weights. What all
# devices hold are the small vectors of layer norm and the places.

figure, (left, right) = plt.subplots(
    1, 2, figsize=(9, 3.6), layout="constrained"
)
left.bar(["one"], alone_bytes[0] / 1e6, color="#9aa0a6")
left.bar(
    [f"{number}" for number in sorted(shared_bytes)],
    [shared_bytes[number] / 1e6 for number in sorted(shared_bytes)],
    color="#4477aa",
)
left.set(xlabel="device", ylabel="MB")
left.set_title("Weights and moments on a device")

right.plot(alone_losses, color="#9aa0a6", linewidth=5, label="one")
right.plot(shared_losses, color="#4477aa", label="eight")
right.set(xlabel="step", ylabel="mean loss so far")
right.set_title("What they learn")
right.legend(title="devices")
for axis in (left, right):
    axis.spines[["top", "right"]].set_visible(False)
plt.show()
