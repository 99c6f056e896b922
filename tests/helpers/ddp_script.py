"""Trains in two processes of PyTorch; `test_replicas.py` runs both.

Arguments: the number of the process, a file that processes meet in, the file for the results.
"""

import json
import os
import sys

RANK, MEETING, RESULTS = int(sys.argv[1]), *sys.argv[2:]
os.environ["GLOO_SOCKET_IFNAME"] = "lo"

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

torch.set_num_threads(1)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import keras  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from replica_models import (  # noqa: E402
    BATCH,
    RATE,
    SEED,
    STEPS,
    Net,
    Plain,
    X,
    Y,
    assert_close,
    key_of,
    make,
    raised,
    run_checks,
    train,
)

import jaxwrap  # noqa: E402

HALF = BATCH // 2
# Each process has half of every batch.
MINE = np.concatenate([np.arange(HALF) + start + RANK * HALF for start in range(0, len(X), BATCH)])


class Replicated(keras.Model):
    """A model that `fit` calls through DDP, as the docs show it."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        # Past Keras, which would make variables of the same parameters again.
        object.__setattr__(self, "replicated", DistributedDataParallel(model))

    def call(self, inputs, training=None):
        return self.replicated(inputs, training=training)


def fitted(module, optimizer, epochs=1, callbacks=(), **options):
    model = Replicated(make(module, **options))
    model.compile(optimizer, "mse")
    model.fit(
        X[MINE],
        Y[MINE],
        batch_size=HALF,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=list(callbacks),
    )
    return model


def alone(module, optimizer, epochs=1):
    model = make(module)
    model.compile(optimizer, "mse")
    model.fit(X, Y, batch_size=BATCH, epochs=epochs, shuffle=False, verbose=0)
    return model


def assert_in_step(tensors):
    for tensor in tensors:
        other = tensor.detach().clone()
        dist.broadcast(other, src=0)
        assert torch.equal(other, tensor.detach())


def values(model):
    return [variable.value for variable in model.variables]


def gradients(model, call, batch):
    model.zero_grad()
    loss = ((call(torch.tensor(X[batch])) - torch.tensor(Y[batch])) ** 2).mean()
    loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def gradients_are_those_of_one_process():
    compiled = torch.compile(DistributedDataParallel(make(Plain())), backend="aot_eager")
    replicated = DistributedDataParallel(make(Plain()))
    batch = slice(RANK * HALF, (RANK + 1) * HALF)
    single = make(Plain())
    expected = gradients(single, single, slice(0, BATCH))
    for call in (replicated, compiled):
        received = gradients(call.module, call, batch)
        assert len(received) == 4
        for a, b in zip(received, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def a_loop_with_state_and_masks_is_equal_to_plain_jax():
    for distinct in (True, False):
        model = make(Net(), distinct_masks=distinct)
        layer = model.layers[0]
        expected = train(layer.get_variables(), 2, distinct)
        replicated = DistributedDataParallel(model)
        optimizer = torch.optim.SGD(
            [parameter for parameter in model.parameters() if parameter.requires_grad], RATE
        )
        for step in range(STEPS):
            batch = MINE[step * HALF : (step + 1) * HALF]
            optimizer.zero_grad()
            out = replicated(torch.tensor(X[batch]), training=True)
            ((out - torch.tensor(Y[batch])) ** 2).mean().backward()
            optimizer.step()
            layer.sync_state("mean")
        assert_close(layer.get_variables(), expected)
        assert_in_step(values(model))


def fit_with_state_and_masks_is_equal_to_plain_jax():
    start = make(Net()).layers[0].get_variables()
    sync = jaxwrap.SyncState("mean")
    sgd = keras.optimizers.SGD(RATE)
    model = fitted(Net(), sgd, 2, [sync], distinct_masks=True)
    expected = train(start, 2, distinct=True, epochs=2)
    assert_close(model.model.layers[0].get_variables(), expected)
    assert_in_step(values(model))


def optax_makes_one_update():
    def optimizer():
        return jaxwrap.OptaxOptimizer(optax.sgd, RATE, momentum=0.9)

    two, one = fitted(Plain(), optimizer(), 2), alone(Plain(), optimizer(), 2)
    assert_in_step([*values(two), *(v.value for v in two.optimizer.variables)])
    pairs = [(two.variables, one.variables), (two.optimizer.variables, one.optimizer.variables)]
    for received, expected in pairs:
        for a, b in zip(received, expected, strict=True):
            np.testing.assert_allclose(a.numpy(), b.numpy(), atol=1e-6, err_msg=a.path)


def masks_are_distinct_if_asked_for():
    def mask(**options):
        layer = jaxwrap.JaxLayer(
            lambda params, rng, inputs, training: jax.random.bits(rng, inputs.shape),
            params=(),
            seed=SEED,
            **options,
        )
        copy = jaxwrap.JaxLayer.from_config(layer.get_config())
        assert copy.get_config()["distinct_masks"] is options.get("distinct_masks")
        layer.build((2, 3))
        return layer(torch.zeros(2, 3), training=True).numpy()

    for options, replica in (({}, None), ({"distinct_masks": False}, None)):
        expected = jax.random.bits(key_of(0, replica), (2, 3))
        np.testing.assert_array_equal(mask(**options), expected)
    np.testing.assert_array_equal(
        mask(distinct_masks=True), jax.random.bits(key_of(0, RANK), (2, 3))
    )


def state_is_synced_by_dtype():
    state = {
        "float": jnp.zeros(()),
        "half": jnp.zeros((3,), "bfloat16"),
        "complex": jnp.zeros((2,), "complex64"),
        "count": jnp.int32(0),
        "flag": jnp.zeros((), bool),
        "key": jax.random.key(0),
    }

    def call(params, state, inputs):
        return inputs, {
            "float": state["float"] + inputs,
            "half": state["half"] + inputs.astype("bfloat16"),
            "complex": state["complex"] + inputs * 1j,
            "count": state["count"] + inputs.astype("int32"),
            "flag": inputs > 2,
            "key": jax.random.fold_in(state["key"], inputs.astype("int32")),
        }

    def synced(how):
        layer = jaxwrap.JaxLayer(call, state=state, name="counts")
        layer(torch.tensor(1.0 + 2 * RANK))
        layer.sync_state(how)
        assert_in_step([variable.value for variable in layer.state.values()])
        key = layer.get_variables()["state"].pop("key")
        assert (
            jax.random.key_data(key) == jax.random.key_data(jax.random.fold_in(state["key"], 1))
        ).all()
        return {name: v.numpy().tolist() for name, v in layer.state.items() if name != "key"}

    first = {"count": 1, "flag": False}
    expected = {"float": 2.0, "complex": [2j, 2j]}
    received = synced("mean")
    del received["half"]
    assert received == {**expected, **first}, received
    received = synced("first")
    del received["half"]
    assert received == {"float": 1.0, "complex": [1j, 1j], **first}, received


def the_callback_reaches_layers_of_keras():
    norm = keras.layers.BatchNormalization()
    model = keras.Sequential([keras.Input((4,)), norm])
    model.compile(keras.optimizers.SGD(RATE), "mse")
    mine = X[MINE]
    for callbacks, alike in ([], False), ([jaxwrap.SyncState("first")], True):
        model.fit(mine, mine, batch_size=HALF, verbose=0, callbacks=callbacks)
        mean = norm.moving_mean.value.detach()
        other = mean.clone()
        dist.broadcast(other, src=0)
        assert RANK == 0 or torch.equal(mean, other) is alike


def split_parameters_are_refused():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_module, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    for split in (
        lambda model: fully_shard(model),
        lambda model: distribute_module(model, mesh),
        lambda model: fully_shard(torch.nn.Sequential(torch.nn.Linear(4, 4), model)),
    ):
        model = make(Plain())
        called = split(model)
        error = raised(lambda: called(torch.tensor(X)), RuntimeError)  # noqa: B023
        assert "'net'" in error, error
        assert "DistributedDataParallel" in error, error
    model = make(Plain())
    fully_shard(model)
    model.compile(keras.optimizers.SGD(RATE), "mse")
    assert "each process would train by itself" in raised(
        lambda: model.fit(X, Y, verbose=0), RuntimeError
    )
    for record in (True, False):
        layer = make(Plain()).layers[0]
        with torch.set_grad_enabled(record):
            inputs = distribute_tensor(torch.tensor(X), mesh, [Shard(0)])
            error = raised(lambda: layer(inputs), RuntimeError)  # noqa: B023
            assert "an argument is a DTensor of shape (32, 4)" in error, error
            assert "full_tensor" in error, error
            kernel = layer.trainable_variables[1]
            kernel._value = distribute_tensor(kernel.value.detach(), mesh, [Shard(0)])
            error = raised(lambda: layer(torch.tensor(X)), RuntimeError)  # noqa: B023
            assert "net/params/Dense_0/kernel is a DTensor of shape (5, 1)" in error, error


def fully_shard_of_modules_of_torch():
    """Torch puts whole parameters into a layer for a call, which the layer follows."""
    from torch.distributed.fsdp import fully_shard

    def parts():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(4, 4), make(Plain()).layers[0])

    single, sharded, of_layer = parts(), fully_shard(parts()), parts()
    fully_shard(of_layer[1])
    fully_shard(of_layer)
    batch = slice(RANK * HALF, (RANK + 1) * HALF)
    expected = gradients(single, single, slice(0, BATCH))
    for module in (sharded, of_layer):
        received = gradients(module, module, batch)
        for a, b in zip(received, expected, strict=True):
            torch.testing.assert_close(a.full_tensor(), b, rtol=0, atol=1e-6)


def keras_ignores_a_distribution():
    """Keras 3.15 has no distribution on PyTorch. It takes one that names devices, and does nothing with it."""
    raised(keras.distribution.list_devices, AttributeError)
    distribution = keras.distribution.DataParallel(
        devices=["cpu:0", "cpu:1"], auto_shard_dataset=False
    )
    expected = alone(Plain(), keras.optimizers.SGD(RATE))
    keras.distribution.set_distribution(distribution)
    try:
        received = alone(Plain(), keras.optimizers.SGD(RATE))
    finally:
        keras.distribution.set_distribution(None)
    for a, b in zip(received.variables, expected.variables, strict=True):
        assert type(a.value) is torch.nn.Parameter
        np.testing.assert_array_equal(a.numpy(), b.numpy())


def before_there_is_a_group():
    """Without a group there is one process, unless `torchrun` has started several."""
    layer = make(Net(), distinct_masks=True).layers[0]
    layer.sync_state()
    os.environ["WORLD_SIZE"] = "2"
    error = raised(layer.sync_state, RuntimeError)
    assert "init_process_group" in error, error
    assert "'mean' or 'first'" in raised(lambda: layer.sync_state("sum"), ValueError)
    alike = make(Net()).layers[0]
    a, b = (one(torch.tensor(X), training=True) for one in (layer, alike))
    assert torch.equal(a, b)


results = run_checks([before_there_is_a_group])
dist.init_process_group("gloo", init_method=f"file://{MEETING}", rank=RANK, world_size=2)
results |= run_checks(
    [
        gradients_are_those_of_one_process,
        a_loop_with_state_and_masks_is_equal_to_plain_jax,
        fit_with_state_and_masks_is_equal_to_plain_jax,
        optax_makes_one_update,
        masks_are_distinct_if_asked_for,
        state_is_synced_by_dtype,
        the_callback_reaches_layers_of_keras,
        split_parameters_are_refused,
        fully_shard_of_modules_of_torch,
        keras_ignores_a_distribution,
    ]
)
with open(RESULTS, "w") as file:
    json.dump(results, file)
os._exit(0)  # a process that is left alone would wait for the other
