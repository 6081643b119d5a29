"""From the rows of a reader to batches: what runs in loading processes, and what hands on their batches."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from fgvczoo.batch import RAGGED_KEYS, Batch
from fgvczoo.data.transforms import Transform, crop_sample
from fgvczoo.errors import FgvczooError, FgvczooWarning
from fgvczoo.preprocess import Preprocess

if TYPE_CHECKING:
    from fgvczoo.data.base import Reader


class Rows(Dataset[Any]):
    """The samples of some rows of a reader; `seed` None leaves the pictures as they are.

    Items are places in `rows`, alone or as (epoch, place), or (epoch, place, number of the repeat).

    shuffles: places are those of an order of its own, which a sampler does not shuffle again.
    views: transforms of the further views of a picture, where `seed` augments it.
    normalize: False leaves the pictures of batches as pixels, uint8 (h, w, 3): between processes they are a quarter of
        the float32 that `Loader` makes of them.
    """

    shuffles = False
    views: Sequence[Transform] = ()
    normalize = True

    def __init__(
        self,
        reader: Reader,
        rows: np.ndarray,
        transform: Transform,
        keys: Sequence[str],
        on_corrupt: str,
        seed: int | None,
    ) -> None:
        self.reader, self.rows, self.transform = reader, rows, transform
        self.keys, self.on_corrupt, self.seed = tuple(keys), on_corrupt, seed

    def __len__(self) -> int:
        return len(self.rows)

    def index(self, epoch: int, place: int) -> int:
        """The row at a place of an epoch."""
        return int(self.rows[place])

    def __getitem__(self, item: int | tuple[int, ...]) -> dict[str, Any]:
        epoch, place, *repeat = item if isinstance(item, tuple) else (0, item)
        return self._sample(epoch, self.index(epoch, place), repeat)

    def _sample(self, epoch: int, index: int, repeat: Sequence[int] = (), normalize: bool = True) -> dict[str, Any]:
        """repeat: its number, where a batch holds a row several times."""
        image = self.reader.read(index)
        notes = self.reader.annotations(index, self.keys)
        height, width = image.shape[:2]
        mask, parts = notes.pop("mask", None), notes.pop("parts", None)
        satellite, edited = notes.pop("satellite", None), notes.pop("edited", None)
        one_box = "bbox" in notes
        boxes = notes.pop("bbox")[None] if one_box else notes.pop("boxes", None)
        if mask is not None and mask.shape != image.shape[:2]:
            raise FgvczooError(f"{self.reader.name_of(index)}: picture of {height, width} pixels, mask of {mask.shape}")
        if (crop := self.reader.crop(index)) is not None:
            image, mask, boxes, parts = crop_sample(crop, image, mask, boxes, parts)
            if not image.size:
                raise FgvczooError(f"{self.reader.name_of(index)}: the crop {crop} has no pixel of {height} x {width}")
        # The last number keeps these streams apart from others that are drawn from (seed, epoch).
        seed = None if self.seed is None else (self.seed, epoch, index, 1, *repeat)
        drawn: dict[str, Any] = {"seed": seed, "normalize": normalize}
        sample: dict[str, Any] = dict(self.transform(image, mask=mask, boxes=boxes, parts=parts, **drawn))
        if self.seed is not None and self.views:
            seeds = [(self.seed, epoch, index, 4, number, *repeat) for number in range(len(self.views))]
            sample["views"] = [view(image, **drawn | {"seed": own})["image"] for view, own in zip(self.views, seeds)]
        if satellite is not None:
            sample["satellite"] = self.transform.preprocess(satellite)
        if edited is not None:  # the same cut, and the same draw
            if edited.shape != (height, width, 3):
                raise FgvczooError(
                    f"{self.reader.name_of(index)}: picture of {height, width} pixels, edited one of {edited.shape[:2]}"
                )
            if crop is not None:
                edited = crop_sample(crop, edited)[0]
            sample["edited"] = self.transform(edited, **drawn)["image"]
        if one_box:
            sample["bbox"] = sample.pop("boxes")[0]
        if "size" in self.keys:
            sample["size"] = np.array([height, width], np.int64)
        return sample | notes | {"index": np.int64(index), "label": np.int64(self.reader.label(index))}

    def __getitems__(self, items: list[Any]) -> tuple[list[dict[str, Any]], dict[str, str]]:
        """The readable samples of a batch, and path -> reason of the others."""
        lost: dict[str, str] = {}
        samples = self._readable(items, lost)
        if not samples and isinstance(items[0], tuple):
            # A training batch that lost all its pictures is read again from the rows that follow: the number of steps,
            # by which processes keep together and a run resumes, does not change.
            for offset in range(1, len(self)):
                following = [(epoch, (place + offset) % len(self), *repeat) for epoch, place, *repeat in items]
                samples = self._readable(following, lost)
                if samples:
                    break
            else:
                raise FgvczooError(f"{self.reader.name}: no picture of the split can be read, such as {min(lost)}")
        return samples, lost

    def _readable(self, items: list[Any], lost: dict[str, str]) -> list[dict[str, Any]]:
        samples = []
        for item in items:
            epoch, place, *repeat = item if isinstance(item, tuple) else (0, item)
            index = self.index(epoch, place)  # a stream that breaks off here is not one more unreadable picture
            try:
                samples.append(self._sample(epoch, index, repeat, self.normalize))
            except FgvczooError as error:
                if self.on_corrupt == "error":
                    raise
                lost[self.reader.name_of(index)] = str(error)
        return samples


class Loader:
    """Batches of a `DataLoader` of `Rows`; Lightning takes it as it is and puts no sampler of its own into it.

    With `on_corrupt="skip"` a batch that lost pictures is smaller, and one of an "exact" loader that lost all of them
    is left out; at the end of each pass a warning says how many are missing and names them.
    """

    def __init__(self, inner: DataLoader[Any], skipped: dict[str, str]) -> None:
        self.inner = inner
        self.skipped = skipped

    @property
    def dataset(self) -> Rows:
        return self.inner.dataset  # type: ignore[return-value]

    @property
    def batch_sampler(self) -> Any:
        return self.inner.batch_sampler

    # By this name Lightning finds and stops the workers when a fit ends or breaks off; left to the garbage collector,
    # each may hold up the process for five seconds.
    @property
    def _iterator(self) -> Any:
        return self.inner._iterator

    @_iterator.setter
    def _iterator(self, value: Any) -> None:
        self.inner._iterator = value

    def __len__(self) -> int:
        return len(self.inner)

    def __iter__(self) -> Iterator[Batch]:
        lost: dict[str, str] = {}
        try:
            with _one_opencv_thread():  # while workers are started
                batches = iter(self.inner)
            for number, (batch, unreadable) in enumerate(batches, 1):
                lost |= unreadable
                self.skipped |= unreadable
                if number == len(self):  # Lightning does not ask whether there is one more
                    _warn_of(lost)
                    lost = {}
                if batch is not None:
                    yield _normalized(batch, self.dataset.transform.preprocess)
        finally:
            _warn_of(lost)


def _warn_of(lost: dict[str, str]) -> None:
    if lost:
        names = ", ".join(list(lost)[:5]) + (", ..." if len(lost) > 5 else "")
        what = "1 unreadable picture was" if len(lost) == 1 else f"{len(lost)} unreadable pictures were"
        warnings.warn(f"{what} skipped: {names}", FgvczooWarning, stacklevel=3)


def collate(data: Any) -> tuple[dict[str, Any] | None, dict[str, str]]:
    """What `Rows.__getitems__` gives, its samples as a batch; None where no picture could be read."""
    samples, lost = data
    return (_stack(samples) if samples else None), lost


def _stack(samples: list[dict[str, Any]]) -> dict[str, Any]:
    batch: dict[str, Any] = {}
    for key, first in samples[0].items():
        values = [sample[key] for sample in samples]
        if key in RAGGED_KEYS:
            batch[key] = [torch.as_tensor(value) for value in values]
        elif isinstance(first, dict):
            batch[key] = _stack(values)
        elif isinstance(first, list):
            batch[key] = [torch.stack(views) for views in zip(*values)]
        else:
            batch[key] = torch.stack([torch.as_tensor(value) for value in values])
    return batch


def _normalized(batch: dict[str, Any], preprocess: Preprocess) -> Any:
    """A batch whose pictures are all normalised."""

    def normal(pictures: torch.Tensor) -> torch.Tensor:
        return preprocess.normalize_batch(pictures) if pictures.dtype == torch.uint8 else pictures

    for key in ("image", "edited"):
        if key in batch:
            batch[key] = normal(batch[key])
    if "views" in batch:
        batch["views"] = [normal(view) for view in batch["views"]]
    return batch


@contextmanager
def _one_opencv_thread() -> Iterator[None]:
    """A forked process inherits OpenCV's thread pool without its threads, and waits for them for ever."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(threads)


def one_thread(worker: int) -> None:
    """Workers are the parallelism. A forked one has its one thread already and must not touch the pool."""
    if cv2.getNumThreads() != 1:
        cv2.setNumThreads(1)
