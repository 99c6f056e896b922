"""One of two processes with two devices each; `test_distribution.py` runs both, over loopback.

Arguments: which process, the port, the folder for files, what to do, and for "train" optionally the step to die in.
What to do is names of functions with commas.
"""

import os
import pathlib
import signal
import sys

import jax

rank, port, folder, tasks, *death = sys.argv[1:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, int(rank))

import keras  # noqa: E402  (it asks JAX for its devices)
import numpy as np  # noqa: E402
import on_devices  # noqa: E402
import pytest  # noqa: E402
from on_devices import CLOSE, assert_same, fit, make, momentum, values  # noqa: E402

from jaxwrap import checkpoints  # noqa: E402

folder = pathlib.Path(folder)
FORMATS = ("msgpack", "npz", "safetensors", "orbax")


def devices(shape=(1, 4)):
    return on_devices.devices(shape, auto_shard_dataset=False)


def local(model, rows=slice(None), **kwargs):
    """Trains on this process's rows of each batch of 8."""
    x, y = (
        array.reshape(4, 8, -1)[:, rows].reshape(-1, array.shape[-1]) for array in on_devices.data()
    )
    size = len(x) // 4
    with devices((1, 4) if size == 8 else (4, 1)):
        history = model.fit(x, y, batch_size=size, shuffle=False, verbose=0, **kwargs)
    return history.history["loss"]


def kernel(model):
    return model.get_layer("net").params["params"]["up"]["kernel"].value


def save():
    """Parameters over both processes: training, reading, writing and loading in every format."""
    for optimizer in (momentum, lambda: keras.optimizers.SGD(0.05, 0.9)):
        one, many = make(optimizer), make(optimizer, devices())
        assert not kernel(many).is_fully_addressable
        with pytest.raises(RuntimeError, match="spans non-addressable"):
            np.asarray(kernel(many))
        np.testing.assert_allclose(local(many, epochs=2), fit(one), rtol=1e-5)
        expected = values(one)
        with devices():
            layer = many.get_layer("net")
            variables = layer.get_variables()
            np.testing.assert_allclose(
                variables["params"]["up"]["kernel"], expected["net/params/up/kernel"], **CLOSE
            )
            checkpoints.save_model(many, folder / "model.keras")
            checkpoints.save_model(many, folder / "model.weights.h5")
            again = keras.models.load_model(folder / "model.keras")
            assert kernel(again).sharding == kernel(many).sharding
            again.load_weights(folder / "model.weights.h5")
            # State of the optimizer included.
            np.testing.assert_allclose(local(again, epochs=1), local(many, epochs=1), rtol=1e-6)
            layer.set_variables(variables)
    for name in FORMATS:
        path = folder / f"weights.{name}"
        for _ in range(2):  # over the first
            checkpoints.save(layer, path)
        before = kernel(many)
        layer.set_variables(jax.tree.map(np.zeros_like, variables))
        checkpoints.load(layer, path)
        assert kernel(many).sharding == before.sharding
        np.testing.assert_array_equal(
            layer.get_variables()["params"]["up"]["kernel"], variables["params"]["up"]["kernel"]
        )
    # A mistake of one process is an error in both.
    with pytest.raises((OSError, RuntimeError)):
        checkpoints.save(layer, folder / ("weights.npz" if rank == "1" else "nowhere/weights.npz"))
    if rank == "0":
        assert {p.name for p in folder.iterdir()} == {
            "model.keras",
            "model.weights.h5",
            *(f"weights.{name}" for name in FORMATS),
        }
        np.savez(folder / "expected.npz", **on_devices.flat(variables))


def replicated():
    """Data over both processes, parameters on all devices: each process has its own rows."""
    one, many = make(momentum), make(momentum, devices((4, 1)))
    assert kernel(many).is_fully_replicated
    rows = slice(0, 4) if rank == "0" else slice(4, 8)
    np.testing.assert_allclose(local(many, rows, epochs=2), fit(one), rtol=1e-5)
    assert_same(values(many), values(one))


class Kill(keras.callbacks.Callback):
    def on_train_batch_begin(self, batch, logs=None):
        if int(self.model.optimizer.iterations.value) == int(death[0]):
            os.kill(os.getpid(), signal.SIGKILL)


def train():
    """Goes on from the last file, and ends as if nothing had happened."""
    path, epoch = folder / "model.keras", 0
    model = make(momentum, devices())
    if path.exists():
        with devices():
            model = keras.models.load_model(path)
        epoch = int(model.optimizer.iterations.value) // 4
        assert epoch == 2
    callbacks = [
        keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: checkpoints.save_model(model, path)
        )
    ]
    if death:
        callbacks.append(Kill())
    local(model, epochs=4, initial_epoch=epoch, callbacks=callbacks)
    with devices():
        received = model.get_layer("net").get_variables()
    if rank == "0":
        one = make(momentum)
        fit(one, epochs=4)
        expected = one.get_layer("net").get_variables()
        assert_same(on_devices.flat(received), on_devices.flat(expected))


for name in tasks.split(","):
    globals()[name]()
