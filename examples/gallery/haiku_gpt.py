"""
Characters: a small GPT from old Haiku weights
==============================================

A GPT in Haiku, as many were written, with its weights in an ``.npz``
file. Load them into a Keras model, train on, and let it write. The
text are the documentation strings of Python's standard library.
"""

import ast
import functools
import pathlib
import re
import sysconfig
import tempfile

import haiku as hk
import jax
import jax.numpy as jnp
import keras
import matplotlib.pyplot as plt
import numpy as np
import optax

import jaxwrap

keras.utils.set_random_seed(0)

# %%
# The text
# --------
# The documentation of the standard library, without indentation.

library = pathlib.Path(sysconfig.get_path("stdlib"))
documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
texts = []
for file in sorted(library.glob("*.py")):
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, documented):
            texts.append(ast.get_docstring(node) or "")
text = "\n\n".join(filter(str.isascii, filter(None, texts)))
text = re.sub(" +", " ", text)
alphabet = sorted(set(text))
codes = {character: code for code, character in enumerate(alphabet)}
tokens = np.array([codes[character] for character in text], "int32")
print(f"{len(tokens):,} characters, {len(alphabet)} different ones")

LENGTH = 48
ends = len(tokens) // (LENGTH + 1) * (LENGTH + 1)
rows = tokens[:ends].reshape(-1, LENGTH + 1)
np.random.default_rng(0).shuffle(rows)
train, test = rows[:-400], rows[-400:]

# %%
# The model
# ---------


def gpt(tokens, width=64, heads=4, layers=2):
    size = tokens.shape[-1]
    causal = jnp.tril(jnp.ones((1, 1, size, size)))
    init = hk.initializers.VarianceScaling(2 / layers)
    small = hk.initializers.RandomNormal(0.02)
    places = hk.get_parameter("places", (LENGTH, width), init=small)
    x = hk.Embed(len(alphabet), width, w_init=small)(tokens)
    x = x + places[:size]
    for _ in range(layers):
        hidden = hk.LayerNorm(-1, True, True)(x)
        attention = hk.MultiHeadAttention(
            heads, width // heads, w_init=init
        )
        x = x + attention(hidden, hidden, hidden, causal)
        hidden = hk.LayerNorm(-1, True, True)(x)
        hidden = jax.nn.gelu(hk.Linear(4 * width)(hidden))
        x = x + hk.Linear(width)(hidden)
    return hk.Linear(len(alphabet))(hk.LayerNorm(-1, True, True)(x))


network = hk.without_apply_rng(hk.transform(gpt))

# %%
# The old program
# ---------------
# Some years ago it trained for 80 steps, and wrote its weights by the
# names of Haiku.

params = network.init(jax.random.key(0), train[:1, :-1])
optimizer = optax.adam(3e-3)
state = optimizer.init(params)
entropy = optax.losses.softmax_cross_entropy_with_integer_labels


@jax.jit
def step(params, state, batch):
    def loss(params):
        logits = network.apply(params, batch[:, :-1])
        return entropy(logits, batch[:, 1:]).mean()

    value, gradients = jax.value_and_grad(loss)(params)
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, value


old_losses = []
for index in range(80):
    batch = train[32 * index : 32 * (index + 1)]
    params, state, value = step(params, state, batch)
    old_losses.append(float(value))

file = pathlib.Path(tempfile.mkdtemp()) / "gpt.npz"
np.savez(
    file,
    **{
        f"{module}/{name}": value
        for module, names in params.items()
        for name, value in names.items()
    },
)

# %%
# Into Keras
# ----------
# The names of Haiku match by themselves. ``load`` returns its plan, and
# ``dry_run=True`` prints it and changes nothing.

layer = jaxwrap.HaikuLayer(network, name="gpt")
model = keras.Sequential([keras.Input((LENGTH,), dtype="int32"), layer])
plan = jaxwrap.checkpoints.load(layer, file)
for row in plan[-4:]:
    print(f"{row.name:<31} -> {row.target}")

# %%
# Train on
# --------
# The loss goes on where the old program stopped, now with Muon of Optax
# for the matrices. Eight parts of 40 batches, to see it fall.


def decay(rate):
    return optax.cosine_decay_schedule(rate, decay_steps=320)


muon = functools.partial(
    optax.contrib.muon, adam_learning_rate=decay(5e-3)
)
model.compile(
    jaxwrap.OptaxOptimizer(muon, learning_rate=decay(0.02)),
    jaxwrap.JaxLoss(entropy),
)
parts = np.resize(train, (8, 40 * 32, LENGTH + 1))
new_losses = []
for part in parts:
    past, future = part[:, :-1], part[:, 1:]
    history = model.fit(past, future, batch_size=32, verbose=0)
    new_losses += history.history["loss"]

unseen = model.evaluate(test[:, :-1], test[:, 1:], verbose=0)
print(f"the old program ended at {np.mean(old_losses[-20:]):.2f}")
print(f"Keras ended at {new_losses[-1]:.2f}")
print(f"and has {unseen:.2f} on text that it has not seen")

# %%
# Let it write
# ------------
# ``get_variables`` returns the parameters as Haiku has them, so the
# old functions go on working.

trained = layer.get_variables()["params"]


@jax.jit
def draw(params, window, place, key):
    logits = network.apply(params, window[None])[0, place] / 0.6
    code = jax.random.categorical(key, logits)
    return code, jax.nn.softmax(logits)[code]


def write(params, start, count=360, seed=3):
    written, sure = [codes[character] for character in start], []
    for key in jax.random.split(jax.random.key(seed), count):
        window = np.zeros(LENGTH, "int32")
        last = written[-LENGTH:]
        window[: len(last)] = last
        code, probability = draw(params, window, len(last) - 1, key)
        written.append(int(code))
        sure.append(float(probability))
    return "".join(alphabet[code] for code in written), sure


start = "Return the "
print("The old weights:\n")
print(write(params, start, count=150)[0])

# %%

print("After training in Keras:\n")
written, sure = write(trained, start)
print(written)

# %%
# Loss and certainty
# ------------------
# Each character has the colour of the probability that the model gave
# it: light where it was unsure, which is at the beginnings of words.

figure, (left, right) = plt.subplots(
    1, 2, figsize=(10, 4), layout="constrained"
)
left.plot(old_losses, color="#9ecae1", label="the old program")
steps = len(old_losses) + 40 * np.arange(8) + 20
left.plot(steps, new_losses, ".-", color="#08519c", label="Keras")
left.axhline(unseen, color="black", ls=":", label="unseen text, end")
left.set(title="Loss", xlabel="step", ylabel="nats by character")
left.legend()
left.spines[["top", "right"]].set_visible(False)

lines = [""]
sure = [1.0] * len(start) + sure
for character in written:
    lines[-1] += character
    if character == "\n" or len(lines[-1]) == 44:
        lines.append("")
place = 0
for row, line in enumerate(lines):
    for column, character in enumerate(line):
        right.text(
            column / 45,
            1 - row / max(14, len(lines)),
            character.strip(),
            color=plt.cm.Blues(0.3 + 0.7 * sure[place]),
            family="monospace",
            fontsize=10,
            va="top",
        )
        place += 1
right.set(title="What it writes")
right.set_axis_off()
plt.show()
