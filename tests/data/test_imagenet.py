"""ImageNet's localisation task through the public data module, in both layouts."""

from __future__ import annotations

from pathlib import Path

import pytest

from fgvczoo.data.check import check_official
from fgvczoo.data.imagenet import ImageNet, ImageNetDataModule
from fgvczoo.errors import FgvczooError
from tests.data.imagenet.make import WORDNET, make_imagenet


@pytest.mark.parametrize("layout", ["kaggle", "folders"])
def test_rows_labels_and_boxes(tmp_path: Path, layout: str) -> None:
    truth = make_imagenet(tmp_path, layout=layout)
    data = ImageNetDataModule(str(tmp_path), keys=["boxes"], preprocess={"size": [20, 20]}, eval_batch_size=4)
    assert data.num_classes == 3 and len(data.splits["train"]) == 12 and len(data.splits["test"]) == 6
    assert len(set(data.class_names)) == 3
    seen = 0
    for batch in data.loader("test"):
        for row, label, boxes in zip(batch["index"].tolist(), batch["label"].tolist(), batch["boxes"]):
            known = data.row(row)
            wnid, expected = truth[Path(known["image_id"]).stem]
            assert list(WORDNET)[label] == wnid and known["boxes"] == expected
            assert len(boxes) == len(expected) and (boxes[0] <= 20).all()
            seen += 1
    assert seen == 6
    assert "boxes" not in data.row(0)
    assert [len(boxes) for boxes in next(iter(data.loader("train", augment=True, shard="train")))["boxes"]] == [0] * 12


def test_names_tell_equal_ones_apart(tmp_path: Path) -> None:
    make_imagenet(tmp_path)
    names = ImageNetDataModule(str(tmp_path)).class_names
    assert names == ["n01440764 tench", "n02012849 crane", "n03126707 crane"]


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(FgvczooError, match="root is not given"):
        ImageNetDataModule()
    with pytest.raises(FgvczooError, match="no train in it"):
        ImageNetDataModule(str(tmp_path))
    make_imagenet(tmp_path)
    solution = tmp_path / "LOC_val_solution.csv"
    text = solution.read_text()
    solution.write_text(text.replace("n01440764 4", "n01440764 x"))
    with pytest.raises(FgvczooError, match="four corners"):
        ImageNetDataModule(str(tmp_path))
    solution.write_text(text.replace("n01440764", "n99999999"))
    with pytest.raises(FgvczooError, match="which train/ does not have"):
        ImageNetDataModule(str(tmp_path))
    solution.unlink()
    with pytest.raises(FgvczooError, match="its class is not known"):
        ImageNetDataModule(str(tmp_path))


def test_boxes_that_are_not_there(tmp_path: Path) -> None:
    make_imagenet(tmp_path, layout="folders")
    for file in (tmp_path / "bbox_val").iterdir():
        file.unlink()
    assert "boxes" not in ImageNetDataModule(str(tmp_path)).row(12)
    (tmp_path / "bbox_val").rmdir()
    with pytest.raises(FgvczooError, match="no boxes of validation images"):
        ImageNetDataModule(str(tmp_path), keys=["boxes"])


def test_check_reads_all_of_it(tmp_path: Path) -> None:
    make_imagenet(tmp_path)
    assert check_official(ImageNet, tmp_path, progress=False).ok
    (tmp_path / "ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_00000001.JPEG").write_bytes(b"no picture")
    report = check_official(ImageNet, tmp_path, progress=False)
    assert not report.ok and any("val_00000001" in line for line in report.lines())
