"""NABirds through the public data module."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fgvczoo.data.nabirds import NABirdsDataModule
from fgvczoo.errors import FgvczooError
from tests.data.nabirds.make import CLASSES, NODES, PARTS, make_nabirds


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    make_nabirds(tmp_path)
    return tmp_path


def test_labels_splits_and_annotations_are_joined_by_id(tmp_path: Path) -> None:
    birds = make_nabirds(tmp_path)
    data = NABirdsDataModule(str(tmp_path / "nabirds"), keys=["bbox", "parts", "label_levels"])
    assert data.class_names == [NODES[node][0] for node in CLASSES] and data.num_classes == 4
    assert data.reader.class_numbers.tolist() == list(CLASSES)  # as numbers, not as texts
    assert data.reader.part_names == list(PARTS)
    assert data.splits["train"].tolist() == [row for row, bird in enumerate(birds) if bird.is_train]
    assert data.splits["test"].tolist() == [row for row, bird in enumerate(birds) if not bird.is_train]
    for index, bird in enumerate(birds):
        row, notes = data.row(index), data.reader.annotations(index, ["bbox", "parts"])
        x, y, w, h = bird.box
        assert row["image_id"] == bird.image_id and data.find(bird.image_id) == index
        assert row["photographer"] == bird.photographer and CLASSES[row["label"]] == bird.node
        assert row["bbox"] == notes["bbox"].tolist() == [x, y, x + w, y + h]
        assert np.array_equal(notes["parts"], bird.parts)


def test_the_tree_is_the_levels(copy: Path) -> None:
    data = NABirdsDataModule(str(copy), keys=["label_levels"])
    names = data.reader.level_names
    of_class = {
        row["class_name"]: [level[place] for level, place in zip(names, data.sample(row["index"])["label_levels"])]
        for row in map(data.row, range(len(data.reader)))
    }
    ducks, hawks = "Ducks, Geese, and Swans", "Hawks"
    assert of_class["Mallard (Breeding male)"] == [ducks, "Mallard", "Mallard (Breeding male)"]
    # A hawk lies directly below its group: it stands for itself below.
    assert of_class["Red-tailed Hawk (Adult)"] == [hawks, *2 * ["Red-tailed Hawk (Adult)"]]
    assert len(names) == 3 and names[0] == [ducks, hawks]


def test_mirrored_pictures_exchange_left_and_right(copy: Path) -> None:
    assert NABirdsDataModule(str(copy)).transform.flip_pairs == ((3, 4), (9, 10))


def test_boxes_are_the_pictures_where_they_are_cropped(copy: Path) -> None:
    data = NABirdsDataModule(str(copy), cropped=True)
    x0, y0, x1, y1 = data.row(0)["bbox"]
    assert data.row(0)["crop"] == (x0, y0, x1, y1)


def test_photographers_need_not_be_there(copy: Path) -> None:
    (copy / "nabirds/photographers.txt").unlink()
    assert "photographer" not in NABirdsDataModule(str(copy)).row(0)


def test_counts_of_the_real_set_are_asserted(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fgvczoo.data.nabirds._CLASSES", 4)
    with pytest.raises(FgvczooError, match=r"12 train.*expected 23,929 train, 24,633 test"):
        NABirdsDataModule(str(copy))


@pytest.mark.parametrize(
    "file, change, message",
    [
        ("image_class_labels.txt", lambda text: text.replace(" 817", " 818"), "class 818 is not in classes.txt"),
        ("image_class_labels.txt", lambda text: text.replace(" 817", " x"), "'x' is not 1 numbers"),
        ("image_class_labels.txt", lambda text: text.partition("\n")[2], "no line for 1 images"),
        ("image_class_labels.txt", lambda text: text + text.partition("\n")[0], "two lines for"),
        ("train_test_split.txt", lambda text: text.replace(" 1\n", " 2\n"), "has 2; expected 0 or 1"),
        ("images.txt", lambda text: text + text.partition("\n")[0], "occurs twice"),
        ("images.txt", lambda text: text.replace("0817/", "../0817/"), "outside the images folder"),
        ("images.txt", lambda text: text.replace("0817/", "0816/"), "listed images are missing"),
        ("hierarchy.txt", lambda text: text + "0 5\n", "no tree"),
        ("bounding_boxes.txt", lambda text: text.replace(" 2", " -2"), "has no area|is missing"),
        ("parts/part_locs.txt", lambda text: text.partition("\n")[2], "no line for 1 images, such as '.* part"),
    ],
)
def test_mistakes_are_one_line(copy: Path, file: str, change, message: str) -> None:
    path = copy / "nabirds" / file
    path.write_text(change(path.read_text()))
    with pytest.raises(FgvczooError, match=message) as error:
        NABirdsDataModule(str(copy), keys=["bbox", "parts", "label_levels"])
    assert "\n" not in str(error.value)
