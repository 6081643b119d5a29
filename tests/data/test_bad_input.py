"""Mistakes in the files of every registered data set with an official layout: each is one clear line, and no reader
leaves its root. A data set enters by its copy in `copies.py`."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import pytest
import torch

from fgvczoo.data.base import FGVCDataModule
from fgvczoo.data.official import Official
from fgvczoo.errors import FgvczooError
from fgvczoo.zoo.registry import DATASETS, dataset_class
from tests.conftest import RECIPES
from tests.data.copies import COPIES, copy_of, spoil
from tests.data.pictures import DAMAGES, damage

OFFICIAL = sorted(name for name in DATASETS if dataset_class(name).reader_class is not None and name != "synthbirds")
PICTURES = (".jpg", ".jpeg", ".png")
WITHOUT_FILES = {"cifar10", "cifar100"}  # all pictures in a few files of pixels, none of which can be corrupt alone
KINDS = ("class", "twice", "missing", "outside")
# Kinds that a set cannot have in a text file: its rows are what lies there, its lists are binary, or ids are numbers.
WITHOUT = {
    "aircraft": {"outside"}, "cifar10": {*KINDS}, "cifar100": {*KINDS}, "dogs": {"class", "twice", "outside"},
    "flowers": {"class", "twice", "outside"}, "gtos-mobile": {"twice", "missing", "outside"},
    "imagenet": {"twice", "missing", "outside"}, "nus-wide": {"missing"}, "voc": {"twice", "outside"},
}  # fmt: skip


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    roots = {}
    for name in OFFICIAL:
        roots[name] = tmp_path_factory.mktemp("copies") / name
        roots[name].mkdir()
        COPIES[name].make(roots[name])
    return roots


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FGVCZOO_CACHE", str(tmp_path / "cache"))


def open_(name: str, root: Path | str | None) -> Official:
    """The reader, with all of its annotations read."""
    reader = dataset_class(name).reader_class(root, **COPIES[name].options)
    reader.require(reader.keys)
    for index in (0, len(reader) - 1):
        reader.annotations(index, reader.keys)
    return reader


def refused(name: str, root: Path | str | None, message: str = "") -> str:
    with pytest.raises(FgvczooError, match=message) as error:
        open_(name, root)
    text = str(error.value)
    assert "\n" not in text and len(text) < 1000
    return text


def refused_or_whole(name: str, root: Path) -> None:
    """One line, or all rows lie below the root."""
    try:
        reader = open_(name, root)
    except FgvczooError as error:
        assert "\n" not in str(error)
        return
    for index in range(len(reader)):
        picture = reader.picture(index)
        if isinstance(picture, Path):
            assert Path(os.path.normpath(picture)).is_relative_to(root), picture


def test_every_set_has_a_copy_and_every_kind_of_mistake() -> None:
    assert set(OFFICIAL) == set(COPIES)
    for name in OFFICIAL:
        assert COPIES[name].mistakes.keys() | WITHOUT.get(name, set()) == set(KINDS), name


@pytest.mark.parametrize("name", OFFICIAL)
def test_roots_that_are_none(name: str, tmp_path: Path) -> None:
    refused(name, None, "root is not given; .")
    refused(name, tmp_path / "nowhere", "no such folder; .")
    (tmp_path / "empty").mkdir()
    text = refused(name, tmp_path / "empty", "empty: no .* in it; .")
    assert str(tmp_path / "empty") in text
    (tmp_path / "file.zip").write_bytes(b"")
    refused(name, tmp_path / "file.zip", "a file; unpack it")


@pytest.mark.parametrize("name", [name for name in OFFICIAL if dataset_class(name).reader_class.archives])
def test_an_archive_that_is_not_unpacked(name: str, tmp_path: Path) -> None:
    said = []
    for number, archive in enumerate(dataset_class(name).reader_class.archives):
        root = tmp_path / str(number)
        root.mkdir()
        (root / archive.name).write_bytes(b"")
        if "is not unpacked; run: " in refused(name, root):
            said.append(archive.name)
    assert said


@pytest.mark.parametrize(
    "name, kind", [(name, kind) for name in OFFICIAL for kind in COPIES[name].mistakes], ids=lambda value: str(value)
)
def test_mistakes_are_one_line(name: str, kind: str, copies: dict[str, Path], tmp_path: Path) -> None:
    root = copy_of(copies[name], tmp_path / "spoilt")
    spoil(root, COPIES[name].mistakes[kind])
    refused(name, root, COPIES[name].mistakes[kind].message)


def lists(root: Path) -> list[Path]:
    """The files of a copy that are no pictures; of many of a kind in a folder the first."""
    found: dict[tuple[Path, str], Path] = {}
    files = [path for path in sorted(root.rglob("*")) if path.is_file() and path.suffix.lower() not in PICTURES]
    for path in files:
        many = sum(other.parent == path.parent and other.suffix == path.suffix for other in files) > 10
        found.setdefault((path.parent, path.suffix if many else path.name), path)
    return list(found.values())


@pytest.mark.parametrize("name", OFFICIAL)
def test_lists_that_are_missing_cut_or_something_else(name: str, copies: dict[str, Path], tmp_path: Path) -> None:
    root = copy_of(copies[name], tmp_path / "spoilt")
    for path in lists(root):
        content = path.read_bytes()
        for spoilt in (
            None,
            b"",
            content[: len(content) // 2],
            b"\xff\xfe<html>\x00" + content[:50],
            content[:-1] + b"x\n",
        ):
            if spoilt is None:
                path.unlink()
            else:
                path.write_bytes(spoilt)
            refused_or_whole(name, root)
        path.write_bytes(content)
    open_(name, root)


@pytest.mark.parametrize("name", OFFICIAL)
def test_no_list_leads_out_of_the_root(name: str, copies: dict[str, Path], tmp_path: Path) -> None:
    root = copy_of(copies[name], tmp_path / "spoilt")
    reader = open_(name, root)
    if not isinstance(reader.picture(0), Path):
        return
    outside = tmp_path / "outside.jpg"
    outside.write_bytes(Path(reader.picture(0)).read_bytes())
    rows = [Path(reader.picture(row)) for row in (0, len(reader) - 1)]
    for path in lists(root):
        content = path.read_bytes()
        for picture in rows:
            for part in (picture.name, picture.stem, picture.parent.name + "/", picture.parent.name + "\\"):
                for evil in (f"../../../../{part}", str(outside), f"..\\{part}"):
                    spoilt = content.replace(part.encode(), evil.encode(), 1)
                    if spoilt != content:
                        path.write_bytes(spoilt)
                        refused_or_whole(name, root)
        path.write_bytes(content)


@pytest.mark.parametrize("name", OFFICIAL)
def test_corrupt_pictures_are_skipped_with_count_and_names(name: str, copies: dict[str, Path], tmp_path: Path) -> None:
    root = copy_of(copies[name], tmp_path / "spoilt")
    options = {"preprocess": {"size": [8, 8]}, "batch_size": 4, "on_corrupt": "skip", "augmentation": "flip"}
    data = dataset_class(name)(str(root), **COPIES[name].options, **options)
    if name in WITHOUT_FILES:
        assert isinstance(data.reader.picture(0), bytes)
        return
    total = len(data.splits["train"])
    lost = corrupt(data, DAMAGES[OFFICIAL.index(name) % len(DAMAGES)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loader = data.train_dataloader()
        sizes = [len(batch["label"]) for batch in loader]
    # No batch is dropped; the one that lost a picture is smaller by it, the last one takes what is left.
    assert len(sizes) == len(loader) and min(sizes) >= 1 and sum(sizes) == total - len(lost)
    assert sum(size < 4 for size in sizes) <= len(lost) + (total % 4 > 0)
    assert sorted(data.skipped) == sorted(map(str, lost))
    said = "1 unreadable picture was" if len(lost) == 1 else f"{len(lost)} unreadable pictures were"
    assert any(said in str(w.message) and str(lost[0]) in str(w.message) for w in caught)
    with pytest.raises(FgvczooError, match=r"cannot be read|corrupt|not an image"):
        list(
            dataset_class(name)(
                str(root), **COPIES[name].options, **options | {"on_corrupt": "error"}
            ).train_dataloader()
        )


@pytest.mark.parametrize("name", sorted(set(OFFICIAL) - WITHOUT_FILES))
def test_trains_on_without_corrupt_pictures(name: str, copies: dict[str, Path], tmp_path: Path, fgvczoo_in) -> None:
    root = copy_of(copies[name], tmp_path / "spoilt")
    data = dataset_class(name)(str(root), **COPIES[name].options, batch_size=4)
    lost = corrupt(data, DAMAGES[(OFFICIAL.index(name) + 1) % len(DAMAGES)])
    options = {"on_corrupt": "skip", "preprocess.size": "[32, 32]", "batch_size": 4, **COPIES[name].options}
    status, out, err = fgvczoo_in(
        "fit", "--config", RECIPES / "linear-tiny.yaml", "--data", name, "--data.root", root,
        *(word for key, value in options.items() for word in (f"--data.{key}", value)),
    )  # fmt: skip
    assert status == 0 and "trained; weights in" in out, err
    run = Path("runs/linear-tiny")
    told = json.loads((run / "data.json").read_text())
    assert told["dataset"] == name and told["splits"]["train"] == len(data.splits["train"])
    assert told["skipped"]["count"] == len(lost) and list(told["skipped"]["pictures"]) == sorted(map(str, lost))
    assert f"skipped unreadable pictures: {len(lost)}, by name in {run / 'data.json'}" in out
    # Two epochs of all steps, as without a corrupt picture; info says it of the weights.
    steps = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert steps == 2 * len(data.train_dataloader())
    status, out, _ = fgvczoo_in("info", run)
    assert status == 0 and f"{len(lost)} unreadable pictures" in out


def corrupt(data: FGVCDataModule, kind: str) -> list[Path]:
    """Spoils one per cent of the training pictures, at least one."""
    rows = data.splits["train"]
    chosen = rows[:: max(len(rows) // max(len(rows) // 100, 1), 1)][: max(len(rows) // 100, 1)]
    pictures = [Path(data.reader.picture(int(row))) for row in chosen]
    for picture in pictures:
        damage(picture, kind)
    return pictures
