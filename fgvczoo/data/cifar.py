"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) in their official layout for Python. Their pickles are read as data: nothing
in them is executed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from fgvczoo.checkpoints import read_pickle
from fgvczoo.data.base import TEXT, FGVCDataModule, check_class_names
from fgvczoo.data.official import Archive, Official, check_choice, check_counts, find_folder
from fgvczoo.errors import FgvczooError

_SIDE = 32
_MOST_BYTES = 1 << 28  # of a file; the largest has 155 MB
_COUNTS = {"train": 50_000, "test": 10_000}
HashingProtocol = Literal["standard", "hashing-1", "hashing-1-train", "hashing-2"]
_QUERIES, _TRAINING = {"hashing-1": 100, "hashing-1-train": 100, "hashing-2": 1_000}, 500  # of a class
_SEED = 0  # of the splits of hashing: they are the same in every run

# Fine class -> super class of CIFAR-100, as the files of the real set say.
SUPER_CLASSES = (
    *(
        4,
        1,
        14,
        8,
        0,
        6,
        7,
        7,
        18,
        3,
        3,
        14,
        9,
        18,
        7,
        11,
        3,
        9,
        7,
        11,
        6,
        11,
        5,
        10,
        7,
        6,
        13,
        15,
        3,
        15,
        0,
        11,
        1,
        10,
    ),
    *(12, 14, 16, 9, 11, 5, 5, 19, 8, 8, 15, 13, 14, 17, 18, 10, 16, 4, 17, 4, 2, 0, 17, 4, 18, 17, 10, 3, 2, 12, 12),
    *(16, 12, 1, 9, 19, 2, 10, 0, 1, 16, 12, 9, 13, 15, 13, 16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17),
    *(8, 14, 13),
)


class _CIFAR(Official):
    """What both share: pictures are rows of numbers, not files.

    Attributes beside those of `Reader`:
        image_ids: (N,) names that the files give, with those of their split before them.
    """

    _files_of: dict[str, tuple[str, ...]]  # split -> names
    _meta: str

    def _read(self, label_key: str) -> tuple[np.ndarray, np.ndarray]:
        """Enters pictures and ids; labels, and (N,) bool, which rows are of training. Two passes of a list are one."""
        pixels, labels, ids, is_train = [], [], [], []
        self._batches = []
        for split, names in self._files_of.items():
            for name in names:
                file = self.folder / name
                batch = read_pickle(file, _MOST_BYTES)
                data, found, files = (
                    batch.get(k) if isinstance(batch, dict) else None for k in ("data", label_key, "filenames")
                )
                if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (3 * _SIDE**2,):
                    raise FgvczooError(f"{file}: no array data of uint8 (N, {3 * _SIDE**2}); get it again")
                if not isinstance(found, list) or len(found) != len(data) or not all(type(n) is int for n in found):
                    raise FgvczooError(f"{file}: {label_key} is not a whole number for each of {len(data)} pictures")
                if not isinstance(files, list) or len(files) != len(data):
                    files = [f"{name}/{place:05d}" for place in range(len(data))]
                pixels.append(data)
                labels += found
                ids += [f"{split}/{file}" for file in files]
                is_train += [split == "train"] * len(data)
                self._batches.append(batch)
        self._pixels = np.concatenate(pixels)
        self.image_ids = self._files = np.array(ids, TEXT)
        if len(set(ids)) < len(ids):
            raise FgvczooError(f"{self.folder}: {next(name for name in ids if ids.count(name) > 1)!r} occurs twice")
        return np.array(labels, np.int64), np.array(is_train)

    def _names(self, key: str) -> list[str]:
        file = self.folder / self._meta
        meta = read_pickle(file, _MOST_BYTES)
        names = meta.get(key) if isinstance(meta, dict) else None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise FgvczooError(f"{file}: {key} are no texts; get it again")
        check_class_names(names, str(file))
        return names

    def _check(self, labels: np.ndarray, count: int) -> np.ndarray:
        if len(wrong := np.flatnonzero((labels < 0) | (labels >= count))):
            raise FgvczooError(
                f"{self.folder}: {self.image_ids[wrong[0]]} has label {labels[wrong[0]]}; expected 0..{count - 1}"
            )
        return labels

    def _standard(self, is_train: np.ndarray) -> dict[str, np.ndarray]:
        splits = {"train": np.flatnonzero(is_train), "test": np.flatnonzero(~is_train)}
        found = {name: len(rows) for name, rows in splits.items()}
        check_counts(self.folder, found, _COUNTS if sum(found.values()) > 10_000 else None)
        return splits

    def picture(self, index: int) -> bytes:
        """As a PPM, the plainest format."""
        return b"P6 %d %d 255\n" % (_SIDE, _SIDE) + self.read(index).tobytes()

    def name_of(self, index: int) -> str:
        return f"{self.folder}: {self.image_ids[index]}"

    def read(self, index: int) -> np.ndarray:
        # 1,024 reds, then greens, then blues.
        return np.ascontiguousarray(self._pixels[index].reshape(3, _SIDE, _SIDE).transpose(1, 2, 0))


class CIFAR10(_CIFAR):
    """The rows of CIFAR-10: those of data_batch_1 .. 5, then those of test_batch.

    root: the folder that holds `cifar-10-batches-py/`, or that folder itself.
    protocol: "standard", the official split. Those of hashing, drawn from all 60,000 images, whatever the official
        split says, the same in every run: "hashing-1", 100 queries and 500 training images of a class, and a gallery of
        the others (54,000); "hashing-1-train", the same, and the training images are in the gallery, too (59,000);
        "hashing-2", 1,000 queries of a class, and all others for training and gallery. Name it in every result.
    """

    name = "cifar10"
    archives = (Archive("cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a", True),)
    _files_of = {"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)}
    _meta = "batches.meta"

    def __init__(self, root: str | Path | None, *, protocol: HashingProtocol = "standard") -> None:
        check_choice("protocol", protocol, get_args(HashingProtocol))
        get = "get cifar-10-python.tar.gz, unpack it, and give the folder that holds cifar-10-batches-py/"
        inner = ("cifar-10-batches-py", ".")
        self.folder = find_folder(root, inner, ("data_batch_1",), archives=self.archives, get=get)
        labels, is_train = self._read("labels")
        self.class_names = self._names("label_names")
        self.labels = self._check(labels, len(self.class_names))
        self._batches.clear()
        self.splits = self._standard(is_train) if protocol == "standard" else self._hashing(protocol)

    def _hashing(self, protocol: HashingProtocol) -> dict[str, np.ndarray]:
        generator = np.random.default_rng(_SEED)
        queries, train = [], []
        for label in range(len(self.class_names)):
            rows = generator.permutation(np.flatnonzero(self.labels == label))
            cut = _QUERIES[protocol]
            if len(rows) <= cut + (0 if protocol == "hashing-2" else _TRAINING):
                name = self.class_names[label]
                raise FgvczooError(f"protocol={protocol}: class {name} has {len(rows)} images, which are too few")
            queries.append(rows[:cut])
            train.append(rows[cut:] if protocol == "hashing-2" else rows[cut : cut + _TRAINING])
        query, learned = np.sort(np.concatenate(queries)), np.sort(np.concatenate(train))
        rest = np.setdiff1d(np.arange(len(self)), query)
        gallery = np.setdiff1d(rest, learned) if protocol == "hashing-1" else rest
        return {"train": learned, "test": query, "query": query, "gallery": gallery}


class CIFAR100(_CIFAR):
    """The rows of CIFAR-100: those of training, then those of testing.

    root: the folder that holds `cifar-100-python/`, or that folder itself.
    target: what the classes are: "fine" (100) or "coarse", the 20 super classes.

    Attributes beside those of `Reader`:
        level_names: the names of both, of the columns of the batch key `label_levels` (B, 2): coarse, fine.
    """

    name = "cifar100"
    archives = (Archive("cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85", True),)
    keys = ("label_levels",)
    _files_of = {"train": ("train",), "test": ("test",)}
    _meta = "meta"

    def __init__(self, root: str | Path | None, *, target: Literal["fine", "coarse"] = "fine") -> None:
        check_choice("target", target, ("fine", "coarse"))
        get = "get cifar-100-python.tar.gz, unpack it, and give the folder that holds cifar-100-python/"
        self.folder = find_folder(root, ("cifar-100-python", "."), ("meta",), archives=self.archives, get=get)
        fine, is_train = self._read("fine_labels")
        self.level_names = {kind: self._names(f"{kind}_label_names") for kind in ("coarse", "fine")}
        fine = self._check(fine, len(self.level_names["fine"]))
        coarse = [label for batch in self._batches for label in batch.get("coarse_labels") or ()]
        self._batches.clear()
        if len(coarse) != len(fine) or not all(type(label) is int for label in coarse):
            raise FgvczooError(f"{self.folder}: {len(coarse)} coarse_labels of {len(fine)} pictures; get it again")
        self._levels = np.stack(
            [self._check(np.array(coarse, np.int64), len(self.level_names["coarse"])), fine], axis=1
        )
        self._check_levels()
        self.class_names = self.level_names[target]
        self.labels = self._levels[:, 0 if target == "coarse" else 1]
        self.splits = self._standard(is_train)

    def _check_levels(self) -> None:
        pairs = np.unique(self._levels, axis=0)
        expected = dict(enumerate(SUPER_CLASSES)) if len(self.level_names["fine"]) == len(SUPER_CLASSES) else {}
        for coarse, fine in pairs.tolist():
            if expected.setdefault(fine, coarse) != coarse:
                raise FgvczooError(
                    f"{self.folder}: fine class {fine} is in super class {coarse}; expected {expected[fine]}"
                )

    def _read_label_levels(self) -> np.ndarray:
        return self._levels


class CIFAR10DataModule(FGVCDataModule):
    """CIFAR-10. It is never downloaded here: `root` says where it is.

    root, protocol: see `CIFAR10`. options: see `FGVCDataModule`. No keys.
    """

    reader_class = CIFAR10

    def __init__(self, root: str | None = None, protocol: HashingProtocol = "standard", **options: Any) -> None:
        super().__init__(CIFAR10(root, protocol=protocol), **options)


class CIFAR100DataModule(FGVCDataModule):
    """CIFAR-100. It is never downloaded here: `root` says where it is.

    root, target: see `CIFAR100`. options: see `FGVCDataModule`. Keys: label_levels: coarse, fine.
    """

    reader_class = CIFAR100

    def __init__(self, root: str | None = None, target: Literal["fine", "coarse"] = "fine", **options: Any) -> None:
        super().__init__(CIFAR100(root, target=target), **options)
