"""Oxford Flowers 102 (Nilsback and Zisserman 2008) in its official layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np

from fgvczoo.data.base import FGVCDataModule
from fgvczoo.data.mat import read_mat
from fgvczoo.data.official import Archive, Official, Part, check_choice, find_folder
from fgvczoo.errors import FgvczooError

_GET = (
    "get 102flowers.tgz, imagelabels.mat and setid.mat from the VGG's page of Flowers 102, and unpack the first there"
)
_CLASSES, _PARTS = 102, {"train": 1_020, "val": 1_020, "test": 6_149}  # of the real set


class Flowers(Official):
    """The rows of Flowers 102: those of training (`trnid`), of validation (`valid`), of testing (`tstid`).

    root: the folder that holds `jpg/`, `imagelabels.mat` and `setid.mat`.
    train: "trainval" trains on both parts, as MetaFormer; "train" leaves the other one as the split "val".

    Testing has six times as many images as training. Some papers swap them; here they are as the files say. Other sizes
    than the real set's are read alike; counts are asserted where it is the real set.
    """

    name = "flowers"
    archives = (
        Archive("102flowers.tgz", "52808999861908f626f3c1f4e79d11fa", True),
        Archive("imagelabels.mat", "e0620be6f572b9609742df49c70aed4d"),
        Archive("setid.mat", "a5357ecc9cb78c4bef273ce3793fc85c"),
    )

    def __init__(self, root: str | Path | None, *, train: Literal["trainval", "train"] = "trainval") -> None:
        check_choice("train", train, ("trainval", "train"))
        inner = (".", "flowers-102", "oxford-flowers-102")
        self.folder = find_folder(root, inner, ("jpg",), archives=self.archives[:1], get=_GET)
        self.pictures = self.folder / "jpg"
        file = self.folder / "imagelabels.mat"
        labels = _whole(file, "labels")
        count = int(labels.max(initial=0))
        if len(wrong := np.flatnonzero(labels < 1)):
            raise FgvczooError(f"{file}: image {wrong[0] + 1} has label {labels[wrong[0]]}; expected 1..{count}")
        file = self.folder / "setid.mat"
        parts = []
        for split, variable in (("train", "trnid"), ("val", "valid"), ("test", "tstid")):
            ids = _whole(file, variable)
            if len(wrong := np.flatnonzero((ids < 1) | (ids > len(labels)))):
                raise FgvczooError(f"{file}: {variable} has image {ids[wrong[0]]}; expected 1..{len(labels)}")
            shown = "train" if split == "val" and train == "trainval" else split
            parts.append(Part(file, shown, [f"image_{number:05d}.jpg" for number in ids], labels[ids - 1] - 1))
        real = dict(_PARTS) if count == _CLASSES else None
        if real and train == "trainval":
            real = {"train": real["train"] + real["val"], "test": real["test"]}
        self.take(parts, _class_names(count), real=real)


def _whole(file: Path, variable: str) -> np.ndarray:
    """(n,) int64."""
    values = np.atleast_1d(read_mat(file, variable))
    if values.dtype.kind not in "iuf" or (values % 1 != 0).any():
        raise FgvczooError(f"{file}: {variable} are no whole numbers; get it again")
    return values.reshape(-1).astype(np.int64)


def _class_names(count: int) -> list[str]:
    """Those of torchvision, in the order of the labels; the files have none."""
    if count != _CLASSES:
        return [f"flower {number + 1}" for number in range(count)]
    from torchvision.datasets import Flowers102

    return list(Flowers102.classes)


class FlowersDataModule(FGVCDataModule):
    """Oxford Flowers 102. Its pictures are never downloaded here: `root` says where they are.

    root, train: see `Flowers`. options: see `FGVCDataModule`. No keys.
    """

    reader_class = Flowers

    def __init__(
        self, root: str | None = None, train: Literal["trainval", "train"] = "trainval", **options: Any
    ) -> None:
        super().__init__(Flowers(root, train=train), **options)
