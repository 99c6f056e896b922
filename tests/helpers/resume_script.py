"""Trains a model, from the last backup if there is one; `test_resume.py` runs and kills it.

Arguments: the backup folder, the file for the result, and optionally "batch" or "backup", when to kill itself.
"""

import os
import signal
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import keras
import numpy as np

import jaxwrap

register = jaxwrap.register_serializable("tests_resume")


@register
class Net(nn.Module):
    @nn.compact
    def __call__(self, x, training=False):
        x = nn.BatchNorm(use_running_average=not training)(nn.Dense(5)(x))
        return nn.Dropout(0.4, deterministic=not training)(nn.tanh(x))


@register
def init(rng, inputs):
    return jax.random.normal(rng, (inputs.shape[-1], 2)), {"calls": jnp.int32(0)}


@register
def call(params, state, rng, inputs, training):
    if training:
        inputs = inputs + 0.1 * jax.random.normal(rng, inputs.shape)
        state = {"calls": state["calls"] + 1}
    return inputs @ params, state


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


class KillInABatch(keras.callbacks.Callback):
    def on_train_batch_begin(self, batch, logs=None):
        if int(self.model.optimizer.iterations.value) == 11:
            kill()


class KillInABackup(keras.callbacks.BackupAndRestore):
    """Dies when half of the third backup has been written."""

    def _save_model(self, *args, **kwargs):
        if int(self.model.optimizer.iterations.value) >= 12:
            super()._save_model(*args, **kwargs)
            with open(self._weights_path, "r+b") as file:
                file.truncate(os.path.getsize(self._weights_path) // 2)
            kill()
        super()._save_model(*args, **kwargs)


folder, result, *death = sys.argv[1:]
keras.utils.set_random_seed(0)
rng = np.random.default_rng(0)
x = rng.standard_normal((32, 4)).astype("float32")
y = rng.standard_normal((32, 2)).astype("float32")
inputs = keras.Input((4,))
hidden = jaxwrap.FlaxLayer(Net(), seed=1, name="net")(inputs)
model = keras.Model(inputs, jaxwrap.JaxLayer(call, init, seed=2, name="head")(hidden))
model.compile(keras.optimizers.Adam(0.01), "mse")
backup_class = KillInABackup if death == ["backup"] else keras.callbacks.BackupAndRestore
# Keras overwrites a backup in place; `double_checkpoint` keeps the one before it.
callbacks = [backup_class(folder, delete_checkpoint=False, double_checkpoint=True)]
if death == ["batch"]:
    callbacks.append(KillInABatch())
history = model.fit(x, y, batch_size=8, epochs=5, shuffle=False, verbose=0, callbacks=callbacks)
variables = [*model.variables, *model.optimizer.variables]
arrays = {
    f"{index} {v.path}": keras.ops.convert_to_numpy(v.value) for index, v in enumerate(variables)
}
np.savez(
    result,
    epochs=len(history.history["loss"]),
    **{k.replace("/", "."): v for k, v in arrays.items()},
)
