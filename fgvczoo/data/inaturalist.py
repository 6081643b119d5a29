"""iNaturalist 2017, 2018 and 2021 (Van Horn et al. 2018, 2021) in their official layouts, with place and date.

The lists are JSON of gigabytes: they are read once into an Arrow file of the cache, which is mapped into memory and
shared by all processes. It is made anew when one of the lists changes.
"""

from __future__ import annotations

import json
import math
import re
from array import array
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from fgvczoo.data.base import FGVCDataModule
from fgvczoo.data.cached import cached_table
from fgvczoo.data.json_stream import json_items
from fgvczoo.data.official import (
    Archive,
    Official,
    Protocol,
    check_choice,
    check_counts,
    check_listed,
    find_folder,
    read_text,
    tree_levels,
)
from fgvczoo.errors import FgvczooError, did_you_mean

VERSIONS = ("2017", "2018", "2021")
_FORMAT = 1  # of the cached file
_RANKS = ("kingdom", "phylum", "class", "order", "family", "genus")
_TRAIN = {"2017": 579_184, "2018": 437_513, "2021": 2_686_843}  # images of the real sets
_VAL = {"2017": 95_986, "2018": 24_426, "2021": 100_000}
_MINI, _CLASSES = 500_000, {"2017": 5_089, "2018": 8_142, "2021": 10_000}
_DATE = re.compile(r"\d{4}-(\d{2})-(\d{2})(?:[T ](\d{2}):\d{2}(?::\d{2}(?:\.\d+)?)?(?:Z|[+-]\d{2}:?\d{2})?)?")
_ARCHIVES = {
    "2017": (Archive("train_val_images.tar.gz", "7c784ea5e424efaec655bd392f87301f", True),),
    "2018": (Archive("train_val2018.tar.gz", "b1c6952ce38f31868cc50ea72d066cc3", True),),
    "2021": (
        Archive("train.tar.gz", "e0526d53c7f7b2e3167b2b43bb2690ed", True),
        Archive("train_mini.tar.gz", "db6ed8330e634445efc8fec83ae81442", True),
        Archive("val.tar.gz", "f6f6e0e242e3d4c9569ba56400938afc", True),
    ),
}


class INaturalist(Official):
    """The rows of one year: those of training in the order of their list, then those of validation, which are "test"
    here, as papers report them.

    root: the folder that holds `train2017.json`, `val2017.json` and `train_val_images/`; `train2018.json`,
        `val2018.json`, `train_val2018/` and, for names, `categories.json`; or `train.json` (`train_mini.json`),
        `val.json`, `train/` (`train_mini/`) and `val/`.
    version: "2017", "2018" or "2021".
    mini: train on the 50 images a class of `train_mini.json` (2021).
    supercategory: only the classes of this one, such as Birds; labels count these alone.
    locations: the folder of `train2017_locations.json` and so on, if another than the root; 2021 has them in its lists.
    protocol: "standard", or "metric-learning" (2018): the lists `Inaturalist_train_set1.txt` and
        `Inaturalist_test_set1.txt`, in the root or its `Inat_dataset_splits/`, whose classes are disjoint.

    Labels are the places of the categories in the list, whatever the order of folders. Place is latitude and longitude
    in degrees; date is month 1..12, hour 0..23 (NaN in 2017, whose dates have no hour) and day 1..31. 0.0 is a value.

    Attributes beside those of `Reader`:
        image_ids: (N,) int64, the set's own.
        level_names: rank -> names, of the columns of the batch key `label_levels` (B, L).
    """

    name = "inaturalist"
    archives = tuple(archive for year in _ARCHIVES.values() for archive in year)

    def __init__(
        self,
        root: str | Path | None,
        *,
        version: str = "2021",
        mini: bool = False,
        supercategory: str | None = None,
        locations: str | Path | None = None,
        protocol: Protocol = "standard",
    ) -> None:
        version = str(version)
        check_choice("version", version, VERSIONS)
        if mini and version != "2021":
            raise FgvczooError(f"mini: only 2021 has a mini training list, not {version}")
        if protocol == "metric-learning" and version != "2018":
            raise FgvczooError(f"protocol=metric-learning: its lists are of 2018, not {version}")
        self._arguments: dict[str, Any] = {
            "version": version, "mini": mini, "supercategory": supercategory, "locations": locations,
            "protocol": protocol,
        }  # fmt: skip
        train = "train_mini" if mini else "train"
        lists = [f"{name}.json" if version == "2021" else f"{name}{version}.json" for name in (train, "val")]
        self.folder = self.pictures = find_folder(
            root, (".", version, f"inat{version}", "inaturalist"), lists[:1], archives=_ARCHIVES[version],
            get=f"get what https://github.com/visipedia/inat_comp has of {version}, unpack it, and give the folder",
        )  # fmt: skip
        places = Path(locations) if locations is not None else self.folder
        if locations is not None and not places.is_dir():
            raise FgvczooError(f"locations={locations}: no such folder; expected {version}'s *_locations.json in it")
        sources = [self.folder / name for name in lists]
        beside = [places / f"{file.stem}_locations.json" for file in sources]
        has_places = version == "2021" or all(file.is_file() for file in beside)
        if locations is not None and not has_places:
            raise FgvczooError(f"{places}: {beside[0].name} and {beside[1].name} are not both in it")
        index = _open(self.folder, sources, beside if version != "2021" and has_places else [])
        self._train = index.train
        self._read_classes(index.categories, version, supercategory)
        self._read_rows(index, protocol, version, mini)
        self.keys = (*(("metadata",) if has_places else ()), *(("label_levels",) if self._levels else ()))

    def __reduce__(self) -> Any:  # another process maps the file itself
        return partial(type(self), self.folder, **self._arguments), ()

    def picture(self, index: int) -> Path:
        return self.pictures / self._files[self._place(index)].as_py()

    def _place(self, index: int) -> int:
        """Of a row in the file."""
        return int(index if self._rows is None else self._rows[index])

    def _read_classes(self, categories: list[dict[str, Any]], version: str, supercategory: str | None) -> None:
        """Class names, levels, and `_label_of`, (C,) the label of each category, -1 of those left out."""
        names = [str(category["name"]) for category in categories]
        if version == "2018" and (self.folder / "categories.json").is_file():
            categories = self._named(categories)
            names = [str(category["name"]) for category in categories]
        kept = np.ones(len(names), bool)
        if supercategory is not None:
            groups = [str(category.get("supercategory")) for category in categories]
            if supercategory not in groups:
                known = sorted(set(groups))
                raise FgvczooError(
                    f"supercategory={supercategory!r}; {self.folder} has {', '.join(known)}"
                    f"{did_you_mean(supercategory, known)}"
                )
            kept = np.array([group == supercategory for group in groups])
        self._label_of = np.where(kept, np.cumsum(kept) - 1, -1)
        self.class_names = [
            f"{name} [{place}]" if names.count(name) > 1 else name
            for place, (name, keep) in enumerate(zip(names, kept))
            if keep
        ]
        categories = [category for category, keep in zip(categories, kept) if keep]
        ranks = [rank for rank in _RANKS if all(isinstance(category.get(rank), str) for category in categories)]
        if not ranks and all(isinstance(category.get("supercategory"), str) for category in categories):
            ranks = ["supercategory"]
        found = tree_levels([[category[rank] for rank in ranks] for category in categories]) if ranks else []
        self.level_names = {rank: nodes for rank, (nodes, _) in zip(ranks, found)}
        self._levels = [places for _, places in found]

    def _named(self, categories: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The same with what `categories.json` says: the lists of 2018 have numbers for names."""
        file = self.folder / "categories.json"
        try:
            of_id = {item["id"]: item for item in json.loads(read_text(file)) if isinstance(item["name"], str)}
            return [category | of_id[category["id"]] for category in categories]
        except (ValueError, TypeError, KeyError):
            raise FgvczooError(f"{file}: expected a list of id and name of every category; get it again") from None

    def _read_rows(self, index: _Index, protocol: Protocol, version: str, mini: bool) -> None:
        column = {name: index.table.column(name).chunk(0) for name in index.table.column_names}
        self._files = column.pop("file_name")
        arrays = {name: values.to_numpy(zero_copy_only=True) for name, values in column.items()}
        train, total = self._train, len(self._files)
        whole = bool((self._label_of >= 0).all())
        if whole and len(self._label_of) == _CLASSES[version]:
            want = {"train": _MINI if mini else _TRAIN[version], "test": _VAL[version]}
            check_counts(self.folder, {"train": train, "test": total - train}, want)
        check_choice("protocol", protocol, ("standard", "metric-learning"))
        self._rows = None if whole else np.flatnonzero(self._label_of[arrays["category"]] >= 0)
        if protocol == "metric-learning":
            self._by_lists(arrays)
        else:
            number = total if self._rows is None else len(self._rows)
            first = train if self._rows is None else int(np.searchsorted(self._rows, train))
            rows = np.arange(number)
            self.splits = {"train": rows[:first], "test": rows[first:]}
            self.labels = arrays["category"] if whole else self._label_of[arrays["category"][self._rows]]
        for split, rows in self.splits.items():
            if not len(rows):
                raise FgvczooError(f"{self.folder}: no {split} image")
        self.image_ids = self._of_rows(arrays["id"])
        self._arrays = arrays
        self._has_hours = version != "2017"

    def _by_lists(self, arrays: dict[str, np.ndarray]) -> None:
        """Rows, splits and labels of the lists of metric learning, whose images are those of both official parts."""
        places = {name: row for row, name in enumerate(self._files.to_pylist())}
        found = []
        for split in ("train", "test"):
            name = f"Inaturalist_{split}_set1.txt"
            file = next(
                (f for f in (self.folder / "Inat_dataset_splits" / name, self.folder / name) if f.is_file()), None
            )
            if file is None:
                raise FgvczooError(
                    f"{self.folder}: no {name}, nor in Inat_dataset_splits/; get the lists of the protocol"
                )
            paths = read_text(file).split()
            if unknown := [path for path in paths if path not in places]:
                raise FgvczooError(f"{file}: {unknown[0]!r} is in neither train2018.json nor val2018.json")
            rows = np.array([places[path] for path in paths], np.int64)
            found.append(rows[self._label_of[arrays["category"][rows]] >= 0])
        train, test = (np.unique(arrays["category"][rows]) for rows in found)
        if len(both := np.intersect1d(train, test)) or not len(train) or not len(test):
            text = f"category {both[0]} is in both" if len(both) else "one of them is empty"
            raise FgvczooError(f"{self.folder}: lists of the protocol: {text}; expected disjoint classes")
        order = np.concatenate([train, test])
        names = dict(zip(np.flatnonzero(self._label_of >= 0).tolist(), self.class_names))
        self.all_class_names = [names[place] for place in order.tolist()]
        self.class_names = self.all_class_names[: len(train)]
        self._levels = [places[self._label_of[order]] for places in self._levels]
        self._label_of = np.full(len(self._label_of), -1)
        self._label_of[order] = np.arange(len(order))
        self._rows = np.concatenate([np.sort(rows) for rows in found])
        self.labels = self._label_of[arrays["category"][self._rows]]
        rows = np.arange(len(self._rows))
        first, second = rows[: len(found[0])], rows[len(found[0]) :]
        self.splits = {"train": first, "test": second, "query": second, "gallery": second}

    def _of_rows(self, values: np.ndarray) -> np.ndarray:
        return values if self._rows is None else values[self._rows]

    def _read_metadata(self) -> Any:
        return _Sightings(self._arrays, self._rows, self._has_hours)

    def _read_label_levels(self) -> Any:
        return _ByLabel(np.stack(self._levels, axis=1), self.labels)


class _ByLabel(NamedTuple):
    """A table of classes, as one of rows."""

    of_class: np.ndarray
    labels: np.ndarray

    def __getitem__(self, index: Any) -> Any:
        return self.of_class[self.labels[index]]


class _Sightings(NamedTuple):
    """Place and date of the rows, out of the mapped columns."""

    arrays: dict[str, np.ndarray]
    rows: np.ndarray | None
    has_hours: bool

    def __getitem__(self, index: Any) -> Any:
        place = index if self.rows is None else self.rows[index]
        values, valid = {}, {}
        for name, columns, needed in (
            ("place", ("latitude", "longitude"), 2),
            ("date", ("month", "hour", "day"), 1 + self.has_hours),
        ):
            value = np.array([self.arrays[column][place] for column in columns], np.float32)
            if name == "date" and not self.has_hours:
                value[1] = np.nan
            valid[name] = np.bool_(np.isfinite(value[:needed]).all())
            values[name] = value if valid[name] else np.zeros_like(value)
        return {"metadata": values, "metadata_valid": valid}


class INaturalistDataModule(FGVCDataModule):
    """iNaturalist 2017, 2018 or 2021. Its pictures are never downloaded here: `root` says where they are.

    root, version, mini, supercategory, locations, protocol: see `INaturalist`. options: see `FGVCDataModule`. Keys:
    metadata: place (latitude, longitude in degrees) and date (month 1..12, hour 0..23 but NaN in 2017, day 1..31), with
    metadata_valid; label_levels.
    """

    reader_class = INaturalist

    def __init__(
        self,
        root: str | None = None,
        version: str = "2021",
        mini: bool = False,
        supercategory: str | None = None,
        locations: str | None = None,
        protocol: Protocol = "standard",
        **options: Any,
    ) -> None:
        reader = INaturalist(
            root,
            version=version,
            mini=mini,
            supercategory=supercategory,
            locations=locations,
            protocol=protocol,
        )
        super().__init__(reader, **options)


# -- the index ---------------------------------------------------------------------------------------------------------


class _Index(NamedTuple):
    """Columns of all images, those of training first; the categories; how many images are of training."""

    table: pa.Table
    categories: list[dict[str, Any]]
    train: int


def _open(folder: Path, lists: Sequence[Path], locations: Sequence[Path]) -> _Index:
    """The index of two lists and what is beside them."""
    sources = [*lists, *locations]
    table = cached_table("inaturalist", _FORMAT, sources, lambda: _make(folder, lists, locations))
    told = table.schema.metadata
    return _Index(table, json.loads(told[b"categories"]), int(told[b"train"]))


def _make(folder: Path, lists: Sequence[Path], locations: Sequence[Path]) -> pa.Table:
    """Reads the lists, and looks whether every picture is there."""
    parts: list[dict[str, Any]] = []
    categories: list[dict[str, Any]] = []
    for number, file in enumerate(lists):
        columns, own = _read_list(file, _read_locations(locations[number]) if locations else None)
        check_listed(folder, columns["file_name"], file)
        if number and [item["id"] for item in own] != [item["id"] for item in categories]:
            raise FgvczooError(f"{file}: its categories are not those of {lists[0].name}")
        categories = categories or own
        parts.append(columns)
    kinds = {"file_name": pa.large_string(), "id": pa.int64(), "category": pa.int64()}
    table = pa.table(
        {
            name: pa.concat_arrays([pa.array(part[name], kinds.get(name, pa.float32())) for part in parts])
            for name in parts[0]
        }
    )
    check_repeats(np.asarray(table.column("id")), lists)
    told = {"categories": json.dumps(categories), "train": str(len(parts[0]["id"]))}
    return table.replace_schema_metadata(told)


def check_repeats(numbers: np.ndarray, lists: Sequence[Path]) -> None:
    """Refuses an image id that is there twice."""
    ordered = np.sort(numbers)
    if len(twice := np.flatnonzero(ordered[1:] == ordered[:-1])):
        raise FgvczooError(f"{' and '.join(map(str, lists))}: image id {ordered[twice[0]]} occurs twice")


def _read_list(
    file: Path, sightings: dict[int, tuple[float, ...]] | None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The columns of a list's images, and its categories. sightings: by image id, where not of the list itself."""
    columns: dict[str, Any] = {"file_name": [], "id": array("q")} | {name: array("f") for name in _SIGHTING}
    image_of, category_of = array("q"), array("q")
    categories: list[dict[str, Any]] = []
    for key, item in json_items(file):
        try:
            if key == "images":
                columns["id"].append(item["id"])
                columns["file_name"].append(item["file_name"])
                if sightings is None:
                    seen = _sighting(item, "latitude", "longitude")
                else:
                    seen = sightings.get(item["id"], _UNKNOWN)
                for name, value in zip(_SIGHTING, seen):
                    columns[name].append(value)
            elif key == "annotations":
                image_of.append(item["image_id"])
                category_of.append(item["category_id"])
            elif key == "categories":
                categories.append(
                    {"id": item["id"], "name": item["name"]}
                    | {name: item[name] for name in ("supercategory", *_RANKS) if name in item}
                )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise FgvczooError(f"{file}: {key} has {str(item)[:80]}, which is no such entry ({error})") from None
    if not columns["id"]:
        raise FgvczooError(f"{file}: lists no image")
    columns["category"] = _categories(file, columns, np.array(image_of), np.array(category_of), categories)
    return columns, categories


def _categories(
    file: Path, columns: dict[str, Any], image_of: np.ndarray, category_of: np.ndarray, categories: list[dict[str, Any]]
) -> np.ndarray:
    """(N,) the place of each image's category in their list."""
    place_of = {item["id"]: place for place, item in enumerate(categories)}
    if len(place_of) < len(categories):
        raise FgvczooError(f"{file}: a category id occurs twice")
    unknown = [number for number in np.unique(category_of).tolist() if number not in place_of]
    if unknown:
        raise FgvczooError(f"{file}: an annotation has category {unknown[0]}, which is none of {len(categories)}")
    images = np.array(columns["id"])
    order, by_image = np.argsort(images, kind="stable"), np.argsort(image_of, kind="stable")
    check_repeats(images, [file])
    if not np.array_equal(images[order], image_of[by_image]):
        missing = np.setdiff1d(images, image_of)
        what = f"image {missing[0]} has no annotation" if len(missing) else "images and annotations do not match"
        raise FgvczooError(f"{file}: {what}; expected one for each image")
    ids, places = np.unique(category_of, return_inverse=True)
    found = np.empty(len(images), np.int64)
    found[order] = np.array([place_of[number] for number in ids.tolist()], np.int64)[places][by_image]
    return found


_SIGHTING = ("latitude", "longitude", "month", "day", "hour")
_UNKNOWN = (math.nan,) * len(_SIGHTING)


def _read_locations(file: Path) -> dict[int, tuple[float, ...]]:
    """Image id -> what is known of place and date."""
    found = {}
    for _, item in json_items(file):
        try:
            found[item["id"]] = _sighting(item, "lat", "lon")
        except (KeyError, TypeError, ValueError) as error:
            raise FgvczooError(f"{file}: {str(item)[:80]} is not id, lat, lon, date ({error})") from None
    return found


def _sighting(item: dict[str, Any], latitude: str, longitude: str) -> tuple[float, ...]:
    """`_SIGHTING` of an image, NaN where it is not known; a date that cannot be read is not known."""
    place = [math.nan if value is None else float(value) for value in (item.get(latitude), item.get(longitude))]
    if abs(place[0]) > 90 or abs(place[1]) > 180:
        raise ValueError(f"{latitude} {place[0]:g}, {longitude} {place[1]:g} outside -90..90, -180..180")
    date = _DATE.fullmatch(item.get("date") or "")
    month, day, hour = (math.nan if cell is None else float(cell) for cell in date.groups()) if date else _UNKNOWN[:3]
    if not (1 <= month <= 12 and 1 <= day <= 31):
        month = day = hour = math.nan
    return *place, month, day, hour
