"""
Muon for matrices, Adam for the rest
====================================

Optax builds optimizers from parts, by the paths of the parameters.
``OptaxOptimizer`` brings them to ``compile``, on every backend. Here
Muon trains the hidden matrices of a network, and Adam trains
everything else.
"""

import flax.linen as nn
import jax
import keras
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import jaxwrap

x, y = load_digits(return_X_y=True)
x, y = (x / 16).astype("float32"), y.astype("int32")
train_x, test_x, train_y, test_y = (
    x[:1400],
    x[1400:],
    y[:1400],
    y[1400:],
)


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(64, name="embed")(x)
        for _ in range(3):
            x = x + nn.gelu(nn.Dense(64)(nn.LayerNorm()(x)))
        return nn.Dense(10, name="head")(x)


def make_model():
    keras.utils.set_random_seed(0)
    layer = jaxwrap.FlaxLayer(MLP(), name="mlp")
    return keras.Sequential([keras.Input((64,)), layer])


# %%
# Which parameter belongs to whom
# -------------------------------
# The optimizer sees the parameters as a nested dict, by the paths of
# the variables. A function of path and leaf gives each a label.


def label_of(path, leaf):
    names = [key.key for key in path]
    outer = "embed" in names or "head" in names
    return "adam" if outer or leaf.ndim < 2 else "muon"


def label(params):
    return jax.tree_util.tree_map_with_path(label_of, params)


model = make_model()
for variable in model.trainable_variables:
    print(f"{variable.path:<40}{tuple(variable.shape)}")

# %%
# The optimizer
# -------------
# Adam has a schedule of its own. The rate of Muon is that of the Keras
# optimizer, which callbacks read and set.


@jaxwrap.register_serializable("gallery")
def muon_and_adam(learning_rate):
    warm = optax.linear_schedule(0.0, 3e-3, transition_steps=50)
    return optax.multi_transform(
        {
            "muon": optax.contrib.muon(learning_rate),
            "adam": optax.adam(warm),
        },
        label,
    )


cosine = optax.cosine_decay_schedule(0.02, decay_steps=220)
optimizers = {
    "Muon and Adam": jaxwrap.OptaxOptimizer(
        muon_and_adam, learning_rate=cosine
    ),
    "Adam": jaxwrap.OptaxOptimizer(optax.adam, learning_rate=3e-3),
    "SGD": jaxwrap.OptaxOptimizer(optax.sgd, learning_rate=0.1),
}
entropy = optax.losses.softmax_cross_entropy_with_integer_labels

# %%
# Training
# --------
# A callback notes the rate, and how far each group has moved.


class Watch(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.rates, self.moved = [], {"muon": [], "adam": []}

    def weights(self):
        return self.model.get_layer("mlp").get_variables()["params"]

    def on_train_begin(self, logs=None):
        self.start = self.weights()
        self.labels = label(self.start)

    def on_train_batch_end(self, batch, logs=None):
        self.rates.append(float(self.model.optimizer.learning_rate))

    def on_epoch_end(self, epoch, logs=None):
        steps = jax.tree.map(np.subtract, self.weights(), self.start)
        for group, norms in self.moved.items():
            leaves = zip(*map(jax.tree.leaves, (steps, self.labels)))
            squares = [
                (step**2).sum()
                for step, name in leaves
                if name == group
            ]
            norms.append(np.sqrt(sum(squares)))


curves, watches = {}, {}
for name, optimizer in optimizers.items():
    model = make_model()
    model.compile(
        optimizer, jaxwrap.JaxLoss(entropy), metrics=["accuracy"]
    )
    watches[name] = Watch()
    curves[name] = model.fit(
        train_x,
        train_y,
        validation_data=(test_x, test_y),
        epochs=10,
        batch_size=64,
        callbacks=[watches[name]],
        verbose=0,
    ).history
    best = max(curves[name]["val_accuracy"])
    print(f"{name:<15}held-out accuracy {best:.3f}")

# %%
# The state of the optimizer
# --------------------------
# It is Optax's own, in Keras variables. A ``.keras`` file holds it, and
# training goes on from there on any backend.

for variable in optimizers["Muon and Adam"].variables:
    place = variable.path.partition("/opt_state/")[2]
    if "Dense_0" in place or "head" in place:
        print(place)

# %%
# Rates and losses
# ----------------

figure, (left, middle, right) = plt.subplots(
    1, 3, figsize=(10, 3.4), layout="constrained"
)
for name, history in curves.items():
    left.plot(history["loss"], lw=2, label=name)
left.set(title="Loss", xlabel="epoch", yscale="log")
left.legend()

watch = watches["Muon and Adam"]
middle.plot(watch.rates, lw=2, label="muon")
steps = np.arange(len(watch.rates))
middle.plot(3e-3 * np.minimum(steps / 50, 1), lw=2, label="adam")
middle.set(title="Learning rate by group", xlabel="step")
for group, norms in watch.moved.items():
    right.plot(norms, lw=2, label=group)
right.set(title="Distance from the start", xlabel="epoch")
for axes in (left, middle, right):
    axes.spines[["top", "right"]].set_visible(False)
for axes in (middle, right):
    axes.legend()
plt.show()
