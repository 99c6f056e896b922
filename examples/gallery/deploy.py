"""
Deploy: ONNX, LiteRT, StableHLO
===============================

Train a small Flax CNN, write its inference in four formats, run each
file in its own runtime, and compare sizes, times and results.

The data are the 1,797 handwritten digits of scikit-learn.
"""

import pathlib
import tempfile
import time

import flax.linen as nn
import jax
import keras
import matplotlib.pyplot as plt
import numpy as np
import onnxruntime
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jaxwrap

keras.utils.set_random_seed(0)
digits = load_digits()
images = digits.images[..., None].astype("float32") / 16
train_x, test_x, train_y, test_y = train_test_split(
    images, digits.target, test_size=0.25, random_state=0
)

# %%
# The model
# ---------
# An exported model is one of inference: batch norm uses its running
# means, and dropout does nothing.


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x, training: bool = False):
        x = nn.relu(nn.Conv(16, (3, 3))(x))
        x = nn.Conv(32, (3, 3), strides=2, use_bias=False)(x)
        x = nn.BatchNorm(use_running_average=not training)(x)
        x = nn.relu(x).reshape(x.shape[0], -1)
        x = nn.Dropout(0.4, deterministic=not training)(x)
        return nn.softmax(nn.Dense(10)(x))


inputs = keras.Input((8, 8, 1), name="images")
model = keras.Model(inputs, jaxwrap.FlaxLayer(CNN())(inputs))
model.compile(
    keras.optimizers.Adam(3e-3),
    "sparse_categorical_crossentropy",
    metrics=["accuracy"],
)
model.fit(train_x, train_y, epochs=10, verbose=0)
loss, accuracy = model.evaluate(test_x, test_y, verbose=0)
print(f"accuracy on held-out digits: {accuracy:.3f}")

# %%
# Four files
# ----------
# ``export`` runs each file in its own runtime before it returns, and
# compares the outputs with those of the model. A file that is off is
# an error.

folder = pathlib.Path(tempfile.mkdtemp())
paths = {
    "stablehlo": folder / "digits.stablehlo",
    "tf_saved_model": folder / "digits",
    "litert": folder / "digits.tflite",
    "onnx": folder / "digits.onnx",
}
for form, path in paths.items():
    jaxwrap.export(model, path, form)

# %%
# What runs them
# --------------
# None of these four runtimes needs Keras or jaxwrap. The size of the
# batch is open in all four files.

artifact = jax.export.deserialize(
    bytearray(paths["stablehlo"].read_bytes())
)
compiled = jax.jit(artifact.call)

served = tf.saved_model.load(str(paths["tf_saved_model"]))

interpreter = Interpreter(str(paths["litert"]))
lite = interpreter.get_signature_runner("serving_default")

session = onnxruntime.InferenceSession(paths["onnx"])


def run_litert(batch):
    return next(iter(lite(images=batch).values()))


def run_onnx(batch):
    return session.run(None, {"images": batch})[0]


runners = {
    "stablehlo": lambda batch: np.asarray(compiled(batch)),
    "tf_saved_model": lambda batch: served.serve(batch).numpy(),
    "litert": run_litert,
    "onnx": run_onnx,
}

# %%
# The numbers
# -----------
# The size is that of all files of the format. The time is the median
# of 30 calls, each with NumPy arrays in and out. Times on your
# machine will differ.


def size_in_kb(path):
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(f.stat().st_size for f in files if f.is_file()) / 1e3


def milliseconds(function, batch):
    function(batch)  # The first call compiles.
    times = []
    for _ in range(30):
        start = time.perf_counter()
        function(batch)
        times.append(time.perf_counter() - start)
    return 1e3 * np.median(times)


expected = model.predict(test_x, verbose=0)
runners = {
    "keras": lambda batch: keras.ops.convert_to_numpy(model(batch)),
    **runners,
}
sizes, one, many = {}, {}, {}
print(f"{'':<15}{'kB':>7}{'ms, 1':>8}{'ms, 256':>9}  difference")
for name, function in runners.items():
    sizes[name] = size_in_kb(paths[name]) if name in paths else np.nan
    one[name] = milliseconds(function, test_x[:1])
    many[name] = milliseconds(function, test_x[:256])
    difference = np.abs(function(test_x) - expected).max()
    print(
        f"{name:<15}{sizes[name]:>7.0f}{one[name]:>8.2f}"
        f"{many[name]:>9.2f}  {difference:.0e}"
    )
    assert difference < 1e-4

# %%
# Which one to take
# -----------------
# The weights alone are what the dashed line shows. What is above it
# is the program.

weights_in_kb = 4 * model.count_params() / 1e3
colors = ["#9aa0a6", "#4477aa", "#ee8866", "#44aa77", "#aa4477"]

figure, (left, middle, right) = plt.subplots(
    1, 3, figsize=(10, 3.4), layout="constrained", sharey=True
)
for axes, values, title in (
    (left, sizes, "kilobytes"),
    (middle, one, "ms for one digit"),
    (right, many, "ms for 256 digits"),
):
    bars = axes.barh(list(values), list(values.values()), color=colors)
    labels = [f"{v:.3g}" if v == v else "" for v in values.values()]
    axes.bar_label(bars, labels, padding=3)
    axes.set_title(title)
    axes.margins(x=0.2)
    axes.spines[["top", "right"]].set_visible(False)
left.axvline(weights_in_kb, color="black", linestyle="--", linewidth=1)
left.invert_yaxis()
plt.show()
