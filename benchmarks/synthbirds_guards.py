"""Does SynthBirds hide its answer where it should, and show it where it should?

Makes the `small` copy, then measures what must stay near chance (colour histograms, tiny thumbnails, the background
alone), what a small network reaches on the whole picture, per pair of siblings, and how fast copies are made. Writes
results/synthbirds_guards.json and .md and ends with status 1 when a bound is broken.

    python benchmarks/synthbirds_guards.py [--quick]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from fgvczoo.data import synthbirds

RESULTS = Path(__file__).parent / "results"
SIDE = 96
NEIGHBOURS = (1, 5, 20)
# name -> (least, most) accuracy in percent; chance is 5.
BOUNDS = {
    "histogram_knn": (0, 10),
    "thumbnail_knn": (0, 10),
    "background_cnn": (0, 8),
    "image_cnn": (60, 100),
}


def read(root: Path) -> dict[str, Any]:
    """All images at `SIDE` pixels with the box greyed or not, their histograms, thumbnails, labels and splits."""
    folder = root / "CUB_200_2011"

    def column(name: str, first: int = 1) -> list[list[str]]:
        return [line.split()[first:] for line in (folder / name).read_text().splitlines()]

    images, backgrounds, histograms, thumbnails = [], [], [], []
    for (path,), box in zip(column("images.txt"), np.array(column("bounding_boxes.txt"), float)):
        picture = Image.open(folder / "images" / path).convert("RGB")
        pixels = np.array(picture)
        cells = (pixels // 32).reshape(-1, 3) @ (64, 8, 1)
        histograms.append(np.bincount(cells, minlength=512))
        thumbnails.append(np.asarray(picture.resize((32, 32), Image.Resampling.BOX)))
        images.append(np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BILINEAR)))
        x, y, width, height = box.astype(int)
        pixels[y : y + height, x : x + width] = 128
        backgrounds.append(np.asarray(Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BILINEAR)))
    return {
        "images": torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(),
        "backgrounds": torch.from_numpy(np.stack(backgrounds)).permute(0, 3, 1, 2).contiguous(),
        "histograms": torch.from_numpy(np.sqrt(np.stack(histograms))).float(),
        "thumbnails": torch.from_numpy(np.stack(thumbnails)).flatten(1).float(),
        "labels": torch.tensor([int(label) - 1 for (label,) in column("image_class_labels.txt")]),
        "train": torch.tensor([flag == "1" for (flag,) in column("train_test_split.txt")]),
    }


def nearest_neighbours(features: Tensor, labels: Tensor, train: Tensor) -> dict[str, float]:
    """Accuracy in percent of a vote of the k most similar training images (cosine)."""
    features = F.normalize(features, dim=1)
    order = (features[~train] @ features[train].T).argsort(dim=1, descending=True, stable=True)
    classes = int(labels.max()) + 1
    accuracy = {}
    for k in NEIGHBOURS:
        votes = F.one_hot(labels[train][order[:, :k]], classes).sum(dim=1)
        accuracy[f"k={k}"] = 100 * (votes.argmax(dim=1) == labels[~train]).float().mean().item()
    return accuracy


class SmallNet(nn.Module):
    """Four convolutions with batch norm, then the largest and the mean response of each channel."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        widths = (3, 24, 48, 96, 128)
        blocks: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            convolution = nn.Conv2d(before, after, 3, padding=1, bias=False)
            blocks += [convolution, nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
        self.trunk = nn.Sequential(*blocks[:-1])
        self.head = nn.Linear(2 * widths[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.trunk(images)
        return self.head(torch.cat([maps.amax(dim=(2, 3)), maps.mean(dim=(2, 3))], dim=1))


def normalized(images: Tensor) -> Tensor:
    return (images.float() - 110) / 60


def augmented(images: Tensor) -> Tensor:
    """Mirrors half of the images and shifts them by up to eight pixels."""
    images = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(3), images)
    padded = F.pad(images, (8, 8, 8, 8), mode="replicate")
    top, left = torch.randint(0, 17, (2,)).tolist()
    return padded[:, :, top : top + SIDE, left : left + SIDE]


def network(images: Tensor, labels: Tensor, train: Tensor, epochs: int, seed: int = 0) -> Tensor:
    """Trains a `SmallNet`; the logits of the test images after the last epoch."""
    torch.manual_seed(seed)
    classes, batch = int(labels.max()) + 1, 32
    model = SmallNet(classes).to(memory_format=torch.channels_last)
    inputs, targets = normalized(images[train]), labels[train]
    steps = len(targets) // batch
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * steps, pct_start=0.2)
    for _ in range(epochs):
        for rows in torch.randperm(len(targets))[: steps * batch].split(batch):
            loss = F.cross_entropy(model(augmented(inputs[rows])), targets[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        return torch.cat([model(part) for part in normalized(images[~train]).split(100)])


def per_pair(logits: Tensor, labels: Tensor) -> list[dict[str, Any]]:
    """Accuracy within each pair of siblings, over all classes and between the two alone."""
    looks = synthbirds.genotypes(10)
    rows = []
    for pair in synthbirds.sibling_pairs(10):
        one, other = pair.classes
        own = (labels == one) | (labels == other)
        between = logits[own][:, [one, other]].argmax(dim=1) + one
        rows.append(
            {
                "factor": pair.factor,
                "values": [getattr(looks[one], pair.factor), getattr(looks[other], pair.factor)],
                "accuracy": percent(logits[own].argmax(dim=1) == labels[own]),
                "between_siblings": percent(between == labels[own]),
            }
        )
    return rows


def percent(hits: Tensor) -> float:
    return 100 * hits.float().mean().item()


def speed() -> dict[str, float]:
    """Images per second of one core's time, which other work on the machine hardly changes."""

    def rate(count: int, work: Callable[[int], Any]) -> float:
        start = time.process_time()
        for index in range(count):
            work(index)
        return count / (time.process_time() - start)

    rates = {}
    for side in (128, 224):
        size = synthbirds.Size(10, 10, 10, side, side)
        with tempfile.TemporaryDirectory() as folder:
            copies = rate(1, lambda _: synthbirds.make(folder, size, workers=1, progress=False))  # noqa: B023
        rates[f"files of {side} px"] = copies * size.classes * size.per_class
        rates[f"drawings of {side} px"] = rate(200, lambda i: synthbirds.draw(0, i % 20, i, size).image)  # noqa: B023
    rates["satellite tiles"] = rate(500, lambda i: synthbirds.tile(0, 0, i))
    return rates


def machine() -> dict[str, Any]:
    return {
        "processor": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "synthbirds": synthbirds.VERSION,
    }


def as_markdown(result: dict[str, Any]) -> str:
    lines = [
        "# SynthBirds: guards",
        "",
        "20 classes, 30 training and 30 test images of each (`small`, seed 0); chance is 5 %. One run of each.",
        "",
        "| what | accuracy % | bound | seconds |",
        "| --- | --- | --- | --- |",
    ]
    for name, entry in result["guards"].items():
        values = ", ".join(
            f"{value:.1f} ({key})" if key else f"{value:.1f}" for key, value in entry["accuracy"].items()
        )
        low, high = BOUNDS[name]
        lines.append(f"| {name} | {values} | {low} .. {high} | {entry['seconds']:.0f} |")
    lines += ["", f"Right pair of siblings (10 pairs): {result['right_pair']:.1f} %.", ""]
    lines += ["| pair | accuracy % | between the siblings % |", "| --- | --- | --- |"]
    for row in result["pairs"]:
        name = f"{row['factor']}: {' / '.join(row['values'])}"
        lines.append(f"| {name} | {row['accuracy']:.1f} | {row['between_siblings']:.1f} |")
    lines += ["", "| speed | per second of one core |", "| --- | --- |"]
    lines += [f"| {name} | {value:.0f} |" for name, value in result["speed"].items()]
    lines += ["", "Machine: " + ", ".join(f"{key} {value}" for key, value in result["machine"].items()) + "."]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="leave the networks out and write nothing")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    guards: dict[str, Any] = {}

    def guard(name: str, seconds: float, accuracy: dict[str, float]) -> None:
        guards[name] = {"accuracy": accuracy, "seconds": seconds}
        print(f"{name}: {accuracy} {seconds:.0f} s", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        data = read(synthbirds.make(folder, "small", progress=False))
    labels, train = data["labels"], data["train"]
    for name, features in (("histogram_knn", data["histograms"]), ("thumbnail_knn", data["thumbnails"])):
        start = time.perf_counter()
        accuracy = nearest_neighbours(features, labels, train)
        guard(name, time.perf_counter() - start, accuracy)
    if not quick:
        start = time.perf_counter()
        logits = network(data["backgrounds"], labels, train, epochs=20)
        guard("background_cnn", time.perf_counter() - start, {"": percent(logits.argmax(dim=1) == labels[~train])})
        start = time.perf_counter()
        logits = network(data["images"], labels, train, epochs=35)
        guard("image_cnn", time.perf_counter() - start, {"": percent(logits.argmax(dim=1) == labels[~train])})
        result = {
            "guards": guards,
            "right_pair": percent(logits.argmax(dim=1) // 2 == labels[~train] // 2),
            "pairs": per_pair(logits, labels[~train]),
            "speed": speed(),
            "machine": machine(),
        }
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "synthbirds_guards.json").write_text(json.dumps(result, indent=2) + "\n")
        (RESULTS / "synthbirds_guards.md").write_text(as_markdown(result))
        print(as_markdown(result))
    broken = [
        f"{name} {value:.1f} is not in {BOUNDS[name][0]} .. {BOUNDS[name][1]}"
        for name, entry in guards.items()
        for value in entry["accuracy"].values()
        if not BOUNDS[name][0] <= value < BOUNDS[name][1] + 1e-9
    ]
    for line in broken:
        print(line, file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
