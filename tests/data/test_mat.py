import io
import zlib

import numpy as np
import pytest
import scipy.io
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fgvczoo.data.mat import read_mat
from fgvczoo.errors import FgvczooError

kinds = st.sampled_from(["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8", "?"])
numbers = kinds.flatmap(lambda kind: arrays.arrays(kind, arrays.array_shapes(min_dims=2, max_dims=3, max_side=4)))
texts = st.text(st.characters(codec="utf-16", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=12)
values = st.recursive(
    st.one_of(numbers, texts),
    lambda inner: (
        st.lists(inner, min_size=1, max_size=4)
        | st.dictionaries(
            st.from_regex(r"[a-z]\w{0,20}", fullmatch=True).filter(str.isascii), inner, min_size=1, max_size=3
        )
    ),
    max_leaves=10,
)


def written(value):
    """What scipy writes as that value."""
    if isinstance(value, list):
        cells = np.empty((1, len(value)), object)
        for place, inner in enumerate(value):
            cells[0, place] = written(inner)
        return cells
    return {name: written(inner) for name, inner in value.items()} if isinstance(value, dict) else value


def same(read, value) -> bool:
    if isinstance(value, list):
        return isinstance(read, list) and len(read) == len(value) and all(map(same, read, value))
    if isinstance(value, dict):
        return read.keys() == value.keys() and all(same(read[name], [value[name]]) for name in value)
    if isinstance(value, np.ndarray):
        return np.shape(read) == (() if value.size == 1 else value.shape) and np.array_equal(
            np.reshape(read, value.shape), value, equal_nan=value.dtype.kind == "f"
        )
    return read == value


@settings(deadline=None, max_examples=60)
@given(value=values, compressed=st.booleans())
def test_what_scipy_writes_is_read(tmp_path_factory, value, compressed):
    file = tmp_path_factory.getbasetemp() / "value.mat"
    scipy.io.savemat(file, {"other": 1, "value": written(value)}, do_compression=compressed, long_field_names=True)
    assert same(read_mat(file, "value"), value)


def test_big_endian_files_are_read(tmp_path):
    """Written by hand: an int8 row of 3 named x."""
    content = b"\x00\x00\x00\x06\x00\x00\x00\x08\x00\x00\x00\x08\x00\x00\x00\x00"
    content += b"\x00\x00\x00\x05\x00\x00\x00\x08\x00\x00\x00\x01\x00\x00\x00\x03"
    content += b"\x00\x01\x00\x01x\x00\x00\x00" + b"\x00\x03\x00\x01\x01\xfe\x03\x00"
    file = tmp_path / "big.mat"
    file.write_bytes(b"MATLAB".ljust(124) + b"\x01\x00MI\x00\x00\x00\x0e" + len(content).to_bytes(4, "big") + content)
    assert read_mat(file, "x").tolist() == [[1, -2, 3]] == scipy.io.loadmat(file)["x"].tolist()


def refused(file, match):
    with pytest.raises(FgvczooError, match=match) as error:
        read_mat(file, "x")
    assert "\n" not in str(error.value)


def test_what_is_not_read_is_said(tmp_path):
    file = tmp_path / "a.mat"
    refused(file, "is missing")
    for value in (np.array([[1 + 2j]]), scipy.sparse.csc_matrix(np.eye(2)), np.array(["ab", "cd"])):
        scipy.io.savemat(file, {"x": value})
        refused(file, "which is not read")
    scipy.io.savemat(file, {"y": 1})
    refused(file, "it has 'y'")
    file.write_bytes(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + bytes(64))
    refused(file, "its first bytes are others")


def test_sizes_that_are_not_there_cost_nothing(tmp_path, monkeypatch):
    stream = io.BytesIO()
    scipy.io.savemat(stream, {"x": written(["a", "b", "c"])})
    file = tmp_path / "a.mat"
    shape = stream.getvalue().index(b"\x01\x00\x00\x00\x03\x00\x00\x00")
    for sides in (b"\xff\xff\xff\x7f" * 2, b"\xff\xff\xff\xff\x03\x00\x00\x00"):
        file.write_bytes(stream.getvalue()[:shape] + sides + stream.getvalue()[shape + 8 :])
        refused(file, "it is cut|without a shape")
    monkeypatch.setattr("fgvczoo.data.mat.MOST_BYTES", 1 << 10)
    bomb = zlib.compress(bytes(1 << 20))
    file.write_bytes(b"MATLAB".ljust(124) + b"\x00\x01IM\x0f\x00\x00\x00" + len(bomb).to_bytes(4, "little") + bomb)
    refused(file, "more than 1024 bytes")


@settings(deadline=None, max_examples=300)
@given(
    value=values,
    places=st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), max_size=6),
    cut=st.integers(0, 40),
)
def test_damaged_files_are_one_line(tmp_path_factory, value, places, cut):
    stream = io.BytesIO()
    scipy.io.savemat(stream, {"x": written(value)})
    content = bytearray(stream.getvalue())[: len(stream.getvalue()) - cut]
    for place, byte in places:
        content[128 + place % (len(content) - 128)] = byte
    file = tmp_path_factory.getbasetemp() / "damaged.mat"
    file.write_bytes(content)
    try:
        read_mat(file, "x")
    except FgvczooError as error:
        assert len(str(error).splitlines()) == 1
