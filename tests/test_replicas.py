"""Training on several devices by `tf.distribute`, and in several processes by PyTorch's DDP.

Devices and processes are set up before anything else, so scripts in processes of their own make all the checks.
"""

import json
import os
import pathlib
import re
import socket
import subprocess
import sys

import flax.linen as nn
import keras
import numpy as np
import pytest

import jaxwrap

pytestmark = pytest.mark.each_jax

HELPERS = pathlib.Path(__file__).parent / "helpers"


def start(script, *arguments):
    """Start a script of the helpers, and collect what it prints."""
    return subprocess.Popen(
        [sys.executable, HELPERS / script, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # Threads of two processes on two cores get in each other's way.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finish(*processes):
    """Wait for processes. If one fails, nobody waits for the others."""
    try:
        printed = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, text in zip(processes, printed, strict=True):
        assert process.returncode == 0, text[-4000:]
    return printed


def names(script):
    """Return the names of the checks in a script."""
    source = (HELPERS / script).read_text()
    lists = re.findall(r"run_checks\(\s*\[(.*?)\]", source, re.DOTALL)
    return [name for part in lists for name in re.findall(r"\w+", part)]


@pytest.fixture(scope="module")
def mirrored(tmp_path_factory):
    file = tmp_path_factory.mktemp("mirrored") / "results.json"
    finish(start("mirrored_script.py", file))
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def replicated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replicated")
    files = [folder / f"{rank}.json" for rank in range(2)]
    meeting = folder / "meeting"
    finish(*(start("ddp_script.py", rank, meeting, file) for rank, file in enumerate(files)))
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.only("tensorflow")
@pytest.mark.parametrize("check", names("mirrored_script.py"))
def test_mirrored_strategy(mirrored, check):
    assert not mirrored[check], mirrored[check]


@pytest.mark.only("torch")
@pytest.mark.parametrize("check", names("ddp_script.py"))
def test_distributed_data_parallel(replicated, check):
    for results in replicated:
        assert not results[check], results[check]


@pytest.mark.only("tensorflow")
def test_keras_refuses_other_strategies():
    """The docs say that they are no limit of ours. When this fails, Keras supports them."""

    def ports():
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
        numbers = [one.getsockname()[1] for one in sockets]
        for one in sockets:
            one.close()
        return numbers

    workers = ports()
    printed = finish(
        *(start("other_strategies_script.py", "workers", index, *workers) for index in range(2))
    )
    for text in printed:
        assert "ValueError: Attempt to convert a value (PerReplica:" in text, text
    (text,) = finish(start("other_strategies_script.py", "parameters", *ports()))
    assert "ValueError: To use this dataset, you need to pass this dataset to" in text


@pytest.mark.quick
@pytest.mark.parametrize("distinct", [None, True, False])
def test_one_process_draws_alike(distinct):
    """Bit for bit, and the option is saved."""

    def make(**options):
        layer = jaxwrap.FlaxLayer(nn.Dropout(0.5, deterministic=False), seed=3, **options)
        return jaxwrap.FlaxLayer.from_config(layer.get_config())

    layer = make(distinct_masks=distinct)
    assert layer.get_config()["distinct_masks"] is distinct
    ones = np.ones((4, 4), "float32")
    received, expected = (
        keras.ops.convert_to_numpy(one(ones, training=True)) for one in (layer, make())
    )
    np.testing.assert_array_equal(received, expected)
    assert 0 < (received == 0).sum() < 16


@pytest.mark.quick
def test_one_process_has_one_state():
    layer = jaxwrap.FlaxLayer(nn.BatchNorm(use_running_average=False), name="norm")
    with pytest.raises(ValueError, match="'norm': the layer has no weights yet"):
        layer.sync_state()
    layer(np.ones((2, 3), "float32"))
    before = layer.get_variables()
    for how in ("mean", "first"):
        layer.sync_state(how)
    with pytest.raises(ValueError, match="'norm': `how` must be 'mean' or 'first'; received 'sum'"):
        layer.sync_state("sum")
    with pytest.raises(ValueError, match="SyncState: `how` must be"):
        jaxwrap.SyncState("last")
    after = layer.get_variables()
    for name, value in before["batch_stats"].items():
        np.testing.assert_array_equal(after["batch_stats"][name], value)


@pytest.mark.quick
@pytest.mark.trains
def test_the_callback_in_one_process():
    layer = jaxwrap.FlaxLayer(nn.BatchNorm(use_running_average=False), name="norm")
    model = keras.Sequential([keras.Input((3,)), layer, keras.layers.BatchNormalization()])
    model.compile("sgd", "mse")
    x = np.ones((4, 3), "float32")
    model.fit(x, x, verbose=0, callbacks=[jaxwrap.SyncState()])


@pytest.mark.quick
def test_rules_for_replicas():
    def make(pattern, aggregation):
        rules = {pattern: jaxwrap.Rule(aggregation=aggregation)}
        layer = jaxwrap.JaxLayer(
            lambda params, state, inputs: (inputs, state),
            params={"w": np.ones(2, "float32")},
            state={"mean": np.ones(2, "float32"), "count": np.int32(0)},
            rules=rules,
        )
        return jaxwrap.JaxLayer.from_config(layer.get_config())

    layer = make("state/mean", "sum")
    assert layer.params["w"].aggregation == "none"
    assert layer.state["mean"].aggregation == "sum"
    assert layer.state["count"].aggregation == "only_first_replica"
    assert make("params/w", "mean").params["w"].aggregation == "mean"
    assert make("params/w", "mean").state["mean"].aggregation == "mean"
    with pytest.raises(ValueError, match=r"aggregation='mean', which applies to none.*state/count"):
        make("state/count", "mean")
    with pytest.raises(ValueError, match=r"`aggregation` must be one of 'mean'.*received 'max'"):
        jaxwrap.Rule(aggregation="max")
    with pytest.raises(ValueError, match=r"`distinct_masks` must be a bool or None; received 1"):
        jaxwrap.FlaxLayer(nn.Dense(1), distinct_masks=1)


@pytest.mark.only("jax")
def test_processes_of_jax_without_a_distribution(monkeypatch):
    """Each would have a state of its own, and no way to reach the others."""
    import jax

    layer = jaxwrap.FlaxLayer(nn.BatchNorm(use_running_average=False), name="norm")
    layer(np.ones((2, 3), "float32"))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(RuntimeError, match=r"'norm': each of the 2 processes.*set_distribution"):
        layer.sync_state()
