import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from numpy.lib.recfunctions import repack_fields
from PIL import Image

from fgvczoo.data import cars
from fgvczoo.data.cars import Cars, CarsDataModule
from fgvczoo.data.check import check_official
from fgvczoo.errors import FgvczooError
from tests.data.cars.make import CLASSES, LAYOUTS, make_cars


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A copy that tests only read, and what is in it."""
    root = tmp_path_factory.mktemp("cars")
    return root, make_cars(root)


@pytest.fixture
def copy(shared, tmp_path) -> Path:
    """A copy that a test may damage."""
    shutil.copytree(shared[0], tmp_path / "cars")
    return tmp_path / "cars"


def module(root, **options) -> CarsDataModule:
    return CarsDataModule(str(root), **{"preprocess": {"size": [32, 32]}, "eval_batch_size": 5} | options)


def refused(root, match, **options) -> None:
    with pytest.raises(FgvczooError, match=match) as error:
        module(root, **options)
    assert "\n" not in str(error.value)


def change(file: Path, **columns) -> None:
    """Rewrites fields of all annotations; None removes one."""
    table = scipy.io.loadmat(file)["annotations"]
    kept = [name for name in table.dtype.names if columns.get(name, ...) is not None]
    table = repack_fields(table[kept])
    for name, values in columns.items():
        if values is not None:
            for place in range(table.size):
                table[name][0, place] = values(place, table[name][0, place]) if callable(values) else values
    scipy.io.savemat(file, {"annotations": table})


# --- what is read


@pytest.mark.parametrize("labels_at", ["beside", "inside"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("folder", ["", "stanford_cars"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_found_and_means_the_same(tmp_path, layout, folder, nested, labels_at):
    made = make_cars(tmp_path / folder, layout, train=2, test=1, nested=nested, labels_at=labels_at, compressed=nested)
    data = module(tmp_path, keys=["bbox"])
    assert (data.dataset_name, data.num_classes, data.licence_allows_pictures) == ("cars", 4, False)
    assert data.class_names == list(CLASSES)  # not in the order of the alphabet, nor of folders
    assert data.reader.image_ids.tolist() == [car.image_id for car in made]
    assert data.reader.labels.tolist() == [car.label for car in made]
    assert {name: len(rows) for name, rows in data.splits.items()} == {
        "train": 8, "test": 4, "train_plain": 8, "projection": 8,
    }  # fmt: skip
    for split in ("train_plain", "test"):
        for batch in data.loader(split):
            for row, image, box in zip(batch["index"].tolist(), batch["image"], batch["bbox"]):
                car = made[row]
                assert car.is_train == (split == "train_plain") and data.row(row)["bbox"] == list(car.box)
                # The box is where the picture is bright: file, size and box are those of one car.
                rows, columns = np.nonzero(data.preprocess.invert(image)[..., 0] > 125)
                found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                assert np.abs(np.array(found) - box.numpy()).max() < 1.5
                height, width = car.size
                assert np.allclose(box, np.array(car.box) * ([32 / width, 32 / height] * 2), atol=1e-4)


def test_cropped_pictures_are_the_boxes(shared):
    root, made = shared
    data = module(root, cropped=True, keys=["bbox"])
    assert data.row(3)["crop"] == made[3].box
    for batch in data.loader("test"):
        assert (data.preprocess.invert(batch["image"][0])[2:-2, 2:-2, 0] > 125).all()
        assert np.allclose(batch["bbox"], [0, 0, 32, 32], atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_metric_learning_splits_by_class_and_pools_both_parts(tmp_path, layout):
    made = make_cars(tmp_path, layout)
    data = module(tmp_path, protocol="metric-learning")
    assert data.num_classes == 2 and data.class_names == list(CLASSES[:2])
    assert data.splits["train"].tolist() == [row for row, car in enumerate(made) if car.label < 2]
    for name in ("test", "query", "gallery"):
        assert data.splits[name].tolist() == [row for row, car in enumerate(made) if car.label >= 2]
    row = data.row(int(data.splits["test"][0]))
    assert row["label"] in (2, 3) and row["class_name"] == CLASSES[row["label"]] and row["split"] == "test"


def test_whole_classes_can_be_held_out_for_validation(shared):
    data = module(shared[0], protocol="metric-learning", val_classes=0.2)  # at least one of two
    labels = data.reader.labels
    assert data.num_classes == 1 and data.class_names == list(CLASSES[:1])
    for name, expected in (("train", {0}), ("projection", {0}), ("val", {1}), ("test", {2, 3}), ("query", {2, 3})):
        assert set(labels[data.splits[name]]) == expected
    assert len(data.splits["train"]) + len(data.splits["val"]) == 14
    assert [label for batch in data.val_dataloader() for label in batch["label"].tolist()] == [1] * 7
    refused(shared[0], "val_classes=0.2: cars is tested on the classes that it is trained on", val_classes=0.2)
    refused(shared[0], "give one", protocol="metric-learning", val_classes=0.2, val_fraction=0.2)
    refused(shared[0], "leaves none of 2 classes", protocol="metric-learning", val_classes=0.9)
    refused(shared[0], "val_classes=1; expected", val_classes=1)


def test_the_real_set_must_have_its_counts(copy, monkeypatch):
    names = ["AM General Hummer SUV 2000", *(f"Car {number}" for number in range(195))]
    scipy.io.savemat(copy / "devkit/cars_meta.mat", {"class_names": np.array(names, object)})
    refused(copy, "16 images for training and 12 for testing; expected 8,144 and 8,041")
    monkeypatch.setattr(cars, "_TRAIN", 16)
    monkeypatch.setattr(cars, "_TEST", 12)
    assert module(copy).num_classes == 196


# --- mistakes


def test_a_missing_or_wrong_root_says_what_was_looked_for(tmp_path):
    for root in (tmp_path / "nowhere", tmp_path):
        refused(root, r"expected cars_train/, .*docs/data/cars\.md")
    with pytest.raises(FgvczooError, match="root is not given"):
        CarsDataModule()
    (tmp_path / "cars_train.tgz").write_bytes(b"")
    refused(tmp_path, r"cars_train\.tgz is not unpacked; run: tar -xzf")


def test_the_plain_devkit_has_no_test_labels(tmp_path):
    make_cars(tmp_path, labels_at=None)
    refused(tmp_path, r"cars_test_annos_withlabels\.mat is missing, .* no labels; put it there or in devkit")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_missing_files_are_named(tmp_path, layout):
    made = make_cars(tmp_path, layout)
    (tmp_path / made[5].image_id).unlink()
    refused(tmp_path, f"1 of .* listed images are missing, such as '{made[5].image_id}'")


@pytest.mark.parametrize(
    "layout, name",
    [("two-folders", "devkit/cars_meta.mat"), ("class-folders", "names.csv"), ("class-folders", "anno_test.csv")],
)
def test_missing_annotations_are_named(tmp_path, layout, name):
    make_cars(tmp_path, layout)
    (tmp_path / name).unlink()
    refused(tmp_path, f"{name} is missing")


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"class": None}, "annotations without class, only 'bbox_x1'"),
        ({"fname": None}, "annotations without fname"),
        ({"class": 0}, "'cars_train/.*' has class 0; expected 1..4"),
        ({"class": 5}, "has class 5; expected 1..4"),
        ({"class": 1.5}, r"has class 1\.5; expected 1..4"),
        ({"class": "one"}, "class is not one number in every annotation"),
        ({"class": np.array([1, 2])}, "class is not one number"),
        ({"fname": 7}, "fname is not one text"),
        ({"fname": "00001.jpg"}, "'cars_train/00001.jpg' occurs twice"),
        ({"fname": lambda place, name: f"../{name[0]}"}, "outside the images folder"),
        ({"fname": lambda place, name: f"a\nb{place}.jpg"}, r"16 of 16 listed images are missing.*a\\nb0"),
        ({"bbox_x2": 1}, "the box of .* has no area"),
        ({"bbox_y1": np.nan}, "the box of .* has no area"),
    ],
)
def test_annotations_that_do_not_fit(copy, columns, message):
    change(copy / "devkit/cars_train_annos.mat", **columns)
    refused(copy, message)


def test_a_split_flag_that_is_none(tmp_path):
    make_cars(tmp_path, "one-folder")
    names = {"class_names": np.array(CLASSES, object)}
    change(tmp_path / "cars_annos.mat", test=2)
    scipy.io.savemat(tmp_path / "cars_meta.mat", names)
    refused(tmp_path, "test is 2 for 'car_ims/.*'; expected 0 or 1")
    change(tmp_path / "cars_annos.mat", test=1)
    refused(tmp_path, "no training image")


class Trap:
    """Unpickled, it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_what_is_no_mat_file_is_one_line_and_nothing_runs(copy, tmp_path):
    file, trap = copy / "devkit/cars_train_annos.mat", tmp_path / "executed"
    whole = file.read_bytes()
    scipy.io.savemat(tmp_path / "other.mat", {"annotations": np.eye(3)})
    header = b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM"
    contents = [b"", b"nothing", pickle.dumps(Trap(trap)), header + bytes(64), (tmp_path / "other.mat").read_bytes()]
    for content in [*contents, *(whole[:length] for length in range(0, len(whole) - 8, 500))]:
        file.write_bytes(content)
        refused(copy, r"cars_train_annos\.mat: .*get it again")
    assert not trap.exists()


@pytest.mark.parametrize("seed", range(50))
def test_a_damaged_mat_file_is_one_line(copy, seed):
    file = copy / "devkit/cars_train_annos.mat"
    content = bytearray(file.read_bytes())
    generator = np.random.default_rng(seed)
    for place in generator.integers(128, len(content), 8):
        content[place] = generator.integers(256)
    file.write_bytes(content)
    try:
        module(copy)
    except FgvczooError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    "name, content",
    [
        ("anno_train.csv", "00001.jpg,1,2,3\n"),
        ("anno_train.csv", "00001.jpg,1,2,3,4,car\n"),
        ("anno_train.csv", ""),
        ("anno_test.csv", "00001.jpg,1,2,30,40,9\n"),
        ("names.csv", "One\x07\n"),
        ("names.csv", ""),
    ],
)
def test_tables_with_something_else_are_named(tmp_path, name, content):
    make_cars(tmp_path, "class-folders")
    (tmp_path / name).write_text(content)
    refused(tmp_path, r"\.csv: ")


def test_protocols_are_checked(shared):
    refused(shared[0], "protocol='halves'; expected 'standard' or 'metric-learning'", protocol="halves")


# --- looking at a set


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_check_passes_a_whole_copy_and_names_what_is_wrong(tmp_path, layout):
    made = make_cars(tmp_path, layout)
    report = check_official(Cars, tmp_path, progress=False)
    text = "\n".join(report.lines())
    assert report.ok and "28 images of 4 classes (16 train, 12 test)" in text and "1 pictures are grey" in text
    path = tmp_path / made[3].image_id
    path.write_bytes(path.read_bytes()[:200])
    Image.new("RGB", (8, 8)).save(tmp_path / made[6].image_id)
    report = check_official(Cars, tmp_path, progress=False)
    text = "\n".join(report.lines())
    assert not report.ok and str(path) in text and f"beyond their border, such as {made[6].image_id}" in text
    assert not check_official(Cars, tmp_path / "nowhere", progress=False).ok
