"""Decoded pictures in a folder: the same pixels of every data set, of what is there now, whatever the folder holds."""

from __future__ import annotations

import errno
import os
import shutil
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fgvczoo.data import decoded
from fgvczoo.data.base import Reader
from fgvczoo.data.folder import FolderDataModule
from fgvczoo.errors import FgvczooError, FgvczooWarning
from fgvczoo.preprocess import read_image
from fgvczoo.zoo.registry import DATASETS, dataset_class
from tests.data.copies import COPIES
from tests.data.hub.make import make_parquet
from tests.data.pictures import save_picture

OFFICIAL = sorted(name for name in DATASETS if dataset_class(name).reader_class is not None and name != "synthbirds")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FGVCZOO_CACHE", str(tmp_path / "cache"))


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def folder_of_pictures(root: Path, count: int = 4) -> Path:
    for number in range(count):
        save_picture(root / f"class{number % 2}" / f"{number}.jpg", number)
    return root


def module(root: Path, kept: Path | None, **options: Any) -> FolderDataModule:
    where = None if kept is None else str(kept)
    return FolderDataModule(str(root), test_fraction=0, decoded=where, preprocess={"size": [8, 8]}, **options)


def images(data: FolderDataModule) -> torch.Tensor:
    return torch.cat([batch["image"] for batch in data.loader("train_plain")])


def forbid_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(decoded, "read_image", refuse)


@pytest.mark.parametrize("name", OFFICIAL)
def test_every_data_set_has_the_same_pixels(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "copy"
    root.mkdir()
    COPIES[name].make(root)
    plain = dataset_class(name)(str(root), **COPIES[name].options)
    kept = dataset_class(name)(str(root), **COPIES[name].options, decoded=str(tmp_path / "kept"))
    rows = range(len(plain.reader))
    wanted = [plain.reader.read(row) for row in rows]
    for turn in ("written", "read"):
        if turn == "read":
            assert files(tmp_path / "kept") or type(plain.reader).read is not Reader.read  # rows of pixels, undecoded
            forbid_decoding(monkeypatch)
        for row in rows:
            found = kept.picture(row)
            assert found.dtype == np.uint8 and found.flags.writeable and np.array_equal(found, wanted[row])


def test_encoded_bytes_have_the_same_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_parquet(tmp_path / "hub", {"train": 5, "test": 2})
    plain, kept = (
        dataset_class("hub")(root=str(tmp_path / "hub"), decoded=where) for where in (None, str(tmp_path / "kept"))
    )
    rows = range(len(plain.reader))
    for row in rows:
        assert np.array_equal(kept.picture(row), plain.picture(row))
    forbid_decoding(monkeypatch)
    for row in rows:
        assert np.array_equal(kept.picture(row), plain.picture(row))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same(workers: int, tmp_path: Path) -> None:
    root, options = folder_of_pictures(tmp_path / "birds"), {"augmentation": "random-crop-colour", "batch_size": 2}
    wanted = list(module(root, None, **options).train_dataloader())
    for _ in range(2):
        found = list(module(root, tmp_path / "kept", num_workers=workers, **options).train_dataloader())
        assert all(torch.equal(a["image"], b["image"]) for a, b in zip(found, wanted, strict=True))
    assert len(files(tmp_path / "kept")) == 4


def test_a_changed_picture_is_decoded_again_in_the_same_place(tmp_path: Path) -> None:
    root = folder_of_pictures(tmp_path / "birds")
    data, picture = module(root, tmp_path / "kept"), root / "class0" / "0.jpg"
    data.picture(0)
    before = files(tmp_path / "kept")
    save_picture(picture, 5)
    assert np.array_equal(data.picture(0), read_image(picture)) and files(tmp_path / "kept") == before
    content, status = picture.read_bytes(), picture.stat()
    picture.write_bytes(content[:100] + bytes(len(content) - 100))  # as long, corrupt, a moment later
    os.utime(picture, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(FgvczooError, match="not an image"):
        data.picture(0)
    picture.unlink()
    with pytest.raises(FgvczooError, match=r"0\.jpg: cannot be read"):
        data.picture(0)


def test_a_link_to_a_picture_shares_its_pixels(tmp_path: Path) -> None:
    root = folder_of_pictures(tmp_path / "birds")
    (tmp_path / "link").symlink_to(root)
    for place in (root, tmp_path / "link"):
        module(place, tmp_path / "kept").picture(0)
    assert len(files(tmp_path / "kept")) == 1


def test_a_corrupt_picture_stays_corrupt(tmp_path: Path) -> None:
    root = folder_of_pictures(tmp_path / "birds")
    (root / "class0" / "0.jpg").write_bytes(b"\xff\xd8\xff")
    data = module(root, tmp_path / "kept", on_corrupt="skip")
    for _ in range(2):
        with pytest.warns(FgvczooWarning, match="1 unreadable picture was skipped"):
            assert len(images(data)) == 3
    assert len(files(tmp_path / "kept")) == 3


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: b"",
        lambda content: content[:20],
        lambda content: content[:-1],
        lambda content: content + b"0",
        lambda content: bytes(24) + content[24:],
        lambda content: content[:24] + struct.pack("<II", 0, 0),
        lambda content: content[:24] + struct.pack("<II", 2**32 - 1, 2**32 - 1) + content[32:],
        lambda content: content[:24] + struct.pack("<II", 3, 5) + content[32:],
        lambda content: b"\x80\x04cos\nsystem\n(X\x04\x00\x00\x00exit\x85R." * 99,
    ],
)
def test_a_damaged_file_is_decoded_again_and_mended(spoil: Any, tmp_path: Path) -> None:
    data = module(folder_of_pictures(tmp_path / "birds"), tmp_path / "kept")
    wanted = data.picture(0)
    (file,) = files(tmp_path / "kept")
    whole = file.read_bytes()
    file.write_bytes(spoil(whole))
    assert np.array_equal(data.picture(0), wanted) and file.read_bytes() == whole


def test_other_decoders_do_not_share_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = module(folder_of_pictures(tmp_path / "birds"), tmp_path / "kept")
    data.picture(0)
    before = files(tmp_path / "kept")[0].read_bytes()
    monkeypatch.setattr(decoded, "_DECODER", "a later one")
    data.picture(0)
    (file,) = files(tmp_path / "kept")
    assert file.read_bytes() != before


def fill_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(".")._replace(free=2**30 - 1)
    monkeypatch.setattr(decoded.shutil, "disk_usage", lambda _: usage)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_disk_that_is_full_at_the_start_is_one_warning(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    root = folder_of_pictures(tmp_path / "birds")
    wanted = images(module(root, None))
    fill_disk(monkeypatch)
    with pytest.warns(FgvczooWarning, match=r"kept: cannot be written \(No space.*decoded every time"):
        data = module(root, tmp_path / "kept", num_workers=workers, eval_batch_size=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(images(data), wanted)
    assert not files(tmp_path / "kept") and "cannot be written" not in capfd.readouterr().err


def test_a_disk_that_fills_up_stops_writing_in_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folder_of_pictures(tmp_path / "birds")
    data = module(root, tmp_path / "kept", num_workers=1)
    data.picture(0)
    fill_disk(monkeypatch)
    assert torch.equal(images(data), images(module(root, None)))  # the worker warns
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.picture(1)
    assert len(files(tmp_path / "kept")) == 1


def test_a_write_that_breaks_off_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = module(folder_of_pictures(tmp_path / "birds"), tmp_path / "kept")

    def full(path: Path, content: bytes) -> None:
        with path.open("wb") as opened:
            opened.write(content[:50])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.warns(FgvczooWarning, match="decoded every time"):
        data.picture(0)
    assert not files(tmp_path / "kept")


def test_a_folder_that_cannot_be_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for where in (tmp_path / "file", tmp_path / "file" / "kept"):
        with pytest.raises(FgvczooError, match=r"decoded=.*cannot be made \(.*\); give a folder"):
            module(folder_of_pictures(tmp_path / "birds"), where)
