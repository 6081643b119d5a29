"""Strangers' checkpoints: every tensor comes out equal, nothing in them runs, what is wrong is one line."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import struct
import subprocess
import tempfile
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from fgvczoo import FgvczooError
from fgvczoo.checkpoints import Checkpoint, read_checkpoint, read_tensors

FORMATS = ["zip", "legacy"]
PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
SAVED = range(1, pickle.HIGHEST_PROTOCOL + 1)  # torch cannot read what it saves under protocol 0


class Net(nn.Module):
    """What authors' modules have: inner modules, buffers, plain attributes, a tensor that is none of both."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.prototype_vectors = nn.Parameter(torch.rand(6, 4, 1, 1))
        self.ones = nn.Parameter(torch.ones(6, 4, 1, 1), requires_grad=False)
        self.last_layer = nn.Linear(6, 3, bias=False)
        self.register_buffer("scratch", torch.rand(2), persistent=False)
        self.register_parameter("nothing", None)
        self.num_classes, self.prototype_shape, self.epsilon = 3, (6, 4, 1, 1), 1e-4
        self.prototype_activation_function = "log"
        self.prototype_class_identity = torch.eye(3).repeat_interleave(2, 0)
        self.rf_info = [7, 32, 268.0, 16.0]
        self.helper = Helper()


class Helper:
    def __init__(self) -> None:
        self.callback = os.system
        self.names = {"a", "b"}


def save(value: Any, path: Path, kind: str, protocol: int = 2) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=kind == "zip", pickle_protocol=protocol)
    return path


def with_pickle(path: Path, kind: str, content: bytes) -> Path:
    """A file in a format of torch.save around any pickle."""
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", content)
    else:
        header = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
        path.write_bytes(b"".join(pickle.dumps(part, 2) for part in header) + content + pickle.dumps([], 2))
    return path


def refused(path: Path, *words: str, **options: Any) -> None:
    with pytest.raises(FgvczooError) as error:
        read_checkpoint(path, **options)
    text = str(error.value)
    assert text.startswith(str(path)) and "\n" not in text and len(text) < len(str(path)) + 400, text
    for word in words:
        assert word in text, text


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key


# -- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("protocol", SAVED)
def test_a_whole_module(tmp_path: Path, kind: str, protocol: int) -> None:
    net = Net()
    checkpoint = read_checkpoint(save(net, tmp_path / "net.pth", kind, protocol))
    assert_equal(checkpoint.tensors, net.state_dict())
    attributes = checkpoint.attributes
    assert torch.equal(attributes.pop("prototype_class_identity"), net.prototype_class_identity)
    assert attributes == {
        "num_classes": 3,
        "prototype_shape": [6, 4, 1, 1],
        "epsilon": 1e-4,
        "prototype_activation_function": "log",
        "rf_info": [7, 32, 268.0, 16.0],
    }


class Node(nn.Module):
    """A module that keeps numbers, and tables by the modules in it, as a decision tree does."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(2, 2), nn.Linear(2, 2)
        self._index = 4
        self._rows = {self.left: 1, self.right: 0, "words": 7}
        self._above = {self.left: self}
        self.elsewhere = {Helper(): 1, nn.Linear(1, 1): 2}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("protocol", SAVED)
def test_what_inner_modules_say(tmp_path: Path, kind: str, protocol: int) -> None:
    found = read_checkpoint(save(nn.Sequential(Node()), tmp_path / "net.pth", kind, protocol))
    assert found.modules["0"] == {"_index": 4, "_rows": {"0.left": 1, "0.right": 0}, "elsewhere": {}}
    assert found.modules["0.left"] == {"in_features": 2, "out_features": 2} and found.modules[""] == {}
    assert found.attributes == {}
    by_module = save({"state_dict": {"x": torch.ones(1), nn.Linear(1, 1): torch.ones(2)}}, tmp_path / "d.pth", kind)
    assert list(read_tensors(by_module)) == ["x"]


@pytest.mark.parametrize("kind", FORMATS)
def test_a_module_in_data_parallel(tmp_path: Path, kind: str) -> None:
    net = Net()
    checkpoint = read_checkpoint(save(nn.DataParallel(net), tmp_path / "net.pth", kind))
    assert_equal(checkpoint.tensors, net.state_dict())
    assert checkpoint.attributes["num_classes"] == 3


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("protocol", SAVED)
def test_state_dicts_are_what_torch_reads(tmp_path: Path, kind: str, protocol: int) -> None:
    base = torch.arange(24.0)
    state = OrderedDict(
        whole=base,
        strided=base.view(4, 6).T[1:5:2],
        scalar=torch.tensor(3.5),
        empty=torch.empty(0, 5),
        flags=torch.tensor([True, False]),
        half=torch.rand(3).half(),
        brain=torch.rand(3).bfloat16(),
        double=torch.rand(3).double(),
        counts=torch.tensor(7),
        bytes=torch.arange(5, dtype=torch.uint8),
    )
    path = save(state, tmp_path / "state.pth", kind, protocol)
    found = read_tensors(path)
    assert_equal(found, state)
    if protocol == 2:
        assert_equal(found, torch.load(path, weights_only=True))
    assert found["strided"].untyped_storage().data_ptr() == found["whole"].untyped_storage().data_ptr()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "model"])
def test_wrappers_and_prefixes(tmp_path: Path, kind: str, wrapper: str) -> None:
    state = {f"module.{key}": value for key, value in Net().state_dict().items()}
    optimizer = torch.optim.Adam([torch.zeros(2)]).state_dict()
    path = save({"epoch": 3, wrapper: state, "optimizer": optimizer}, tmp_path / "training.pth", kind)
    checkpoint = read_checkpoint(path)
    assert_equal(checkpoint.tensors, {key.removeprefix("module."): value for key, value in state.items()})
    assert checkpoint.attributes["epoch"] == 3


def test_safetensors(tmp_path: Path) -> None:
    state = {f"module.{key}": value for key, value in Net().state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    found = read_tensors(tmp_path / "w.safetensors")
    assert sorted(found) == sorted(key.removeprefix("module.") for key in state)
    refused(tmp_path / "w.safetensors", "max_bytes", max_bytes=100)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((tmp_path / "w.safetensors").read_bytes()[:-10])
    refused(cut, "not a whole safetensors file")


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_the_classes_that_old_files_name(tmp_path: Path) -> None:
    """Before torch 1.6 a module's class went into the file with its source, as a persistent id."""
    net = nn.Sequential(nn.Linear(2, 2))
    storages: dict[str, Tensor] = {}
    seen: set[type] = set()

    class OldPickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            if isinstance(value, type) and issubclass(value, nn.Module) and value not in seen:
                seen.add(value)
                return "module", value, "/home/author/model.py", "class Sequential: ..."
            if isinstance(value, torch.storage.TypedStorage):
                key = str(len(storages))
                storages[key] = torch.tensor(value.tolist())
                return "storage", torch.FloatStorage, key, "cpu", len(storages[key]), None
            return None

    stream = io.BytesIO()
    for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
        pickle.dump(part, stream, 2)
    OldPickler(stream, 2).dump(net)
    pickle.dump(list(storages), stream, 2)
    for tensor in storages.values():
        stream.write(struct.pack("<q", tensor.numel()) + tensor.numpy().tobytes())
    path = tmp_path / "old.pth"
    path.write_bytes(stream.getvalue())
    assert_equal(read_tensors(path), net.state_dict())


# -- nothing runs ----------------------------------------------------------------------------------------------------


class Calls:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def attacks(sentinel: Path) -> dict[str, Callable[[int], bytes]]:
    """Pickles that leave the file `sentinel` when they are unpickled, by what they use; each for every protocol."""
    touch, python = f"touch {sentinel}", f"open({str(sentinel)!r}, 'w').close()"

    def dumped(value: Any) -> Callable[[int], bytes]:
        return lambda protocol: pickle.dumps(value, protocol)

    def assembled(body: bytes) -> Callable[[int], bytes]:
        return lambda protocol: (b"\x80" + bytes([protocol]) if protocol >= 2 else b"") + body

    text = b"S'" + touch.encode() + b"'\n"
    system = {
        "reduce": b"cos\nsystem\n(" + text + b"tR.",
        "inst": b"(" + text + b"ios\nsystem\n.",
        "obj": b"(cos\nsystem\n" + text + b"o.",
        "two reduces": b"cbuiltins\ngetattr\n(cos\n__dict__\nS'get'\ntR(S'system'\ntR(" + text + b"tR.",
        "memo": b"cos\nsystem\np0\n0g0\n(" + text + b"tR.",
        "setstate": b"ctypes\nSimpleNamespace\n)R}S'__setstate__'\ncos\nsystem\nsb" + text + b"b.",
        "stack global": b"\x8c\x02os\x8c\x06system\x93(" + text + b"tR.",
        "after stop of a state dict": b"}(S'a'\ncos\nsystem\n(" + text + b"tRu.",
    }
    return {
        "os.system": dumped(Calls(os.system, touch)),
        "popen": dumped(Calls(subprocess.getoutput, touch)),
        "eval": dumped(Calls(eval, python)),
        "exec": dumped(Calls(exec, python)),
        "open": dumped(Calls(open, str(sentinel), "w")),
        "in a dict": dumped({"state_dict": {"a": Calls(os.system, touch)}}),
        "as a key": dumped({Calls(os.system, touch): 1}),
        "in a set": dumped({Calls(os.system, touch)}),
        "in a chain": dumped([Calls(getattr, Calls(__import__, "os"), "sep"), (Calls(os.system, touch),)]),
        "in an argument": dumped(Calls(OrderedDict, [("a", Calls(os.system, touch))])),
        **{name: assembled(body) for name, body in system.items()},
    }


NAMES = sorted(attacks(Path("x")))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", NAMES)
def test_nothing_runs(tmp_path: Path, name: str, protocol: int) -> None:
    sentinel = tmp_path / "it-ran"
    content = attacks(sentinel)[name](protocol)
    for kind in FORMATS:
        refused(with_pickle(tmp_path / f"{kind}.pth", kind, content))
    assert not sentinel.exists()
    pickle.loads(content)
    assert sentinel.exists()  # an unpickler runs it: the attack is a real one


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("protocol", SAVED)
def test_nothing_runs_in_a_module_that_is_read(tmp_path: Path, kind: str, protocol: int) -> None:
    sentinel = tmp_path / "it-ran"
    net = Net()
    net.hook = Calls(os.system, f"touch {sentinel}")  # type: ignore[assignment]
    net.features.names = {Calls(eval, f"open({str(sentinel)!r}, 'w')")}  # type: ignore[assignment]
    path = save(net, tmp_path / "net.pth", kind, protocol)
    checkpoint = read_checkpoint(path)
    assert_equal(checkpoint.tensors, net.state_dict())
    assert "hook" not in checkpoint.attributes and not sentinel.exists()


# -- what is refused -------------------------------------------------------------------------------------------------


def view_pickle(
    storage: bytes = b"ctorch\nFloatStorage\n", count: str = "4", offset: str = "0", size: str = "4", stride: str = "1"
) -> bytes:
    """{"a": a tensor over the storage "0"}, by hand."""
    identity = b"(S'storage'\n" + storage + b"S'0'\nS'cpu'\nI" + count.encode() + b"\ntQ"
    numbers = [b"(" + b"".join(b"L" + n.encode() + b"L\n" for n in dims.split()) + b"t" for dims in (size, stride)]
    call = identity + b"L" + offset.encode() + b"L\n" + numbers[0] + numbers[1] + b"I00\nNt"
    return b"\x80\x02}S'a'\nctorch._utils\n_rebuild_tensor_v2\n(" + call + b"Rs."


def zip_file(path: Path, content: bytes, storage: bytes = bytes(16), method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/data/0", storage)
    return path


def test_the_pickle_by_hand_is_a_good_one(tmp_path: Path) -> None:
    path = zip_file(tmp_path / "good.pth", view_pickle())
    assert_equal(read_tensors(path), {"a": torch.zeros(4)})


@pytest.mark.parametrize(
    "wrong",
    [
        {"offset": "1"},
        {"offset": "-1"},
        {"size": "5"},
        {"size": "-4"},
        {"size": "2 2", "stride": "1"},
        {"size": "2 2", "stride": "3 1"},
        {"size": "1000000000000", "stride": "0"},
        {"size": "1000000 1000000", "stride": "0 0"},
        {"size": "4", "stride": "-1"},
        {"size": "0 281474976710655 281474976710655", "stride": "1 1 1"},
        {"size": "9" * 30},
        {"size": " ".join(["1"] * 40), "stride": " ".join(["1"] * 40)},
        {"count": "5"},
        {"count": "3", "size": "3"},
        {"count": "-1"},
        {"count": "1000000000000"},
        {"storage": b"ctorch\nComplexFloatStorage\n"},
        {"storage": b"ctorch\nQInt8Storage\n"},
        {"storage": b"cos\nsystem\n"},
        {"storage": b"S'FloatStorage'\n"},
        {"storage": b"ctorch\nDoubleStorage\n"},
    ],
)
def test_tensors_stay_within_their_storages(tmp_path: Path, wrong: dict[str, Any]) -> None:
    refused(zip_file(tmp_path / "bad.pth", view_pickle(**wrong)))


def test_zip_files(tmp_path: Path) -> None:
    path = tmp_path / "bad.pth"
    refused(zip_file(path, view_pickle(), method=zipfile.ZIP_DEFLATED), "compressed")
    refused(zip_file(path, view_pickle(), storage=bytes(20)), "data/0")
    for name in ("../evil", "/etc/passwd", "archive/../../evil", "archive\\..\\evil"):
        zip_file(path, view_pickle())
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(zipfile.ZipInfo(name), b"x")
        refused(path, "leads out")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/other", b"x")
    refused(path, "data.pkl")
    zip_file(path, view_pickle())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/byteorder", "big")
    refused(path, "big-endian")
    zip_file(path, view_pickle())
    content = path.read_bytes()
    entry = content.index(b"PK\x01\x02", content.index(b"PK\x01\x02") + 1)
    sizes = slice(entry + 20, entry + 28)  # the directory claims a gigabyte for data/0
    path.write_bytes(content[: sizes.start] + struct.pack("<II", 2**30, 2**30) + content[sizes.stop :])
    refused(path)


@pytest.mark.parametrize("kind", FORMATS)
def test_cut_files(tmp_path: Path, kind: str) -> None:
    content = save(Net().state_dict(), tmp_path / "whole.pth", kind).read_bytes()
    path = tmp_path / "cut.pth"
    for length in [*range(0, len(content) - 1, 97), len(content) - 1]:
        path.write_bytes(content[:length])
        refused(path)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    refused(tmp_path / "gone.pth", "No such file")
    refused(tmp_path, "cannot be read")
    text = tmp_path / "text.pth"
    text.write_text("<html>404</html>")
    refused(text, "neither safetensors")
    for value, word in (
        ({"epoch": 3}, "'epoch' in it is no tensor"),
        ({}, "no tensors"),
        ([1, 2], "list"),
        (nn.Identity(), "no tensors"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "ComplexFloatStorage"),
        ({"a": torch.zeros(2).to_sparse()}, "'a' in it is no tensor"),
    ):
        refused(save(value, tmp_path / "other.pth", "zip"), word)
    refused(save({"a": torch.zeros(100)}, tmp_path / "large.pth", "zip"), "max_bytes", max_bytes=300)
    tied = torch.zeros(1000)
    path = save({str(i): tied for i in range(100)}, tmp_path / "tied.pth", "zip")
    refused(path, "max_bytes", max_bytes=100_000)


def bombs() -> dict[str, bytes]:
    """Small pickles that take an unpickler, or whoever walks the result, gigabytes or for ever."""
    nested_tuples = b"}p0\n(tp1\n" + b"".join(b"(g%d\ng%d\ntp%d\n" % (i, i, i + 1) for i in range(1, 60))
    nested_modules = b"}" + b"".join(
        b"p%d\n0ca\nB\n)R}S'_modules'\n}(S'a'\ng%d\nS'b'\ng%d\nusb" % (i, i, i) for i in range(60)
    )
    module_in_itself = b"ca\nB\n)Rp0\n}S'_modules'\n}S''\ng0\nssb"
    copies = b"(" + b"I1\n" * 2000 + b"l" + b"p0\n0" + b"cbuiltins\nset\n(g0\ntRp1\n0" * 100_000 + b"}"
    return {
        "a place of memory that is not there": b"\x80\x02Nr\xff\xff\xff\x7f.",
        "the same in text": b"Np99999999999\n.",
        "a negative one": b"Np-1\n.",
        "long bytes": b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x3f.",
        "long text": b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x3f.",
        "a long frame": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7fN.",
        "a long number": b"\x80\x02\x8b\xff\xff\xff\x7f.",
        "a long number in text": b"L" + b"9" * 1_000_000 + b"L\n.",
        "an extension": b"\x80\x02\x82\x01.",
        "a buffer from outside": b"\x80\x05\x97.",
        "tuples as a key": nested_tuples + b"g0\ng60\nI1\ns.",
        "modules in modules": nested_modules + b".",
        "a module in itself": module_in_itself + b".",
        "millions of lists": b"\x80\x02" + b"]0" * 3_000_000 + b"}.",
        "copies": copies + b".",
        "no end": b"\x80\x02}",
        "an empty stack": b"\x80\x02.",
        "pops below the mark": b"\x80\x02}(00000.",
        "no mark": b"\x80\x02}u.",
        "a call of a call": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n" + b"(N" * 20 + b"tR.",
        "a persistent id in text": b"Pstorage\n.",
    }


@pytest.mark.parametrize("name", sorted(bombs()))
def test_bombs_take_neither_memory_nor_time(tmp_path: Path, name: str) -> None:
    resource = pytest.importorskip("resource", reason="memory in use is asked of Unix")
    for kind in FORMATS:
        path = with_pickle(tmp_path / f"{kind}.pth", kind, bombs()[name])
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        refused(path)
        assert time.perf_counter() - start < 20
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 * 1024  # KiB on Linux


def test_attributes_that_are_endless_are_left_out(tmp_path: Path) -> None:
    net: Any = Net()
    net.endless = []
    for _ in range(60):
        net.endless = [net.endless, net.endless]
    net.itself = []
    net.itself.append(net.itself)
    checkpoint = read_checkpoint(save(net, tmp_path / "net.pth", "zip"))
    assert_equal(checkpoint.tensors, net.state_dict())
    assert {"endless", "itself"}.isdisjoint(checkpoint.attributes)


# -- mutations -------------------------------------------------------------------------------------------------------


def one_of_each() -> dict[str, bytes]:
    def content(write: Callable[[Path], Any]) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "file"
            write(path)
            return path.read_bytes()

    state = {"a": torch.rand(3, 2), "b": torch.arange(3)}
    return {
        "zip": content(lambda path: save(Net(), path, "zip")),
        "legacy": content(lambda path: save(Net(), path, "legacy")),
        "legacy state dict, protocol 4": content(lambda path: save(state, path, "legacy", 4)),
        "safetensors": content(lambda path: save_file(state, path)),
    }


WHOLE = one_of_each()
with zipfile.ZipFile(io.BytesIO(WHOLE["zip"])) as whole_archive:
    MODULE_PICKLE = whole_archive.read("file/data.pkl")
OPERATIONS = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]

edits = st.lists(
    st.tuples(
        st.sampled_from(["flip", "insert", "delete", "double", "cut"]),
        st.floats(0, 1),
        st.binary(min_size=1, max_size=9),
    ),
    min_size=1,
    max_size=6,
)


def mutated(content: bytes, changes: list[tuple[str, float, bytes]]) -> bytes:
    for kind, where, new in changes:
        place = int(where * len(content))
        match kind:
            case "flip":
                content = content[:place] + new + content[place + len(new) :]
            case "insert":
                content = content[:place] + new + content[place:]
            case "delete":
                content = content[:place] + content[place + len(new) :]
            case "double":
                content = content[:place] + content[place : place + 40] + content[place:]
            case "cut":
                content = content[:place]
    return content


def read_or_refuse(path: Path) -> None:
    try:
        found = read_checkpoint(path, 10**8)
    except FgvczooError as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(found, Checkpoint)
        assert all(tensor.sum().item() is not None for tensor in found.tensors.values())  # its memory is there


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(sorted(WHOLE)), changes=edits)
def test_mutated_files(tmp_path: Path, kind: str, changes: list[tuple[str, float, bytes]]) -> None:
    path = tmp_path / "mutated"
    path.write_bytes(mutated(WHOLE[kind], changes))
    read_or_refuse(path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=edits)
def test_mutated_pickles(tmp_path: Path, changes: list[tuple[str, float, bytes]]) -> None:
    """Mutations that a zip file's checksums would catch."""
    read_or_refuse(with_pickle(tmp_path / "mutated", "zip", mutated(MODULE_PICKLE, changes)))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(st.sampled_from(OPERATIONS) | st.binary(max_size=3) | st.just(b"1\n"), max_size=40))
def test_any_operations(tmp_path: Path, parts: list[bytes]) -> None:
    read_or_refuse(with_pickle(tmp_path / "any", "zip", b"}" + b"".join(parts) + b"."))
