import json
import os
import pickle
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fgvczoo.data.check import check_folder, contact_sheet
from fgvczoo.data.columns import read_table
from fgvczoo.data.folder import FolderDataModule
from fgvczoo.errors import FgvczooError
from tests.conftest import RECIPES
from tests.data.folder.make import BIRDS, make_folders, make_table, picture, write_table
from tests.data.test_cub import order, same

SMALL = {"size": [16, 16]}
KEYS = ["bbox", "parts", "attributes", "label_levels", "metadata", "mask", "size"]


def module(root, **options) -> FolderDataModule:
    return FolderDataModule(str(root), **{"preprocess": SMALL, "batch_size": 4, "eval_batch_size": 3} | options)


def refused(root, message: str, **options) -> None:
    with pytest.raises(FgvczooError, match=message) as error:
        module(root, **options)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A table of every kind beside its pictures, that tests only read, and its rows."""
    root = tmp_path_factory.mktemp("birds")
    rows = make_table(root)
    for name in ("metadata.csv", "other.parquet"):
        write_table(root / name, rows)
    return root, rows


# --- folders


def test_a_folder_for_each_class(tmp_path):
    make_folders(tmp_path / "my birds", {"b owl": 5, "a/deep/er": 4, "a": 1, "-dash": 10, ".hidden": 3})
    (tmp_path / "my birds/a/notes.txt").write_text("no picture")
    (tmp_path / "my birds/a/.thumb.png").write_bytes(b"")
    picture(tmp_path / "my birds/a/UPPER.JPG", 9)
    picture(tmp_path / "my birds/sheet.png", 10)
    data = module(tmp_path / "my birds")
    assert data.class_names == ["-dash", "a", "b owl"] and data.num_classes == 3
    assert (data.dataset_name, data.licence_allows_pictures, data.reader.keys) == ("my-birds", False, ())
    ids = data.reader.image_ids.tolist()
    assert len(ids) == 10 + 6 + 5 and ids[10:16] == [
        "a/000.png",
        "a/UPPER.JPG",
        *(f"a/deep/er/{n:03d}.png" for n in range(4)),
    ]
    assert [data.find(image_id) for image_id in ids] == list(range(21))
    row = data.row(data.find("b owl/003.png"))
    assert row == {
        "index": 19, "image_id": "b owl/003.png", "path": str(tmp_path / "my birds/b owl/003.png"), "label": 2,
        "class_name": "b owl", "split": row["split"], "height": 20, "width": 24, "crop": None,
    }  # fmt: skip
    assert np.array_equal(data.picture(19), np.asarray(Image.open(row["path"])))
    with pytest.raises(FgvczooError, match=r"no image 'b owl/009\.png'"):
        data.find("b owl/009.png")


def test_test_pictures_are_cut_from_every_class_and_are_the_same_for_every_seed(tmp_path):
    make_folders(tmp_path, {"a": 10, "b": 5, "one": 1})
    data, other = module(tmp_path), module(tmp_path, seed=7, val_fraction=0.5)
    labels = data.reader.labels
    assert {name: np.bincount(labels[rows], minlength=3).tolist() for name, rows in data.splits.items()} == {
        "train": [8, 4, 1], "test": [2, 1, 0], "train_plain": [8, 4, 1], "projection": [8, 4, 1],
    }  # fmt: skip
    assert np.array_equal(data.splits["test"], other.splits["test"])
    assert sorted([*other.splits["train"], *other.splits["val"]]) == data.splits["train"].tolist()
    assert {data.row(row)["split"] for row in data.splits["test"]} == {"test"}
    assert {data.row(row)["split"] for row in data.splits["train"]} == {"train"}
    whole = module(tmp_path, test_fraction=0)
    assert len(whole.splits["train"]) == 16
    with pytest.raises(FgvczooError, match=r"has no split 'test', only train, .*; give test_fraction to cut it"):
        whole.loader("test")
    refused(tmp_path, "test_fraction=0.01 leaves no test image; give a larger one", test_fraction=0.01)
    refused(tmp_path, r"test_fraction=1.0; expected a number in \[0, 1\)", test_fraction=1.0)


@pytest.mark.parametrize("val", ["val", "valid", "Validation"])
def test_splits_may_be_folders(tmp_path, val):
    make_folders(tmp_path, {"train/a": 3, "train/b": 2, f"{val}/b": 2, "test/a": 2, "test/b/c": 1, ".git/x": 1})
    data = module(tmp_path)
    assert {name: rows.tolist() for name, rows in data.splits.items()} == {
        "train": [0, 1, 2, 3, 4], "val": [5, 6], "test": [7, 8, 9], "train_plain": [0, 1, 2, 3, 4],
        "projection": [0, 1, 2, 3, 4],
    }  # fmt: skip
    assert data.reader.image_ids[[0, 5, 9]].tolist() == ["train/a/000.png", f"{val}/b/000.png", "test/b/c/000.png"]
    assert data.reader.labels.tolist() == [0, 0, 0, 1, 1, 1, 1, 0, 0, 1]
    assert order(data.val_dataloader()) == [[5, 6]]
    refused(tmp_path, "val_fraction=0.2, but .* has a split val", val_fraction=0.2)


def test_a_train_folder_alone_is_cut(tmp_path):
    make_folders(tmp_path, {"train/a": 5, "train/b": 5})
    assert {name: len(rows) for name, rows in module(tmp_path).splits.items() if name in ("train", "test")} == {
        "train": 8, "test": 2,
    }  # fmt: skip


def test_folders_that_look_like_splits_are_classes_without_train(tmp_path):
    make_folders(tmp_path, {"valid": 5, "invalid": 5})
    assert module(tmp_path).class_names == ["invalid", "valid"]


plain = st.text("abcXYZ019 _-.", min_size=1, max_size=8).filter(lambda name: not name.startswith("."))


@settings(max_examples=25)
@given(st.dictionaries(plain, st.integers(1, 3), min_size=1, max_size=5))
def test_plain_names_are_read_as_torchvision_reads_them(tmp_path_factory, counts):
    from torchvision.datasets import ImageFolder

    root = tmp_path_factory.mktemp("plain")
    make_folders(root, counts)
    data, other = module(root, test_fraction=0), ImageFolder(root)
    assert data.class_names == other.classes
    ours = dict(zip(data.reader.image_ids.tolist(), data.reader.labels.tolist()))
    assert ours == {Path(path).relative_to(root).as_posix(): label for path, label in other.samples}


odd = st.text(
    st.characters(exclude_characters="/", exclude_categories=("Cc", "Cs", "Zl", "Zp")), min_size=1, max_size=20
)


@settings(max_examples=50)
@given(st.sets(odd.filter(lambda name: not name.startswith(".")), min_size=1, max_size=4))
def test_odd_names_are_kept_as_they_are(tmp_path_factory, names):
    names = set({unicodedata.normalize("NFC", name): name for name in names}.values())
    root = tmp_path_factory.mktemp("odd")
    make_folders(root, {f"train/{name}": 1 for name in names})
    data = module(root, test_fraction=0)
    assert data.class_names == sorted(names)
    assert [data.row(data.find(f"train/{name}/000.png"))["class_name"] for name in names] == list(names)
    [batch] = data.loader("train") if len(names) < 4 else [next(iter(data.loader("train")))]
    assert len(batch["image"])


@pytest.mark.parametrize("layout", ["{}", "train/{}"])
def test_names_that_differ_only_in_spelling_are_refused(tmp_path, layout):
    one, other = "caf\u00e9", "cafe\u0301"
    make_folders(tmp_path, {layout.format(name): 2 for name in (one, other)})
    refused(tmp_path, r"'cafe\\u0301' and 'caf\\xe9' are one class name in two spellings; rename one")


def test_a_hundred_thousand_empty_files_would_do(tmp_path):
    """No picture is opened before a batch asks for it."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(10):
            (tmp_path / name / f"{number}.jpg").touch()
    data = module(tmp_path, on_corrupt="skip")
    assert len(data.splits["train"]) == 16
    with pytest.raises(FgvczooError, match=r"a/\d.jpg: not an image"):
        data.row(0)


def test_one_corrupt_picture_is_named_or_skipped(tmp_path):
    make_folders(tmp_path, {"train/a": 3, "train/b": 3, "test/a": 1})
    path = tmp_path / "train/a/001.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(FgvczooError) as error:
        list(module(tmp_path).train_dataloader())
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
    data = module(tmp_path, on_corrupt="skip")
    with pytest.warns(UserWarning, match="1 unreadable"):
        rows = [row for batch in order(data.train_dataloader()) for row in batch]
    assert sorted(rows) == [0, 2, 3, 4, 5] and list(data.skipped) == [str(path)]


def test_links_lead_to_files_inside(tmp_path):
    make_folders(tmp_path / "birds", {"a": 3, "b": 3})
    make_folders(tmp_path / "else", {"c": 3})
    root = tmp_path / "birds"
    link = root / "b/link.png"
    link.symlink_to("../a/000.png")
    assert "b/link.png" in module(root).reader.image_ids.tolist()
    link.unlink()
    (root / "b/notes.txt").symlink_to(tmp_path / "else/c/000.png")  # is not read
    for target, message in (
        (tmp_path / "else/c/000.png", "link.png: a link that leads out of"),
        (root / "gone.png", "link.png: a link that leads nowhere"),
        (root / "a", "link.png: a link to a folder is not followed"),
        (root, "link.png: a link to a folder is not followed"),
    ):
        link.symlink_to(target)
        refused(root, message)
        link.unlink()
    (root / "c").symlink_to(tmp_path / "else/c")
    refused(root, "c: a link to a folder is not followed; move or copy")
    (tmp_path / "linked").symlink_to(tmp_path / "else")  # the root itself may be one
    assert module(tmp_path / "linked").dataset_name == "else"


@pytest.mark.parametrize(
    "folders, message",
    [
        (
            {"train/a": 2, "bus": 2, "car": 1},
            "holds train and also bus, car; move classes into train/, or rename train",
        ),
        ({"test/a": 2, "val/a": 2}, "test, val without train"),
        ({"train/a": 2, "val/a": 1, "valid/a": 1}, "val, valid are two names of one split"),
        ({"train/a": 2, "Train/a": 2}, "Train, train are two names of one split"),
        ({"train/aah": 2, "test/ah": 1}, "test has the class 'ah', which train has not; did you mean aah"),
        ({"train/a": 2, "train/b": 0}, "1 class folders without a picture .*train/b"),
        ({"train/a": 2, "test/a": 0}, "1 class folders without a picture .*test/a"),
        ({"a": 2, "b": 0, "c/d": 0}, r"2 class folders without a picture .*: b, c"),
        ({"train": 2}, "train: 2 pictures lie in no class folder; expected a folder for each class"),
        ({".": 2}, "2 pictures lie in no class folder"),
        ({}, "no class folder; expected a folder for each class, or train/"),
        ({"line\nbreak": 2}, r"the name 'line\\nbreak' cannot be printed; rename it"),
        ({"a": 2, "b\udcff": 2}, r"the name 'b\\udcff' cannot be printed; rename it"),
    ],
)
def test_layouts_that_are_not_clear(tmp_path, folders, message):
    (tmp_path / "root").mkdir()
    for folder in folders:
        (tmp_path / "root" / folder).mkdir(parents=True, exist_ok=True)
    make_folders(tmp_path / "root", folders)
    refused(tmp_path / "root", message)


def test_a_root_that_is_not_there(tmp_path):
    refused(tmp_path / "gone", "gone: no such folder; expected a folder for each class")
    (tmp_path / "birds.zip").write_bytes(b"")
    refused(tmp_path / "birds.zip", "birds.zip: a file; unpack it")
    with pytest.raises(FgvczooError, match="root is not given; expected a folder for each class"):
        FolderDataModule()
    make_folders(tmp_path, {"a": 5})
    refused(tmp_path, "name='my birds'; expected letters", name="my birds")
    assert module(tmp_path, name="birds-2.0").dataset_name == "birds-2.0"
    refused(tmp_path, "crop_to_bbox: .* has no column bbox", crop_to_bbox=True)
    refused(tmp_path, "keys: .* has no 'bbox', only size", keys=["bbox"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_folder_that_may_not_be_read(tmp_path):
    make_folders(tmp_path, {"a": 2})
    (tmp_path / "a").chmod(0)
    refused(tmp_path, "a: cannot be read")
    (tmp_path / "a").chmod(0o700)


def test_folders_need_neither_datasets_nor_pyarrow(tmp_path):
    make_folders(tmp_path, {"a": 5})
    program = (
        "import sys; from fgvczoo.data.folder import FolderDataModule\n"
        f"FolderDataModule({str(tmp_path)!r})\n"
        "sys.exit(str([m for m in ('datasets', 'pyarrow') if m in sys.modules] or ''))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""


# --- tables


@pytest.mark.parametrize("table", [None, "other.parquet"])
def test_a_table_gives_all_annotations(shared, table):
    root, rows = shared
    data = module(root, table=table, keys=KEYS, preprocess={"size": [16, 16], "mean": [0, 0, 0], "std": [1, 1, 1]})
    assert data.class_names == sorted(BIRDS) and data.reader.unread == ["photographer"]
    assert set(data.reader.keys) == set(KEYS) - {"size"}
    expected = [index for index, row in enumerate(rows) if row["split"] == "test"]
    assert data.splits["test"].tolist() == expected
    for split in ("train", "test"):
        for batch in data.loader(split):
            assert set(batch) == {"image", "index", "label", "attribute_certainty", "metadata_valid", *KEYS}
            for place, index in enumerate(batch["index"].tolist()):
                row, whole = rows[index], rows[index]["parts"] is not None
                with Image.open(root / row["path"]) as image:
                    width, height = image.size
                scale = np.array([16 / width, 16 / height])
                corners = np.array([row[f"bbox_{name}"] for name in ("x0", "y0", "x1", "y1")])
                assert data.class_names[int(batch["label"][place])] == row["label"]
                assert np.allclose(batch["bbox"][place], corners * [*scale, *scale], atol=1e-5)
                parts = np.array(row["parts"] if whole else [[0, 0, 0]] * 2)
                assert np.allclose(batch["parts"][place], parts * [*scale, 1], atol=1e-5)
                assert batch["attributes"][place].tolist() == row["attributes"]
                assert batch["attribute_certainty"][place].tolist() == row["attribute_certainty"]
                assert batch["label_levels"][place].tolist() == row["label_levels"]
                assert batch["size"][place].tolist() == [height, width]
                assert set(batch["mask"][place].unique().tolist()) <= {7, 255, index % 4}
                place_, date = batch["metadata"]["place"][place], batch["metadata"]["date"][place]
                month, day = (5, 3) if index % 2 else (12, 24)
                assert place_.tolist() == ([-12.5, index] if whole else [0, 0])
                assert date.tolist() == ([month, index, day] if whole else [0, 0, 0])
                assert batch["metadata"]["habitat"][place].tolist() == ([1, index / 4] if whole else [0, 0])
                assert batch["metadata"]["altitude"][place].tolist() == [index]
                valid = {name: bool(value[place]) for name, value in batch["metadata_valid"].items()}
                assert valid == {"place": whole, "date": whole, "habitat": whole, "altitude": True}
    assert data.row(0)["bbox"] == [rows[0][f"bbox_{name}"] for name in ("x0", "y0", "x1", "y1")]


def test_boxes_cut_the_picture(shared):
    root, _ = shared
    data = module(root, crop_to_bbox=True, keys=["bbox", "mask"])
    for batch in data.loader("train"):
        for place, index in enumerate(batch["index"].tolist()):
            assert data.preprocess.invert(batch["image"][place]).min() >= 90  # it is dark outside of the box
            assert (batch["mask"][place] == index % 4).all()
            assert batch["bbox"][place].tolist() == [0, 0, 16, 16]
    row = data.row(1)
    assert row["crop"] == tuple(int(value) for value in row["bbox"])


def test_many_boxes_a_picture(tmp_path):
    for name in ("a.png", "b.png", "c.png"):
        picture(tmp_path / name, len(name), (32, 32))
    boxes = [[[0, 0, 16, 8], [4.0, 4.0, 8.0, 12.0]], [], None]
    rows = [{"file_name": f"./{name}.png", "label": 0, "boxes": own} for name, own in zip("abc", boxes)]
    for name in ("metadata.csv", "x.parquet"):
        data = module(tmp_path, table=write_table(tmp_path / name, rows), keys=["boxes"], test_fraction=0)
        [batch] = data.loader("train")
        assert [own.tolist() for own in batch["boxes"]] == [[[0, 0, 8, 4], [2, 2, 4, 6]], [], []]
        assert all(own.shape[1] == 4 for own in batch["boxes"]) and data.reader.image_ids[0] == "a.png"


def test_annotations_are_those_of_the_picture_as_it_is_seen(tmp_path):
    """A camera held upright writes a lying picture and a note."""
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, :10] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn to the right: the bright left end becomes the top
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    write_table(tmp_path / "metadata.csv", [{"path": "a.png", "label": "x", "bbox": [0, 0, 20, 10]}])
    data = module(tmp_path, crop_to_bbox=True, test_fraction=0)
    row = data.row(0)
    assert (row["height"], row["width"], row["crop"]) == (40, 20, (0, 0, 20, 10))
    assert data.preprocess.invert(data.sample(0)["image"]).min() == 255


def test_masks_hold_class_numbers(tmp_path):
    picture(tmp_path / "a.png", 0, (8, 8))
    mask = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    mask.putpalette(bytes(255 - i // 3 for i in range(768)))  # other colours than numbers
    write_table(tmp_path / "metadata.csv", [{"path": "a.png", "label": "x", "mask": "m.png"}])
    options = {"keys": ["mask"], "test_fraction": 0, "preprocess": {"size": [8, 8]}}
    refused(tmp_path, "1 of 1 files of .*metadata.csv are missing: m.png", **options)
    module(tmp_path, test_fraction=0)  # nobody asked for it
    mask.save(tmp_path / "m.png")
    assert module(tmp_path, **options).sample(0)["mask"].tolist() == np.arange(64).reshape(8, 8).tolist()
    for other, message in (
        (mask.convert("RGB"), "m.png: pixels of mode RGB"),
        (mask.resize((4, 8)), r"a.png: .*\(8, 4\)"),
    ):
        other.save(tmp_path / "m.png")
        with pytest.raises(FgvczooError, match=message):
            module(tmp_path, **options).sample(0)


point = st.tuples(st.floats(0, 9), st.floats(0, 9), st.integers(0, 1)).map(list)
low, high = st.integers(0, 9), st.integers(10, 19)
cells = st.fixed_dictionaries(
    {
        "bbox": st.tuples(low, low, high, high).map(list),
        "parts": st.none() | st.lists(point, min_size=2, max_size=2),
        "attributes": st.lists(st.floats(-1e6, 1e6), min_size=3, max_size=3),
        "label_levels": st.lists(low, min_size=1, max_size=1),
        "latitude": st.none() | st.floats(-90, 90),
        "longitude": st.none() | st.floats(-180, 180),
        "date": st.none() | st.dates().map(str),
        "metadata.depth": st.none() | st.integers(-9, 9),
        "split": st.sampled_from(["train", "Validation", "test"]),
    }
)
names = st.text(min_size=1, max_size=4).filter(lambda name: name.isprintable() and name not in ("nan", "NaN"))
labels = st.just(0) | names.filter(lambda name: not name.removeprefix("-").isdecimal())


@settings(max_examples=40)
@given(st.lists(cells, min_size=1, max_size=6), st.lists(labels, min_size=6, max_size=6))
def test_csv_and_parquet_tables_are_the_same(tmp_path_factory, rows, names):
    names = [str(name) for name in names] if any(isinstance(name, str) for name in names) else names
    names = [unicodedata.normalize("NFC", name) if isinstance(name, str) else name for name in names]
    rows = [row | {"path": f"{number}.png", "label": name} for number, (row, name) in enumerate(zip(rows, names))]
    folder = tmp_path_factory.mktemp("tables")
    one, other = (read_table(write_table(folder / name, rows)) for name in ("a.csv", "a.parquet"))
    every = np.arange(len(rows))
    known = one.class_names(every)
    assert known == other.class_names(every) and one.labels(known).tolist() == other.labels(known).tolist()
    spelt = {"train": "train", "validation": "val", "test": "test"}
    splits = [{name: own.tolist() for name, own in table.splits(spelt).items()} for table in (one, other)]
    assert splits[0] == splits[1]
    for index in every:
        a, b = (table.annotations(index, one.keys) for table in (one, other))
        assert a.keys() == b.keys() and one.keys == other.keys
        for key in a:
            assert np.array_equal(a[key], b[key]) if not isinstance(a[key], dict) else repr(a[key]) == repr(b[key])


def test_numbers_may_be_labels_and_have_names(tmp_path):
    for number in range(4):
        picture(tmp_path / f"{number}.png", number)
    rows = [
        {"path": f"{number}.png", "label": [1, 0, 1, 2][number], "class_name": "bac"[[1, 0, 1, 2][number]]}
        for number in range(4)
    ]
    for name in ("metadata.csv", "x.parquet"):
        write_table(tmp_path / name, rows)
        data = module(tmp_path, table=name, test_fraction=0)
        assert data.class_names == ["b", "a", "c"] and data.reader.labels.tolist() == [1, 0, 1, 2]
        write_table(tmp_path / name, [{key: row[key] for key in ("path", "label")} for row in rows])
        assert module(tmp_path, table=name, test_fraction=0).class_names == ["0", "1", "2"]
    write_table(tmp_path / "metadata.csv", [{"path": "0.png", "label": "007"}])  # a name: numbers begin with no 0
    assert module(tmp_path, table="metadata.csv", test_fraction=0).class_names == ["007"]


BASE = [{"path": "a.png", "label": "x"}, {"path": "b.png", "label": "y"}, {"path": "c.png", "label": "x"}]


def with_column(name, *values):
    return [row | {name: value} for row, value in zip(BASE, values)]


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"path": "a.png", "lable": 1}], "no column 'label'; is it lable?"),
        ([{"paht": "a.png", "label": 1}], "no column 'path'; is it paht?"),
        ([{"path": "a.png", "z": 1}], "no column 'label'; it has 'path', 'z'"),
        ([{"path": "a.png", "file_name": "b.png", "label": 1}], "columns path and file_name; expected one of them"),
        ([{"path;label": "a.png;1"}], "no column 'path'; columns are separated by ';', expected commas"),
        (with_column("path", "a.png", "../b.png", "c.png"), "line 3: path does not lie below the root"),
        (with_column("path", "a.png", "x/../../b.png", "c.png"), "line 3: path does not lie below the root"),
        (with_column("path", "/etc/passwd", "b.png", "c.png"), "line 2: path does not lie below the root"),
        (with_column("path", "C:\\b.png", "b.png", "c.png"), "line 2: path does not lie below the root"),
        (with_column("path", "x\\b.png", "b.png", "c.png"), "line 2: path does not lie below the root"),
        (with_column("path", "a.png", "b\n.png", "c.png"), "line 3: path does not lie below the root"),
        (with_column("path", "a.png", "", "c.png"), "line 3: path is empty"),
        (with_column("path", "a.png", "b.png", "./a.png"), "line 4: path 'a.png' is also in .*line 2"),
        (with_column("path", "a.png", "gone.png", "c.png"), "1 of 3 files of .*metadata.csv are missing: gone.png"),
        (with_column("path", "a.png", "b.png", "no/c.png"), "1 of 3 files of .*metadata.csv are missing: no/c.png"),
        (with_column("label", "x", "", "y"), "line 3: label is empty; expected a name"),
        (with_column("label", "x", "nan", "y"), "line 3: label is empty; expected a name"),
        (with_column("label", 0, None, 1), "line 3: label is empty; expected a name or a whole number"),
        (with_column("label", 0, -1, 1), r"labels -1\.\.1 of train, but none is 0; expected 0, 1, 2"),
        (with_column("label", 0, 2, 0), r"labels 0\.\.2 of train, but none is 1; expected 0, 1, 2"),
        (with_column("label", 0, 10**30, 0), "line 3: label is '1000000000.*; expected a name or a whole number"),
        (with_column("label", "x", "line\nbreak", "y"), r"the class name 'line\\nbreak' has characters"),
        (with_column("label", "caf\u00e9", "cafe\u0301", "y"), "one class name in two spellings"),
        (with_column("split", "train", "tets", "train"), "line 3: split 'tets'; .*; did you mean test"),
        (with_column("split", "train", None, "train"), "line 3: split is empty"),
        (with_column("split", "test", "test", "val"), "no row of train"),
        (with_column("split", "train", "test", "train"), "line 3: label 'y' is none of the classes of train"),
        (with_column("bbox_x0", 1, 2, 3), "a column bbox_x0 without bbox_y0, bbox_x1, bbox_y1"),
        (with_column("latitude", 1, 2, 3), "a column latitude without longitude"),
        (with_column("attribute_certainty", [1], [1], [1]), "a column attribute_certainty without attributes"),
        ([row | {"bbox": [0, 0, 1, 1], "boxes": []} for row in BASE], "columns bbox and boxes; expected one of"),
        ([row | {"date": "", "metadata.date": ""} for row in BASE], "columns metadata.date and date for the same"),
        (with_column("bbox", [0, 0, 1, 1], [0, 0, 1], [0, 0, 1, 1]), "line 3: bbox does not hold four numbers"),
        (with_column("bbox", [0, 0, 1, 1], [5, 0, 1, 1], [0, 0, 1, 1]), "line 3: bbox has no area"),
        (with_column("bbox", [0, 0, 1, 1], None, [0, 0, 1, 1]), "line 3: bbox does not hold four numbers"),
        (with_column("boxes", [], [[0, 0, 1, 1], [0, 0, 1]], []), "line 3: boxes is not a list of lists of 4 numbers"),
        (with_column("boxes", [], [[0, 0, 1, 1], [0, 0, 0, 1]], []), "line 3: boxes has one without area"),
        (with_column("boxes", [], [0, 0, 0, 1], []), r"line 3: boxes is '\[0, 0, 0, 1\]'; expected a list of lists"),
        (with_column("boxes", [], "[[0, 0", []), r"line 3: boxes is '\[\[0, 0'; expected .* of 4 numbers as JSON"),
        (with_column("boxes", [], '{"a": 1}', []), "line 3: boxes is .*; expected .* of 4 numbers as JSON"),
        (with_column("boxes", [], "[" * 100_000, []), r"line 3: boxes is '\[\[.*; expected a list of lists"),
        (with_column("parts", None, [[1, 2, 1]], [[1, 2, 1]] * 2), "line 3: parts does not hold 2 points"),
        (with_column("attributes", [1], [1, 2], [1]), "line 2: attributes does not hold 2 numbers"),
        (with_column("attributes", [1], [None], [1]), "line 3: attributes holds what is no number"),
        (with_column("attributes", [1], ["x"], [1]), "line 3: attributes is .*; expected a list of numbers as JSON"),
        (with_column("label_levels", [1], [0.5], [1]), "line 3: label_levels holds others than whole numbers"),
        ([row | {"attributes": [1], "attribute_certainty": [1, 2]} for row in BASE], "1 attributes and 2 attribute"),
        ([row | {"latitude": 91, "longitude": 0} for row in BASE], "line 2: latitude, longitude outside"),
        ([row | {"latitude": "north", "longitude": 0} for row in BASE], "latitude is 'north'; expected a number"),
        (with_column("date", "2020-05-03", "May", ""), "line 3: date is not written as 2021-05-03"),
        ([row | {"date": "2020-05-03", "hour": 24} for row in BASE], "line 2: hour outside 0..23"),
        (with_column("metadata.x", [1], [1, 2], [1]), "line 2: metadata.x does not hold 2 numbers"),
        (with_column("metadata.x", 1, "x", 2), "line 3: metadata.x is 'x'; expected a number"),
    ],
)  # fmt: skip
def test_tables_that_are_wrong(tmp_path, rows, message):
    for name in "abc":
        picture(tmp_path / f"{name}.png", ord(name))
    write_table(tmp_path / "metadata.csv", rows)
    with pytest.raises(FgvczooError, match=message) as error:
        data = module(tmp_path, test_fraction=0)
        module(tmp_path, test_fraction=0, keys=data.reader.keys)
    assert "\n" not in str(error.value)


def test_files_that_are_no_tables(tmp_path):
    picture(tmp_path / "a.png", 0)
    table = tmp_path / "metadata.csv"
    for content, message in (
        (b"", "no column 'path'"),
        (b"path,label\n", "no row of train"),
        (b"path,label\na.png,x,y\n", "cannot be read .*Row #2: Expected 2 columns, got 3: a.png,x,y"),
        (b"path,label\n\xff.png,x\n", "cannot be read .*utf-8"),
        (b"\xff,label\na.png,x\n", "cannot be read"),
        (b"path,label,label\na.png,x,y\n", "the column 'label' is there twice"),
        (b"\0\0\0", "cannot be read|no column 'path'"),
    ):
        table.write_bytes(content)
        refused(tmp_path, message)
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1 junk")
    refused(tmp_path, "holds metadata.csv and metadata.parquet; say which with table")
    refused(tmp_path, "metadata.parquet: cannot be read", table="metadata.parquet")
    refused(tmp_path, "table=birds.xlsx: expected a name ending in .csv or .parquet", table="birds.xlsx")
    refused(tmp_path, "birds.csv: no such file; give table as a path", table="birds.csv")
    elsewhere = write_table(tmp_path.parent / "elsewhere.csv", [{"path": "a.png", "label": "x"}])
    assert len(module(tmp_path, table=str(elsewhere), test_fraction=0).reader) == 1


def test_lines_are_those_of_an_editor(tmp_path):
    """Blank lines, cells of two lines and a byte order mark are counted; Excel writes the last."""
    text = '\ufeffpath,label,note\r\n\r\na.png,x,"two\r\nlines"\r\nb.png,,\r\n'
    (tmp_path / "metadata.csv").write_bytes(text.encode())
    for name in "ab":
        picture(tmp_path / f"{name}.png", ord(name))
    refused(tmp_path, "metadata.csv, line 5: label is empty")
    write_table(tmp_path / "x.parquet", [{"path": "a.png", "label": "x"}, {"path": "b.png", "label": None}])
    refused(tmp_path, "x.parquet, row 2: label is empty", table="x.parquet")


def test_tables_do_not_lead_out_by_links(tmp_path):
    picture(tmp_path / "else/a.png", 0)
    root = tmp_path / "root"
    picture(root / "in/b.png", 1)
    (root / "out").symlink_to(tmp_path / "else")
    (root / "a.png").symlink_to(tmp_path / "else/a.png")
    (root / "b.png").symlink_to("in/b.png")
    (root / "also").symlink_to("in")
    for path, message in (("out/a.png", "out: a link that leads out of"), ("a.png", "a.png: a link that leads out of")):
        write_table(root / "metadata.csv", [{"path": path, "label": "x"}])
        refused(root, message)
    write_table(root / "metadata.csv", [{"path": path, "label": "x"} for path in ("b.png", "also/b.png")])
    assert len(module(root, test_fraction=0).reader) == 2


# --- in training


def test_batches_do_not_depend_on_workers_or_processes(shared, monkeypatch):
    root, _ = shared
    options = {"augmentation": "flip", "keys": KEYS}
    alone, helped = (module(root, num_workers=number, **options) for number in (0, 2))
    whole = list(alone.train_dataloader())
    assert same(whole, list(helped.train_dataloader()))
    shares, tests = [], []
    for rank in (0, 1):
        monkeypatch.setattr(alone, "_processes", lambda rank=rank: (2, rank))
        shares.append(list(alone.loader("train", augment=True, shard="train")))
        tests.append(order(alone.loader("test")))
    for batch, one, other in zip(whole, *shares):
        assert torch.cat([one["image"], other["image"]]).equal(batch["image"])
    assert [row for share in tests for rows in share for row in rows] == alone.splits["test"].tolist()


def test_rows_can_be_sent_to_processes(shared):
    data = module(shared[0], keys=KEYS)
    again = pickle.loads(pickle.dumps(data))
    assert same(list(data.loader("test")), list(again.loader("test")))


def test_a_recipe_trains_on_a_plain_folder(fgvczoo_in, birds, tmp_path):
    """The options of the recipe's own data set are carried over where a folder has them, and left out where not."""
    images = birds / "CUB_200_2011/images"
    for folder, name in zip(sorted(images.iterdir()), ("two words", "-dash", "\u00fcn\u00ef", 'it\'s "it"')):
        shutil.copytree(folder, tmp_path / "mine" / name)
    run = ("--config", RECIPES / "st-protopnet-tiny.yaml", "--data.root", "mine")
    data = ("--data", "folder")
    status, _, err = fgvczoo_in("fit", *run, *data)
    assert status == 0, err
    assert fgvczoo_in("test", *run, *data, "--ckpt_path", "last")[0] == 0
    weights = Path("runs/st-protopnet-tiny/weights")
    assert json.loads((weights / "config.json").read_text())["classes"] == sorted(
        p.name for p in Path("mine").iterdir()
    )
    assert str(tmp_path) not in (weights / "config.json").read_text()
    status, out, _ = fgvczoo_in("predict", weights, *sorted(Path("mine/-dash").iterdir())[:1])
    assert status == 0 and "mine/-dash" in out


# --- looking at a folder


def test_the_check_passes_what_is_whole_and_changes_nothing(shared):
    root, _ = shared
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    report = check_folder(root, progress=False)
    text = "\n".join(report.lines())
    assert report.ok and text.endswith("nothing is wrong")
    assert "12 images of 4 classes (8 train, 4 test)" in text and "it's: 2 train, 1 test" in text
    assert "4 classes with less than 5 train images" in text and "mean nothing here: photographer" in text
    assert "1 files are not read, such as other.parquet" in text and "all 12 pictures and segmentations" in text
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*")}


def test_the_check_names_all_that_is_wrong(tmp_path):
    make_folders(tmp_path, {"train/a": 6, "train/b": 6, "test/a": 2})
    Image.new("L", (9, 9)).save(tmp_path / "train/a/grey.png")
    broken = tmp_path / "train/a/005.png"
    broken.write_bytes(b"no picture")
    for source, copy in (("a/000", "b/twin"), ("a/001", "a/twin"), ("a/002", "../test/a/twin")):
        shutil.copy(tmp_path / f"train/{source}.png", tmp_path / f"train/{copy}.png")
    (tmp_path / "train/loose.png").touch()
    report = check_folder(tmp_path, progress=False)
    text = "\n".join(report.lines())
    assert not report.ok and text.endswith("3 things are wrong")
    assert f"wrong  {broken}: not an image" in text and "1 pictures are grey" in text
    assert (
        "wrong  1 pictures are there more than once, in two classes, such as train/a/000.png = train/b/twin.png" in text
    )
    assert (
        "wrong  1 pictures are there more than once, in two splits, such as train/a/002.png = test/a/twin.png" in text
    )
    assert (
        "note   1 pictures are there more than once, in one class, such as train/a/001.png = train/a/twin.png" in text
    )
    assert "1 classes with less than 1 test images, such as b" in text and "such as train/loose.png" in text
    assert not check_folder(tmp_path / "gone", progress=False).ok


def test_the_check_reads_all_columns(tmp_path):
    picture(tmp_path / "a.png", 0, (20, 10))
    row = {"path": "a.png", "label": "x", "bbox": [2, 2, 25, 9], "attributes": ["y"]}
    text = "\n".join(check_folder(tmp_path, write_table(tmp_path / "t.csv", [row]), progress=False).lines())
    assert "note   1 pictures have a box beyond their border, such as a.png" in text
    assert "wrong  " in text and "t.csv, line 2: attributes is" in text


def test_a_check_of_many_classes_is_short(tmp_path):
    make_folders(tmp_path, {f"{number:02d}": 1 + number for number in range(25)})
    lines = check_folder(tmp_path, progress=False).lines()
    assert "ok     and 5 more classes, of 1 to 25 images" in lines and len(lines) < 30


def test_a_contact_sheet_shows_a_folder(shared):
    data = module(shared[0], keys=["bbox", "parts"])
    assert contact_sheet(data, "test", 4, columns=2).size == (2 * 20 + 4, 2 * 34 + 4)
