"""
Why is it slow, and what is traced
==================================

JAX runs a Python function once for each kind of call, to record what it
computes, and compiles the record. After that, Python is out of the way.
Slow programs are mostly programs that make ever new kinds of calls.
Count them.
"""

import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import keras
import matplotlib.pyplot as plt
import numpy as np

import jaxwrap

# %%
# A counter
# ---------
# What a function does in Python happens once a trace. So a line of
# Python counts traces.

traces = 0


def call(params, inputs, power=1.0):
    global traces
    traces += 1
    hidden = jnp.tanh(inputs @ params["kernel"])
    return hidden**power


kernel = np.random.default_rng(0).normal(size=(64, 64)) / 8


def make_layer():
    return jaxwrap.JaxLayer(
        call,
        params={"kernel": kernel.astype("float32")},
        call_arguments=("inputs", "power"),
    )


def count(title, calls):
    """Runs calls one after the other; returns seconds of each."""
    global traces
    traces, seconds = 0, []
    for one in calls:
        start = time.perf_counter()
        jax.block_until_ready(one())
        seconds.append(time.perf_counter() - start)
    print(f"{title:<34}{len(seconds):>3} calls, {traces:>2} traces")
    return seconds


# %%
# The same shape again
# --------------------
# The first call finds out the shapes, and compiles. The others run what
# is there.

layer = make_layer()
x = np.ones((32, 64), "float32")
same = count("same shape", [lambda: layer(x)] * 20)

# %%
# Ever new shapes
# ---------------
# A batch of another size is another kind of call. Text of ever new
# lengths, or a last batch that is smaller, does this.

layer = make_layer()
batches = [np.ones((size, 64), "float32") for size in range(1, 21)]
new = count("20 sizes", [lambda b=b: layer(b) for b in batches])

# %%
# The remedy is a few sizes: pad to the next of them. The result is cut
# in NumPy, since JAX compiles slices too.

layer = make_layer()


def padded_call(batch):
    size = next(size for size in (8, 16, 32) if size >= len(batch))
    full = np.pad(batch, [(0, size - len(batch)), (0, 0)])
    outputs = keras.ops.convert_to_numpy(layer(full))
    return outputs[: len(batch)]


padded = count(
    "20 sizes, padded to 3",
    [lambda b=b: padded_call(b) for b in batches],
)

# %%
# Numbers that are not arrays
# ---------------------------
# An argument that is a Python number reaches the function as it is, so
# that ``if power > 1`` works. Each value is another kind of call, with
# a trace of its own.

layer = make_layer()
powers = np.linspace(1.0, 2.0, 20)
static = count(
    "20 Python numbers",
    [lambda p=p: layer(x, power=float(p)) for p in powers],
)

# %%
# An array is traced: its value may change.

layer = make_layer()
powers = [np.array(power, "float32") for power in powers]
array = count(
    "20 numbers as arrays",
    [lambda p=p: layer(x, power=p) for p in powers],
)

# %%
# In ``fit``
# ----------
# Keras compiles a whole step of training, for the shape of a batch. 320
# examples are ten batches of 32. Eight more are a smaller last batch,
# and one more kind of call.

for examples in (320, 328):
    model = keras.Sequential([keras.Input((64,)), make_layer()])
    model.compile("sgd", "mse")
    data = np.ones((examples, 64), "float32")
    traces = 0
    model.fit(data, data, batch_size=32, epochs=3, verbose=0)
    print(f"{examples} examples: {traces} traces")

# %%
# Functions without a layer
# -------------------------
# ``wrap_function`` works the same way. Make it once, outside of loops.


def norm(x):
    global traces
    traces += 1
    return jnp.linalg.norm(x)


wrapped = jaxwrap.wrap_function(norm)
count("wrapped once", [lambda: wrapped(x)] * 20)
count(
    "wrapped in the loop",
    [lambda: jaxwrap.wrap_function(lambda x: norm(x))(x)] * 20,
)

# %%
# float64
# -------
# JAX computes in float32. A float64 array of NumPy is no new kind of
# call, and no gain. ``JAX_ENABLE_X64=1`` changes that, for a process as
# a whole. Then float64 is a kind of call of its own to a function. A
# layer casts what it gets to its own ``dtype``, so it has one kind
# still, and computes in float64 only when told so.

program = """
import jax, jaxwrap, numpy as np

traces = 0

def double(inputs):
    global traces
    traces += 1
    return 2 * inputs

print("x64 is", "on" if jax.config.jax_enable_x64 else "off")
for title, function in {
    "a function": jaxwrap.wrap_function(double),
    "a layer": jaxwrap.JaxLayer(double),
    "a layer of float64": jaxwrap.JaxLayer(double, dtype="float64"),
}.items():
    function(np.ones(3, "float32"))
    traces = 0
    function(np.ones(3, "float32"))
    result = function(np.ones(3, "float64"))
    print(f"  {title:<19}{result.dtype}, {traces} new traces")
"""
for x64 in "01":
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env={**os.environ, "JAX_ENABLE_X64": x64},
        check=True,
    )

# %%
# What a call costs
# -----------------

figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
for title, seconds in {
    "ever new sizes": new,
    "Python numbers": static,
    "padded to three sizes": padded,
    "numbers as arrays": array,
    "the same shape": same,
}.items():
    axes.plot(1000 * np.array(seconds), ".-", label=title)
axes.set(title="The time of each call", yscale="log")
axes.set(xlabel="call", ylabel="milliseconds")
axes.set(xticks=range(0, 20, 5))
axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
axes.grid(alpha=0.3)
axes.spines[["top", "right"]].set_visible(False)
plt.show()
