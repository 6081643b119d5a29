"""CelebA (Liu et al. 2015), aligned and cropped, in its official layout: faces with attributes and identities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fgvczoo.data.base import FGVCDataModule
from fgvczoo.data.lists import Listed, Subset
from fgvczoo.data.official import Archive, Official, Part, find_folder, join, mirrored, read_text, to_labels, to_numbers
from fgvczoo.errors import FgvczooError, did_you_mean

_GET = "get img_align_celeba.zip and the lists from the authors' page, unpack the first, and give their folder"
_IMAGES, _COUNTS = 202_599, {"train": 162_770, "val": 19_867, "test": 19_962}  # of the real set
_SPLITS = ("train", "val", "test")
POINTS = ("left eye", "right eye", "nose", "left mouth", "right mouth")


class CelebA(Official):
    """The rows of CelebA in the order of `list_eval_partition.txt`.

    root: the folder that holds `img_align_celeba/`, `list_eval_partition.txt`, `identity_CelebA.txt`,
        `list_attr_celeba.txt` and `list_landmarks_align_celeba.txt`; or holds it as `celeba/`. Copies with .csv are
        read, too.
    target: what the classes are: "identity", or the name of an attribute, whose classes are "not NAME" and "NAME".
    subset: a paper's list of images, see `fgvczoo.data.lists`, by identity, whatever the target: these are "test",
        whatever their official split, and in no other.

    The boxes of `list_bbox_celeba.txt` are those of other pictures, before they were cut, and are not read. Other sizes
    than the real set's are read alike; counts are asserted where it is the real set.

    Attributes beside those of `Reader`:
        attribute_names: of the batch key `attributes` (B, 40), 0 or 1. part_names: of `parts` (B, 5, 3).
    """

    name = "celeba"
    archives = (
        Archive("img_align_celeba.zip", "00d2c5bc6d35e252742224ab0c1e8fcb", True),
        Archive("list_attr_celeba.txt", "75e246fa4810816ffd6ee81facbd244c"),
        Archive("identity_CelebA.txt", "32bd1bd63d3c78cd57e08160ec5ed1e2"),
        Archive("list_landmarks_align_celeba.txt", "cc24ecafdb5b50baae59b03474781f8c"),
        Archive("list_eval_partition.txt", "d32c9cbf5e040fd4025c592c306e6668"),
    )
    keys = ("attributes", "parts")

    def __init__(self, root: str | Path | None, *, target: str = "identity", subset: Subset = None) -> None:
        inner = (".", "celeba", "CelebA")
        self.folder = find_folder(root, inner, ("img_align_celeba",), archives=self.archives[:1], get=_GET)
        folder = self.folder / "img_align_celeba"
        self.pictures = folder / folder.name if (folder / folder.name).is_dir() else folder
        file, lines, _ = self._list("list_eval_partition")
        self._names = [name for name, *_ in lines]
        split = np.array(_SPLITS)[to_labels(file, [line[-1] for line in lines], 0, 3)]
        if target == "identity":
            labels = self._identities()
            class_names = [str(number + 1) for number in range(int(labels.max(initial=0)) + 1)]
        else:
            names, table = self._attribute_table()
            if target not in names:
                hint = did_you_mean(target, names)
                raise FgvczooError(f"target={target!r}; expected identity or one of {', '.join(names)}{hint}")
            labels, class_names = table[:, names.index(target)].astype(np.int64), [f"not {target}", target]
        real = _COUNTS if len(self._names) == _IMAGES else None
        self.take([Part(file, split, self._names, labels)], class_names, real=real)
        self.part_names = list(POINTS)
        if subset is not None:
            listed = Listed(subset, np.arange(len(self)), self._names, self._identities())
            self.splits, self.subset = listed.splits(self.splits), listed.file

    @property
    def attribute_names(self) -> list[str]:
        return self._attribute_table()[0]

    @property
    def flip_pairs(self) -> tuple[tuple[int, int], ...]:
        """Left and right eye and corner of the mouth."""
        return mirrored(list(POINTS))

    def _list(self, name: str) -> tuple[Path, list[list[str]], list[str]]:
        """A list, its lines as cells, and the names of its columns where it has such."""
        file = next((f for f in (self.folder / f"{name}{end}" for end in (".txt", ".csv")) if f.is_file()), None)
        if file is None:
            raise FgvczooError(f"{self.folder / name}.txt is missing; {_GET}")
        text = read_text(file)
        if text.lstrip()[:1] == "<":
            raise FgvczooError(f"{file}: a web page, such as Google Drive's of an exceeded quota; get it again")
        comma = file.suffix == ".csv"
        lines = [[cell.strip() for cell in line.split(",")] if comma else line.split() for line in text.splitlines()]
        lines = [line for line in lines if line]
        columns: list[str] = []
        if comma:
            columns, lines = (lines[0][1:] if lines else []), lines[1:]
        elif lines and len(lines[0]) == 1:  # the number of images, then the names of the columns
            columns, lines = (lines[1] if len(lines) > 1 else []), lines[2:]
        width = 1 + len(columns) if columns else 2
        if wrong := next((line for line in lines if len(line) != width), None):
            raise FgvczooError(f"{file}: {' '.join(wrong)[:80]!r}; expected an image and {width - 1} values")
        return file, lines, columns

    def _identities(self) -> np.ndarray:
        """(N,) from 0."""
        file, lines, _ = self._list("identity_CelebA")
        numbers = [cells[0] for cells in join(file, self._names, lines)]
        most = max((int(n) for n in numbers if n.isdecimal() and len(n) < 9), default=1)
        return to_labels(file, numbers, 1, most)

    def _attribute_table(self) -> tuple[list[str], np.ndarray]:
        """Their names, and (N, 40) float32, 0 or 1; the file has -1 and 1."""
        file, lines, names = self._list("list_attr_celeba")
        values = to_numbers(file, join(file, self._names, lines), len(names))
        if not np.isin(values, (-1, 1)).all():
            raise FgvczooError(f"{file}: attributes others than -1 and 1")
        return names, (values > 0).astype(np.float32)

    def _read_attributes(self) -> np.ndarray:
        return self._attribute_table()[1]

    def _read_parts(self) -> np.ndarray:
        """(N, 5, 3) float64; all are visible."""
        file, lines, _ = self._list("list_landmarks_align_celeba")
        points = to_numbers(file, join(file, self._names, lines), 10).reshape(-1, 5, 2)
        return np.concatenate([points, np.ones((*points.shape[:2], 1))], axis=2)


class CelebADataModule(FGVCDataModule):
    """CelebA. Its pictures are never downloaded here: `root` says where they are.

    root, target, subset: see `CelebA`. options: see `FGVCDataModule`. Keys: attributes (A = 40), parts (K = 5).
    """

    reader_class = CelebA

    def __init__(
        self, root: str | None = None, target: str = "identity", subset: Subset = None, **options: Any
    ) -> None:
        super().__init__(CelebA(root, target=target, subset=subset), **options)
