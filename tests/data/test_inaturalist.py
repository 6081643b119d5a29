"""iNaturalist of three years through the public data module, and its index."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from fgvczoo.data import inaturalist
from fgvczoo.data.cub import SynthBirdsDataModule
from fgvczoo.data.inaturalist import INaturalistDataModule
from fgvczoo.data.json_stream import json_items
from fgvczoo.errors import FgvczooError
from tests.data.inaturalist.make import CATEGORIES, make_inaturalist

NAMES = [name for _, name, _, _ in CATEGORIES]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("FGVCZOO_CACHE", str(folder))
    return folder


@pytest.mark.parametrize("version", ["2017", "2018", "2021"])
def test_rows_labels_place_and_date(tmp_path: Path, version: str) -> None:
    written = make_inaturalist(tmp_path, version)
    data = INaturalistDataModule(
        str(tmp_path), version=version, keys=["metadata", "label_levels"], preprocess={"size": [8, 8]}
    )
    assert data.class_names == NAMES  # the order of the list; of 2018 with the names of categories.json
    assert len(data.splits["train"]) == 14 and len(data.splits["test"]) == 8
    assert [data.row(index)["split"] for index in (0, 20)] == ["train", "test"]
    seen_zero = False
    for index, known in enumerate(written):
        row, sample = data.row(index), data.sample(index)
        assert (row["image_id"], row["label"]) == (known.image_id, known.label) == (known.image_id, sample["label"])
        assert row["path"].endswith(known.file_name) and data.find(str(known.image_id)) == index
        values, valid = sample["metadata"], sample["metadata_valid"]
        latitude, longitude, month, hour = known.seen
        assert valid["place"] == (latitude is not None) and valid["date"] == (month is not None)
        assert values["place"].tolist() == ([latitude, longitude] if latitude is not None else [0, 0])
        date = [month, float("nan") if version == "2017" else hour, 28] if month is not None else [0, 0, 0]
        assert np.array_equal(values["date"], np.array(date, np.float32), equal_nan=True)
        seen_zero |= latitude == 0.0 and bool(valid["place"])
    assert seen_zero  # 0.0 is a value
    batch = next(iter(data.loader("test")))
    assert batch["metadata"]["place"].shape == (8, 2) and batch["metadata_valid"]["place"].shape == (8,)


@pytest.mark.parametrize(
    "version, ranks", [("2017", ["supercategory"]), ("2018", ["genus"]), ("2021", ["kingdom", "genus"])]
)
def test_ranks_above_the_species(tmp_path: Path, version: str, ranks: list[str]) -> None:
    make_inaturalist(tmp_path, version)
    data = INaturalistDataModule(str(tmp_path), version=version, keys=["label_levels"])
    assert list(data.reader.level_names) == ranks
    names = list(data.reader.level_names.values())[-1]
    for index in range(len(data.reader)):
        _, _, group, genus = CATEGORIES[data.reader.label(index)]
        assert names[data.sample(index)["label_levels"][-1]] == (group if version == "2017" else genus)


def test_a_supercategory_alone(tmp_path: Path) -> None:
    written = [s for s in make_inaturalist(tmp_path) if s.label in (0, 2)]
    data = INaturalistDataModule(str(tmp_path), supercategory="Birds", keys=["metadata"])
    assert data.class_names == ["Turdus merula", "Turdus philomelos"]
    assert [data.row(index)["image_id"] for index in range(len(data.reader))] == [s.image_id for s in written]
    assert data.reader.labels.tolist() == [s.label // 2 for s in written]
    assert [data.sample(i)["metadata"]["place"][0].item() for i in range(2)] == [0.0, -33.5]
    with pytest.raises(FgvczooError, match="has Birds, Insects, Plants; did you mean Birds"):
        INaturalistDataModule(str(tmp_path), supercategory="Bird")


def test_mini(tmp_path: Path) -> None:
    make_inaturalist(tmp_path)
    data = INaturalistDataModule(str(tmp_path), mini=True)
    assert len(data.splits["train"]) == 8 and len(data.splits["test"]) == 8
    assert "train_mini" in data.row(0)["path"]
    with pytest.raises(FgvczooError, match="only 2021"):
        INaturalistDataModule(str(tmp_path), version="2018", mini=True)


def test_metric_learning_on_disjoint_classes(tmp_path: Path) -> None:
    written = make_inaturalist(tmp_path, "2018")
    data = INaturalistDataModule(
        str(tmp_path), version="2018", protocol="metric-learning", keys=["metadata", "label_levels"]
    )
    assert data.class_names == [NAMES[1], NAMES[3]] and data.reader.all_class_names[2:] == [NAMES[0], NAMES[2]]
    of_id = {s.image_id: s for s in written}
    assert sorted(of_id) == sorted(data.reader.image_ids.tolist())  # both official parts
    for index in range(len(data.reader)):
        row = data.row(index)
        assert row["class_name"] == NAMES[of_id[row["image_id"]].label]
        assert row["split"] == ("train" if row["label"] < 2 else "test")
        genus = data.reader.level_names["genus"][data.sample(index)["label_levels"][0]]
        assert genus == row["class_name"].split()[0]
    assert data.splits["query"].tolist() == data.splits["gallery"].tolist() == data.splits["test"].tolist()


def test_places_elsewhere_or_nowhere(tmp_path: Path) -> None:
    root, places = tmp_path / "root", tmp_path / "places"
    make_inaturalist(root, "2017")
    places.mkdir()
    files = [f"{split}2017_locations.json" for split in ("train", "val")]
    for name in files:
        (root / name).rename(places / name)
    assert "metadata" not in INaturalistDataModule(str(root), version="2017").reader.keys
    data = INaturalistDataModule(str(root), version="2017", locations=str(places), keys=["metadata"])
    assert data.sample(3)["metadata"]["place"].tolist() == [45.0, -180.0]
    (places / files[0]).unlink()
    with pytest.raises(FgvczooError, match=r"train2017_locations\.json and .* are not both in it"):
        INaturalistDataModule(str(root), version="2017", locations=str(places))


def test_dates_that_cannot_be_read_are_not_known(tmp_path: Path) -> None:
    make_inaturalist(tmp_path)
    text = (tmp_path / "train.json").read_text("utf-8")
    for date in ("2016-13-28 00:45:00+00:00", "last summer", "2016-03-28", "2016-03-32 00:45:00"):
        (tmp_path / "train.json").write_text(text.replace("2016-03-28 00:45:00+00:00", date), "utf-8")
        sample = INaturalistDataModule(str(tmp_path), keys=["metadata"]).sample(0)
        assert not sample["metadata_valid"]["date"] and sample["metadata_valid"]["place"]


def test_synthbirds_is_the_same_in_both_layouts(birds: Path) -> None:
    cub = SynthBirdsDataModule(str(birds), size="tiny", keys=["metadata"])
    data = INaturalistDataModule(str(birds / "CUB_200_2011"), keys=["metadata"])
    assert data.num_classes == cub.num_classes and len(data.reader) == len(cub.reader) == 32
    row_of = {cub.row(index)["path"]: index for index in range(32)}
    for index in range(32):
        row = data.row(index)
        other = row_of[row["path"]]
        assert (row["label"], row["split"]) == (cub.row(other)["label"], cub.row(other)["split"])
        sample, known = data.sample(index), cub.sample(other)
        for key in ("metadata", "metadata_valid"):
            for name in ("place", "date"):
                assert np.allclose(sample[key][name], known[key][name], atol=1e-4)


# --- the index


def test_the_index_is_made_once_and_again_when_a_list_changes(tmp_path: Path, cache: Path, monkeypatch) -> None:
    make_inaturalist(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    made = []
    make = inaturalist._make
    monkeypatch.setattr(inaturalist, "_make", lambda *args: made.append(1) or make(*args))
    for _ in range(3):
        INaturalistDataModule(str(tmp_path))
    assert len(made) == 1
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before  # nothing beside the user's files
    [file] = (cache / "inaturalist").glob("*.arrow")
    whole = json.loads((tmp_path / "val.json").read_text("utf-8"))
    whole["annotations"][0]["category_id"] = CATEGORIES[3][0]
    (tmp_path / "val.json").write_text(json.dumps(whole))
    INaturalistDataModule(str(tmp_path))
    assert len(made) == 2 and [*(cache / "inaturalist").glob("*.arrow")] == [file]
    file.write_bytes(file.read_bytes()[:500])  # a cut one is made again
    INaturalistDataModule(str(tmp_path))
    assert len(made) == 3


def test_an_index_is_not_half_written(tmp_path: Path, cache: Path, monkeypatch) -> None:
    make_inaturalist(tmp_path)

    def breaks(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("pyarrow.ipc.RecordBatchFileWriter.write_table", breaks)
        with pytest.raises(FgvczooError, match=r"disk full.*FGVCZOO_CACHE"):
            INaturalistDataModule(str(tmp_path))
    assert not [*(cache / "inaturalist").glob("*.arrow")]
    INaturalistDataModule(str(tmp_path))


def test_processes_map_the_same_file(tmp_path: Path) -> None:
    make_inaturalist(tmp_path)
    reader = INaturalistDataModule(str(tmp_path), supercategory="Birds").reader
    content = pickle.dumps(reader)
    assert len(content) < 2000  # no row travels
    other = pickle.loads(content)
    assert other.class_names == reader.class_names and np.array_equal(other.labels, reader.labels)
    assert not INaturalistDataModule(str(tmp_path)).reader.labels.flags.writeable  # mapped


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w["images"][1].update(id=w["images"][0]["id"]), "image id 100000 occurs twice"),
        (lambda w: w["annotations"].pop(), "has no annotation; expected one for each"),
        (lambda w: w["annotations"].append(w["annotations"][0]), "do not match"),
        (lambda w: w["annotations"][0].update(category_id=5), "category 5, which is none of 4"),
        (lambda w: w["categories"].append(w["categories"][0]), "a category id occurs twice"),
        (lambda w: w["images"][0].update(file_name="../x.jpg"), "outside the images folder"),
        (lambda w: w["images"][0].update(file_name="train/x.jpg"), "1 of 14 listed images are missing"),
        (lambda w: w["images"][0].update(latitude=91), "outside -90..90"),
        (lambda w: w["images"][0].update(longitude=190), "longitude 190 outside"),
        (lambda w: w["images"][0].update(id="a"), "which is no such entry"),
        (lambda w: w["images"][0].pop("file_name"), "which is no such entry"),
        (lambda w: w.update(images=[]), "lists no image"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, change, message: str) -> None:
    make_inaturalist(tmp_path)
    whole = json.loads((tmp_path / "train.json").read_text("utf-8"))
    change(whole)
    (tmp_path / "train.json").write_text(json.dumps(whole))
    with pytest.raises(FgvczooError, match=message) as error:
        INaturalistDataModule(str(tmp_path), keys=["metadata"])
    assert "\n" not in str(error.value)


def test_other_mistakes(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(FgvczooError, match=r"no train\.json in it"):
        INaturalistDataModule(str(tmp_path))
    with pytest.raises(FgvczooError, match="version='2019'; expected '2017' or '2018' or '2021'"):
        INaturalistDataModule(str(tmp_path), version="2019")
    make_inaturalist(tmp_path)
    (tmp_path / "val.json").rename(tmp_path / "other.json")
    with pytest.raises(FgvczooError, match=r"val\.json is missing"):
        INaturalistDataModule(str(tmp_path))
    (tmp_path / "val.json").write_text("<html>")
    with pytest.raises(FgvczooError, match="no whole JSON object"):
        INaturalistDataModule(str(tmp_path))
    os.replace(tmp_path / "other.json", tmp_path / "val.json")
    monkeypatch.setitem(inaturalist._CLASSES, "2021", 4)
    with pytest.raises(FgvczooError, match="expected 2,686,843 train, 100,000 test"):
        INaturalistDataModule(str(tmp_path))


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_lists_are_read_in_pieces(tmp_path: Path, monkeypatch, chunk: int) -> None:
    monkeypatch.setattr("fgvczoo.data.json_stream._CHUNK", chunk)
    file = tmp_path / "a.json"
    value = {"info": 12.5, "a": [1, 234, "x]\\", {"b": [[], {}]}, None], "empty": [], "number": 3456}
    file.write_text(json.dumps(value, indent=1))
    assert [*json_items(file)] == [("info", 12.5), *(("a", item) for item in value["a"]), ("number", 3456)]
    file.write_text("[1, 22]")
    assert [*json_items(file)] == [("", 1), ("", 22)]
    for text in ('{"a": [1, 2', '{"a" 1}', "{1: 2}", "", '{"a": [1 2]}', "{'a': 1}"):
        file.write_text(text)
        with pytest.raises(FgvczooError, match="no whole JSON object of lists"):
            list(json_items(file))
