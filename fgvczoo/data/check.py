"""Looking at a data set before it is trusted: is it all there, can it be read, do the annotations fit the pictures."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fgvczoo.data.base import FGVCDataModule
from fgvczoo.data.cub import CUB
from fgvczoo.errors import FgvczooError

_SHOWN = 20  # problems of one kind that are named


@dataclass
class Report:
    """What was found: `found` holds (kind, text), kind "ok", "note" (allowed, worth knowing) or "wrong"."""

    found: list[tuple[str, str]] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Nothing is wrong."""
        return all(kind != "wrong" for kind, _ in self.found)

    def add(self, kind: str, text: str) -> None:
        """Appends one finding."""
        self.found.append((kind, text))

    def lines(self) -> list[str]:
        """The report as text, the verdict last."""
        wrong = sum(kind == "wrong" for kind, _ in self.found)
        verdict = "nothing is wrong" if self.ok else f"{wrong} thing{'s are' if wrong > 1 else ' is'} wrong"
        return [*(f"{kind:5}  {text}" for kind, text in self.found), verdict]


def check_cub(root: str | Path, *, progress: bool = True) -> Report:
    """Reads every file and every picture of a copy of CUB-200-2011, or of a set in its layout. Changes nothing.

    No archive's checksum is published in a confirmed form, so what was unpacked is checked and not the archive.

    progress: show a bar on stderr.
    """
    report = Report()
    try:
        reader = CUB(root)
    except FgvczooError as error:
        report.add("wrong", str(error))
        return report
    counts = ", ".join(f"{len(rows):,} {name}" for name, rows in reader.splits.items())
    report.add("ok", f"{reader.folder}: {len(reader):,} images of {len(reader.class_names)} classes ({counts})")
    train = np.bincount(reader.labels[reader.splits["train"]], minlength=len(reader.class_names))
    if empty := [reader.class_names[label] for label in np.flatnonzero(train == 0)]:
        report.add("note", f"{len(empty)} classes without a training image, such as {', '.join(empty[:5])}")
    for key in ("bbox", "parts", "attributes", "class_attributes"):
        try:
            if key == "class_attributes":
                _ = reader.class_attributes
            else:
                reader.require([key])
            report.add("ok", f"{key}: read")
        except FgvczooError as error:
            report.add("wrong", str(error))
    try:
        reader.require(["mask"])
    except FgvczooError as error:
        report.add("note", str(error))
        _check_pictures(reader, report, masks=False, progress=progress)
    else:
        _check_pictures(reader, report, masks=True, progress=progress)
    return report


def _check_pictures(reader: CUB, report: Report, *, masks: bool, progress: bool) -> None:
    from rich.console import Console
    from rich.progress import track

    problems: list[str] = []
    grey = 0
    rows = range(len(reader))
    for index in track(rows, "reading pictures", console=Console(stderr=True), disable=not progress, transient=True):
        try:
            image = reader.read(index)
            grey += bool((image == image[..., :1]).all())
            if masks and (shape := reader.annotations(index, ["mask"])["mask"].shape) != image.shape[:2]:
                problems.append(f"{reader.name_of(index)}: {image.shape[:2]} pixels, but its segmentation has {shape}")
        except FgvczooError as error:
            problems.append(str(error))
    for problem in problems[:_SHOWN]:
        report.add("wrong", problem)
    if len(problems) > _SHOWN:
        report.add("wrong", f"and {len(problems) - _SHOWN} more pictures like these")
    what = "pictures and segmentations" if masks else "pictures"
    if not problems:
        report.add("ok", f"all {len(reader):,} {what} can be read")
    if grey:
        report.add("note", f"{grey} pictures are grey; they are read as RGB")


def contact_sheet(
    datamodule: FGVCDataModule, split: str, n: int = 24, *, augment: bool = False, columns: int = 6
) -> Image.Image:
    """A sheet of `n` pictures spread over a split, as the network gets them, each with the name of its class.

    Boxes and visible parts are drawn where the data module's `keys` ask for them. augment: as in training.
    """
    rows = datamodule.loader(split, augment=augment).dataset
    places = np.unique(np.linspace(0, len(rows) - 1, min(max(n, 1), len(rows))).round().astype(int))
    height, width = datamodule.preprocess.size
    caption, gap = 14, 4
    columns = min(columns, len(places))
    lines = -(-len(places) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, lines * (height + caption + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(10)
    for number, place in enumerate(places):
        sample = rows[int(place)]
        picture = Image.fromarray(datamodule.preprocess.invert(sample["image"]))
        pen = ImageDraw.Draw(picture)
        boxes = sample["bbox"][None] if "bbox" in sample else sample.get("boxes", ())
        for box in boxes:
            pen.rectangle([float(value) for value in box], outline="yellow")
        for x, y, visible in sample.get("parts", ()):
            if visible:
                pen.ellipse([float(x) - 2, float(y) - 2, float(x) + 2, float(y) + 2], outline="red", fill="white")
        left, top = gap + number % columns * (width + gap), gap + number // columns * (height + caption + gap)
        sheet.paste(picture, (left, top))
        name = datamodule.row(int(sample["index"]))["class_name"]
        while name and font.getlength(name) > width:
            name = name[:-1]
        draw.text((left, top + height), name, fill="black", font=font)
    return sheet
