"""Writes a model in every way that Keras has, for `test_saving_matrix.py`, which reads it on another backend.

Argument: the folder.
"""

import os

if os.environ.get("KERAS_BACKEND") == "torch":
    import torch  # noqa: F401  (before TensorFlow: they crash in the other order)

import pathlib
import pickle
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax

import jaxwrap
from jaxwrap.reparametrizations import Int8, LoRA, SpectralNorm

register = jaxwrap.register_serializable("tests_matrix")


@register
class Net(nn.Module):
    width: int = 5

    @nn.compact
    def __call__(self, x, training=False):
        x = nn.BatchNorm(use_running_average=not training)(nn.Dense(self.width)(x))
        return nn.Dropout(0.4, deterministic=not training)(nn.tanh(x))


@register
def init(rng, inputs):
    return {"w": jax.random.normal(rng, (inputs.shape[-1], 3))}, {"calls": jnp.int32(0)}


@register
def call(params, state, rng, inputs, training):
    if training:
        inputs = inputs + jax.random.normal(rng, inputs.shape)
        state = {"calls": state["calls"] + 1}
    return inputs @ params["w"], state


def make():
    inputs = keras.Input((4,))
    rules = {
        ".*/bias": jaxwrap.Rule(trainable=False),
        ".*/kernel": jaxwrap.Rule(reparametrize=LoRA(2, base=Int8(), dropout=0.3)),
    }
    hidden = jaxwrap.FlaxLayer(Net(), seed=1, name="net", rules=rules)(inputs)
    rules = {"params/w": jaxwrap.Rule(reparametrize=SpectralNorm())}
    hidden = jaxwrap.JaxLayer(call, init, seed=2, name="head", rules=rules)(hidden)
    return keras.Model(inputs, keras.layers.Dense(2, name="dense")(hidden))


def inputs():
    return np.random.default_rng(0).standard_normal((6, 4)).astype("float32")


def trained():
    model = make()
    if keras.config.backend() == "numpy":
        model(inputs(), training=True)
    else:
        model.compile(keras.optimizers.Adam(0.01), "mse")
        model.fit(inputs(), np.ones((6, 2)), epochs=2, batch_size=3, verbose=0)
    return model


@register
def noisy_steps(learning_rate):
    """A state of floats, counters, flags and keys."""
    noise = optax.add_noise(1e-3, 0.5, key=jax.random.key(1))
    inner = optax.chain(noise, optax.contrib.muon(learning_rate))
    return optax.apply_if_finite(optax.MultiSteps(inner, 2).gradient_transformation(), 3)


def trained_by_optax():
    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.layers.Dense(2, name="dense")(inputs))
    model.compile(jaxwrap.OptaxOptimizer(noisy_steps, learning_rate=1e-2), "mse")
    train_on(model)
    return model


def train_on(model):
    model.fit(inputs(), np.ones((6, 2)), batch_size=2, shuffle=False, verbose=0)


def all_values(model):
    variables = [*model.variables, *model.optimizer.variables]
    return {f"{index:03d}": plain(v.value) for index, v in enumerate(variables)}


def write_trained_by_optax(folder):
    """A model in the midst of its training, and what it is at the next epoch's end."""
    model = trained_by_optax()
    model.save(folder / "optax.keras")
    saved = {f"saved.{name}": value for name, value in all_values(model).items()}
    train_on(model)
    resumed = {f"resumed.{name}": value for name, value in all_values(model).items()}
    np.savez(folder / "optax.npz", **saved, **resumed)


def write(model, folder):
    """Everything that there is of a model."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save(folder / "model.keras")
    model.save_weights(folder / "model.weights.h5")
    model.save_weights(folder / "sharded.weights.json", max_shard_size=3e-7)
    (folder / "model.json").write_text(model.to_json())
    (folder / "model.pickle").write_bytes(pickle.dumps(model))
    jaxwrap.checkpoints.save(model, folder / "trained.npz", trainable_only=True)
    values = {f"variable.{index:03d}": plain(v.value) for index, v in enumerate(model.variables)}
    if model.compiled:
        variables = enumerate(model.optimizer.variables)
        values |= {f"optimizer.{index:03d}": plain(v.value) for index, v in variables}
    outputs = plain(model(inputs()))
    # What the loaded model computes next in training, dropout and noise included.
    training = plain(model(inputs(), training=True))
    np.savez(folder / "arrays.npz", inference=outputs, training=training, **values)
    if keras.config.backend() != "numpy":
        write_trained_by_optax(folder)


def plain(tensor):
    """A tensor as NumPy saves it; backends hold seeds in integers of different kinds."""
    if keras.config.backend() == "torch":
        tensor = tensor.detach()
    array = keras.ops.convert_to_numpy(tensor)
    return array.astype("float32" if array.dtype.kind == "f" else "int64")


if __name__ == "__main__":
    write(trained(), pathlib.Path(sys.argv[1]))
