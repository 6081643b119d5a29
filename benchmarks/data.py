"""Times loading and augmenting pictures against torchvision's: `python benchmarks/data.py [--pictures 480]`.

Both sides read the same folder of JPEGs of 500 x 375 (smooth colours, edges, noise) and give batches of 32 normalised
tensors of 224 x 224 out of a DataLoader, with as many workers, one thread each:

- ours: `FolderDataModule`, with the protocol of that name, once decoding every time and once with `decoded`, a folder
  that the first pass has filled;
- torchvision: `ImageFolder` with the same operations, as its users write them (Pillow decodes and resizes), and once
  more over decoded pictures, by a `loader` that reads a .npy file each.

The geometric maps of ProtoPNet's protocol are drawn by the same functions on both sides; torchvision applies them by
its `functional.perspective`, bicubic. Passes alternate, after one of each that is not counted; median. Pictures of both
sides are compared where nothing is drawn. Writes results/data.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from report import processor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import default_loader
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from fgvczoo.data import warps
from fgvczoo.data.folder import FolderDataModule
from fgvczoo.files import write_text

RESULTS = Path(__file__).parent / "results"
SIZE, BATCH, PASSES, TARGET = 224, 32, 5, 2.5
# Of speeds: both decode; ours reads decoded pictures and torchvision decodes; both read decoded pictures.
RATIOS = {
    "ratio": ("ours", "torchvision"),
    "ratio_decoded": ("ours decoded", "torchvision"),
    "ratio_both_decoded": ("ours decoded", "torchvision decoded"),
}
SIDES = ("ours", "ours decoded", "torchvision", "torchvision decoded")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def write_pictures(root: Path, count: int) -> None:
    """Four classes of pictures."""
    rng = np.random.default_rng(0)
    for number in range(count):
        field = cv2.resize(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8), (500, 375), interpolation=cv2.INTER_CUBIC)
        for _ in range(40):
            x, y, w, h = (int(v) for v in rng.integers(0, (500, 375, 120, 90)))
            colour = [int(value) for value in rng.integers(0, 256, 3)]
            cv2.ellipse(field, (x, y), (w // 2 + 1, h // 2 + 1), 0, 0, 360, colour, -1)
        noisy = np.clip(field + rng.normal(0, 9, field.shape), 0, 255).astype(np.uint8)
        path = root / f"class{number % 4}" / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy).save(path, quality=90)


class Drawn:
    """One of ProtoPNet's maps, by torchvision."""

    def __call__(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        draw = random.choice((warps.draw_rotation, warps.draw_skew, warps.draw_shear))
        matrix = draw(random, height, width)  # the generator of the worker
        corners = np.array([[0, 0, 1], [width, 0, 1], [width, height, 1], [0, height, 1]], np.float64)
        moved = corners @ matrix.T
        ends = (moved[:, :2] / moved[:, 2:]).tolist()
        return F.perspective(image, corners[:, :2].tolist(), ends, InterpolationMode.BICUBIC)


def chain(*steps: Any) -> Any:
    return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])


PIPELINES: dict[str, tuple[str, Callable[[], Any]]] = {  # what it is -> our protocol, torchvision's
    "resize": ("none", lambda: chain(transforms.Resize((SIZE, SIZE)))),
    "plain: resize, flip": ("flip", lambda: chain(transforms.Resize((SIZE, SIZE)), transforms.RandomHorizontalFlip())),
    "plain: crop, flip, colours": (
        "random-crop-colour",
        lambda: chain(
            transforms.Resize((256, 256)),
            transforms.RandomCrop(SIZE),
            transforms.RandomHorizontalFlip(),
            transforms.ColorJitter(0.2, 0.2, 0.2, 0.2),
        ),
    ),
    "resized crop, flip": (
        "resized-crop",
        lambda: chain(transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip()),
    ),
    "ProtoPNet": (
        "protopnet",
        lambda: chain(Drawn(), transforms.RandomHorizontalFlip(), transforms.Resize((SIZE, SIZE))),
    ),
}


def one_thread(_: int) -> None:
    torch.set_num_threads(1)
    cv2.setNumThreads(1)


class Arrays:
    """A loader of torchvision's `ImageFolder` for pictures that were decoded once, into .npy files of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, path: str) -> Image.Image:
        file = self.folder / f"{Path(path).stem}.npy"
        if not file.exists():
            np.save(file, np.asarray(default_loader(path)))
        return Image.fromarray(np.load(file))


def loaders(root: Path, decoded: Path, name: str, workers: int) -> dict[str, Any]:
    """Side -> its loader. decoded: a folder for each side's decoded pictures."""
    protocol, theirs = PIPELINES[name]
    made: dict[str, Any] = {}
    for side, where in (("ours", None), ("ours decoded", str(decoded / "ours"))):
        data = FolderDataModule(
            str(root), test_fraction=0, augmentation=protocol, batch_size=BATCH, num_workers=workers,
            preprocess={"size": [SIZE, SIZE]}, decoded=where,
        )  # fmt: skip
        made[side] = data.loader("train", augment=True, shard="train")
    arrays = decoded / "torchvision"
    arrays.mkdir(exist_ok=True)
    options = {"batch_size": BATCH, "shuffle": True, "num_workers": workers, "worker_init_fn": one_thread}
    for side, loader in (("torchvision", default_loader), ("torchvision decoded", Arrays(arrays))):
        folder = ImageFolder(str(root), theirs(), loader=loader)
        made[side] = DataLoader(folder, persistent_workers=workers > 0, **options)
    return made


def run(loader: Any) -> float:
    """Pictures a second of one pass."""
    start, seen = time.perf_counter(), 0
    for batch in loader:
        seen += len(batch["image"] if isinstance(batch, dict) else batch[0])
    return seen / (time.perf_counter() - start)


def difference(root: Path) -> float:
    """The largest difference of two pictures that are only resized, in levels of 0..255, as a mean over pixels."""
    data = FolderDataModule(str(root), test_fraction=0, preprocess={"size": [SIZE, SIZE]})
    folder = ImageFolder(str(root), PIPELINES["resize"][1]())
    levels = 255 * torch.tensor(STD)[:, None, None]
    return max(float(((data.sample(row)["image"] - folder[row][0]).abs() * levels).mean()) for row in range(8))


def line(row: dict[str, Any]) -> list[str]:
    """The cells of a row."""
    speeds = [f"{row[side]:.0f}" for side in SIDES]
    return [row["pipeline"], str(row["workers"]), *speeds, *(f"{row[ratio]:.2f}" for ratio in RATIOS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=480)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    options = parser.parse_args()
    one_thread(0)
    rows = []
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as kept:
        root, decoded = Path(folder), Path(kept)
        write_pictures(root, options.pictures)
        gap = difference(root)
        size = sum(path.stat().st_size for path in root.rglob("*.jpg")) / options.pictures / 1000
        for workers in options.workers:
            for name in PIPELINES:
                pair = loaders(root, decoded, name, workers)
                found: dict[str, list[float]] = {side: [] for side in pair}
                for number in range(1 + PASSES):
                    for side, loader in pair.items():
                        speed = run(loader)
                        if number:
                            found[side].append(speed)
                middle = {side: statistics.median(speeds) for side, speeds in found.items()}
                ratios = {ratio: middle[one] / middle[other] for ratio, (one, other) in RATIOS.items()}
                rows.append({"pipeline": name, "workers": workers, **middle, **ratios})
                print(rows[-1], flush=True)
    names = ("torch", "torchvision", "albumentations", "opencv-python-headless", "pillow")
    result = {
        "pictures": options.pictures, "kilobytes": size, "difference_levels": gap, "rows": rows, "target": TARGET,
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in names}},
    }  # fmt: skip
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    lines = [
        "# Loading and augmenting pictures", "",
        f"{options.pictures} JPEGs of 500 x 375 ({size:.0f} kB each) to 224 x 224, batches of {BATCH}.", "",
        f"Pictures a second, median of {PASSES} passes. Merely resized pictures differ by {gap:.3f} of 255 levels.", "",
        "Decoded: out of a folder that a first pass has filled, by `decoded`; torchvision by a loader of .npy files.",
        "Ratios: both decode; ours decoded over torchvision, which decodes; both decoded.", "",
        "| pipeline | workers | fgvczoo | decoded | torchvision | decoded | ratio | ours decoded | both decoded |",
        f"|{' --- |' * 9}",
        *(f"| {' | '.join(line(row))} |" for row in rows), "",
        f"{result['machine']}; {versions}. `python benchmarks/data.py`",
    ]  # fmt: skip
    print("\n".join(lines))
    write_text(RESULTS / "data.json", json.dumps(result, indent=1) + "\n")
    write_text(RESULTS / "data.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
