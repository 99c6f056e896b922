"""Train a CNN of a JAX library on handwritten digits with Keras on one backend, and use it on all four.

    python examples/quickstart.py --backend jax --library linen

The data are the 1,797 8x8 images that ship with scikit-learn. The model, a module of Flax Linen (or Flax NNX, Haiku,
Equinox) inside a functional Keras model, is trained, saved as a `.keras` file and loaded in a fresh process on every
other backend, where its predictions have to be the same. Results are written to `quickstart-results/`. Exits with 1 if
the accuracy on held-out digits is below 0.97, or if any backend's predictions differ by more than 1e-5.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

BACKENDS = ("jax", "tensorflow", "torch", "numpy")
LIBRARIES = ("linen", "nnx", "haiku", "equinox")
MIN_ACCURACY = 0.97
MAX_DIFFERENCE = 1e-5


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=BACKENDS, default="jax", help="the one that trains")
    parser.add_argument(
        "--library", choices=LIBRARIES, default="linen", help="the one the model is of"
    )
    parser.add_argument("--output", type=Path, default=Path("quickstart-results"))
    # How this script calls itself in a fresh process: load the model, save its predictions.
    parser.add_argument("--load", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.backend == "numpy" and not args.load:
        parser.error("Keras cannot train on NumPy; choose jax, tensorflow or torch.")
    return args


if __name__ == "__main__":
    ARGS = parse_args()
    os.environ["KERAS_BACKEND"] = ARGS.backend  # Keras reads it once, when it is imported
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import keras
import numpy as np
from flax import nnx
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jaxwrap

# What a file refers to needs a name.
register = jaxwrap.register_serializable("quickstart")


@register
class DigitsCNN(nn.Module):
    """An ordinary Linen module."""

    width: int = 32
    dropout: float = 0.4

    @nn.compact
    def __call__(self, x, training: bool = False):
        for width in (self.width, 2 * self.width):
            x = nn.Conv(width, (3, 3), use_bias=False)(x)
            x = nn.BatchNorm(use_running_average=not training, momentum=0.9)(x)
            x = nn.max_pool(nn.relu(x), (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        x = nn.Dropout(self.dropout, deterministic=not training)(x)
        return nn.relu(nn.Dense(4 * self.width)(x))


@register
class NnxCNN(nnx.Module):
    """The same in Flax NNX."""

    def __init__(self, rngs):
        self.convs = nnx.List(
            [
                nnx.Conv(size, width, (3, 3), use_bias=False, rngs=rngs)
                for size, width in ((1, 32), (32, 64))
            ]
        )
        self.norms = nnx.List([nnx.BatchNorm(width, momentum=0.9, rngs=rngs) for width in (32, 64)])
        self.dropout = nnx.Dropout(0.4, rngs=rngs)
        self.dense = nnx.Linear(256, 128, rngs=rngs)

    def __call__(self, x):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.max_pool(nnx.relu(norm(conv(x))), (2, 2), (2, 2))
        return nnx.relu(self.dense(self.dropout(x.reshape(x.shape[0], -1))))


def haiku_cnn(x, is_training):
    """The same in Haiku."""
    for width in (32, 64):
        x = hk.Conv2D(width, 3, with_bias=False)(x)
        x = hk.BatchNorm(True, True, 0.9)(x, is_training)
        x = hk.max_pool(jax.nn.relu(x), (2, 2, 1), (2, 2, 1), "SAME")
    x = x.reshape(x.shape[0], -1)
    if is_training:
        x = hk.dropout(hk.next_rng_key(), 0.4, x)
    return jax.nn.relu(hk.Linear(128)(x))


haiku_transform = jaxwrap.register_serializable("quickstart", "haiku")(
    hk.transform_with_state(haiku_cnn)
)


class EquinoxCNN(eqx.Module):
    """The same in Equinox, where a module is written for one example."""

    convs: list
    norms: list
    dropout: eqx.nn.Dropout
    dense: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.convs = [
            eqx.nn.Conv2d(size, width, 3, padding=1, use_bias=False, key=key)
            for size, width, key in ((1, 32, keys[0]), (32, 64, keys[1]))
        ]
        self.norms = [
            eqx.nn.BatchNorm(width, axis_name="batch", momentum=0.9, mode="batch")
            for width in (32, 64)
        ]
        self.dropout = eqx.nn.Dropout(0.4)
        self.dense = eqx.nn.Linear(256, 128, key=keys[2])

    def __call__(self, x, state, *, key=None):
        x = x.transpose(2, 0, 1)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x, state = norm(conv(x), state)
            x = eqx.nn.MaxPool2d(2, 2)(jax.nn.relu(x))
        return jax.nn.relu(self.dense(self.dropout(x.ravel(), key=key))), state


@register
def make_equinox(key):
    return eqx.nn.make_with_state(EquinoxCNN)(key)


LAYERS = {
    "linen": lambda **kwargs: jaxwrap.FlaxLayer(DigitsCNN(), **kwargs),
    "nnx": lambda **kwargs: jaxwrap.NNXLayer.from_factory(NnxCNN, **kwargs),
    "haiku": lambda **kwargs: jaxwrap.HaikuLayer(haiku_transform, **kwargs),
    "equinox": lambda **kwargs: jaxwrap.EquinoxLayer.from_factory(
        make_equinox, batch=True, **kwargs
    ),
}


def load_data():
    """Training images and labels, then the held-out fifth."""
    digits = load_digits()
    images = digits.images[..., None].astype("float32") / 16
    train_x, test_x, train_y, test_y = train_test_split(
        images, digits.target, test_size=0.2, stratify=digits.target, random_state=0
    )
    return train_x, train_y, test_x, test_y


def build_model(library="linen"):
    inputs = keras.Input((8, 8, 1))
    features = LAYERS[library](name="cnn")(inputs)
    outputs = keras.layers.Dense(10, activation="softmax", name="classes")(features)
    return keras.Model(inputs, outputs, name="digits")


def train(library, output):
    """Trains, saves model and pictures; returns the predictions for the held-out digits and the seconds."""
    keras.utils.set_random_seed(0)
    train_x, train_y, test_x, test_y = load_data()
    model = build_model(library)
    model.summary()
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    # The best epoch is chosen on a part of the training data; the held-out fifth chooses nothing.
    stopping = keras.callbacks.EarlyStopping(patience=8, restore_best_weights=True)
    start = time.perf_counter()
    history = model.fit(train_x, train_y, epochs=40, validation_split=0.15, callbacks=[stopping])
    seconds = time.perf_counter() - start
    model.save(output / "digits.keras")
    predictions = model.predict(test_x, verbose=0)
    draw_results(output, history.history, test_x, test_y, predictions)
    return predictions, seconds


def load_elsewhere(backend, output):
    """Predicts on another backend in a fresh process; returns the predictions, None if it failed, and the seconds."""
    command = [sys.executable, __file__, "--load", "--backend", backend, "--output", str(output)]
    start = time.perf_counter()
    process = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - start
    if process.returncode:
        print(process.stderr, file=sys.stderr)
        return None, seconds
    return np.load(output / f"predictions-{backend}.npy"), seconds


def load(backend, output):
    """What the fresh process does."""
    # What `compile` chose was chosen for the backend that trained.
    model = keras.saving.load_model(output / "digits.keras", compile=False)
    _, _, test_x, _ = load_data()
    np.save(output / f"predictions-{backend}.npy", model.predict(test_x, verbose=0))


def draw_results(output, history, images, labels, predictions):
    """Writes `learning-curve.png`, `predictions.png`, and `quickstart.png` with both."""
    parts = {
        "learning-curve": lambda figure: draw_curve(figure, history),
        "predictions": lambda figure: draw_grid(figure, images, labels, predictions),
    }
    both = Figure((12, 4.5), layout="constrained")
    for (name, draw), half in zip(parts.items(), both.subfigures(1, 2), strict=True):
        alone = Figure((6, 4.5), layout="constrained")
        draw(alone)
        alone.savefig(output / f"{name}.png", dpi=150)
        draw(half)
    both.savefig(output / "quickstart.png", dpi=100)


def draw_curve(figure, history):
    axes = figure.subplots()
    epochs = range(1, len(history["accuracy"]) + 1)
    for key, label, color in (
        ("accuracy", "training (with dropout)", "#9ecae1"),
        ("val_accuracy", "validation", "#08519c"),
    ):
        axes.plot(epochs, history[key], color=color, linewidth=2, label=label)
    axes.set(xlabel="epoch", ylabel="accuracy", title="Learning curve", ylim=(0.75, 1.005))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False)


def draw_grid(figure, images, labels, predictions, rows=4, columns=8):
    figure.suptitle(f"The {rows * columns} least certain of {len(images)} held-out digits")
    hardest = np.argsort(predictions.max(axis=-1))
    all_axes = figure.subplots(rows, columns).flat
    for axes, index in zip(all_axes, hardest[: rows * columns], strict=True):
        predicted, label = predictions[index].argmax(), labels[index]
        axes.imshow(images[index, ..., 0], cmap="gray_r")
        axes.set_axis_off()
        if predicted == label:
            axes.set_title(predicted, color="#238b45", fontsize=11)
        else:
            axes.set_title(f"{predicted}, not {label}", color="#cb181d", fontsize=11)


def main(backend, library, output):
    output.mkdir(parents=True, exist_ok=True)
    expected, seconds = train(library, output)
    _, _, _, labels = load_data()
    rows, problems = [(backend, expected, seconds)], []
    for other in BACKENDS:
        if other != backend:
            print(f"loading the model on {other} ...", flush=True)
            rows.append((other, *load_elsewhere(other, output)))

    print(f"\n{'backend':<12}{'accuracy':>10}{'seconds':>10}  largest difference")
    for name, predictions, seconds in rows:
        if predictions is None:
            problems.append(f"{name} failed to load the model or to predict; its error is above")
            print(f"{name:<12}{'failed':>10}{seconds:>10.1f}")
            continue
        accuracy = np.mean(predictions.argmax(axis=-1) == labels)
        difference = np.abs(predictions - expected).max()
        shown = "(trained here)" if predictions is expected else f"{difference:.1e}"
        print(f"{name:<12}{accuracy:>10.4f}{seconds:>10.1f}  {shown}")
        if not accuracy >= MIN_ACCURACY:
            problems.append(f"{name}: accuracy {accuracy:.4f} is below {MIN_ACCURACY}")
        if not difference <= MAX_DIFFERENCE:
            problems.append(f"{name}: predictions differ by {difference:.1e}")
    print(
        "Seconds are those of training, or of a whole fresh process that loads and predicts.\n"
        f"Model and pictures are in {output}/."
    )
    if problems:
        sys.exit("FAILED: " + "; ".join(problems))


if __name__ == "__main__":
    if ARGS.load:
        load(ARGS.backend, ARGS.output)
    else:
        main(ARGS.backend, ARGS.library, ARGS.output)
