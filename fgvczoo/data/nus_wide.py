"""NUS-WIDE (Chua et al. 2009): pictures of Flickr with several of 81 concepts, for hashing.

Many of its pictures are gone: every copy is another subset. Rows are the images that are there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from fgvczoo.data.base import TEXT, FGVCDataModule
from fgvczoo.data.official import Official, check_choice, check_path, check_unique, find_folder, read_text
from fgvczoo.errors import FgvczooError

NUSProtocol = Literal["standard", "hashing"]
_GET = "expected ImageList/, Groundtruth/ and ConceptsList/ of the authors, and their pictures in Flickr/ or images/"
_FREQUENT, _QUERIES, _TRAINING, _SEED = 21, 100, 500, 0


class NUSWide(Official):
    """The rows of NUS-WIDE in the order of `Imagelist.txt`: of those images the ones that are there and have a concept.

    root: the folder that holds `ImageList/`, `Groundtruth/`, `ConceptsList/`, and the pictures in `Flickr/` or
        `images/`; or holds it as `NUS-WIDE/`.
    protocol: "standard", the official split and 81 concepts; or "hashing": the 21 most frequent concepts by the lists,
        100 queries and 500 training images of each, drawn the same in every run from a set of files, and a gallery of
        the others. Two images are relevant to each other when they share a concept.
    queries, training: other numbers of them for each concept, where a copy has too few images.

    A picture has several concepts, which are the batch's `labels`; `label` is the first of them.

    Attributes beside those of `Reader`:
        missing: number of listed images with a concept that are not there. A run keeps the list of those that are.
    """

    name = "nus-wide"
    keys = ("labels",)

    def __init__(
        self,
        root: str | Path | None,
        *,
        protocol: NUSProtocol = "standard",
        queries: int = _QUERIES,
        training: int = _TRAINING,
    ) -> None:
        check_choice("protocol", protocol, get_args(NUSProtocol))
        self.folder = find_folder(root, (".", "NUS-WIDE", "nus-wide"), ("ImageList",), get=_GET)
        places = [self.folder / name for name in ("Flickr", "images")]
        self.pictures = next((place for place in places if place.is_dir()), places[0])
        if not self.pictures.is_dir():
            raise FgvczooError(f"{self.pictures}: no such folder; {_GET}")
        paths = self._list("Imagelist.txt")
        concepts = read_text(self.folder / "ConceptsList" / "Concepts81.txt").split()
        if not concepts:
            raise FgvczooError(f"{self.folder / 'ConceptsList/Concepts81.txt'}: lists no concept")
        table = np.stack([self._concept(name, len(paths)) for name in concepts], axis=1)
        if protocol == "hashing":
            # The most frequent ones of all listed images, in the order of the concepts.
            kept = np.sort(np.argsort(-table.sum(axis=0), kind="stable")[:_FREQUENT])
            table, concepts = table[:, kept], [concepts[place] for place in kept]
        listed, present = table.any(axis=1), self._present(paths)
        self.missing = int((listed & ~present).sum())
        used = listed & present
        if not used.any():
            raise FgvczooError(f"{self.pictures}: none of {len(paths)} listed images is there; {_GET}")
        self.image_ids = self._files = np.array(paths, TEXT)[used]
        self.multi = table[used]
        self.class_names, self.labels = concepts, self.multi.argmax(axis=1).astype(np.int64)
        self.splits = self._official() if protocol == "standard" else self._hashing(queries, training)
        for split, rows in self.splits.items():
            if not len(rows):
                raise FgvczooError(f"{self.folder}: no {split} image is there")

    def _list(self, name: str) -> list[str]:
        """Paths with "/": the lists are of Windows."""
        file = self.folder / "ImageList" / name
        paths = [line.strip().replace("\\", "/") for line in read_text(file).splitlines() if line.strip()]
        check_unique(paths, file)
        for path in paths:
            check_path(path, file)
        return paths

    def _concept(self, name: str, count: int) -> np.ndarray:
        """(N,) uint8 of all listed images."""
        file = self.folder / "Groundtruth" / "AllLabels" / f"Labels_{name}.txt"
        cells = read_text(file).split()
        if len(cells) != count or not set(cells) <= {"0", "1"}:
            raise FgvczooError(f"{file}: {len(cells)} values; expected 0 or 1 for each of {count} images")
        return np.array(cells, "U1").astype(np.uint8)

    def _present(self, paths: list[str]) -> np.ndarray:
        there: dict[str, set[str]] = {}
        found = np.zeros(len(paths), bool)
        for row, path in enumerate(paths):
            folder, _, name = path.rpartition("/")
            if folder not in there:
                inner = self.pictures / folder
                there[folder] = {entry.name for entry in inner.iterdir()} if inner.is_dir() else set()
            found[row] = name in there[folder]
        return found

    def _official(self) -> dict[str, np.ndarray]:
        row_of = {path: row for row, path in enumerate(self._files.tolist())}
        splits = {}
        for split in ("train", "test"):
            listed = self._list(f"{split.capitalize()}Imagelist.txt")
            splits[split] = np.array(sorted(row_of[path] for path in listed if path in row_of), np.int64)
        if len(both := np.intersect1d(splits["train"], splits["test"])):
            raise FgvczooError(f"{self.folder / 'ImageList'}: {str(self._files[both[0]])!r} is in train and in test")
        return splits

    def _hashing(self, queries: int, training: int) -> dict[str, np.ndarray]:
        generator = np.random.default_rng(_SEED)
        free = np.ones(len(self), bool)
        chosen: dict[str, list[np.ndarray]] = {"query": [], "train": []}
        for split, number in (("query", queries), ("train", training)):
            for concept, name in enumerate(self.class_names):
                rows = np.flatnonzero(free & (self.multi[:, concept] > 0))
                if len(rows) < number:
                    raise FgvczooError(
                        f"protocol=hashing: {len(rows)} free images of {name} for {number} of {split}; give queries "
                        "and training"
                    )
                chosen[split].append(generator.permutation(rows)[:number])
                free[chosen[split][-1]] = False
        query, train = (np.sort(np.concatenate(rows)) for rows in chosen.values())
        return {"train": train, "test": query, "query": query, "gallery": np.flatnonzero(free)}

    def _read_labels(self) -> np.ndarray:
        return self.multi


class NUSWideDataModule(FGVCDataModule):
    """NUS-WIDE. Its pictures are never downloaded here: `root` says where they are.

    root, protocol, queries, training: see `NUSWide`. options: see `FGVCDataModule`. Keys: labels (C = 81, or 21).
    """

    reader_class = NUSWide

    def __init__(
        self,
        root: str | None = None,
        protocol: NUSProtocol = "standard",
        queries: int = _QUERIES,
        training: int = _TRAINING,
        **options: Any,
    ) -> None:
        super().__init__(NUSWide(root, protocol=protocol, queries=queries, training=training), **options)
