"""CUB-200-2011 (Wah et al. 2011) in its official layout, and SynthBirds, which has the same.

Files are joined by image id, never by line. Boxes are x0, y0, x1, y1 with exclusive ends.
"""

from __future__ import annotations

import csv
import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fgvczoo.data.base import FGVCDataModule, Reader
from fgvczoo.data.official import (
    Archive,
    Masks,
    Official,
    Protocol,
    Together,
    by_protocol,
    check_boxes,
    check_listed,
    find_folder,
    from_size,
    known,
    mirrored,
    read_text,
)
from fgvczoo.data.views import CornerViews
from fgvczoo.errors import FgvczooError

FOLDER = "CUB_200_2011"
_RECORD = "https://data.caltech.edu/records/65de6-vp158"
_SEGMENTATIONS_RECORD = "https://data.caltech.edu/records/w9d68-gec53"
_GET = f"get CUB_200_2011.tgz from {_RECORD}, unpack it, and give the folder that holds {FOLDER}/ and attributes.txt"
_FIRST_CLASS = "001.Black_footed_Albatross"
_IMAGES, _TRAIN, _TEST = 11_788, 5_994, 5_794  # of the real set
# Words in the names of attributes -> parts, from 1, as Concept-Centric Transformers maps them.
_PARTS_OF = {
    **{"bill": (2,), "wing": (9, 13), "upperparts": (1, 10), "underparts": (3, 4, 15), "breast": (4,), "back": (1,)},
    **{"tail": (14,), "head": (5,), "throat": (15,), "eye": (7, 11), "forehead": (6,), "nape": (10,), "belly": (3,)},
    **{"leg": (8, 12), "crown": (5,)},
}
MASK_OBJECT = 128  # a segmentation is grey votes of annotators: from here on a pixel is bird


class CUB(Official):
    """The rows of CUB-200-2011, in the order of the image ids.

    root: the folder that holds `CUB_200_2011/`, or that folder itself; `attributes.txt` and `segmentations/` may lie in
        either. A `metadata.csv` (SynthBirds) gives place and date.
    cropped: use the box of each bird as the picture: x, y, x + w, y + h rounded to whole pixels as Pillow's `crop`.
    protocol: "standard", the official split, or "metric-learning", the halves of the classes; see `by_protocol`.

    Other sizes than the real set's are read alike; counts are asserted where it is the real set.

    Attributes beside those of `Reader`:
        image_ids: (N,) int64, ascending.
        all_class_names: of all labels; `class_names` are those that are trained on.
        part_names, attribute_names: of the batch keys `parts` and `attributes`.
        class_attributes: (C, A) float32, percentages 0..100.
        attribute_parts, frequent_attributes: what concepts are made of, see there.
    """

    name = "cub"
    archives = (
        Archive("CUB_200_2011.tgz", "97eceeb196236b17998738112f37df78"),
        Archive("CUB_200_2011.tar.gz", "97eceeb196236b17998738112f37df78"),
    )
    optional, also = ("mask",), ("class_attributes",)

    def __init__(
        self,
        root: str | Path | None,
        *,
        cropped: bool = False,
        protocol: Protocol = "standard",
    ) -> None:
        self.folder = find_folder(root, (FOLDER, "."), ("images.txt",), archives=self.archives, get=_GET)
        self.cropped = cropped
        self._read_images()
        self._read_classes()
        self._read_splits(protocol)
        self.keys = ("bbox", "parts", "attributes", "mask", *(("metadata",) if self._place("metadata.csv") else ()))
        if cropped:
            self.require(["bbox"])

    def picture(self, index: int) -> Path:
        return self.folder / "images" / self._files[index]

    @cached_property
    def part_names(self) -> list[str]:
        return _names(self._file("parts/parts.txt"))

    @cached_property
    def attribute_names(self) -> list[str]:
        for folder in (self.folder.parent, self.folder, self.folder / "attributes"):
            if (folder / "attributes.txt").is_file():
                return _names(folder / "attributes.txt")
        raise FgvczooError(
            f"{self.folder}: no attributes.txt beside it, in it or in attributes/; the archive puts it beside {FOLDER}/"
        )

    @cached_property
    def class_attributes(self) -> np.ndarray:
        file = self._file("attributes/class_attribute_labels_continuous.txt")
        shape = len(self.all_class_names), len(self.attribute_names)
        table = _table(file, range(shape[1]), np.float32)
        if table.shape != shape:
            raise FgvczooError(f"{file}: {table.shape[0]} lines; expected one for each of {shape[0]} classes")
        return table

    @cached_property
    def attribute_parts(self) -> list[tuple[int, ...]]:
        """For each attribute its parts, from 0, by what stands before its "::"; () is of the whole bird."""
        groups = [name.partition("::")[0] for name in self.attribute_names]
        return [
            tuple(sorted({part - 1 for word, parts in _PARTS_OF.items() if word in group for part in parts}))
            for group in groups
        ]

    def frequent_attributes(self, share: float = 0.45, classes: int = 8) -> np.ndarray:
        """Places of the attributes that at least this share of the images of more than so many classes have.

        Concept-Centric Transformers keeps the 108 of the defaults.
        """
        return np.flatnonzero((self.class_attributes >= 100 * share).sum(axis=0) > classes)

    @property
    def flip_pairs(self) -> tuple[tuple[int, int], ...]:
        """Left and right eye, leg and wing, found by their names."""
        return mirrored(self.part_names) if (self.folder / "parts" / "parts.txt").is_file() else ()

    def _read_images(self) -> None:
        file = self._file("images.txt")
        listed: dict[int, str] = {}
        for number, path in _pairs(file):
            if number in listed:
                raise FgvczooError(f"{file}: image id {number} occurs twice")
            listed[number] = path
        if not listed:
            raise FgvczooError(f"{file}: lists no image")
        self.image_ids = np.array(sorted(listed), np.int64)
        self._files = [listed[number] for number in self.image_ids.tolist()]
        check_listed(self.folder / "images", self._files, file)

    def __len__(self) -> int:
        return len(self.image_ids)

    def _read_classes(self) -> None:
        file = self._file("classes.txt")
        self.all_class_names = _names(file)
        count = len(self.all_class_names)
        file = self._file("image_class_labels.txt")
        self.labels = self._by_image(file, _table(file, (0, 1), np.int64))[:, 0] - 1
        wrong = np.flatnonzero((self.labels < 0) | (self.labels >= count))
        if len(wrong):
            number, label = self.image_ids[wrong[0]], self.labels[wrong[0]] + 1
            raise FgvczooError(f"{file}: image {number} has class {label}; expected 1..{count}")

    def _read_splits(self, protocol: Protocol) -> None:
        file = self._file("train_test_split.txt")
        flags = self._by_image(file, _table(file, (0, 1), np.int64))[:, 0]
        wrong = np.flatnonzero((flags != 0) & (flags != 1))
        if len(wrong):
            raise FgvczooError(f"{file}: image {self.image_ids[wrong[0]]} has {flags[wrong[0]]}; expected 0 or 1")
        self._is_train = flags == 1
        found = len(self), int(self._is_train.sum()), int((~self._is_train).sum())
        is_real = len(self.all_class_names) == 200 and self.all_class_names[0] == _FIRST_CLASS
        if is_real and found != (_IMAGES, _TRAIN, _TEST):
            raise FgvczooError(
                f"{self.folder}: {found[0]:,} images, {found[1]:,} for training and {found[2]:,} for testing; expected "
                f"{_IMAGES:,}, {_TRAIN:,} and {_TEST:,}; unpack the archive again"
            )
        self.class_names, self.splits = by_protocol(protocol, self.all_class_names, self.labels, self._is_train)
        if not len(self.splits["train"]):
            raise FgvczooError(f"{file}: no training image")

    def _read_bbox(self) -> np.ndarray:
        """(N, 4) float64."""
        file = self._file("bounding_boxes.txt")
        boxes = from_size(self._by_image(file, _table(file, range(5), np.float64)))
        return check_boxes(file, self.image_ids, boxes)

    def _read_parts(self) -> np.ndarray:
        """(N, K, 3) float32."""
        file = self._file("parts/part_locs.txt")
        return self._by_image_and_item(file, len(self.part_names), np.float32, range(5), "part")

    def _read_attributes(self) -> Together:
        """(N, A) each: present float32, certainty uint8."""
        file = self._file("attributes/image_attribute_labels.txt")
        # Some lines have a sixth field: the first four are taken by position.
        table = self._by_image_and_item(file, len(self.attribute_names), np.int32, range(4), "attribute")
        for name, column, most in (("is_present", table[..., 0], 1), ("certainty", table[..., 1], 4)):
            if column.min() < 0 or column.max() > most:
                raise FgvczooError(f"{file}: {name} outside 0..{most}")
        present, certainty = table[..., 0].astype(np.float32), table[..., 1].astype(np.uint8)
        return Together({"attributes": present, "attribute_certainty": certainty})

    def _read_mask(self) -> Masks:
        """(H, W) uint8 each: 1 bird, 0 background."""
        if folder := self._place("segmentations"):
            files = [str(Path(file).with_suffix(".png")) for file in self._files]
            return Masks(folder, files, at_least=MASK_OBJECT)
        raise FgvczooError(
            f"{self.folder}: no segmentations/ in it or beside it; get segmentations.tgz from {_SEGMENTATIONS_RECORD} "
            "and unpack it there"
        )

    def _read_metadata(self) -> Together:
        """Place: latitude, longitude in degrees. Date: month 1..12, hour 0..23, day 1..31."""
        file = self._place("metadata.csv")
        assert file is not None  # it is in `keys` only then
        columns = ("latitude", "longitude", "date", "hour")
        lines = list(csv.DictReader(read_text(file).splitlines()))
        values = np.full((len(lines), 6), np.nan)
        for row, line in zip(values, lines):
            try:
                latitude, longitude, date, hour = (line[name] for name in columns)
                _, month, day = date.split("-") if date else ("", "", "")
                cells = (line["image_id"], latitude, longitude, month, hour, day)
                row[:] = [float(cell) if cell else np.nan for cell in cells]
            except (KeyError, TypeError, ValueError, IndexError):
                raise FgvczooError(f"{file}: {line} is not image_id, {', '.join(columns)}") from None
        values = self._by_image(file, values)
        return known({"place": values[:, :2], "date": values[:, 2:]}, {"date": 2})

    def _file(self, name: str) -> Path:
        path = self.folder / name
        if not path.is_file():
            raise FgvczooError(f"{path} is missing; unpack the archive again, or {_GET}")
        return path

    def _place(self, name: str) -> Path | None:
        """A file or folder that lies in the set's folder or beside it."""
        return next((path for path in (self.folder / name, self.folder.parent / name) if path.exists()), None)

    def _rows_of(self, file: Path, numbers: np.ndarray) -> np.ndarray:
        """Image ids -> rows."""
        rows = np.minimum(np.searchsorted(self.image_ids, numbers), len(self) - 1)
        unknown = np.flatnonzero(self.image_ids[rows] != numbers)
        if len(unknown):
            raise FgvczooError(f"{file}: image {numbers[unknown[0]]:g} is not in images.txt")
        return rows

    def _by_image(self, file: Path, table: np.ndarray) -> np.ndarray:
        """Lines that begin with an image id -> one row for each image, without the id."""
        rows = self._rows_of(file, table[:, 0])
        counts = np.bincount(rows, minlength=len(self))
        if (counts != 1).any():
            row = int(np.flatnonzero(counts != 1)[0])
            raise FgvczooError(
                f"{file}: {counts[row]} lines for image {self.image_ids[row]}; expected one for each image"
            )
        joined = np.empty_like(table[:, 1:])
        joined[rows] = table[:, 1:]
        return joined

    def _by_image_and_item(
        self, file: Path, items: int, dtype: type[np.generic], columns: Sequence[int], what: str
    ) -> np.ndarray:
        """Lines that begin with an image id and an item number from 1 -> (N, items, rest)."""
        table = _table(file, columns, np.float64 if dtype is np.float32 else dtype)
        rows = self._rows_of(file, table[:, 0])
        item = table[:, 1].astype(np.int64) - 1
        wrong = np.flatnonzero((item < 0) | (item >= items))
        if len(wrong):
            raise FgvczooError(
                f"{file}: {what} {item[wrong[0]] + 1} of image {table[wrong[0], 0]:g}; expected 1..{items}"
            )
        counts = np.bincount(rows * items + item, minlength=len(self) * items)
        if (counts != 1).any():
            row, place = divmod(int(np.flatnonzero(counts != 1)[0]), items)
            count, number = counts[row * items + place], self.image_ids[row]
            raise FgvczooError(f"{file}: {count} lines for {what} {place + 1} of image {number}; expected 1")
        joined = np.empty((len(self), items, table.shape[1] - 2), dtype)
        joined[rows, item] = table[:, 2:]
        return joined


class SynthBirds(CUB):
    """A copy of SynthBirds. Its pictures are ours to show."""

    name = "synthbirds"
    licence_allows_pictures = True


class CUBDataModule(FGVCDataModule):
    """CUB-200-2011. Its pictures are never downloaded here: `root` says where they are.

    root, cropped, protocol: see `CUB`. views: "images", or "corners", see `CornerViews`. options: see `FGVCDataModule`.
    Keys: bbox, parts (K = 15), attributes (A = 312,
    with attribute_certainty: 1 not visible, 2 guessing, 3 probably, 4 definitely), mask (1 = bird).
    """

    reader_class: type[CUB] = CUB

    def __init__(
        self,
        root: str | None = None,
        cropped: bool = False,
        protocol: Protocol = "standard",
        views: Literal["images", "corners"] = "images",
        **options: Any,
    ) -> None:
        reader: Reader = self.reader_class(root, cropped=cropped, protocol=protocol)
        if views not in ("images", "corners"):
            raise FgvczooError(f"views={views!r}; expected 'images' or 'corners'")
        if views == "corners":
            if cropped:
                raise FgvczooError("views=corners are cuts of whole pictures; leave out cropped")
            reader = CornerViews(reader)
        super().__init__(reader, **options)


class SynthBirdsDataModule(CUBDataModule):
    """SynthBirds, drawn on first use.

    size: "tiny", "small" or "large".
    root: where the copy lies or is drawn; by default a folder of the cache, see `fgvczoo.data.synthbirds.default_root`.
    cropped, protocol: see `CUB`. options: see `FGVCDataModule`. Keys: those of `CUBDataModule`, and metadata: place
    (latitude, longitude in degrees) and date (month 1..12, hour 0..23), with metadata_valid.
    """

    reader_class = SynthBirds

    def __init__(
        self,
        root: str | None = None,
        size: str = "small",
        cropped: bool = False,
        protocol: Protocol = "standard",
        **options: Any,
    ) -> None:
        from fgvczoo.data.synthbirds import make

        super().__init__(str(make(root, size)), cropped, protocol, **options)


def _pairs(file: Path) -> list[tuple[int, str]]:
    """Lines `number text`; the text may hold spaces."""
    pairs = []
    for place, line in enumerate(read_text(file).splitlines(), 1):
        number, _, text = line.strip().partition(" ")
        if not number.isdecimal() or not text:
            raise FgvczooError(f"{file}: line {place} is {line[:80]!r}; expected a number and a name")
        pairs.append((int(number), text.strip()))
    return pairs


def _names(file: Path) -> list[str]:
    """Names of the numbers 1, 2, ...; each must be there once."""
    pairs = _pairs(file)
    names = dict(pairs)
    if sorted(names) != list(range(1, len(pairs) + 1)):
        raise FgvczooError(f"{file}: its ids are not 1..{len(pairs)}, each once")
    return [names[number] for number in sorted(names)]


def _table(file: Path, columns: Sequence[int], dtype: type[np.generic]) -> np.ndarray:
    """Numbers in those columns, (lines, columns)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*input contained no data")
        try:
            table = np.loadtxt(file, dtype, comments=None, usecols=tuple(columns), ndmin=2, encoding="utf-8")
        except (ValueError, OSError) as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise FgvczooError(f"{file}: {reason}; expected {len(columns)} numbers a line") from None
    return table.reshape(-1, len(columns))
