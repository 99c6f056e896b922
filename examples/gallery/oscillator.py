"""
Two unknown constants of an oscillator
======================================

A damped oscillator is seen only through noise. How stiff is it, and how
strong is the friction? diffrax solves its equation inside a Keras
layer, and ``fit`` finds both constants by the gradient of the solution.
"""

import diffrax
import jax
import jax.numpy as jnp
import keras
import matplotlib.pyplot as plt
import numpy as np

import jaxwrap

keras.utils.set_random_seed(0)

# %%
# The equation
# ------------
# ``y'' = -stiffness y - friction y'``. The function gets the starts of
# a batch of motions, and returns position and speed at 60 times.
#
# On the TensorFlow backend set the environment variable
# ``EQX_ON_ERROR=off``. diffrax checks its arguments by calls back into
# Python, which a TensorFlow graph cannot hold.

times = jnp.linspace(0.0, 12.0, 60)


def solve(params, inputs):
    stiffness, friction = jnp.exp(params["log_constants"])

    def derivative(t, y, args):
        position, speed = y
        force = -stiffness * position - friction * speed
        return jnp.stack([speed, force])

    def one(start):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(derivative),
            diffrax.Tsit5(),
            t0=0.0,
            t1=12.0,
            dt0=0.1,
            y0=start,
            saveat=diffrax.SaveAt(ts=times),
            stepsize_controller=diffrax.PIDController(1e-4, 1e-5),
        )
        return solution.ys

    return jax.vmap(one)(inputs)


# %%
# The data
# --------
# The truth is known here: stiffness 1.7, friction 0.25.

truth = {"log_constants": jnp.log(jnp.array([1.7, 0.25]))}
rng = np.random.default_rng(0)
starts = rng.normal(size=(64, 2)).astype("float32")
clean = np.asarray(solve(truth, starts))
noise = rng.normal(scale=0.2, size=clean.shape)
seen = (clean + noise).astype("float32")

# %%
# The layer
# ---------
# Its only parameters are the two constants, which start far off. They
# are positive, so the layer learns their logarithms.

guess = {"log_constants": np.log([1.0, 1.0]).astype("float32")}
layer = jaxwrap.JaxLayer(solve, params=guess, name="oscillator")
model = keras.Sequential([keras.Input((2,)), layer])
model.compile(keras.optimizers.Adam(0.05), "mse")

found = [np.exp(guess["log_constants"])]


def remember(epoch, logs):
    params = layer.get_variables()["params"]
    found.append(np.exp(params["log_constants"]))


watch = keras.callbacks.LambdaCallback(on_epoch_end=remember)
model.fit(
    starts, seen, epochs=40, batch_size=32, callbacks=[watch], verbose=0
)
stiffness, friction = found[-1]
print(f"stiffness {stiffness:.3f}  (truth 1.700)")
print(f"friction  {friction:.3f}  (truth 0.250)")

# %%
# The motion
# ----------
# The model follows the true path closer than any point that it has
# seen.

predicted = model.predict(starts, verbose=0)
for name, values in (("data", seen), ("model", predicted)):
    error = np.sqrt(np.mean((values - clean) ** 2))
    print(f"error of the {name:<6} {error:.3f}")

# %%

figure, (left, right) = plt.subplots(
    1, 2, figsize=(9, 4), layout="constrained"
)
for index, color in zip((3, 8), ("#08519c", "#a63603")):
    left.plot(*seen[index].T, ".", color=color, alpha=0.4)
    left.plot(*clean[index].T, color="black", lw=3, alpha=0.25)
    left.plot(*predicted[index].T, color=color, lw=1.5)
left.set(title="Phase portrait: data, truth and model")
left.set(xlabel="position", ylabel="speed")

for values, name, color, true in zip(
    np.array(found).T,
    ("stiffness", "friction"),
    ("#08519c", "#a63603"),
    (1.7, 0.25),
):
    right.plot(values, color=color, lw=2, label=name)
    right.axhline(true, color=color, ls=":")
right.set(title="The constants, and the truth (dotted)")
right.set(xlabel="epoch", ylim=(0, 2))
right.legend(loc="center right")
for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)
plt.show()
