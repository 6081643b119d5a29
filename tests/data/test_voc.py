"""VOC 2012 through the public data module."""

from __future__ import annotations

from pathlib import Path

import pytest

from fgvczoo.data.check import check_official
from fgvczoo.data.voc import CLASSES, VOC, VOCDataModule
from fgvczoo.errors import FgvczooError
from tests.data.voc.make import OBJECTS, make_voc


def test_classes_boxes_and_masks(tmp_path: Path) -> None:
    make_voc(tmp_path)
    keys = ["labels", "boxes", "mask"]
    data = VOCDataModule(str(tmp_path), keys=keys, preprocess={"size": [30, 40]})
    assert data.num_classes == 20 and {name: len(rows) for name, rows in data.splits.items()} == {
        "train": 2, "test": 1, "train_plain": 2, "projection": 2,
    }  # fmt: skip
    batch = next(iter(data.loader("train_plain")))
    first, second = batch["labels"].tolist()
    assert [CLASSES[c] for c in range(20) if first[c]] == ["aeroplane", "person"] and sum(second) == 1
    assert batch["label"].tolist() == [0, 19]
    assert batch["boxes"][0].tolist() == [[0, 0, 20, 20], [4, 5, 9.5, 12]]
    assert batch["mask"].shape == (2, 30, 40) and set(batch["mask"][0].unique().tolist()) == {0, 1, 255}
    row = data.row(int(data.splits["test"][0]))
    assert row["image_id"] == "2007_000033" and row["class_numbers"] == [CLASSES.index("dog")]
    assert row["boxes"] == [[x0 - 1, y0 - 1, x1, y1] for _, (x0, y0, x1, y1) in OBJECTS["2007_000033"]]


def test_the_augmented_list(tmp_path: Path) -> None:
    base = make_voc(tmp_path)
    data = VOCDataModule(str(base), augmented=True, test="train", keys=["mask"], preprocess={"size": [30, 40]})
    assert len(data.splits["train"]) == 3 and len(data.splits["test"]) == 2
    assert sum(len(batch["mask"]) for batch in data.loader("train_plain")) == 3


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(FgvczooError, match="no JPEGImages"):
        VOCDataModule(str(tmp_path))
    with pytest.raises(FgvczooError, match="expected 'val' or 'train'"):
        VOCDataModule(str(tmp_path), test="seeds")
    base = make_voc(tmp_path)
    note = base / "Annotations/2007_000039.xml"
    note.write_text(note.read_text().replace("tvmonitor", "television"))
    with pytest.raises(FgvczooError, match=r"2007_000039\.xml: .*20 classes"):
        VOCDataModule(str(tmp_path))
    (base / "JPEGImages/2007_000033.jpg").unlink()
    with pytest.raises(FgvczooError, match="1 of 3 listed images are missing"):
        VOCDataModule(str(tmp_path))
    (base / "ImageSets/Segmentation/train_aug.txt").unlink()
    with pytest.raises(FgvczooError, match=r"train_aug\.txt is missing"):
        VOCDataModule(str(tmp_path), augmented=True)


def test_check_reads_all_of_it(tmp_path: Path) -> None:
    base = make_voc(tmp_path)
    assert check_official(VOC, tmp_path, progress=False).ok
    (base / "SegmentationClass/2007_000033.png").write_bytes(b"no picture")
    report = check_official(VOC, tmp_path, progress=False)
    assert not report.ok and any("2007_000033" in line for line in report.lines())
