"""The documented behaviour of the shorter readers, each on its generated copy, through the public data modules."""

from __future__ import annotations

import pickle
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from fgvczoo.checkpoints import read_pickle
from fgvczoo.data import cifar
from fgvczoo.data.aircraft import AircraftDataModule
from fgvczoo.data.celeba import CelebADataModule
from fgvczoo.data.check import check_official
from fgvczoo.data.cifar import CIFAR10DataModule, CIFAR100DataModule
from fgvczoo.data.coco import COCODataModule, draw
from fgvczoo.data.cub import CUBDataModule
from fgvczoo.data.dogs import DogsDataModule
from fgvczoo.data.flowers import FlowersDataModule
from fgvczoo.data.forgetme import ForgetMeDataModule
from fgvczoo.data.gtos import GTOSMobileDataModule
from fgvczoo.data.imagenet import ImageNet, ImageNetDataModule
from fgvczoo.data.inat_birds import CrossViewBirdsDataModule
from fgvczoo.data.nus_wide import NUSWideDataModule
from fgvczoo.data.places import Places365, Places365DataModule
from fgvczoo.data.tiny_imagenet import TinyImageNetDataModule
from fgvczoo.data.vggface2 import VGGFace2, VGGFace2DataModule
from fgvczoo.data.wsol import WSOLDataModule
from fgvczoo.errors import FgvczooError
from fgvczoo.zoo.registry import dataset_class
from tests.data.aircraft.make import BANNER, FAMILIES, MANUFACTURERS, VARIANTS, make_aircraft
from tests.data.celeba.make import ATTRIBUTES, make_celeba
from tests.data.cifar.make import COARSE, FINE, NAMES, make_cifar10, make_cifar100, python2_pickle
from tests.data.coco.make import SIZE, make_coco, square
from tests.data.copies import COPIES
from tests.data.cub.make import make_cub
from tests.data.dogs.make import BREEDS, make_dogs
from tests.data.flowers.make import make_flowers
from tests.data.forgetme.make import make_forgetme
from tests.data.gtos.make import CLASSES as GROUNDS
from tests.data.gtos.make import make_gtos
from tests.data.imagenet.make import WORDNET, make_imagenet
from tests.data.inat_birds.make import make_inat_birds
from tests.data.nus_wide.make import make_nus_wide
from tests.data.places.make import CLASSES as SCENES
from tests.data.places.make import make_places
from tests.data.tiny_imagenet.make import WORDS, make_tiny_imagenet
from tests.data.vggface2.make import make_vggface2
from tests.data.wsol.make import MIDS, make_wsol

SMALL = {"preprocess": {"size": [16, 16]}}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FGVCZOO_CACHE", str(tmp_path_factory.mktemp("cache")))


def sizes(data) -> dict[str, int]:
    return {name: len(rows) for name, rows in data.splits.items() if name not in ("train_plain", "projection")}


@pytest.mark.parametrize("name", sorted(COPIES))
def test_the_check_passes_a_whole_copy_and_changes_nothing(name: str, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    root.mkdir()
    COPIES[name].make(root)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    reader = dataset_class(name).reader_class
    report = check_official(reader, root, progress=False, **COPIES[name].options)
    assert report.ok, report.lines()
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    confirmed = [archive for archive in reader.archives if archive.confirmed]
    for archive in confirmed[:1]:  # another file of that name is wrong
        if not (root / archive.name).exists():
            (root / archive.name).write_bytes(b"no archive")
            assert not check_official(reader, root, progress=False, **COPIES[name].options).ok


# --- aircraft


def test_aircraft_has_three_levels_and_no_banner(tmp_path: Path) -> None:
    images = make_aircraft(tmp_path)
    data = AircraftDataModule(str(tmp_path), keys=["bbox", "label_levels"])
    assert data.class_names == list(VARIANTS) and sizes(data) == {"train": 16, "test": 8}
    for index in range(len(data.reader)):
        row, sample = data.row(index), data.sample(index)
        part, variant = images[row["image_id"]]
        assert row["class_name"] == variant and row["split"] == ("test" if part == "test" else "train")
        assert row["crop"] == (0, 0, row["width"], row["height"] - BANNER)
        family, manufacturer = VARIANTS[variant]
        known = [list(VARIANTS).index(variant), FAMILIES.index(family), MANUFACTURERS.index(manufacturer)]
        assert sample["label_levels"].tolist() == known
    # From 1 and inclusively to from 0 and exclusively.
    assert data.row(0)["bbox"] == [0, 0, 20, 25]


@pytest.mark.parametrize("level, names", [("family", FAMILIES), ("manufacturer", MANUFACTURERS)])
def test_aircraft_of_other_levels_and_parts(tmp_path: Path, level: str, names: tuple[str, ...]) -> None:
    make_aircraft(tmp_path)
    data = AircraftDataModule(str(tmp_path / "fgvc-aircraft-2013b"), level=level, train="train", banner=True)
    assert data.class_names == list(names) and sizes(data) == {"train": 8, "val": 8, "test": 8}
    assert data.row(0)["crop"] is None


# --- dogs, flowers


def test_dogs_have_labels_boxes_and_pngs(tmp_path: Path) -> None:
    lists = make_dogs(tmp_path)
    data = DogsDataModule(str(tmp_path), keys=["boxes"], **SMALL)
    assert data.class_names == ["Chihuahua", "Airedale", "flat-coated_retriever"] and sizes(data) == {
        "train": 12,
        "test": 9,
    }
    known = lists["train"] + lists["test"]
    assert [(data.row(i)["image_id"], data.row(i)["label"]) for i in range(21)] == known
    assert [len(boxes) for batch in data.loader("test") for boxes in batch["boxes"]] == [1, 2, 1] * 3
    assert len(BREEDS) == data.num_classes


def test_labels_of_dogs_are_those_of_their_folders(tmp_path: Path) -> None:
    make_dogs(tmp_path)
    (tmp_path / "train_list.mat").write_bytes((tmp_path / "test_list.mat").read_bytes())
    with pytest.raises(FgvczooError, match="occurs twice"):
        DogsDataModule(str(tmp_path))


def test_flowers_are_tested_on_the_larger_part(tmp_path: Path) -> None:
    parts = make_flowers(tmp_path)
    data = FlowersDataModule(str(tmp_path))
    assert sizes(data) == {"train": 12, "test": 12}
    assert sizes(FlowersDataModule(str(tmp_path), train="train")) == {"train": 6, "val": 6, "test": 12}
    known = {f"image_{number:05d}.jpg": label for listed in parts.values() for number, label in listed}
    assert {data.row(i)["image_id"]: data.row(i)["label"] for i in range(24)} == known


def test_flowers_have_the_names_that_torchvision_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_flowers(tmp_path, classes=102)
    monkeypatch.setattr("fgvczoo.data.flowers._PARTS", {"train": 204, "val": 204, "test": 408})
    names = FlowersDataModule(str(tmp_path)).class_names
    assert len(set(names)) == 102 and names[0] == "pink primrose" and names[-1] == "blackberry lily"


# --- CIFAR


def test_cifar_pictures_are_rows_of_numbers(tmp_path: Path) -> None:
    batches = make_cifar10(tmp_path)
    data = CIFAR10DataModule(str(tmp_path), preprocess={"size": [32, 32]})
    assert data.class_names == list(NAMES) and sizes(data) == {"train": 45, "test": 9}
    whole = np.concatenate([batch["data"] for batch in batches.values()])
    for index in (0, 17, 53):
        assert np.array_equal(data.picture(index), whole[index].reshape(3, 32, 32).transpose(1, 2, 0))
        assert np.array_equal(data.preprocess.invert(data.sample(index)["image"]), data.picture(index))
        assert data.row(index)["height"] == 32 and data.find(data.row(index)["image_id"]) == index
    names = [f"train/{name}" for name in batches["data_batch_1"]["filenames"]]
    assert [data.row(index)["image_id"] for index in range(9)] == names


def test_hashing_protocols_of_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_cifar10(tmp_path)  # 18 images of each of 3 classes
    monkeypatch.setattr(cifar, "_QUERIES", {"hashing-1": 2, "hashing-1-train": 2, "hashing-2": 6})
    monkeypatch.setattr(cifar, "_TRAINING", 5)
    kinds = {name: CIFAR10DataModule(str(tmp_path), protocol=name) for name in cifar._QUERIES}
    assert [sizes(data) for data in kinds.values()] == [
        {"train": 15, "test": 6, "query": 6, "gallery": 33},
        {"train": 15, "test": 6, "query": 6, "gallery": 48},
        {"train": 36, "test": 18, "query": 18, "gallery": 36},
    ]
    for data in kinds.values():
        query, train, gallery = (set(data.splits[name].tolist()) for name in ("query", "train", "gallery"))
        assert not query & (train | gallery) and (np.bincount(data.reader.labels[[*query]]) == len(query) // 3).all()
        again = CIFAR10DataModule(str(data.reader.folder), protocol="hashing-1")
    assert np.array_equal(again.splits["query"], kinds["hashing-1"].splits["query"])
    assert not set(kinds["hashing-1"].splits["train"]) & set(kinds["hashing-1"].splits["gallery"])
    monkeypatch.setattr(cifar, "_TRAINING", 500)
    with pytest.raises(FgvczooError, match="class airplane has 18 images, which are too few"):
        CIFAR10DataModule(str(tmp_path), protocol="hashing-1")


@pytest.mark.parametrize("target, names", [("fine", FINE), ("coarse", COARSE)])
def test_super_classes_of_cifar(tmp_path: Path, target: str, names: tuple[str, ...]) -> None:
    batches = make_cifar100(tmp_path)
    data = CIFAR100DataModule(str(tmp_path / "cifar-100-python"), target=target, keys=["label_levels"])
    assert data.class_names == list(names) and sizes(data) == {"train": 16, "test": 8}
    fine = batches["train"]["fine_labels"] + batches["test"]["fine_labels"]
    for index, label in enumerate(fine):
        assert data.sample(index)["label_levels"].tolist() == [label % 2, label]
        assert data.row(index)["label"] == (label if target == "fine" else label % 2)


def test_the_super_classes_of_the_real_set_are_balanced() -> None:
    assert (np.bincount(cifar.SUPER_CLASSES) == 5).all() and len(cifar.SUPER_CLASSES) == 100


def test_pickles_execute_nothing(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "touched",)

    make_cifar10(tmp_path)
    file = tmp_path / "cifar-10-batches-py/test_batch"
    for content, message in (
        (pickle.dumps({"data": Evil()}, protocol=2), "no plain value"),
        (pickle.dumps(["a", "list"]), "no array data"),
        (
            python2_pickle({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}),
            "labels is not a whole number for each",
        ),
        (python2_pickle({"data": np.zeros((1, 3072), np.uint8), "labels": [3]}), "has label 3; expected 0..2"),
        (python2_pickle({"data": np.zeros((1, 3072), np.uint8), "labels": [0]})[:-9], "not a whole pickle"),
    ):
        file.write_bytes(content)
        with pytest.raises(FgvczooError, match=message) as error:
            CIFAR10DataModule(str(tmp_path))
        assert "\n" not in str(error.value) and not (tmp_path / "touched").exists()


def test_pickles_of_today_are_read_alike(tmp_path: Path) -> None:
    value = {"data": np.arange(12, dtype=np.int64).reshape(3, 4), "bytes": b"\x00\xff", "names": ["é", None, 1.5]}
    for protocol in (2, 3, 4, 5):
        (tmp_path / "file").write_bytes(pickle.dumps(value, protocol=protocol))
        if protocol == 5:  # numpy then keeps its numbers by another call
            continue
        read = read_pickle(tmp_path / "file")
        assert np.array_equal(read["data"], value["data"]) and read["names"] == value["names"]


# --- Tiny-ImageNet, ImageNet, the localisation benchmark


def test_tiny_imagenet_sorts_its_classes(tmp_path: Path) -> None:
    make_tiny_imagenet(tmp_path)
    data = TinyImageNetDataModule(str(tmp_path), keys=["bbox"], preprocess={"size": [64, 64]})
    assert data.class_names == ["n01440764 tench", "n02012849 crane", "n03126707 crane"]
    assert sizes(data) == {"train": 12, "test": 6} and data.reader.wordnet_ids == sorted(WORDS)
    assert data.sample(3)["bbox"].tolist() == [3, 1, 33, 62]
    for index in data.splits["test"].tolist():
        number = int(data.row(index)["image_id"].rpartition("_")[2].removesuffix(".JPEG"))
        assert data.row(index)["class_name"].startswith(list(WORDS)[number // 2])
        assert data.row(index)["bbox"] == [number % 2, 2, 44, 63]


def test_flat_validation_images_by_the_devkit(tmp_path: Path) -> None:
    truth = make_imagenet(tmp_path, layout="devkit")
    data = ImageNetDataModule(str(tmp_path))
    assert len(truth) == 6
    for index in data.splits["test"].tolist():
        row = data.row(index)
        assert list(WORDNET)[row["label"]] == truth[Path(row["image_id"]).stem][0]
    kit = tmp_path / "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"
    kit.write_text("9\n" * 6)
    with pytest.raises(FgvczooError, match=r"class '9' is not in meta\.mat"):
        ImageNetDataModule(str(tmp_path))


def test_the_first_classes_of_imagenet(tmp_path: Path) -> None:
    make_imagenet(tmp_path)
    data = ImageNetDataModule(str(tmp_path), first=2)
    assert data.num_classes == 2 and sizes(data) == {"train": 8, "test": 4}
    with pytest.raises(FgvczooError, match=r"first=9; expected 2\.\.3"):
        ImageNetDataModule(str(tmp_path), first=9)


@pytest.mark.parametrize("name", ["CUB", "ILSVRC"])
def test_boxes_of_the_localisation_benchmark(tmp_path: Path, name: str) -> None:
    make_wsol(tmp_path, name)
    data = WSOLDataModule(str(tmp_path), dataset=name, keys=["boxes"], **SMALL)
    assert data.class_names == list(MIDS) and sizes(data) == {"train": 12, "val": 3, "test": 6}
    assert [len(boxes) for batch in data.loader("test") for boxes in batch["boxes"]] == [1, 2] * 3
    assert {len(boxes) for batch in data.loader("train") for boxes in batch["boxes"]} == {0}
    assert data.reader.table("boxes")[len(data.reader) - 1].tolist() == [[0, 3, 20, 30], [1, 3, 21, 30]]


def test_masks_of_openimages(tmp_path: Path) -> None:
    make_wsol(tmp_path)
    data = WSOLDataModule(str(tmp_path), keys=["mask"], preprocess={"size": [40, 50]})
    row = data.sample(int(data.splits["test"][0]))["mask"][0].tolist()
    # Two objects; what is ignored and no object.
    assert row == [0] * 5 + [1] * 10 + [255] * 5 + [0] * 5 + [1] * 10 + [0] * 15
    assert (data.sample(0)["mask"] == 255).all()


# --- GTOS-mobile, Places365, VGGFace2, CelebA


def test_grounds_are_held_out_by_sequence(tmp_path: Path) -> None:
    make_gtos(tmp_path)
    assert sizes(GTOSMobileDataModule(str(tmp_path))) == {"train": 18, "test": 6}
    data = GTOSMobileDataModule(str(tmp_path), val_sequences=0.34)
    assert data.class_names == list(GROUNDS) and sizes(data) == {"train": 12, "test": 6, "val": 6}
    stems = {split: [Path(data.row(i)["path"]).stem for i in data.splits[split]] for split in ("train", "val")}
    sequences = {split: {stem[:-5] for stem in own if "sandPaper" not in stem} for split, own in stems.items()}
    assert not sequences["train"] & sequences["val"] and sequences["val"] == {"Painting_02", "aluminum_02"}
    assert [stem[-4:] for stem in stems["val"] if "sandPaper" in stem] == ["0004", "0005"]  # the last frames of its one


@pytest.mark.parametrize("folder", ["data_256_standard", "data_256"])
def test_places_have_names_of_two_levels(tmp_path: Path, folder: str) -> None:
    make_places(tmp_path, folder=folder)
    data = Places365DataModule(str(tmp_path))
    assert data.class_names == list(SCENES) and sizes(data) == {"train": 12, "test": 6}
    assert data.reader.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [0, 0, 1, 1, 2, 2]
    with pytest.raises(FgvczooError, match="data_large_standard: no such folder"):
        Places365DataModule(str(tmp_path), size="large")


@pytest.mark.parametrize("lists", [True, False])
def test_faces_of_other_people_are_tested(tmp_path: Path, lists: bool) -> None:
    make_vggface2(tmp_path, lists=lists)
    data = VGGFace2DataModule(str(tmp_path), keys=["bbox"])
    assert data.class_names == ["n000002 A. J. Buckley", "n000003 Sammy Davis, Jr."]
    assert data.reader.all_class_names[2:] == ["n000001 14th Dalai Lama", "n000009 Óscar"]
    assert sizes(data) == {"train": 10, "test": 10, "query": 10, "gallery": 10}
    assert [data.row(int(i))["label"] for i in data.splits["test"]] == [2] * 5 + [3] * 5
    assert data.row(13)["bbox"] == [3, 2, 23, 27]


@pytest.mark.parametrize("csv", [False, True])
def test_faces_have_attributes_points_and_identities(tmp_path: Path, csv: bool) -> None:
    known = make_celeba(tmp_path, csv=csv)
    data = CelebADataModule(str(tmp_path), keys=["attributes", "parts"])
    assert data.class_names == ["1", "2", "3"] and sizes(data) == {"train": 10, "val": 2, "test": 4}
    assert data.reader.attribute_names == list(ATTRIBUTES) and data.transform.flip_pairs == ((0, 1), (3, 4))
    assert np.array_equal(torch.cat([batch["attributes"] for batch in data.loader("train")]), known[:10])
    assert "bbox" not in data.reader.keys  # they are of other pictures
    smiling = CelebADataModule(str(tmp_path), target="Smiling")
    assert smiling.class_names == ["not Smiling", "Smiling"] and smiling.reader.labels.tolist() == known[:, 2].tolist()
    with pytest.raises(
        FgvczooError, match="expected identity or one of Bald, Eyeglasses, Smiling; did you mean Smiling"
    ):
        CelebADataModule(str(tmp_path), target="Smilling")


def test_a_web_page_is_no_list(tmp_path: Path) -> None:
    make_celeba(tmp_path)
    (tmp_path / "identity_CelebA.txt").write_text("<!DOCTYPE html><html>Google Drive - Quota exceeded")
    with pytest.raises(FgvczooError, match="a web page, such as Google Drive's"):
        CelebADataModule(str(tmp_path))


# --- NUS-WIDE, COCO


def test_concepts_of_the_pictures_that_are_there(tmp_path: Path) -> None:
    paths, labels, names = make_nus_wide(tmp_path)
    data = NUSWideDataModule(str(tmp_path), keys=["labels"])
    kept = [row for row in range(60) if row % 10 != 9 and labels[row].any()]
    gone = sum(row % 10 == 9 and labels[row].any() for row in range(60))
    assert data.class_names == names and data.reader.missing == gone > 0
    assert data.reader.image_ids.tolist() == [paths[row] for row in kept]
    assert sizes(data) == {"train": sum(row < 36 for row in kept), "test": sum(row >= 36 for row in kept)}
    assert np.array_equal(data.reader.multi, labels[kept]) and data.reader.labels[0] == labels[kept[0]].argmax()
    (tmp_path / "Flickr" / paths[kept[0]]).unlink()
    assert NUSWideDataModule(str(tmp_path)).reader.fingerprint != data.reader.fingerprint


def test_hashing_by_the_frequent_concepts(tmp_path: Path) -> None:
    _, labels, names = make_nus_wide(tmp_path, images=400)
    options = {"protocol": "hashing", "queries": 2, "training": 4}
    data = NUSWideDataModule(str(tmp_path), **options)
    assert data.class_names == [name for place, name in enumerate(names) if place not in (0, 4)]  # the rarest two
    query, train, gallery = (data.splits[name] for name in ("query", "train", "gallery"))
    assert len(query) == 42 and len(train) == 84 and len(gallery) == len(data.reader) - 126
    assert (data.reader.multi[query].sum(axis=0) >= 2).all() and (data.reader.multi[train].sum(axis=0) >= 4).all()
    assert not set(query) & set(train) and not (set(query) | set(train)) & set(gallery)
    assert np.array_equal(NUSWideDataModule(str(tmp_path), **options).splits["query"], query)
    with pytest.raises(FgvczooError, match="give queries and training"):
        NUSWideDataModule(str(tmp_path), protocol="hashing")
    assert labels.shape == (400, 23)


def test_objects_of_coco(tmp_path: Path) -> None:
    make_coco(tmp_path)
    data = COCODataModule(str(tmp_path), keys=["labels", "boxes", "mask"], preprocess={"size": list(SIZE)})
    assert data.class_names == ["person", "car", "toothbrush"] and data.reader.category_ids == [1, 3, 90]
    assert sizes(data) == {"train": 10, "test": 4}
    sample = data.sample(0)
    assert sample["labels"].tolist() == [1, 1, 0] and sample["boxes"].tolist() == [[10, 10, 14, 14], [5, 5, 25, 25]]
    mask = sample["mask"].numpy()
    # The car, smaller and listed first, lies on the person.
    assert (mask[10:14, 10:14] == 2).all() and (mask == 1).sum() == 400 - 16 and (mask == 2).sum() == 16
    runs = data.sample(1)["mask"].numpy()
    assert (runs[:, 2:5] > 0).all() and (runs > 0).sum() == 120
    assert (data.sample(2)["mask"].numpy() > 0).sum() == 25 + 144
    (tmp_path / "SegmentationClass").mkdir()
    with pytest.raises(FgvczooError, match=r"SegmentationClass/.*\.png"):
        COCODataModule(str(tmp_path), keys=["mask"]).sample(0)


def test_a_polygon_covers_the_pixels_inside_of_it() -> None:
    item = {"label": 0, "area": 1, "segmentation": [[3.0, 2.0, 9.0, 2.0, 9.0, 8.0]]}
    mask = draw([item], 12, 12)
    y, x = np.mgrid[:12, :12] + 0.5
    inside = (x < 9) & (y > 2) & (y - 2 < x - 3)
    on_edge = np.isclose(y - 2, x - 3)
    assert ((mask == 1) == inside)[~on_edge].all()
    assert (draw([{"label": 1, "area": 1, "segmentation": [square(0, 0, 5)]}], 6, 6) == 2).sum() == 25


# --- pairs of pictures


def test_birds_have_the_satellite_image_of_their_place(tmp_path: Path) -> None:
    pairs = make_inat_birds(tmp_path)
    data = CrossViewBirdsDataModule(str(tmp_path), keys=["satellite", "metadata"], **SMALL)
    assert sizes(data) == {split: len(own) for split, own in pairs.items()} and data.num_classes == 2
    known = [(split, k, sighting) for split, own in pairs.items() for k, sighting in enumerate(own)]
    for index, (split, k, sighting) in enumerate(known):
        row, sample = data.row(index), data.sample(index)
        assert (row["image_id"], row["split"], row["cluster"]) == (sighting.image_id, split, k % 5)
        assert row["satellite"].endswith(f"images_sentinel/{k}.jpeg") and row["label"] == sighting.label // 2
        assert sample["satellite"].shape == (3, 16, 16)
        date = sighting.seen[2]
        assert sample["metadata"]["date"][2] == (28 if date else 0)
        assert sample["metadata_valid"]["date"] == (date is not None)
        assert sample["metadata"]["place"].tolist() == [value or 0 for value in sighting.seen[:2]]
    batch = next(iter(data.loader("train", augment=True, shard="train")))
    assert batch["satellite"].shape[1:] == (3, 16, 16) and batch["metadata"]["date"].shape[1:] == (3,)
    assert len(pickle.loads(pickle.dumps(data.reader))) == len(data.reader)


@pytest.mark.parametrize("table", [False, True])
def test_edited_pictures_move_with_their_originals(tmp_path: Path, table: bool) -> None:
    make_forgetme(tmp_path, table=table)
    options = {
        "preprocess": {"size": [48, 48], "interpolation": "nearest"},
        "augmentation": "protopnet",
        "batch_size": 4,
    }
    data = ForgetMeDataModule(str(tmp_path), keys=["edited", "mask"], **options)
    assert data.class_names == (["even", "odd"] if table else ["bird", "dog"])
    assert sum(sizes(data).values()) == 16
    for batch in data.train_dataloader():
        far = torch.nn.functional.max_pool2d(batch["mask"].float()[:, None], 9, 1, 4)[:, 0] == 0
        for image, edited, mask, outside in zip(batch["image"], batch["edited"], batch["mask"], far):
            difference = (image - edited).abs().amax(0)
            assert difference[outside].max() < 1e-6
            assert difference[mask == 1].mean() > 0.5
    one = ForgetMeDataModule(str(tmp_path), subset="bird")
    assert {Path(row["path"]).parts[-3] for row in map(one.row, range(8))} == {"bird"}


def test_pairs_without_a_partner(tmp_path: Path) -> None:
    make_forgetme(tmp_path)
    (tmp_path / "dog/bg/3.png").unlink()
    with pytest.raises(FgvczooError, match="dog: 1 stems are not in both original and edited, such as 3"):
        ForgetMeDataModule(str(tmp_path))


# --- concepts of CUB


def test_attributes_of_cub_are_of_parts(tmp_path: Path) -> None:
    make_cub(tmp_path)
    reader = CUBDataModule(str(tmp_path)).reader
    names = reader.attribute_names
    assert names[0].startswith("has_bill_shape") and reader.attribute_parts[0] == (1,)  # the beak
    assert names[2].startswith("has_size") and reader.attribute_parts[2] == ()  # the whole bird
    table = reader.class_attributes
    expected = np.flatnonzero((table >= 45).sum(axis=0) > 1)
    assert reader.frequent_attributes(classes=1).tolist() == expected.tolist()


def test_all_attributes_of_synthbirds_are_mapped(birds: Path) -> None:
    reader = CUBDataModule(str(birds)).reader
    assert len(reader.attribute_names) == 312
    of_group = {name.partition("::")[0]: parts for name, parts in zip(reader.attribute_names, reader.attribute_parts)}
    assert {group for group, parts in of_group.items() if not parts} == {"has_size", "has_shape", "has_primary_color"}
    assert of_group["has_forehead_color"] == (4, 5) and of_group["has_wing_color"] == (8, 12)
    assert of_group["has_underparts_color"] == (2, 3, 14) and of_group["has_leg_color"] == (7, 11)


# --- Lists of millions, read once


@pytest.mark.parametrize("name", ["places365", "vggface2", "vggface2-folders", "imagenet"])
def test_lists_are_read_once_and_again_when_they_change(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FGVCZOO_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "copy"
    make, reader, added = {
        "places365": (make_places, Places365, "data_256_standard/a/airfield/00000099.jpg"),
        "vggface2": (make_vggface2, VGGFace2, "train/n000002/0099_01.jpg"),
        "vggface2-folders": (partial(make_vggface2, lists=False), VGGFace2, "train/n000002/0099_01.jpg"),
        "imagenet": (make_imagenet, ImageNet, "train/n01440764/n01440764_99.JPEG"),
    }[name]
    make(root)
    first = reader(str(root))
    assert {file.suffix for file in (tmp_path / "cache" / reader.name).iterdir()} >= {".arrow"}
    with monkeypatch.context() as patched:
        patched.setattr(reader, "_make", lambda *_: pytest.fail("the lists were read again"))
        again = reader(str(root))
    assert again.class_names == first.class_names and again.image_ids.tolist() == first.image_ids.tolist()
    assert np.array_equal(again.labels, first.labels) and again.find(first.image_ids[3]) == 3
    assert {split: rows.tolist() for split, rows in again.splits.items()} == {
        split: rows.tolist() for split, rows in first.splits.items()
    }
    copied = pickle.loads(pickle.dumps(again))  # for workers that are spawned
    assert copied.picture(2) == first.picture(2) and copied.row(2) == first.row(2)
    # One more picture: by the list where there is one, else in a folder alone.
    shutil.copyfile(first.picture(0), first.pictures / added)
    if name == "places365":
        with (root / "places365_train_standard.txt").open("a") as file:
            file.write("/a/airfield/00000099.jpg 0\n")
    elif name == "vggface2":
        with (root / "train_list.txt").open("a") as file:
            file.write("n000002/0099_01.jpg\n")
    more = reader(str(root))
    assert len(more) == len(first) + 1 and sum(str(path).endswith(added) for path in more.image_ids) == 1
    (first.pictures / added).unlink()
    if name in ("imagenet", "vggface2-folders"):
        assert len(reader(str(root))) == len(first)
