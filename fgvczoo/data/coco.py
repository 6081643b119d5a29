"""MS COCO 2014 (Lin et al. 2014) for segmentation: the classes of a picture, its boxes and its mask.

The lists are read once into the cache, see `fgvczoo.data.cached`. Boxes are x0, y0, x1, y1 with exclusive ends.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fgvczoo.data.base import FGVCDataModule, check_class_names
from fgvczoo.data.cached import cached_table
from fgvczoo.data.json_stream import json_items
from fgvczoo.data.official import Archive, Official, check_counts, check_listed, check_unique, find_folder
from fgvczoo.errors import FgvczooError
from fgvczoo.preprocess import image_size, read_mask

_GET = "get train2014.zip, val2014.zip and annotations_trainval2014.zip, and unpack them in one folder"
_FORMAT = 1  # of the cached file
_CLASSES, _COUNTS = 80, {"train": 82_081, "test": 40_137}  # of the real set, with an object


class COCO(Official):
    """The rows of MS COCO 2014: those of training, then those of validation, which are "test" here, as papers report
    them; images without an object are left out.

    root: the folder that holds `train2014/`, `val2014/` and `annotations/instances_{train,val}2014.json`.

    Labels are ranks of the category ids, which have gaps. A picture has several classes, which are the batch's
    `labels`; `label` is the first of them. Masks are those of `SegmentationClass/` in the root where there is such a
    folder, else the objects drawn into the picture, the smaller ones on top. Other sizes than the real set's are read
    alike; counts are asserted where it is the real set.

    Attributes beside those of `Reader`:
        image_ids: (N,) int64, the set's own.
        category_ids: of the labels.
    """

    name = "coco"
    archives = (
        Archive("train2014.zip", "0da8c0bd3d6becc4dcb32757491aca88"),
        Archive("val2014.zip", "a3d79f5ed8d289b7a7554ce06a5782b3"),
        Archive("annotations_trainval2014.zip", "0a379cfc70b0e71301e0f377548639bd"),
    )
    keys = ("labels", "boxes", "mask")

    def __init__(self, root: str | Path | None) -> None:
        marker = "annotations/instances_train2014.json"
        self.folder = self.pictures = find_folder(
            root, (".", "coco", "COCO"), (marker,), archives=self.archives, get=_GET
        )
        lists = [self.folder / "annotations" / f"instances_{split}2014.json" for split in ("train", "val")]
        table = cached_table("coco", _FORMAT, lists, lambda: _make(self.folder, lists))
        categories = json.loads(table.schema.metadata[b"categories"])
        self.category_ids = [number for number, _ in categories]
        self.class_names = [name for _, name in categories]
        self._files, self._objects = (table.column(name).chunk(0) for name in ("file_name", "objects"))
        self.image_ids, self.labels = (table.column(name).chunk(0).to_numpy() for name in ("id", "label"))
        rows, first = np.arange(len(self.labels)), int(table.schema.metadata[b"train"])
        self.splits = {"train": rows[:first], "test": rows[first:]}
        for split, own in self.splits.items():
            if not len(own):
                raise FgvczooError(f"{self.folder}: no {split} image")
        found = {split: len(own) for split, own in self.splits.items()}
        check_counts(self.folder, found, _COUNTS if len(categories) == _CLASSES else None)

    def picture(self, index: int) -> Path:
        return self.pictures / self._files[index].as_py()

    def objects(self, index: int) -> list[dict[str, Any]]:
        """Those of a picture: `label`, `bbox` (x, y, width, height), `segmentation` as the list has it, `area`."""
        return json.loads(self._objects[index].as_py())

    def row(self, index: int) -> dict[str, Any]:
        """As of any set, with `boxes` and `class_numbers`, all classes of the picture."""
        classes = np.flatnonzero(self.table("labels")[index]).tolist()
        return {**super().row(index), "boxes": self.table("boxes")[index].tolist(), "class_numbers": classes}

    def _read_labels(self) -> _Objects:
        return _Objects(self, "labels")

    def _read_boxes(self) -> _Objects:
        return _Objects(self, "boxes")

    def _read_mask(self) -> _Objects:
        return _Objects(self, "mask")


@dataclass(frozen=True)
class _Objects:
    """An annotation of the rows, made of their objects when it is asked for."""

    reader: COCO
    key: str

    def __getitem__(self, index: int) -> np.ndarray:
        objects = self.reader.objects(index)
        if self.key == "labels":
            there = np.zeros(len(self.reader.class_names), np.uint8)
            there[[item["label"] for item in objects]] = 1
            return there
        if self.key == "boxes":
            return np.array([(x, y, x + w, y + h) for x, y, w, h in (item["bbox"] for item in objects)], np.float64)
        picture = self.reader.picture(index)
        file = self.reader.folder / "SegmentationClass" / f"{picture.stem}.png"
        if file.parent.is_dir():
            return read_mask(file)
        return draw(objects, *image_size(picture))


def draw(objects: list[dict[str, Any]], height: int, width: int) -> np.ndarray:
    """(H, W) uint8: 0 background, label + 1 of the smallest object that covers a pixel."""
    mask = np.zeros((height, width), np.uint8)
    for item in sorted(objects, key=lambda item: -item["area"]):
        shape = item["segmentation"]
        if isinstance(shape, dict):  # lengths of runs of background and object by turns, in the order of columns
            runs = np.repeat(np.arange(len(shape["counts"])) % 2, shape["counts"]).astype(bool)
            mask[runs.reshape(shape["size"], order="F")] = item["label"] + 1
        else:
            for polygon in shape:
                mask[_inside(np.array(polygon, np.float64).reshape(-1, 2), height, width)] = item["label"] + 1
    return mask


def _inside(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W) bool, which pixels have their centre in a polygon: left of it an odd number of edges crosses their row."""
    (x0, y0), (x1, y1) = points.T, np.roll(points, -1, axis=0).T
    rows = np.arange(height)[:, None] + 0.5
    crossed, edge = np.nonzero((y0 <= rows) != (y1 <= rows))
    x = x0[edge] + (rows[crossed, 0] - y0[edge]) * (x1 - x0)[edge] / (y1 - y0)[edge]
    turns = np.zeros((height, width + 1), np.int64)
    np.add.at(turns, (crossed, np.clip(np.ceil(x - 0.5), 0, width).astype(np.int64)), 1)
    return np.cumsum(turns[:, :-1], axis=1) % 2 == 1


def _make(folder: Path, lists: list[Path]) -> pa.Table:
    columns: dict[str, list[Any]] = {name: [] for name in ("file_name", "id", "label", "objects")}
    categories: list[tuple[int, str]] = []
    train = 0
    for file in lists:
        names: dict[int, str] = {}
        objects: dict[int, list[dict[str, Any]]] = {}
        own: dict[int, str] = {}
        for key, item in json_items(file):
            try:
                if key == "images":
                    if item["id"] in names:
                        raise FgvczooError(f"{file}: image id {item['id']} occurs twice")
                    names[item["id"]] = item["file_name"]
                elif key == "annotations":
                    kept = {name: item[name] for name in ("bbox", "segmentation", "area")}
                    _check_shape(kept)
                    objects.setdefault(item["image_id"], []).append({"label": item["category_id"], **kept})
                elif key == "categories":
                    own[item["id"]] = item["name"]
            except (KeyError, TypeError, ValueError) as error:
                raise FgvczooError(f"{file}: {key} has {str(item)[:80]}, which is no such entry ({error})") from None
        if categories and sorted(own.items()) != categories:
            raise FgvczooError(f"{file}: its categories are not those of {lists[0].name}")
        categories = sorted(own.items())
        check_class_names([name for _, name in categories], str(file))
        if unknown := objects.keys() - names.keys():
            raise FgvczooError(f"{file}: an annotation of image {min(unknown)}, which it does not list")
        place = {category: label for label, (category, _) in enumerate(categories)}
        top = f"{file.stem.removeprefix('instances_')}"
        for image, items in objects.items():
            for item in items:
                if item["label"] not in place:
                    raise FgvczooError(f"{file}: category {item['label']} of image {image} is none of {len(place)}")
                item["label"] = place[item["label"]]
            columns["file_name"].append(f"{top}/{names[image]}")
            columns["id"].append(image)
            columns["label"].append(min(item["label"] for item in items))
            columns["objects"].append(json.dumps(items))
        paths = columns["file_name"][train:]
        check_unique(paths, file)
        check_listed(folder, paths, file)
        train = train or len(paths)
    kinds = {"id": pa.int64(), "label": pa.int64()}
    table = pa.table({name: pa.array(values, kinds.get(name, pa.large_string())) for name, values in columns.items()})
    return table.replace_schema_metadata({"categories": json.dumps(categories), "train": str(train)})


def _check_shape(item: dict[str, Any]) -> None:
    """`ValueError` where box or shape of an object are not as COCO has them."""
    if len(item["bbox"]) != 4 or not all(isinstance(value, (int, float)) for value in (*item["bbox"], item["area"])):
        raise ValueError("bbox is not x, y, width, height")
    shape = item["segmentation"]
    if isinstance(shape, dict):
        height, width = shape["size"]
        if not isinstance(shape["counts"], list) or sum(shape["counts"]) != height * width:
            raise ValueError("runs that do not fill their picture")
    elif not all(len(polygon) % 2 == 0 for polygon in shape):
        raise ValueError("a polygon of half a point")


class COCODataModule(FGVCDataModule):
    """MS COCO 2014. Its pictures are never downloaded here: `root` says where they are.

    root: see `COCO`. options: see `FGVCDataModule`. Keys: labels (C = 80), boxes, mask (0 background, classes from 1).
    """

    reader_class = COCO

    def __init__(self, root: str | None = None, **options: Any) -> None:
        super().__init__(COCO(root), **options)
