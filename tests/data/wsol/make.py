"""A tiny copy of the localisation benchmark's lists and pictures, boxes and masks, with the traps of the real ones.

The traps: several boxes a picture; several masks a picture, and one of what is ignored, on its first line alone;
    training images of which nothing is known; folders of ImageNetV2 that are numbers.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from tests.data.pictures import save_picture, write_lines

MIDS = ("m0gj37", "m01lsmm", "m0dtln")
SIZE = (40, 50)


def make_wsol(root: Path, name: str = "OpenImages", *, train: int = 4, val: int = 1, test: int = 2) -> None:
    """Writes the copy of one data set. train, val, test: images of a class."""
    for split, count in (("train", train), ("val", val), ("test", test)):
        folder = root / f"metadata/{name}/{split}"
        ids, labels, places = [], [], []
        for label, mid in enumerate(MIDS):
            for number in range(count):
                inner = f"val2/{label}" if split == "val" and name == "ILSVRC" else f"{split}/{mid}"
                path = f"{inner}/{split}{number}.jpg"
                save_picture(root / f"dataset/{name}" / path, 10 * label + number, size=SIZE)
                ids.append(path)
                labels.append(f"{path},{label}")
                if split == "train":
                    continue
                if name != "OpenImages":
                    places += [f"{path},{x},3,{x + 20},30" for x in range(1 + number)]
                    continue
                for place in range(2):
                    mask = path.replace(".jpg", f"_{mid}_{place}.png")
                    _mask(root / f"dataset/{name}" / mask, 5 + 20 * place, 15 + 20 * place)
                    ignore = path.replace(".jpg", "_ignore.png") if place == 0 else ""
                    if ignore:
                        _mask(root / f"dataset/{name}" / ignore, 10, 20)
                    places.append(f"{path},{mask},{ignore}")
        write_lines(folder / "image_ids.txt", ids)
        write_lines(folder / "class_labels.txt", labels[::-1])
        write_lines(folder / "image_sizes.txt", [f"{path},{SIZE[1]},{SIZE[0]}" for path in ids])
        if split != "train":
            write_lines(folder / "localization.txt", places)


def _mask(path: Path, left: int, right: int) -> None:
    mask = np.zeros(SIZE, np.uint8)
    mask[:, left:right] = 255
    Image.fromarray(mask).save(path)
