"""Files that a stranger made to do harm: nothing in them runs, each is one line, and takes little time and memory."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import struct
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

import fgvczoo
from fgvczoo.errors import FgvczooError
from fgvczoo.zoo.build import build_model, data_from_provenance
from fgvczoo.zoo.load import load
from fgvczoo.zoo.recipe import read_recipe
from fgvczoo.zoo.registry import DATASETS
from fgvczoo.zoo.weights import file_sha256, load_weights
from tests.conftest import RECIPES

SECONDS, BYTES = 2.0, 200 * 2**20
TINY = RECIPES / "st-protopnet-tiny.yaml"


@contextmanager
def within_bounds() -> Iterator[None]:
    """At most 2 seconds and 200 MB more than before."""
    status = Path("/proc/self/status")

    def resident(key: str) -> int:
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(key))

    before = None
    if status.exists():
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts at the present size
        before = resident("VmRSS")
    start = time.process_time()
    yield
    assert time.process_time() - start < SECONDS
    if before is not None:
        assert resident("VmHWM") - before < BYTES


def refused(call: Callable[[], Any], *words: str) -> None:
    with within_bounds(), pytest.raises(FgvczooError) as caught:
        call()
    message = str(caught.value)
    assert message.isprintable() and len(message) < 2000
    for word in words:
        assert word in message, message


class Payload:
    """Leaves a file where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[Path]:
    """What a payload would make; it never does."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of a small network."""
    folder = tmp_path_factory.mktemp("whole") / "weights"
    return fgvczoo.save_weights(build_model(read_recipe(TINY)), folder, provenance={"recipe": "x"}, licences={})


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "weights"))


def edit(folder: Path, *keys: str, value: Any) -> None:
    """Sets config[key][key]... and signs the files as they are."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["files"] = {file.name: file_sha256(file) for file in folder.glob("*.safetensors")}
    place = config
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    path.write_text(json.dumps(config))


# -- config.json -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "value", "words"),
    [
        (["paper"], "os.system", ["no model 'os.system'"]),
        (["paper"], "../../../models/linear", ["no model"]),
        (["paper"], "\x1b[2J\n\u202eevil", ["no model", "\\x1b"]),
        (["init", "loss"], {"class_path": "subprocess.Popen", "init_args": {"args": "x"}}, ["names a class"]),
        (["init", "backbone_options"], {"x": {"class_path": "os.system"}}, ["names a class"]),
        (["init", "loss"], "subprocess.Popen", ["loss"]),
        (["init", "backbone"], "hf-hub:evil/model", ["not a timm model"]),
        (["init", "backbone_options"], {"checkpoint_path": "payload.pth"}, ["checkpoint_path"]),
        (["init", "backbone_options"], {"pretrained_cfg": {"url": "http://evil"}}, ["pretrained_cfg"]),
        (["init", "backbone_weights"], "payload.pth", ["backbone_weights"]),
        (["init", "plan"], ["project"], ["plan"]),
        (["init", "backbone_options"], {"layers": [10**9] * 4}, ["parts"]),
        (["init", "prototype_dim"], 10**12, ["describes no"]),
        (["init", "prototype_dim"], 10**4, ["shape"]),
        (["init", "prototypes_per_class"], 2**62, ["shape", "describes no"]),
        (["init", "prototypes_per_class"], -5, ["at least 1"]),
        (["init", "prototype_dim"], "x" * 100_000, ["prototype_dim"]),
        (["init", "num_classes"], 10**9, ["num_classes"]),
        (["classes"], ["a"] * 1_000_000, ["class names"]),
        (["classes"], [["a"], {}, 3, None], ["names"]),
        (["preprocess"], {"size": [10**9, 10**9]}, ["preprocess.size"]),
        (["preprocess"], {"size": "large"}, ["describes no"]),
        (["preprocess"], {"crop_fraction": 1e-300}, ["crop_fraction"]),
        (["preprocess"], {"no_such": 1}, ["no_such"]),
        (["state"], {}, ["describes no"]),
        (["state", "sources"], {"trivial": [{"image": 1}]}, ["describes no"]),
        (["state", "sources"], 7, ["describes no"]),
        (["files"], {"../../../etc/passwd": "0"}, ["files", "expected model.safetensors"]),
        (["files"], {}, ["files"]),
        (["files", "model.safetensors"], {"x": 1}, ["altered or cut"]),
        (["format"], 10**30, ["format"]),
        (["format"], True, ["format"]),
        (["licence"], "MIT", ["licence"]),
    ],
)
def test_configs(folder: Path, keys: list[str], value: Any, words: list[str]) -> None:
    edit(folder, *keys, value=value)
    with within_bounds(), pytest.raises(FgvczooError) as caught:
        load_weights(folder)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 2000
    assert any(word in message for word in words), message


def test_buffers_that_are_in_no_file(tmp_path: Path) -> None:
    """A Swin transformer makes tables for its image size, of which its tensors say nothing."""
    options = {"img_size": 64, "window_size": 8}
    model = fgvczoo.create("linear", num_classes=2, backbone="swin_tiny_patch4_window7_224", backbone_options=options)
    folder = fgvczoo.save_weights(model, tmp_path / "w", provenance={}, licences={})
    edit(folder, "init", "backbone_options", "img_size", value=65_536)
    refused(lambda: load_weights(folder), "buffers")


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b'{"format": 1, "x": ' + b"9" * 5_000_000 + b"}",
        b'{"format": 1, "x": NaN}',
        b'{"format": 1, "x": "\xff\xfe"}',
        b"\x00" * 1000,
        b" " * 40_000_000,
        b"",
        b"[]",
        b"null",
    ],
    ids=["lists", "dicts", "number", "NaN", "bytes", "zeros", "large", "empty", "list", "null"],
)
def test_what_is_hardly_json(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    refused(lambda: load_weights(folder), "config.json")


def test_weights_that_name_their_data(folder: Path, mark: Path) -> None:
    for section in ({"class_path": "os.system", "init_args": {}}, {"class_path": "fgvczoo.cli.main"}, "x", [1], {}):
        edit(folder, "provenance", value={"data": section})
        model = load_weights(folder)
        refused(lambda model=model: data_from_provenance(model, mark), "no data set of fgvczoo")


def test_weights_do_not_say_where_pictures_are_written(folder: Path, birds: Path, tmp_path: Path) -> None:
    where = tmp_path / "written"
    arguments = {"size": "tiny", "decoded": str(where)}
    edit(folder, "provenance", value={"data": {"class_path": DATASETS["synthbirds"], "init_args": arguments}})
    data_from_provenance(load_weights(folder), birds).picture(0)
    assert not where.exists()


def test_names_of_classes_stay_text(folder: Path, tmp_path: Path, fgvczoo_in) -> None:
    edit(
        folder,
        "classes",
        value=["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "$\\frac$", "\x1b]0;x\x07"],
    )
    image = tmp_path / "bird.png"
    Image.fromarray(np.full((48, 48, 3), 90, np.uint8)).save(image)
    for target in range(4):
        status, out, err = fgvczoo_in("explain", folder, image, "--target", target, "-o", "why.html")
        assert status == 0, err
        page = Path("why.html").read_text()
        assert "<script" not in page and "<img src=x" not in page and "\x1b" not in out + err
        assert fgvczoo_in("explain", folder, image, "--target", target, "-o", "why.png")[0] == 0


# -- tensors -----------------------------------------------------------------------------------------------------------


def header(entries: dict[str, Any], rest: bytes = b"", length: int | None = None) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + rest


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a whole"),
        (b"\x00" * 7, "not a whole"),
        (header({}, length=2**62), "header"),
        (header({}, length=90_000_000), "header"),
        (header({"x": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}, b"\0" * 4), "not a whole"),
        (header({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 2**60]}}, b"\0" * 8), "not a whole"),
        (header({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"\0" * 4), "not a whole"),
        (header({"x": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}, b"\0" * 4), "type"),
        (header({"x\n\x1b[2J": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4), "missing"),
        (b"PK\x03\x04" + b"\0" * 100, "not a safetensors file"),
        (pickle.dumps({"x": 1}), "not a"),
    ],
)
def test_safetensors(folder: Path, content: bytes, words: str) -> None:
    (folder / "model.safetensors").write_bytes(content)
    edit(folder, "provenance", value=None)
    refused(lambda: load_weights(folder), "model.safetensors", words)


def test_tensors_of_another_kind(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith("prototypes.vectors"))
    for changed, words in (
        (tensors[key].double(), "float64"),
        (tensors[key].long(), "int64"),
        (tensors[key][1:], "shape"),
    ):
        save_file({**tensors, key: changed.contiguous()}, path)
        edit(folder, "provenance", value=None)
        refused(lambda: load_weights(folder), key, words)


def test_pictures_that_are_none(folder: Path, tmp_path: Path, fgvczoo_in) -> None:
    """A picture of a prototype that would take gigabytes when decoded."""
    bomb = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(bomb, "PNG")
    pictures = {
        f"{branch}.{n}": torch.frombuffer(bytearray(bomb.getvalue()), dtype=torch.uint8)
        for branch in ("trivial", "support")
        for n in range(8)
    }
    save_file(pictures, folder / "prototypes.safetensors")
    edit(folder, "provenance", value=None)
    image = tmp_path / "bird.png"
    Image.fromarray(np.full((48, 48, 3), 90, np.uint8)).save(image)
    with within_bounds():
        status, _, err = fgvczoo_in("explain", folder, image, "-o", "why.png")
    assert status == 2 and "pixels" in err and err.count("\n") == 1


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_pickles(tmp_path: Path, mark: Path, protocol: int, kind: str) -> None:
    path = tmp_path / "w.pth"
    torch.save(
        {"state_dict": Payload(mark)},
        path,
        pickle_protocol=max(protocol, 1),
        _use_new_zipfile_serialization=kind == "zip",
    )
    refused(lambda: load(TINY, weights=path))
    refused(lambda: fgvczoo.from_official("protopnet", path))
    refused(lambda: load(TINY, weights=path.rename(tmp_path / "w.ckpt")), "w.ckpt")
    plain = tmp_path / "plain.pth"
    plain.write_bytes(pickle.dumps(Payload(mark), protocol))
    refused(lambda: load(TINY, weights=plain), "plain.pth")
    model = {"backbone_weights": str(plain)}
    refused(lambda: _pretrained(model["backbone_weights"]), "plain.pth")


def _pretrained(source: str) -> None:
    from fgvczoo.nn.backbones import Backbone, load_pretrained

    load_pretrained(Backbone("test_resnet"), source)


def test_archives_that_grow(tmp_path: Path) -> None:
    state = io.BytesIO()
    torch.save({"x": torch.zeros(4)}, state)
    bomb = tmp_path / "bomb.ckpt"
    with (
        zipfile.ZipFile(io.BytesIO(state.getvalue())) as given,
        zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as made,
    ):
        for name in given.namelist():
            made.writestr(name, given.read(name))
        with made.open("archive/data/1", "w") as member:
            for _ in range(500):
                member.write(b"\0" * 2**20)
    refused(lambda: load(TINY, weights=bomb), "bomb.ckpt", "compressed")
    refused(lambda: load(TINY, weights=bomb.rename(tmp_path / "bomb.pth")), "compressed")


# -- recipes -----------------------------------------------------------------------------------------------------------


def hostile_recipe(path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    config = yaml.safe_load(TINY.read_text())
    change(config)
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["model"].update(class_path="os.system"),
        lambda c: c["model"].update(class_path=["os"]),
        lambda c: c["data"].update(class_path="subprocess.Popen"),
        lambda c: c["model"]["init_args"].update(loss={"class_path": "subprocess.Popen"}),
        lambda c: c["model"]["init_args"].update(backbone_options={"a": {"class_path": "subprocess.Popen"}}),
        lambda c: c["trainer"].update(callbacks=[{"class_path": "subprocess.Popen", "init_args": {"args": "x"}}]),
        lambda c: c["trainer"].update(logger={"class_path": "antigravity.Logger"}),
    ],
)
def test_recipes_that_name_code(tmp_path: Path, change: Callable[..., Any], fgvczoo_in) -> None:
    recipe = hostile_recipe(tmp_path / "r.yaml", change)
    refused(lambda: load(recipe, weights=None), "class_path", "FGVCZOO_ALLOW")
    status, _, err = fgvczoo_in("fit", "--config", recipe)
    assert status == 2 and "class_path" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("trainer", "logger", "antigravity.Logger"),
        ("trainer", "callbacks", ["antigravity.Callback"]),
        ("trainer", "profiler", "antigravity.fly"),
    ],
)
def test_recipes_that_name_code_in_short(
    tmp_path: Path, section: str, key: str, value: Any, fgvczoo_in, monkeypatch
) -> None:
    """jsonargparse takes a bare import path for a class."""
    import sys

    monkeypatch.delitem(sys.modules, "antigravity", raising=False)
    recipe = hostile_recipe(tmp_path / "r.yaml", lambda c: c[section].update({key: value}))
    status, _, err = fgvczoo_in("fit", "--config", recipe)
    assert status == 2 and err.count("\n") == 1, err
    assert "antigravity" not in sys.modules


def test_a_users_own_package_is_allowed_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = hostile_recipe(tmp_path / "r.yaml", lambda c: c["model"].update(class_path="mine.Model"))
    refused(lambda: read_recipe(recipe), "FGVCZOO_ALLOW=mine")
    monkeypatch.setenv("FGVCZOO_ALLOW", "other, mine")
    assert read_recipe(recipe).config["model"]["class_path"] == "mine.Model"


@pytest.mark.parametrize(
    "text",
    [
        "a: !!python/object/apply:os.system [x]",
        "&a [*a, *a]",
        "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9) if n else 1}]\n" for n in range(30)),
        "a: [" + "[" * 50_000,
        "card: " + "9" * 100_000,
        "card: 2026-99-99",
        "? [a, b]\n: c",
        "card: 1\ncard: 2",
        "\x00",
        "- card",
        "card: {paper: 3}\nmodel: {}\ndata: {}",
        "card: []\nmodel: 1\ndata: x",
        "#" * 200_000,
    ],
)
def test_recipes_that_are_hardly_yaml(tmp_path: Path, text: str, fgvczoo_in) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    refused(lambda: read_recipe(path), "r.yaml")
    for command in (("info", path), ("fit", "--config", path)):
        status, _, err = fgvczoo_in(*command)
        assert status == 2 and err.count("\n") == 1 and "internal" not in err, err


# -- anything ----------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=8,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in nested values."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def put(value: Any, path: tuple[Any, ...], new: Any) -> None:
    for key in path[:-1]:
        value = value[key]
    value[path[-1]] = new


def one_line_or_right(call: Callable[[], Any]) -> None:
    try:
        call()
    except FgvczooError as error:
        assert str(error).isprintable() and len(str(error)) < 2000


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_config(whole: Path, tmp_path: Path, data: st.DataObject) -> None:
    config = json.loads((whole / "config.json").read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        every = list(places(config))
        if every:
            put(config, data.draw(st.sampled_from(every)), data.draw(JSON))
    folder = tmp_path / "fuzzed"
    folder.mkdir(exist_ok=True)
    shutil.copyfile(whole / "model.safetensors", folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    with within_bounds():
        one_line_or_right(lambda: load_weights(folder))


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_safetensors(whole: Path, tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray((whole / "model.safetensors").read_bytes())
    length = int.from_bytes(content[:8], "little")
    if data.draw(st.booleans()):  # bytes of the header
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, 8 + length - 1))] = data.draw(st.integers(0, 255))
    else:  # values in it
        entries = json.loads(content[8 : 8 + length])
        put(entries, data.draw(st.sampled_from(list(places(entries)))), data.draw(JSON))
        content = bytearray(header(entries, bytes(content[8 + length :])))
    folder = tmp_path / "fuzzed"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(content[: data.draw(st.integers(len(content) - 3, len(content)))])
    shutil.copyfile(whole / "config.json", folder / "config.json")
    edit(folder, "provenance", value=None)
    with within_bounds():
        one_line_or_right(lambda: load_weights(folder))


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_recipe(tmp_path: Path, data: st.DataObject) -> None:
    config = yaml.safe_load(TINY.read_text())
    for _ in range(data.draw(st.integers(1, 2))):
        put(config, data.draw(st.sampled_from(list(places(config)))), data.draw(JSON))
        if not isinstance(config, dict):
            break
    path = tmp_path / "fuzzed.yaml"
    path.write_text(yaml.safe_dump(config))

    def build() -> None:
        with torch.device("meta"):
            build_model(read_recipe(path))

    with within_bounds():
        one_line_or_right(build)
