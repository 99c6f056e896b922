"""Checkpoints of the JAX world: against the libraries that they are of, both ways."""

import concurrent.futures
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import textwrap
import warnings

import equinox as eqx
import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from flax.traverse_util import flatten_dict
from models import x
from orbax.checkpoint import StandardCheckpointer

from jaxwrap import EquinoxLayer, FlaxLayer, JaxLayer, NNXLayer, checkpoints
from jaxwrap.checkpoints import _atomic


class Mixed(nn.Module):
    """Weights of several dtypes, and state."""

    @nn.compact
    def __call__(self, x, training=False):
        x = nn.Dense(3, param_dtype=jnp.bfloat16)(x)
        x = nn.BatchNorm(use_running_average=not training)(x)
        return nn.Dense(2, dtype="float32")(x)


def make(seed=0, **kwargs):
    layer = FlaxLayer(Mixed(), seed=seed, name="mixed", **kwargs)
    layer(x(2, 4))
    return layer


def write_orbax(path, tree):
    with StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def read_orbax(path):
    with StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path)


def flat(tree):
    return flatten_dict(tree, sep="/")


# For each format how its own library writes and reads a tree of dicts, as a flat dict.
NATIVE = {
    "msgpack": (
        lambda path, tree: path.write_bytes(flax.serialization.msgpack_serialize(tree)),
        lambda path: flat(flax.serialization.msgpack_restore(path.read_bytes())),
    ),
    "orbax": (write_orbax, lambda path: flat(read_orbax(path))),
    "safetensors": (
        lambda path, tree: safetensors.numpy.save_file(flat(tree), path),
        safetensors.numpy.load_file,
    ),
    "npz": (
        lambda path, tree: np.savez(path, **flat(tree)),
        lambda path: dict(np.load(path)),
    ),
}


def assert_equal(one, two):
    assert one.keys() == two.keys()
    for name in one:
        left, right = np.asarray(one[name]), np.asarray(two[name])
        assert (left.dtype, left.shape) == (right.dtype, right.shape), name
        np.testing.assert_array_equal(left, right, err_msg=name)


def variables_for(kind, layer):
    variables = layer.get_variables()
    if kind == "npz":  # which has no bfloat16
        variables = jax.tree.map(lambda leaf: np.asarray(leaf, "float32"), variables)
    return variables


@pytest.mark.quick
@pytest.mark.parametrize("kind", NATIVE)
def test_what_a_library_wrote_is_read(kind, tmp_path):
    source, layer = make(seed=1), make(seed=2)
    path = tmp_path / f"weights.{kind}"
    NATIVE[kind][0](path, variables_for(kind, source))
    plan = checkpoints.load(layer, path)
    assert_equal(flat(layer.get_variables()), flat(source.get_variables()))
    assert {row.status for row in plan} <= {"match", "cast"}
    assert len(plan) == len(layer.weight_table())


@pytest.mark.quick
@pytest.mark.parametrize("kind", NATIVE)
def test_what_is_written_a_library_reads(kind, tmp_path):
    layer = make(seed=1) if kind != "npz" else make(seed=1, dtype="float32")
    path = tmp_path / f"weights.{kind}"
    checkpoints.save(layer, path)
    assert_equal(NATIVE[kind][1](path), flat(layer.get_variables()))
    again = make(seed=2) if kind != "npz" else make(seed=2, dtype="float32")
    plan = checkpoints.load(again, path)
    assert {row.status for row in plan} == {"match"}
    assert_equal(flat(again.get_variables()), flat(layer.get_variables()))
    assert list(tmp_path.iterdir()) == [path]


def test_float8_and_other_dtypes(tmp_path):
    params = {
        "a": jnp.ones((2, 3), jnp.float8_e4m3fn),
        "b": jnp.arange(3, dtype="int8"),
        "c": np.array(True),
        "d": np.zeros((0, 2), "float16"),
        "key": jax.random.key(3),
        "e": {"f": [1.5, (jnp.ones(2, "complex64"),)]},
    }

    def with_params(params, inputs):
        return inputs

    layer = JaxLayer(with_params, params=params)
    path = tmp_path / "all.msgpack"
    checkpoints.save(layer, path)
    again = JaxLayer(with_params, params=params)
    for variable in again.trainable_variables:
        variable.assign(np.zeros(variable.shape, "float32"))
    checkpoints.load(again, path)
    one, two = (
        [np.asarray(v) for v in jax.tree.leaves(drop_keys(part.get_variables()))]
        for part in (layer, again)
    )
    for left, right in zip(one, two, strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left.astype("complex64"), right.astype("complex64"))
    for suffix in ("npz", "safetensors"):
        with pytest.raises(ValueError, match=r"params/a is float8.*Save it as"):
            checkpoints.save(layer, tmp_path / f"all.{suffix}")
    assert list(tmp_path.iterdir()) == [path]


def drop_keys(variables):
    params = dict(variables["params"])
    params["key"] = jax.random.key_data(params["key"])
    return params


class Block(eqx.Module):
    linear: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    scale: float
    half: jax.Array

    def __init__(self, key):
        self.linear = eqx.nn.Linear(4, 3, key=key)
        self.norm = eqx.nn.BatchNorm(3, "batch", mode="batch")
        self.scale = 0.5
        self.half = jax.random.normal(key, (3,), jnp.bfloat16)

    def __call__(self, x, state):
        x, state = self.norm(self.linear(x) * self.scale + self.half, state)
        return x, state


def make_block(seed):
    return eqx.nn.make_with_state(Block)(jax.random.key(seed))


def test_equinox_both_ways(tmp_path):
    path = tmp_path / "block.eqx"
    native, layer = make_block(1), EquinoxLayer(*make_block(2), batch=True)
    eqx.tree_serialise_leaves(path, native)
    checkpoints.load(layer, path)
    assert eqx.tree_equal(layer.module_with_weights(), native)

    layer = EquinoxLayer(*make_block(3), batch=True)
    checkpoints.save(layer, path)
    assert eqx.tree_equal(eqx.tree_deserialise_leaves(path, make_block(4)), make_block(3))


@pytest.mark.once
def test_equinox_of_another_library(tmp_path):
    layer, again = make(seed=1), make(seed=2)
    checkpoints.save(layer, tmp_path / "w.eqx")
    variables = jax.tree.map(jnp.asarray, layer.get_variables())
    read = eqx.tree_deserialise_leaves(tmp_path / "w.eqx", variables)
    assert_equal(flat(read), flat(layer.get_variables()))
    eqx.tree_serialise_leaves(tmp_path / "native.eqx", variables)
    checkpoints.load(again, tmp_path / "native.eqx")
    assert_equal(flat(again.get_variables()), flat(layer.get_variables()))


@pytest.mark.once
def test_msgpack_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 8)
    source, layer = make(seed=1), make(seed=2)
    NATIVE["msgpack"][0](tmp_path / "w.msgpack", source.get_variables())
    assert b"__msgpack_chunked_array__" in (tmp_path / "w.msgpack").read_bytes()
    checkpoints.load(layer, tmp_path / "w.msgpack")
    assert_equal(flat(layer.get_variables()), flat(source.get_variables()))


def test_nnx_state_with_names(tmp_path):
    module = nnx.Linear(4, 2, rngs=nnx.Rngs(1))
    layer = NNXLayer(nnx.Linear(4, 2, rngs=nnx.Rngs(2)))
    write_orbax(tmp_path / "state", nnx.to_pure_dict(nnx.state(module)))
    checkpoints.load(layer, tmp_path / "state", names={"(.*)": r"params/\1"})
    kernel = layer.get_variables()["params"]["kernel"]
    np.testing.assert_array_equal(kernel, module.kernel.get_value())


# Names.


@pytest.mark.once
def test_names_by_patterns_both_ways(tmp_path):
    layer, again = make(seed=1), make(seed=2)
    names = [
        (r"params/Dense_(\d)/(.*)", r"model.layer.\1.\2"),
        ("batch_stats/.*/mean", "mean"),
        ("batch_stats/.*", None),
    ]
    checkpoints.save(layer, tmp_path / "w.safetensors", names=names)
    assert set(safetensors.numpy.load_file(tmp_path / "w.safetensors")) == {
        "model.layer.0.bias",
        "model.layer.0.kernel",
        "model.layer.1.bias",
        "model.layer.1.kernel",
        "params/BatchNorm_0/bias",
        "params/BatchNorm_0/scale",
        "mean",
    }
    back = {
        r"model\.layer\.(\d)\.(.*)": r"params/Dense_\1/\2",
        "mean": "batch_stats/BatchNorm_0/mean",
    }
    with pytest.raises(ValueError, match=r"missing: batch_stats/BatchNorm_0/var"):
        checkpoints.load(again, tmp_path / "w.safetensors", names=back)


@pytest.mark.once
def test_a_dry_run_prints_and_assigns_nothing(tmp_path, capsys):
    layer = make(seed=1)
    before = flat(layer.get_variables())
    tree = make(seed=2).get_variables()
    kernel = tree["params"]["Dense_1"]["kernel"]
    tree["params"]["Dense_1"]["kernel"] = kernel.astype("float64")
    tree["params"]["Dense_1"]["bias"] = np.zeros(5, "float32")
    tree["params"]["BatchNorm_0"]["bias"] = np.zeros(3, "complex64")
    del tree["batch_stats"]["BatchNorm_0"]["mean"]
    tree["extra"] = {"a": np.zeros(1)}
    tree["optimizer"] = {"b": np.zeros(1)}
    NATIVE["msgpack"][0](tmp_path / "w.msgpack", tree)
    plan = checkpoints.load(
        layer, tmp_path / "w.msgpack", names={"optimizer/.*": None}, dry_run=True
    )
    printed = capsys.readouterr().out
    status = {row.name or row.target: row.status for row in plan}
    assert status == {
        "params/Dense_0/kernel": "match",
        "params/Dense_0/bias": "match",
        "params/Dense_1/kernel": "cast",
        "params/Dense_1/bias": "shape",
        "params/BatchNorm_0/bias": "dtype",
        "params/BatchNorm_0/scale": "match",
        "batch_stats/BatchNorm_0/mean": "missing",
        "batch_stats/BatchNorm_0/var": "match",
        "extra/a": "unexpected",
        "optimizer/b": "left out",
    }
    for name, word in status.items():
        assert any(name in line and word in line for line in printed.splitlines())
    with pytest.raises(ValueError, match=r"weights in .* are not those of the layer") as error:
        checkpoints.load(layer, tmp_path / "w.msgpack", names={"optimizer/.*": None})
    for line in (
        "shape: params/Dense_1/bias is (2,), in the file (5,)",
        "dtype: params/BatchNorm_0/bias is float32, in the file complex64",
        "missing: batch_stats/BatchNorm_0/mean",
        "unexpected: extra/a",
    ):
        assert line in str(error.value)
    assert_equal(flat(layer.get_variables()), before)


@pytest.mark.once
@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"(": "a"}, "not a regular expression"),
        ({"(?=p)(.*)": "a"}, "not a regular expression.*without lookaround"),
        ({".*": r"\1"}, r"'.*1' does not fit its pattern '\.\*'"),
        ({"nothing": "a"}, "are not the first to match any of the names"),
        ({".*": "a"}, "both .* and .* into 'a'"),
        ({"params/Dense_0/bias": "params/Dense_1"}, "'params/Dense_1.*cannot be in one file with"),
        ({3: "a"}, "must map patterns to names or None"),
        ({".*": 3}, "must map patterns to names or None"),
        (3, "`names` must be a dict from patterns to names, or pairs of both; received 3"),
        (["params"], r"`names` must be a dict .* received \['params'\]"),
    ],
)
def test_wrong_names(names, message, tmp_path):
    layer = make()
    with pytest.raises((TypeError, ValueError), match=rf"^FlaxLayer 'mixed': .*{message}"):
        checkpoints.save(layer, tmp_path / "w.msgpack", names=names)
    assert not list(tmp_path.iterdir())


@pytest.mark.once
def test_no_names(tmp_path):
    layer = make()
    before = flat(layer.get_variables())
    checkpoints.save(layer, tmp_path / "w.msgpack", names=None)
    checkpoints.load(layer, tmp_path / "w.msgpack", names=None)
    assert_equal(flat(layer.get_variables()), before)
    with pytest.raises(TypeError, match=r"^FlaxLayer 'mixed': the pattern must be a string"):
        checkpoints.load(layer, tmp_path / "w.msgpack", only=["params/.*"])


@pytest.mark.once
@pytest.mark.quick
def test_patterns_that_re_would_match_forever(tmp_path):
    layer = JaxLayer(lambda params, inputs: inputs, params={"a" * 60: np.zeros(2)}, name="slow")
    with pytest.raises(ValueError, match=r"^JaxLayer 'slow': .*not the first to match any"):
        checkpoints.save(layer, tmp_path / "w.npz", names={"params/(a|a)*[bc]": "b"})
    checkpoints.save(layer, tmp_path / "w.npz", names={"params/(a|a)*": r"all \1"})
    assert list(np.load(tmp_path / "w.npz")) == ["all a"]


@pytest.mark.once
def test_wrong_arguments(tmp_path):
    layer = make()
    with pytest.raises(TypeError, match="expected a layer of jaxwrap"):
        checkpoints.save(nn.Dense(2), tmp_path / "w.npz")
    with pytest.raises(ValueError, match="no weights yet"):
        checkpoints.save(FlaxLayer(nn.Dense(2)), tmp_path / "w.npz")
    with pytest.raises(ValueError, match=r"no format 'pkl'.*msgpack, orbax, safetensors, npz, eqx"):
        checkpoints.save(layer, tmp_path / "w.pkl")
    with pytest.raises(ValueError, match="no format 'pickle'"):
        checkpoints.save(layer, tmp_path / "w.npz", format="pickle")
    with pytest.raises(FileNotFoundError, match=r"w\.npz"):
        checkpoints.load(layer, tmp_path / "w.npz")
    with pytest.raises(ValueError, match=r"mixed.*params/Dense_0/bias is bfloat16.*safetensors"):
        checkpoints.save(layer, tmp_path / "w.npz")
    checkpoints.save(layer, tmp_path / "weights", format="msgpack")
    checkpoints.load(layer, tmp_path / "weights", format="msgpack")


# Files that somebody made, or that are damaged.


@pytest.mark.once
@pytest.mark.parametrize("kind", ["msgpack", "safetensors", "npz", "eqx"])
def test_damaged_files(kind, tmp_path):
    """An error, and nothing has changed; or values, of which these formats have no checksum."""
    layer = make(seed=1, dtype="float32")
    path = tmp_path / f"w.{kind}"
    checkpoints.save(layer, path)
    data = path.read_bytes()
    before = flat(layer.get_variables())
    rng = random.Random(f"{kind} {sys.version}")
    errors, messages = 0, set()
    for number in range(150):
        place = rng.randrange(len(data))
        flipped = data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :]
        path.write_bytes(data[:place] if number % 3 == 0 else flipped)
        try:
            checkpoints.load(layer, path)
        except ValueError as error:
            errors += 1
            messages.add(str(error).split(". ")[0])
            assert_equal(flat(layer.get_variables()), before)
        else:
            layer.set_variables(
                jax.tree.map(lambda leaf: leaf, make(1, dtype="float32").get_variables())
            )
    assert errors >= 50
    assert all(str(path) in message for message in messages)


class Fires:
    def __reduce__(self):
        return os.system, ("touch fired",)


def huge_header(dtype="<f4", shape=(10**15,)):
    header = str({"descr": dtype, "fortran_order": False, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + b"1234"


@pytest.mark.once
@pytest.mark.parametrize("kind", ["npz", "eqx", "safetensors", "msgpack"])
def test_hostile_files(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layer = FlaxLayer(nn.Dense(2), name="dense")
    layer(x(1, 3))
    before = flat(layer.get_variables())
    path = tmp_path / f"w.{kind}"
    attacks = {
        "npz": [
            lambda: np.savez(
                path, **{"params/bias": np.array([Fires()] * 2), "params/kernel": np.ones((3, 2))}
            ),
            lambda: write_npz(path, huge_header()),
            lambda: write_npz(path, huge_header(shape=(-1, 2))),
            lambda: write_npz(path, huge_header(dtype="|O", shape=(2,))),
            lambda: write_npz(path, b"\x80\x04cos\nsystem\n(S'touch fired'\ntR."),
        ],
        "eqx": [
            lambda: path.write_bytes(huge_header()),
            lambda: path.write_bytes(huge_header(dtype="|O", shape=(2,))),
            lambda: path.write_bytes(b"\x80\x04cos\nsystem\n(S'touch fired'\ntR."),
        ],
        "safetensors": [
            lambda: write_safetensors(
                path, {"dtype": "F32", "shape": [10**15], "data_offsets": [0, 4]}
            ),
            lambda: write_safetensors(
                path, {"dtype": "F32", "shape": [2], "data_offsets": [0, 10**15]}
            ),
            lambda: write_safetensors(
                path, {"dtype": "X", "shape": "os.system", "data_offsets": 3}
            ),
        ],
        "msgpack": [
            lambda: path.write_bytes(b"\xdd\xff\xff\xff\xff"),
            lambda: path.write_bytes(b"\x91" * 10**5),
            lambda: path.write_bytes(b"\xc9\xff\xff\xff\xff\x01abc"),
            lambda: path.write_bytes(b"\xc7\x03\x01abc"),
            lambda: write_chunked(path, [10**9, 10**3]),
            lambda: write_chunked(path, [-4, -1]),
            lambda: write_chunked(path, [3]),
        ],
    }[kind]
    for attack in attacks:
        attack()
        with pytest.raises(ValueError, match=rf"^FlaxLayer 'dense': .*{path}") as error:
            checkpoints.load(layer, path)
        assert "No weight has been changed" in str(error.value)
        assert_equal(flat(layer.get_variables()), before)
    assert not (tmp_path / "fired").exists()


def write_npz(path, member):
    import zipfile

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("params/bias.npy", member)


def write_chunked(path, shape, chunks=(2, 2)):
    """What Flax writes of an array of more than 2**30 bytes, in small."""
    parts = [np.arange(count, dtype="float32") for count in chunks]
    value = {
        "__msgpack_chunked_array__": True,
        "shape": {str(index): size for index, size in enumerate(shape)},
        "chunks": {str(index): part for index, part in enumerate(parts)},
    }
    path.write_bytes(flax.serialization.msgpack_serialize({"params": {"kernel": value}}))


def write_safetensors(path, entry):
    header = json.dumps({"params/bias": entry}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"1234")


# Interruptions.

SCRIPT = """
import sys
import flax.linen as nn, numpy as np, jaxwrap
layer = jaxwrap.FlaxLayer(nn.Dense(256), name="dense")
layer(np.ones((1, 512), "float32"))
print("ready", flush=True)
for value in range(2, 1000):
    for variable in layer.trainable_variables:
        variable.assign(np.full(variable.shape, value, "float32"))
    jaxwrap.checkpoints.save(layer, sys.argv[1])
"""


@pytest.mark.once
@pytest.mark.parametrize("kind", ["safetensors", "orbax"])
def test_a_killed_save_leaves_a_whole_checkpoint(kind, tmp_path):
    layer = FlaxLayer(nn.Dense(256), name="dense")
    layer(x(1, 512))
    for variable in layer.trainable_variables:
        variable.assign(np.ones(variable.shape, "float32"))
    path = tmp_path / f"w.{kind}"
    checkpoints.save(layer, path)
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(path)],
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout.readline() == "ready\n"
        for _ in range(3):
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(random.Random().uniform(0.1, 0.3))
        process.send_signal(signal.SIGKILL)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "there is no checkpoint")  # killed between two renames
        checkpoints.load(layer, path)
    variables = layer.get_variables()["params"]
    values = {float(value) for leaf in variables.values() for value in np.unique(leaf)}
    assert len(values) == 1
    # What the dead process left is gone after the next save. Files of other names or processes stay.
    own = _atomic._place()
    alive = tmp_path / f".{path.name}.{own}-{os.getpid()}-{'0' * 32}.tmp"
    elsewhere = tmp_path / f".{path.name}.deadbeef-{process.pid}-{'0' * 32}.tmp"
    other = tmp_path / f".other-{path.name}.{own}-{process.pid}-{'0' * 32}.tmp"
    dead = tmp_path / f".{path.name}.{own}-{process.pid}-{'0' * 32}.tmp"
    for leftover in (alive, elsewhere, other, dead):
        leftover.touch()
    checkpoints.save(layer, path)
    assert {file.name for file in tmp_path.iterdir()} == {
        file.name for file in (path, alive, elsewhere, other)
    }


@pytest.mark.once
@pytest.mark.parametrize("kind", ["msgpack", "orbax", "safetensors", "npz", "eqx"])
def test_a_failed_save_leaves_the_previous_one(kind, tmp_path, monkeypatch):
    layer = make(seed=1, dtype="float32")
    path = tmp_path / f"w.{kind}"
    checkpoints.save(layer, path)
    before = flat(layer.get_variables())
    for variable in layer.trainable_variables:
        variable.assign(np.zeros(variable.shape, "float32"))
    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "rename" if kind == "orbax" else "replace", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save(layer, path)
    checkpoints.load(layer, path)
    assert_equal(flat(layer.get_variables()), before)
    assert list(tmp_path.iterdir()) == [path]
    if kind == "orbax":  # between the two renames
        path.rename(tmp_path / "w.orbax.previous")
        with pytest.warns(UserWarning, match=r"no checkpoint .*w\.orbax, .*w\.orbax\.previous"):
            checkpoints.load(layer, path)


def _interrupted(self, target):
    raise KeyboardInterrupt


@pytest.mark.once
def test_threads_that_save_to_one_path_leave_a_whole_checkpoint(tmp_path):
    layers = [make(seed, dtype="float32") for seed in range(4)]
    path = tmp_path / "w.npz"
    with concurrent.futures.ThreadPoolExecutor(len(layers)) as pool:
        for _ in range(5):
            list(pool.map(lambda layer: checkpoints.save(layer, path), layers))
    again = make(9, dtype="float32")
    checkpoints.load(again, path)
    kernels = [layer.get_variables()["params"]["Dense_0"]["kernel"] for layer in (again, *layers)]
    assert any(np.array_equal(kernels[0], kernel) for kernel in kernels[1:])
    assert list(tmp_path.iterdir()) == [path]


# Memory.

MEMORY = """
import pathlib, sys
import numpy as np, jaxwrap
from jaxwrap import checkpoints

def call(params, inputs):
    return inputs

count, rows = 32, int(sys.argv[2]) * 2**20 // 32 // 4 // 1024
layer = jaxwrap.JaxLayer(call, params={f"w{i}": np.zeros((rows, 1024), "float32") for i in range(count)})
path = pathlib.Path(sys.argv[1])
checkpoints.save(layer, path)

def status(name):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))

# What is loaded on first use is not the checkpoint's.
small = jaxwrap.JaxLayer(call, params={"w": np.zeros(3, "float32")})
checkpoints.save(small, path.with_name(f"small{path.suffix}"))
checkpoints.load(small, path.with_name(f"small{path.suffix}"))
pathlib.Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
checkpoints.load(layer, path)
print(status("VmHWM") - before)
"""


def run(*arguments):
    command = [sys.executable, "-c", MEMORY, *map(str, arguments)]
    # glibc is to give back what has been freed: arrays that are gone do not count.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout


@pytest.mark.only("jax")
@pytest.mark.parametrize("kind", ["msgpack", "orbax", "safetensors", "npz", "eqx"])
def test_a_checkpoint_is_loaded_in_parts(kind, tmp_path):
    megabytes = 192
    path = tmp_path / f"w.{kind}"
    grown = float(run(path, megabytes))
    # Beside the weights, which the layer has already.
    assert grown < 0.9 * megabytes
