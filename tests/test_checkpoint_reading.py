"""Checkpoints that are replaced while they are read, repeat names, or claim more than they hold."""

import io
import os
import shutil
import tracemalloc
import zipfile

import flax.linen as nn
import jax
import msgpack
import numpy as np
import pytest
from models import x
from test_checkpoints import NATIVE, assert_equal, flat

from jaxwrap import FlaxLayer, checkpoints
from jaxwrap._weights import _targets

pytestmark = pytest.mark.once
KINDS = ["msgpack", "orbax", "safetensors", "npz", "eqx"]


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.relu(nn.Dense(3)(x)))


def filled(value):
    layer = FlaxLayer(Net(), name="net")
    layer(x(2, 4))
    for variable in layer.trainable_variables:
        variable.assign(np.full(variable.shape, value, "float32"))
    return layer


def values(layer):
    return {float(v) for leaf in flat(layer.get_variables()).values() for v in np.unique(leaf)}


def load_while(layer, path, monkeypatch, change):
    """Load, and make a change when the first weight is assigned."""
    own, changes = _targets.assign, [change]

    def assign(variable, value):
        own(variable, value)
        if changes:
            changes.pop()()

    monkeypatch.setattr(_targets, "assign", assign)
    checkpoints.load(layer, path)
    assert not changes


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_replaced_while_it_is_read(kind, tmp_path, monkeypatch):
    path, layer = tmp_path / f"w.{kind}", filled(0)
    checkpoints.save(filled(1), path)
    # All of Orbax's arrays fit into one batch otherwise.
    monkeypatch.setattr("jaxwrap.checkpoints._orbax._BATCH_BYTES", 16)

    def replace():
        checkpoints.save(filled(2), path)

    if kind == "orbax":  # which opens files by their names
        with pytest.raises(ValueError, match=r"some weights have been changed: load it again"):
            load_while(layer, path, monkeypatch, replace)
    else:
        load_while(layer, path, monkeypatch, replace)
        assert values(layer) == {1}
    monkeypatch.undo()
    checkpoints.load(layer, path)
    assert values(layer) == {2}


@pytest.mark.parametrize("kind", ["msgpack", "safetensors", "npz", "eqx"])
def test_a_file_that_is_written_over_while_it_is_read(kind, tmp_path, monkeypatch):
    path, other, layer = tmp_path / f"w.{kind}", tmp_path / f"other.{kind}", filled(0)
    checkpoints.save(filled(1), path)
    checkpoints.save(filled(2), other)
    os.utime(path, (0, 0))  # clocks of file systems are coarse
    with pytest.raises(ValueError, match=r"written or replaced while it was read"):
        load_while(layer, path, monkeypatch, lambda: shutil.copyfile(other, path))


def npy(value):
    file = io.BytesIO()
    np.save(file, value)
    return file.getvalue()


def write_npz(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members:
            archive.writestr(name, data)


def write_msgpack(path, pairs):
    """Write a map with these pairs, of which a dict could not hold two of one name."""
    packer = msgpack.Packer(autoreset=False)
    packer.pack_map_header(len(pairs))
    for name, value in pairs:
        packer.pack(name)
        packer.pack(value)
    path.write_bytes(packer.getbuffer())


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("second", ["params/Dense_0/bias.npy", "params/Dense_0/bias"])
def test_names_that_come_twice_in_npz(second, tmp_path):
    layer, path = filled(0), tmp_path / "w.npz"
    arrays = {f"{name}.npy": np.ones_like(v) for name, v in flat(layer.get_variables()).items()}
    write_npz(path, [(n, npy(v)) for n, v in arrays.items()])
    checkpoints.load(layer, path)
    write_npz(path, [*((n, npy(v)) for n, v in arrays.items()), (second, npy(np.full(2, 2.0)))])
    with pytest.raises(ValueError, match=r"the name 'params/Dense_0/bias' twice"):
        checkpoints.load(filled(0), path)


@pytest.mark.parametrize("second", ["w", "group/w"])
def test_names_that_come_twice_in_msgpack(second, tmp_path):
    layer, path = filled(0), tmp_path / "w.msgpack"
    first = ("group", {"w": 1}) if second == "group/w" else ("w", 1)
    write_msgpack(path, [first, (second, 2)])
    with pytest.raises(ValueError, match=rf"the name .{second}. twice"):
        checkpoints.load(layer, path, dry_run=True)


def test_names_that_come_twice_in_orbax(tmp_path):
    tree = {"a": {"b": np.ones(2)}, "a/b": np.zeros(2)}
    NATIVE["orbax"][0](tmp_path / "w", tree)
    with pytest.raises(ValueError, match=r"the name 'a/b' twice"):
        checkpoints.load(filled(0), tmp_path / "w", dry_run=True)


def test_names_that_come_twice_in_safetensors(tmp_path):
    entry = b'"a": {"dtype": "F32", "shape": [%d], "data_offsets": [0, 0]}'
    header = b"{" + entry % 0 + b", " + entry % 0 + b"}"
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match=r"the name 'a' twice"):
        checkpoints.load(filled(0), tmp_path / "w.safetensors", dry_run=True)


# Files that claim more than they hold.

HUGE = 2**31


def sparse(path, head, size=HUGE):
    """A file that takes no place on the disk."""
    with path.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + size)


def huge_msgpack(path):
    body = msgpack.packb([[HUGE // 4], "float32"])[1:]
    body = b"\x93" + body + b"\xc6" + HUGE.to_bytes(4, "big")
    length = (len(body) + HUGE).to_bytes(4, "big")
    names = b"\x81\xa6params\x81\xa7Dense_0\x81\xa4bias"
    sparse(path, names + b"\xc9" + length + b"\x01" + body)


def huge_safetensors(path):
    shape = b'{"dtype": "F32", "shape": [%d], "data_offsets": [0, %d]}' % (HUGE // 4, HUGE)
    header = b'{"params/Dense_0/bias": ' + shape + b"}"
    sparse(path, len(header).to_bytes(8, "little") + header)


def huge_eqx(path):
    header = str({"descr": "<f4", "fortran_order": False, "shape": (HUGE // 4,)}).encode() + b"\n"
    sparse(path, b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)


def packed_npz(path):
    """Zeros that are packed to a thousandth."""
    head = npy(np.zeros(0, "float32")).replace(b"(0,), }        ", b"(33554432,), } ")
    write_npz(path, [("params/Dense_0/bias.npy", head + bytes(2**27))])


def long_head(path):
    """A head of 64 MB, which NumPy reads before it refuses."""
    head = b"\x93NUMPY\x02\x00" + (2**26).to_bytes(4, "little") + b" " * 2**26
    write_npz(path, [("params/Dense_0/bias.npy", head)])


@pytest.mark.parametrize(
    ("kind", "write", "message"),
    [
        (
            "msgpack",
            huge_msgpack,
            r"shape: params/Dense_0/bias is \(2,\), in the file \(536870912,",
        ),
        ("safetensors", huge_safetensors, r"shape: params/Dense_0/bias is \(2,\), in the file \("),
        ("npz", packed_npz, r"shape: params/Dense_0/bias is \(2,\), in the file \(33554432,\)"),
        ("npz", long_head, r"cannot be read"),
        ("eqx", huge_eqx, r"cannot be read"),
    ],
)
def test_shapes_are_compared_before_data_are_read(kind, write, message, tmp_path):
    layer, path = filled(1), tmp_path / f"w.{kind}"
    checkpoints.save(layer, path)
    checkpoints.load(layer, path)  # what is imported on first use does not count
    before = flat(layer.get_variables())
    write(path)
    tracemalloc.start()
    with pytest.raises(ValueError, match=message):
        checkpoints.load(layer, path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**24
    assert_equal(flat(layer.get_variables()), before)


def test_lists_in_msgpack(tmp_path):
    """Flax writes lists as dicts, but its serializer takes them."""
    layer = filled(1)
    value = layer.get_variables()["params"]
    bias, kernel = value["Dense_0"]["bias"], value["Dense_0"]["kernel"]
    tree = {"a": [bias, {"w": kernel}], "rest": value["Dense_1"], "n": [None, np.float32(3)]}
    NATIVE["msgpack"][0](tmp_path / "w.msgpack", tree)
    names = {
        "a/0": "params/Dense_0/bias",
        "a/1/w": "params/Dense_0/kernel",
        "rest/(.*)": r"params/Dense_1/\1",
        "n/1": None,
    }
    again = filled(0)
    plan = checkpoints.load(again, tmp_path / "w.msgpack", names=names)
    assert {row.status for row in plan} == {"match", "left out"}
    assert jax.tree.all(jax.tree.map(np.array_equal, again.get_variables(), layer.get_variables()))
