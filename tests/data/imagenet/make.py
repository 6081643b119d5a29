"""A tiny copy of ImageNet's localisation task, as Kaggle packs it, with the traps of the real one.

The traps: a flat folder of validation images, several boxes an image, two classes of one name, a CMYK JPEG, a PNG that
is called .JPEG, pictures of different sizes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image

WORDNET = {"n01440764": "tench, Tinca tinca", "n02012849": "crane", "n03126707": "crane"}


def make_imagenet(root: Path, *, layout: str = "kaggle") -> dict[str, tuple[str, list[list[int]]]]:
    """Writes the copy and returns the validation images' names, classes and boxes.

    layout: "kaggle"; "folders": train/ and val/ with a folder for each class, boxes as XML; or "devkit": val/ flat,
        with the devkit, whose numbers are in another order than the WordNet ids.
    """
    rng = np.random.default_rng(0)
    base = root / "ILSVRC/Data/CLS-LOC" if layout == "kaggle" else root
    truth: dict[str, tuple[str, list[list[int]]]] = {}
    for label, wnid in enumerate(WORDNET):
        for number in range(4):
            _save(base / f"train/{wnid}/{wnid}_{number}.JPEG", rng, label, number)
        for number in range(2):
            name = f"ILSVRC2012_val_{2 * label + number + 1:08d}"
            folder = base / "val" / wnid if layout == "folders" else base / "val"
            width, height = _save(folder / f"{name}.JPEG", rng, label, number)
            truth[name] = (wnid, [[4, 5, width - 6, height - 7], [0, 0, 10, 9]][: number + 1])
    if layout == "kaggle":
        lines = [
            f"{name}," + " ".join(f"{wnid} {' '.join(map(str, box))}" for box in boxes) + " "
            for name, (wnid, boxes) in truth.items()
        ]
        (root / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *lines]) + "\n")
        names = "".join(f"{wnid} {name}\n" for wnid, name in WORDNET.items())
        (root / "LOC_synset_mapping.txt").write_text(names)
        return truth
    if layout == "devkit":
        kit = root / "ILSVRC2012_devkit_t12/data"
        kit.mkdir(parents=True)
        synsets = np.empty((3, 1), [("ILSVRC2012_ID", object), ("WNID", object), ("words", object)])
        order = list(WORDNET)[::-1]
        for number, wnid in enumerate(order):
            synsets[number, 0] = np.uint16(number + 1), wnid, WORDNET[wnid]
        scipy.io.savemat(kit / "meta.mat", {"synsets": synsets})
        lines = [f"{order.index(truth[name][0]) + 1}\n" for name in sorted(truth)]
        (kit / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(lines))
        return truth
    (root / "bbox_val").mkdir()
    for name, (wnid, boxes) in truth.items():
        corners = ("xmin", "ymin", "xmax", "ymax")
        objects = "".join(
            f"<object><name>{wnid}</name><bndbox>"
            + "".join(f"<{key}>{value}</{key}>" for key, value in zip(corners, box))
            + "</bndbox></object>"
            for box in boxes
        )
        (root / f"bbox_val/{name}.xml").write_text(f"<annotation>{objects}</annotation>")
    return truth


def _save(path: Path, rng: np.random.Generator, label: int, number: int) -> tuple[int, int]:
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = (int(side) for side in rng.integers(40, 60, 2))
    picture = Image.fromarray(np.full((height, width, 3), (60 * label + 20, 50 * number, 90), np.uint8))
    if number == 2:
        picture.convert("CMYK").save(path, "JPEG")
    else:
        picture.save(path, "PNG" if number == 3 else "JPEG")
    return width, height
