import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fgvczoo.data import sop
from fgvczoo.data.check import check_official
from fgvczoo.data.sop import SOP, SOPDataModule
from fgvczoo.errors import FgvczooError
from tests.data.sop.make import SUPER_CLASSES, make_sop


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A copy that tests only read, and what is in it."""
    root = tmp_path_factory.mktemp("sop")
    return root, make_sop(root)


@pytest.fixture
def copy(shared, tmp_path) -> Path:
    """A copy that a test may damage."""
    shutil.copytree(shared[0], tmp_path / "sop")
    return tmp_path / "sop"


def module(root, **options) -> SOPDataModule:
    return SOPDataModule(str(root), **{"preprocess": {"size": [16, 16]}, "eval_batch_size": 5} | options)


def refused(root, match, **options) -> None:
    with pytest.raises(FgvczooError, match=match) as error:
        module(root, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("inner", ["", "Stanford_Online_Products"])
def test_classes_are_split_and_labels_count_on(shared, inner):
    root, made = shared
    data = module(root / inner, keys=["label_levels"])
    assert (data.dataset_name, data.num_classes, data.licence_allows_pictures) == ("sop", 5, False)
    assert data.class_names[:2] == ["bicycle_00001", "coffee_maker_00002"]
    assert len(data.reader.all_class_names) == 9 and data.reader.super_class_names == list(SUPER_CLASSES)
    assert data.reader.image_ids.tolist() == [path for path, *_ in made]
    training = [row for row, (_, label, _) in enumerate(made) if label < 5]
    testing = [row for row, (_, label, _) in enumerate(made) if label >= 5]
    for name in ("train", "train_plain", "projection"):
        assert data.splits[name].tolist() == training
    for name in ("test", "query", "gallery"):
        assert data.splits[name].tolist() == testing
    for split in ("train_plain", "test"):
        for batch in data.loader(split):
            for place, row in enumerate(batch["index"].tolist()):
                path, label, group = made[row]
                assert batch["label"][place] == label and batch["label_levels"][place].tolist() == [group]
                view = int(path[-5])
                if (label, view) != (1, 1):  # the grey one
                    colour = data.preprocess.invert(batch["image"][place]).mean(axis=(0, 1))
                    assert np.abs(colour - [20 * label + 20, 40 * view, 60 * group]).max() < 5
    row = data.row(testing[-1])
    assert row["class_name"] == "sofa_00009" and row["label"] == 8 and row["split"] == "test"


def test_small_classes_give_what_they_have(shared):
    data = module(shared[0], images_per_class=4, batch_size=12, batches_per_epoch=6)
    sizes = np.minimum(np.bincount(data.reader.labels[data.splits["train"]]), 4)
    for batch in data.train_dataloader():
        labels, counts = batch["label"].unique_consecutive(return_counts=True)
        assert counts.sum() == 12 and counts[:-1].tolist() == sizes[labels[:-1]].tolist()


def test_the_real_set_must_have_its_counts(shared, monkeypatch):
    monkeypatch.setattr(sop, "_CLASSES", (5, 4))
    refused(shared[0], "16 images for training and 14 for testing; expected 59,551 and 60,502")


# --- mistakes


def test_a_missing_or_wrong_root_says_what_was_looked_for(tmp_path):
    for root in (tmp_path / "nowhere", tmp_path):
        refused(root, r"get Stanford_Online_Products\.zip")
    with pytest.raises(FgvczooError, match="root is not given"):
        SOPDataModule()
    (tmp_path / "Stanford_Online_Products.zip").write_bytes(b"")
    refused(tmp_path, "is not unpacked; run: unzip")


@pytest.mark.parametrize(
    "name, old, new, message",
    [
        ("train", "image_id class_id", "class_id image_id", "line 1 is 'class_id image_id"),
        ("train", "\n3 2 2 ", "\n3 2 x ", "line 4 is '3 2 x"),
        ("train", "\n3 2 2 ", "\n3 2 9999999999 ", "line 4 is "),
        ("train", "\n3 2 2 coffee_maker_final/111085122871_0.JPG", "\n3 2", "line 4 is '3 2'"),
        ("train", "\n3 2 2 ", "\n3 7 2 ", r"Ebay_train\.txt: its classes are not 1\.\.6"),
        ("train", "\n3 2 2 ", "\n3 0 2 ", r"Ebay_train\.txt: its classes are not"),
        ("test", " 9 3 ", " 10 3 ", r"Ebay_test\.txt: its classes are not 6\.\.9"),
        ("test", " 9 3 ", " 5 3 ", r"Ebay_test\.txt: its classes are not 6\.\.9"),
        ("train", "\n3 2 2 ", "\n3 2 1 ", "class 2 is in two super classes"),
        ("test", " 9 3 ", " 9 5 ", r"super_class_id is not 1\.\.4"),
        (
            "train",
            "coffee_maker_final/111085122871_0",
            "coffee_maker_final/gone",
            "1 of 30 .*_final/gone.JPG",
        ),
        ("train", "coffee_maker_final/111085122871_0", "../secret", "outside the images folder"),
        ("train", "coffee_maker_final/111085122871_0", "bicycle_final/111085122871_0", "_0.JPG' occurs twice"),
    ],
)
def test_lists_that_do_not_fit(copy, name, old, new, message):
    file = copy / f"Stanford_Online_Products/Ebay_{name}.txt"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    refused(copy, message)


@pytest.mark.parametrize("content", ["", "image_id class_id super_class_id path\n", None])
def test_empty_and_missing_lists(copy, content):
    file = copy / "Stanford_Online_Products/Ebay_test.txt"
    file.unlink() if content is None else file.write_text(content)
    refused(copy, r"Ebay_test\.txt")


# --- looking at a set


def test_the_check_passes_a_whole_copy_and_names_what_is_wrong(shared, copy):
    report = check_official(SOP, copy, progress=False)
    text = "\n".join(report.lines())
    assert report.ok and "30 images of 9 classes (16 train, 14 test" in text and "1 pictures are grey" in text
    path = copy / "Stanford_Online_Products" / shared[1][3][0]
    path.write_bytes(path.read_bytes()[:200])
    Image.new("RGB", (8, 8)).save(copy / "Stanford_Online_Products.zip", "PNG")  # no such archive
    report = check_official(SOP, copy, progress=False)
    text = "\n".join(report.lines())
    assert not report.ok and str(path) in text and "Stanford_Online_Products.zip: MD5" in text
    assert not check_official(SOP, copy / "nowhere", progress=False).ok
