"""NABirds (Van Horn et al. 2015) in its official layout: birds of North America, classes by species, sex and age.

Ids of images are texts, and those of classes have gaps. Boxes are x0, y0, x1, y1 with exclusive ends.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fgvczoo.data.base import TEXT, FGVCDataModule
from fgvczoo.data.official import (
    Archive,
    Official,
    Part,
    check_boxes,
    check_unique,
    find_folder,
    from_size,
    join,
    mirrored,
    read_lines,
    to_numbers,
    tree_levels,
)
from fgvczoo.errors import FgvczooError

FOLDER = "nabirds"
_GET = (
    "get nabirds.tar.gz from https://dl.allaboutbirds.org/nabirds, where its terms must be accepted, unpack it, and "
    f"give the folder that holds {FOLDER}/"
)
_CLASSES, _COUNTS = 555, {"train": 23_929, "test": 24_633}  # of the real set


class NABirds(Official):
    """The rows of NABirds in the order of `images.txt`.

    root: the folder that holds `nabirds/`, or that folder itself.
    cropped: use the box of each bird as the picture.

    `classes.txt` names the nodes of a tree, of which those with images are classes: labels are the ranks of their
    numbers. Other sizes than the real set's are read alike; counts are asserted where it is the real set.

    Attributes beside those of `Reader`:
        image_ids: (N,) the set's own, texts.
        class_numbers: of the labels, as `classes.txt` has them.
        part_names: of the batch key `parts`.
        level_names: lists of names, of the columns of the batch key `label_levels` (B, L): the ancestors of a class
            from below the root down to itself; a class that lies higher stands for itself on the levels below it.
    """

    name = "nabirds"
    archives = (Archive("nabirds.tar.gz"),)
    keys = ("bbox", "parts", "label_levels")

    def __init__(self, root: str | Path | None, *, cropped: bool = False) -> None:
        self.folder = find_folder(root, (FOLDER, "."), ("image_class_labels.txt",), archives=self.archives, get=_GET)
        self.pictures = self.folder / "images"
        self.cropped = cropped
        listed = read_lines(self.folder / "images.txt", 2, "an image id and a path")
        self._ids = [name for name, _ in listed]
        check_unique(self._ids, self.folder / "images.txt")
        numbers = self._whole("image_class_labels.txt")
        self._names = self._node_names()
        self.class_numbers = np.unique(numbers)
        unknown = [number for number in self.class_numbers.tolist() if number not in self._names]
        if unknown:
            file = self.folder / "image_class_labels.txt"
            raise FgvczooError(f"{file}: class {unknown[0]} is not in classes.txt")
        flags = self._whole("train_test_split.txt")
        if len(wrong := np.flatnonzero((flags != 0) & (flags != 1))):
            file = self.folder / "train_test_split.txt"
            raise FgvczooError(f"{file}: {self._ids[wrong[0]]!r} has {flags[wrong[0]]}; expected 0 or 1")
        labels = np.searchsorted(self.class_numbers, numbers)
        class_names = self._class_names(self.class_numbers.tolist())
        paths = np.array([path for _, path in listed], TEXT)
        split = np.where(flags == 1, "train", "test")
        real = _COUNTS if len(class_names) == _CLASSES else None
        self.take([Part(self.folder / "images.txt", split, paths, labels)], class_names, real=real)
        self.image_ids = np.array(self._ids, TEXT)
        if cropped:
            self.require(["bbox"])

    def row(self, index: int) -> dict[str, Any]:
        """As of any set, with the `photographer`, where there is a list of them."""
        return {**super().row(index), **({"photographer": self._photographers[index]} if self._photographers else {})}

    @cached_property
    def part_names(self) -> list[str]:
        lines = read_lines(self.folder / "parts" / "parts.txt", 2, "a number and the name of a part")
        numbers = {int(number): name for number, name in lines if number.isdecimal()}
        if sorted(numbers) != list(range(1, len(lines) + 1)):
            raise FgvczooError(f"{self.folder / 'parts/parts.txt'}: its ids are not 1..{len(lines)}, each once")
        return [numbers[number] for number in sorted(numbers)]

    @cached_property
    def level_names(self) -> list[list[str]]:
        return [[self._names[node] for node in nodes] for nodes, _ in self._levels]

    @property
    def flip_pairs(self) -> tuple[tuple[int, int], ...]:
        """Left and right eye and wing, found by their names."""
        return mirrored(self.part_names) if (self.folder / "parts" / "parts.txt").is_file() else ()

    def _node_names(self) -> dict[int, str]:
        file = self.folder / "classes.txt"
        names = {}
        for number, name in read_lines(file, 2, "a number and a name"):
            if not number.isdecimal() or int(number) in names:
                raise FgvczooError(f"{file}: class {number!r}; expected whole numbers, each once")
            names[int(number)] = name
        return names

    def _class_names(self, numbers: list[int]) -> list[str]:
        """Their names; with the number where two are alike."""
        names = [self._names[number] for number in numbers]
        return [f"{name} [{number}]" if names.count(name) > 1 else name for number, name in zip(numbers, names)]

    def _whole(self, name: str) -> np.ndarray:
        """(N,) int64, the number after each image id."""
        file = self.folder / name
        cells = join(file, self._ids, read_lines(file, 2, "an image id and a number"))
        numbers = to_numbers(file, cells, 1)[:, 0]
        if len(wrong := np.flatnonzero(~((numbers >= 0) & (numbers % 1 == 0)))):
            raise FgvczooError(f"{file}: {self._ids[wrong[0]]!r} has {numbers[wrong[0]]:g}; expected a whole number")
        return numbers.astype(np.int64)

    def _read_bbox(self) -> np.ndarray:
        """(N, 4) float64."""
        file = self.folder / "bounding_boxes.txt"
        cells = join(file, self._ids, read_lines(file, 5, "an image id and x, y, width, height"))
        return check_boxes(file, self._ids, from_size(to_numbers(file, cells, 4)))

    def _read_parts(self) -> np.ndarray:
        """(N, K, 3) float64; invisible parts are zero."""
        file, count = self.folder / "parts" / "part_locs.txt", len(self.part_names)
        lines = read_lines(file, 5, "an image id, a part, x, y, visible")
        wanted = [f"{name} part {part}" for name in self._ids for part in range(1, count + 1)]
        cells = join(file, wanted, ((f"{name} part {part}", *rest) for name, part, *rest in lines))
        parts = to_numbers(file, cells, 3).reshape(len(self), count, 3)
        return np.where(parts[..., 2:] > 0, parts, 0)

    def _read_label_levels(self) -> np.ndarray:
        """(N, L) int64."""
        return np.stack([of_class for _, of_class in self._levels], axis=1)[self.labels]

    @cached_property
    def _levels(self) -> list[tuple[list[int], np.ndarray]]:
        """For each level, from below the root: its nodes, ascending, and (C,) the place of each class's among them."""
        file = self.folder / "hierarchy.txt"
        lines = to_numbers(file, read_lines(file, 2, "a class and the class above it"), 2).astype(np.int64)
        above = {int(child): int(parent) for child, parent in lines if child != parent}
        paths = []
        for number in self.class_numbers.tolist():
            path = [number]
            while path[-1] in above:
                path.append(above[path[-1]])
                if len(path) > len(above) + 1 or path[-1] not in self._names:
                    raise FgvczooError(f"{file}: what lies above class {number} is no tree of classes.txt")
            paths.append(path[::-1][1:] or path)  # without the root
        return tree_levels(paths)

    @cached_property
    def _photographers(self) -> list[str]:
        """Of all rows; empty where the file is not there."""
        file = self.folder / "photographers.txt"
        if not file.is_file():
            return []
        return [name for (name,) in join(file, self._ids, read_lines(file, 2, "an image id and a name"))]


class NABirdsDataModule(FGVCDataModule):
    """NABirds. Its pictures are never downloaded here: `root` says where they are.

    root, cropped: see `NABirds`. options: see `FGVCDataModule`. Keys: bbox, parts (K = 11), label_levels, the classes
    above each class.
    """

    reader_class = NABirds

    def __init__(self, root: str | None = None, cropped: bool = False, **options: Any) -> None:
        super().__init__(NABirds(root, cropped=cropped), **options)
