"""What every data set shares: a reader turns its official layout into rows, a data module turns rows into batches."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from torch.utils.data import DataLoader

from fgvczoo.data.decoded import Decoded
from fgvczoo.data.loader import Loader, Rows, collate, one_thread
from fgvczoo.data.samplers import (
    BalancedBatchSampler,
    EpochBatchSampler,
    ExactSampler,
    PKBatchSampler,
    TrainBatchSampler,
)
from fgvczoo.data.transforms import Transform
from fgvczoo.errors import FgvczooError, did_you_mean
from fgvczoo.preprocess import Preprocess, image_size, read_image

# Rows that are cut from train are the same in every run, whatever its seed: results of several seeds are comparable.
_SPLIT_SEED = 0
# Control characters, line ends, and bytes of a file name that are not UTF-8.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
TEXT = np.dtypes.StringDType()  # strings of any length in one block of memory, which forked workers share


class Reader(ABC):
    """The rows of a data set in its official layout. Reads metadata files when made, pictures only when asked for one.

    Rows count from 0 and never change for a given set: batches carry them as `index`.
    """

    name: str  # of the data set, lower case
    licence_allows_pictures: bool  # whether explanations that show its pictures may be passed on
    class_names: list[str]  # of the labels 0..C-1, those that are trained on
    labels: np.ndarray  # (N,) int64
    image_ids: np.ndarray  # (N,) the set's own ids, of any kind
    splits: dict[str, np.ndarray]  # name -> rows, ascending; the official ones where there are such; "train" among them
    keys: tuple[str, ...]  # annotations that it can give
    cropped = False  # the box of each picture is used as the picture
    missing = 0  # images that the lists name and that are not there, where every copy is another subset
    subset: Path | None = None  # the list of a paper that "test" is, see `fgvczoo.data.lists`
    decoded: Decoded | None = None  # where pictures lie decoded; a data module sets it

    @cached_property
    def all_class_names(self) -> list[str]:
        """Of all labels: more than `class_names` where some classes are there for testing only."""
        return self.class_names

    @cached_property
    def fingerprint(self) -> str:
        """Of the list of images: results of two copies compare where it is the same."""
        return hashlib.blake2b("\n".join(map(str, self.image_ids.tolist())).encode(), digest_size=8).hexdigest()

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def picture(self, index: int) -> Path | bytes:
        """The picture of a row: its file, or its encoded bytes."""

    def name_of(self, index: int) -> str:
        """What messages call the picture of a row: its file."""
        return str(self.picture(index))

    def read(self, index: int) -> np.ndarray:
        """The picture of a row as RGB uint8 (H, W, 3); `FgvczooError` naming it where it cannot be read."""
        picture, name = self.picture(index), self.name_of(index)
        return read_image(picture, name) if self.decoded is None else self.decoded.read(picture, name)

    def label(self, index: int) -> int:
        """The label of a row."""
        return int(self.labels[index])

    def split_of(self, index: int) -> str:
        """The split of a row; the first of them where several have it."""
        for name, rows in self.splits.items():
            place = int(np.searchsorted(rows, index))
            if place < len(rows) and rows[place] == index:
                return name
        raise FgvczooError(f"{self.name}: row {index} is in none of {', '.join(self.splits)}")

    def find(self, image_id: str) -> int | None:
        """The row of an image by the set's own id, as text; None where there is none."""
        if self.image_ids.dtype.kind == "i" and not re.fullmatch(r"-?\d{1,18}", image_id):
            return None
        ids = self.image_ids if self.image_ids.dtype.kind == "i" else self.image_ids.astype(TEXT, copy=False)
        places = np.flatnonzero(ids == (int(image_id) if ids.dtype.kind == "i" else image_id))
        return int(places[0]) if len(places) else None

    @abstractmethod
    def require(self, keys: Sequence[str]) -> None:
        """Reads what these annotations need; `FgvczooError` where a file is missing or wrong."""

    @abstractmethod
    def annotations(self, index: int, keys: Sequence[str]) -> dict[str, Any]:
        """The annotations of a row by batch key.

        In pixels of the original picture: `mask` uint8 (H, W), `boxes` (n, 4), `bbox` (4,), `parts` (K, 3). Pictures:
        `edited` (H, W, 3), which is cut and augmented as the picture, `satellite` (h, w, 3), which is neither. Other
        keys as arrays of one sample, or dicts of them.
        """

    @property
    def flip_pairs(self) -> tuple[tuple[int, int], ...]:
        """Pairs of part numbers, from 0, that a mirrored picture exchanges."""
        return ()

    def box(self, index: int) -> np.ndarray | None:
        """The box of the one object of a picture in its pixels, x0, y0, x1, y1; None where the set has no boxes."""
        return None

    def crop(self, index: int) -> tuple[int, int, int, int] | None:
        """The part of the picture that is used, x0, y0, x1, y1: its box rounded as Pillow's `crop`; None for all."""
        if not self.cropped or (box := self.box(index)) is None:
            return None
        x0, y0, x1, y1 = (round(float(value)) for value in box)
        return x0, y0, x1, y1

    def row(self, index: int) -> dict[str, Any]:
        """What is known of a row as plain values, in original coordinates; see `FGVCDataModule.row`."""
        picture = self.picture(index)
        height, width = image_size(picture, self.name_of(index))
        label, image_id = self.label(index), self.image_ids[index]
        if (crop := self.crop(index)) is not None:  # what was cut: no more than the picture has
            crop = max(crop[0], 0), max(crop[1], 0), min(crop[2], width), min(crop[3], height)
        box = self.box(index)
        return {
            "index": index,
            "image_id": image_id.item() if isinstance(image_id, np.generic) else image_id,
            "path": str(picture.absolute()) if isinstance(picture, Path) else None,
            "label": label,
            "class_name": self.all_class_names[label],
            "split": self.split_of(index),
            "height": height,
            "width": width,
            "crop": crop,
            **({} if box is None else {"bbox": box.tolist()}),
        }


class FGVCDataModule(lightning.LightningDataModule):
    """Named splits of a data set as loaders of `Batch`.

    Nothing drawn here depends on a random stream: the order of an epoch comes from (seed, epoch), the augmentation of a
    picture from (seed, epoch, row). So batches are the same for any number of workers and in a resumed run. Give the
    trainer `use_distributed_sampler=False`: the loaders share rows between processes themselves.

    Args:
        reader: the data set.
        batch_size: of training, over all processes together.
        eval_batch_size: of everything else, in each process.
        num_workers: loading processes; 0 loads in the main one.
        augmentation: a protocol of `fgvczoo.data.transforms.AUGMENTATIONS`, for training.
        preprocess: values of `fgvczoo.preprocess.Preprocess`, where they differ from its defaults.
        view_augmentations: a protocol each for further views of every training picture, the batch's `views`.
        view_sizes: height and width of each of these views (multi-crop); by default those of `preprocess`.
        repeats: how often a training batch holds each of its images, augmented anew (`TrainBatchSampler`).
        class_balanced: train on every class equally often, instead of on every image once (`BalancedBatchSampler`).
        images_per_class: K; training batches then hold K images of each of `batch_size` / K classes, each batch drawn
            anew (`PKBatchSampler`). Without it every image is used once in an epoch.
        batches_per_epoch: of `images_per_class`; by default as many as the training rows fill.
        seed: of order and augmentation.
        val_fraction: share of the training rows of every class that becomes the split "val"; the choice is fixed.
        val_classes: share of the training classes, the last of them, whose images become the split "val" instead and
            are not trained on; where training and test classes are disjoint, this is what measures retrieval.
        on_corrupt: "error" stops at an unreadable picture; "skip" goes on without it, warns and counts it in `skipped`.
        decoded: a folder that keeps the pixels of every picture that is read, for all later reads of any process or
            run; 3 bytes a pixel of the original (`fgvczoo.data.decoded.Decoded`). None decodes every time.
        keys: annotations wanted in the batches, beside `image`, `index` and `label`.

    Attributes:
        reader_class: the reader of its official layout, where it has one; what `fgvczoo data check` opens.
        num_classes, class_names: of the labels that are trained on.
        splits: name -> rows. "train", "train_plain" and "projection" hold the same rows; "val" is there on request.
        preprocess: the `Preprocess` value that made the images.
        skipped: path -> reason, of unreadable pictures met so far.
    """

    reader_class: type[Reader] | None = None

    def __init__(
        self,
        reader: Reader,
        *,
        batch_size: int = 80,
        eval_batch_size: int = 100,
        num_workers: int = 0,
        augmentation: str = "none",
        preprocess: dict[str, Any] | None = None,
        view_augmentations: Sequence[str] = (),
        view_sizes: Sequence[int] = (),
        repeats: int = 1,
        class_balanced: bool = False,
        images_per_class: int | None = None,
        batches_per_epoch: int | None = None,
        seed: int = 0,
        val_fraction: float = 0.0,
        val_classes: float = 0.0,
        on_corrupt: str = "error",
        decoded: str | None = None,
        keys: Sequence[str] = (),
    ) -> None:
        super().__init__()
        for name, given in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            if given < 1:
                raise FgvczooError(f"{name}={given}; expected at least 1")
        for name, given in (("num_workers", num_workers), ("seed", seed)):
            if given < 0:
                raise FgvczooError(f"{name}={given}; expected at least 0")
        for option, size in (("images_per_class", images_per_class), ("batches_per_epoch", batches_per_epoch)):
            if size is not None and size < 1:
                raise FgvczooError(f"{option}={size}; expected at least 1")
        if batches_per_epoch is not None and images_per_class is None:
            raise FgvczooError(
                f"batches_per_epoch={batches_per_epoch} without images_per_class: an epoch is every image once"
            )
        if repeats < 1:
            raise FgvczooError(f"repeats={repeats}; expected at least 1")
        if images_per_class is not None and (class_balanced or repeats > 1):
            raise FgvczooError("images_per_class draws batches of its own; leave out class_balanced and repeats")
        if view_sizes and len(view_sizes) != len(view_augmentations):
            raise FgvczooError(
                f"view_sizes: {len(view_sizes)} of {len(view_augmentations)} view_augmentations; give all"
            )
        for option, share in (("val_fraction", val_fraction), ("val_classes", val_classes)):
            if not 0 <= share < 1:
                raise FgvczooError(f"{option}={share}; expected a number in [0, 1)")
        if val_classes and val_fraction:
            raise FgvczooError("val_fraction and val_classes: two ways to get val; give one")
        if on_corrupt not in ("error", "skip"):
            raise FgvczooError(f"on_corrupt={on_corrupt!r}; expected 'error' or 'skip'")
        known_keys = (*reader.keys, "size")
        for key in keys:
            if key not in known_keys:
                raise FgvczooError(
                    f"keys: {reader.name} has no {key!r}, only {', '.join(known_keys)}{did_you_mean(key, known_keys)}"
                )
        reader.require(keys)
        if decoded is not None:
            reader.decoded = Decoded(decoded)
        self.reader = reader
        self.batch_size, self.eval_batch_size, self.num_workers = batch_size, eval_batch_size, num_workers
        self.images_per_class, self.batches_per_epoch = images_per_class, batches_per_epoch
        self.seed, self.on_corrupt, self.keys = seed, on_corrupt, tuple(keys)
        self.preprocess = make_preprocess(preprocess)
        self.transform = Transform(self.preprocess, augmentation, reader.flip_pairs)
        self.repeats, self.class_balanced = repeats, class_balanced
        sizes = [(side, side) for side in view_sizes] or [self.preprocess.size] * len(view_augmentations)
        self.view_transforms = tuple(
            Transform(replace(self.preprocess, size=size), name) for name, size in zip(view_augmentations, sizes)
        )
        self.class_names = list(reader.class_names)
        self.dataset_name = reader.name
        self.licence_allows_pictures = reader.licence_allows_pictures
        self.splits = dict(reader.splits)
        if val_fraction:
            if "val" in self.splits:
                raise FgvczooError(f"val_fraction={val_fraction}, but {reader.name} has a split val; leave it out")
            self.splits["train"], self.splits["val"] = stratified(
                self.splits["train"], reader.labels, val_fraction, "val"
            )
        if val_classes:
            self._hold_out_classes(val_classes)
        self.num_classes = len(self.class_names)
        for name in ("train_plain", "projection"):
            self.splits.setdefault(name, self.splits["train"])
        self.skipped: dict[str, str] = {}
        self._samplers: list[TrainBatchSampler] = []

    def loader(self, split: str, augment: bool = False, shard: str = "exact") -> Loader:
        """Batches of a split.

        shard: "exact" gives every row once, in order, each process a contiguous share without padding; "train" gives
            shuffled batches of `batch_size` over all processes (`EpochBatchSampler`, or `PKBatchSampler` where
            `images_per_class` is given).
        augment: by the protocol of this data module, from (seed, epoch, row).
        """
        if split not in self.splits:
            cut = f"; give {split}_fraction to cut it from train" if split in ("val", "test") else ""
            hint = cut or did_you_mean(split, self.splits)
            raise FgvczooError(f"{self.dataset_name} has no split {split!r}, only {', '.join(self.splits)}{hint}")
        if shard not in ("exact", "train"):
            raise FgvczooError(f"shard={shard!r}; expected 'exact' or 'train'")
        rows = self.splits[split]
        dataset = self._rows(rows, self.seed if augment else None, shuffle=shard == "train")
        dataset.normalize = not self.num_workers
        if augment:
            dataset.views = self.view_transforms
        if augment and self.num_workers:
            for transform in (self.transform, *self.view_transforms):
                transform.build()
        world_size, rank = self._processes()
        options: dict[str, Any]
        if shard == "train":
            sampler = self._sampler(rows, dataset, {"seed": self.seed, "world_size": world_size, "rank": rank})
            self._samplers.append(sampler)
            options = {"batch_sampler": sampler}
        else:
            exact = ExactSampler(len(rows), world_size=world_size, rank=rank)
            options = {"sampler": exact, "batch_size": self.eval_batch_size}
        inner = DataLoader(
            dataset,
            **options,
            collate_fn=collate,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            worker_init_fn=one_thread,
            pin_memory=torch.cuda.is_available(),
        )
        return Loader(inner, self.skipped)

    def set_epoch(self, epoch: int) -> None:
        """Epoch of the training loaders made so far; call it before each of them is iterated."""
        for sampler in self._samplers:
            sampler.epoch = epoch

    def row(self, index: int) -> dict[str, Any]:
        """What the data set says of the row that a batch names by `index`, in original coordinates.

        Plain values: `index`, `image_id`, `path` (absolute; None where the picture is no file), `label`, `class_name`,
        `split`, `height`, `width` of the original picture, `crop` (x0, y0, x1, y1 of the used part, or None), and what
        the set adds, such as `bbox`.
        """
        self._check(index)
        return self.reader.row(index)

    def picture(self, index: int) -> np.ndarray:
        """The original picture of a row, RGB uint8 (H, W, 3)."""
        self._check(index)
        return self.reader.read(index)

    def _check(self, index: int) -> None:
        if not 0 <= index < len(self.reader):
            raise FgvczooError(f"row {index} of {self.dataset_name}: expected 0..{len(self.reader) - 1}")

    def find(self, image_id: str) -> int:
        """The row of an image by the set's own id, the inverse of `row(index)["image_id"]`."""
        row = self.reader.find(str(image_id))
        if row is None:
            raise FgvczooError(
                f"{self.dataset_name}: no image {image_id!r}; this is not the copy that the model learned from"
            )
        return row

    def sample(self, index: int) -> dict[str, Any]:
        """One row as a batch has it, un-augmented: `image` (3, h, w) and the annotations of `keys`."""
        return next(self.samples([index]))

    def samples(self, indices: Iterable[int]) -> Iterator[dict[str, Any]]:
        """Rows as `sample` gives them, one by one. In ascending order they are one pass over a set that is a stream."""
        for index in indices:
            yield Rows(self.reader, np.array([index]), self.transform, self.keys, "error", None)[0]

    def train_dataloader(self) -> Loader:
        loader = self.loader("train", augment=True, shard="train")
        if self.trainer is not None:
            # Lightning restores its counters before it asks for the loader, whose workers read ahead before any hook of
            # the epoch: a resumed run's place is set here. Batches count only where their epoch is not over; those of a
            # whole epoch mean that the run ended between its last batch and its end, and Lightning begins the next.
            loop, sampler = self.trainer.fit_loop, loader.batch_sampler
            epoch: Any = loop.epoch_progress.current
            used = loop.epoch_loop.batch_progress.current.ready if epoch.started > epoch.processed else 0
            whole, sampler.skip = divmod(used, max(_limited(len(sampler), self.trainer.limit_train_batches), 1))
            sampler.epoch = sampler.first = epoch.processed + whole
        return loader

    def val_dataloader(self) -> Loader | list[Any]:
        """The split "val"; nothing where none was asked for: the test split selects nothing."""
        return self.loader("val") if "val" in self.splits else []

    def test_dataloader(self) -> Loader:
        return self.loader("test")

    def predict_dataloader(self) -> Loader:
        return self.loader("test")

    def _hold_out_classes(self, share: float) -> None:
        if "query" not in self.splits:
            raise FgvczooError(
                f"val_classes={share}: {self.dataset_name} is tested on the classes that it is trained on; give "
                "val_fraction, or for retrieval protocol='metric-learning'"
            )
        kept = len(self.class_names) - max(round(share * len(self.class_names)), 1)
        if not kept:
            raise FgvczooError(f"val_classes={share} leaves none of {len(self.class_names)} classes to train on")
        train = self.splits["train"]
        held_out = self.reader.labels[train] >= kept
        self.splits["train"], self.splits["val"] = train[~held_out], train[held_out]
        self.class_names = self.class_names[:kept]

    def _rows(self, rows: np.ndarray, seed: int | None, *, shuffle: bool) -> Rows:
        """The samples of a loader. shuffle: it is for training."""
        return Rows(self.reader, rows, self.transform, self.keys, self.on_corrupt, seed)

    def _sampler(self, rows: np.ndarray, dataset: Rows, options: dict[str, int]) -> TrainBatchSampler:
        if self.images_per_class is None:
            if self.repeats > 1:
                options["repeats"] = self.repeats
            if self.class_balanced:
                return BalancedBatchSampler(self.reader.labels[rows], self.batch_size, **options)
            return EpochBatchSampler(len(rows), self.batch_size, shuffle=not dataset.shuffles, **options)
        return PKBatchSampler(
            self.reader.labels[rows],
            self.batch_size,
            self.images_per_class,
            batches_per_epoch=self.batches_per_epoch,
            **options,
        )

    def _processes(self) -> tuple[int, int]:
        if self.trainer is not None:
            return self.trainer.world_size, self.trainer.global_rank
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_world_size(), torch.distributed.get_rank()
        return 1, 0


def make_preprocess(values: dict[str, Any] | None) -> Preprocess:
    """`Preprocess` from keyword values; `FgvczooError` for a name that it does not have."""
    values = values or {}
    known = Preprocess.__dataclass_fields__
    for name in values:
        if name not in known:
            raise FgvczooError(f"preprocess has no {name!r}, only {', '.join(known)}{did_you_mean(name, known)}")
    return Preprocess(**values)


def check_class_names(names: Iterable[str], source: str) -> None:
    """Refuses names that cannot stand in a line of text, and two that look alike but are spelt with other code points
    (a letter with its accent, or the letter and then the accent). source: what messages call their origin."""
    spelt: dict[str, str] = {}
    for name in names:
        if UNPRINTABLE.search(name):
            raise FgvczooError(f"{source}: the class name {name!a} has characters that cannot be printed; rename it")
        if (other := spelt.setdefault(unicodedata.normalize("NFC", name), name)) != name:
            raise FgvczooError(f"{source}: {other!a} and {name!a} are one class name in two spellings; rename one")


def stratified(rows: np.ndarray, labels: np.ndarray, fraction: float, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Cuts a fixed share of the rows of every class, but never all of them: (the rest, the share), both in order.

    rows: ascending. split: what the share is for; its fraction is the option `SPLIT_fraction`.
    """
    generator = np.random.default_rng(_SPLIT_SEED)
    by_class = rows[np.argsort(labels[rows], kind="stable")]
    chosen = [
        generator.permutation(own)[: min(round(fraction * len(own)), len(own) - 1)]
        for own in np.split(by_class, np.flatnonzero(np.diff(labels[by_class])) + 1)
    ]
    share = np.sort(np.concatenate(chosen))
    if not len(share):
        raise FgvczooError(f"{split}_fraction={fraction} leaves no {split} image; give a larger one")
    return np.setdiff1d(rows, share), share


def _limited(steps: int, limit: float | int | None) -> int:
    """Steps of an epoch under Lightning's `limit_train_batches`: a number of batches, or a share of them as a float."""
    if limit is None:
        return steps
    return min(steps, limit) if isinstance(limit, int) else int(steps * limit)
