"""Looking at a data set before it is trusted: is it all there, can it be read, do the annotations fit the pictures."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from hashlib import blake2b, file_digest
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fgvczoo.data.base import FGVCDataModule, Reader
from fgvczoo.data.folder import Folder
from fgvczoo.data.official import Official
from fgvczoo.errors import FgvczooError, did_you_mean
from fgvczoo.progress import progress as bar

_SHOWN = 20  # problems of one kind, and classes, that are named
_WITH_PICTURES = ("mask", "bbox", "boxes", "satellite", "edited")
_FEW = 5  # training images without which a class is worth a note


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


def check_official(reader_class: Any, root: str | Path, *, progress: bool = True, **options: Any) -> Report:
    """Reads every file and every picture of a copy in its official layout. Changes nothing.

    Archives that still lie there are compared with the MD5 sums that are known of them; another one is wrong only where
    the sum is confirmed.

    reader_class: a subclass of `Official`. options: of the reader. progress: show a bar on stderr.
    """
    known = [name for name in inspect.signature(reader_class).parameters if name != "root"]
    for name in options:
        if name not in known:
            expected = f"only {', '.join(known)}" if known else "none"
            raise FgvczooError(f"{reader_class.name} has no option {name!r}, {expected}{did_you_mean(name, known)}")
    report = Report()
    try:
        reader = reader_class(root, **options)
    except FgvczooError as error:
        report.add("wrong", str(error))
        return report
    _count(reader, report)
    read = []
    for key in (*reader.keys, *reader.also):
        try:
            if key in reader.keys:
                reader.require([key])
                read.append(key)
            else:
                getattr(reader, key)
            report.add("ok", f"{key}: read")
        except FgvczooError as error:
            report.add("note" if key in reader.optional else "wrong", str(error))
    _check_archives(reader, Path(root), report)
    _check_pictures(reader, report, [key for key in read if key in _WITH_PICTURES], progress=progress)
    return report


def _check_archives(reader: Official, root: Path, report: Report) -> None:
    folders = dict.fromkeys((root, reader.folder, reader.folder.parent))
    for archive in reader.archives:
        for file in (folder / archive.name for folder in folders):
            if archive.md5 is None or not file.is_file():
                continue
            with file.open("rb") as handle:
                found = file_digest(handle, "md5").hexdigest()
            if found == archive.md5:
                report.add("ok", f"{file}: MD5 {found}")
            elif archive.confirmed:
                report.add("wrong", f"{file}: MD5 {found}; expected {archive.md5}; get it again")
            else:
                text = f"{file}: MD5 {found}, elsewhere {archive.md5} is named; what it holds counts"
                report.add("note", text)


def _count(reader: Official, report: Report) -> None:
    counts = ", ".join(f"{len(rows):,} {name}" for name, rows in reader.splits.items())
    report.add("ok", f"{reader.folder}: {len(reader):,} images of {len(reader.all_class_names)} classes ({counts})")
    train = np.bincount(reader.labels[reader.splits["train"]], minlength=len(reader.class_names))
    if empty := [reader.class_names[label] for label in np.flatnonzero(train == 0)]:
        report.add("note", f"{len(empty)} classes without a training image, such as {', '.join(empty[:5])}")


def check_folder(root: str | Path, table: str | Path | None = None, *, progress: bool = True) -> Report:
    """Reads every picture of a user's own folder and all columns of its table. Changes nothing.

    Wrong are unreadable pictures and cells, and the same file under two classes or in two splits; worth knowing are
    small classes, the same file twice in one class, grey pictures, boxes beyond their picture, and what is not read.

    table: see `Folder`. progress: show a bar on stderr.
    """
    report = Report()
    try:
        reader = Folder(root, table=table, test_fraction=0)  # as it is, before anything is cut from train
    except FgvczooError as error:
        report.add("wrong", str(error))
        return report
    counts = ", ".join(f"{len(rows):,} {name}" for name, rows in reader.splits.items())
    report.add("ok", f"{reader.root}: {len(reader):,} images of {len(reader.class_names)} classes ({counts})")
    _count_classes(reader, report)
    keys = []
    for key in reader.keys:
        try:
            reader.require([key])
            keys.append(key)
            report.add("ok", f"{key}: read")
        except FgvczooError as error:
            report.add("wrong", str(error))
    if reader.unread:
        report.add("note", f"columns that mean nothing here: {', '.join(reader.unread)}")
    if others := reader.others():
        report.add("note", f"{len(others)} files are not read, such as {', '.join(others[:5])}")
    rows_of: dict[bytes, list[int]] = {}
    _check_pictures(reader, report, keys, rows_of=rows_of, progress=progress)
    _report_twins(reader, report, rows_of)
    return report


def _count_classes(reader: Folder, report: Report) -> None:
    counts = {
        name: np.bincount(reader.labels[rows], minlength=len(reader.class_names))
        for name, rows in reader.splits.items()
    }
    for label, class_name in enumerate(reader.class_names[:_SHOWN]):
        report.add("ok", f"{class_name}: " + ", ".join(f"{number[label]} {name}" for name, number in counts.items()))
    if len(reader.class_names) > _SHOWN:
        every = np.sum(list(counts.values()), axis=0)
        report.add(
            "ok", f"and {len(reader.class_names) - _SHOWN} more classes, of {every.min()} to {every.max()} images"
        )
    for name, least in (("train", _FEW), ("test", 1)):
        if name in counts and (small := [reader.class_names[label] for label in np.flatnonzero(counts[name] < least)]):
            report.add("note", f"{len(small)} classes with less than {least} {name} images, such as {_some(small)}")


def _report_twins(reader: Folder, report: Report, rows_of: dict[bytes, list[int]]) -> None:
    """Files of equal content: hash -> rows."""
    kinds: dict[str, list[str]] = {"two classes": [], "two splits": [], "one class": []}
    for rows in rows_of.values():
        if len(rows) > 1:
            labels, splits = ({find(row) for row in rows} for find in (reader.label, reader.split_of))
            kind = "two classes" if len(labels) > 1 else "two splits" if len(splits) > 1 else "one class"
            kinds[kind].append(" = ".join(str(reader.image_ids[row]) for row in rows))
    for kind, found in kinds.items():
        if found:
            text = f"{len(found)} pictures are there more than once, in {kind}, such as {_some(found)}"
            if kind == "one class":
                report.add("note", f"{text}; leave one, or training and test may share it")
            else:
                report.add("wrong", text)


def _beyond(boxes: np.ndarray, image: np.ndarray) -> bool:
    """Whether a box leaves the picture by more than a pixel, as x, y, width, height do when read as two corners."""
    height, width = image.shape[:2]
    return bool(((boxes < -1) | (boxes > (width + 1, height + 1, width + 1, height + 1))).any())


def _some(names: list[str]) -> str:
    return ", ".join(names[:5])


def _check_pictures(
    reader: Reader, report: Report, keys: list[str], *, rows_of: dict[bytes, list[int]] | None = None, progress: bool
) -> None:
    """Decodes all pictures, and compares them with those of "mask", "bbox" and "boxes" that are in `keys`.

    rows_of: filled with the rows of every content, by its hash.
    """
    problems: list[str] = []
    beyond: list[str] = []
    grey = 0
    rows = range(len(reader))
    for index in bar(rows, "reading pictures", show=progress):
        try:
            image = reader.read(index)
            grey += bool((image == image[..., :1]).all())
            notes = reader.annotations(index, keys)
            if "mask" in notes and (shape := notes["mask"].shape) != image.shape[:2]:
                problems.append(f"{reader.name_of(index)}: {image.shape[:2]} pixels, but its segmentation has {shape}")
            if any(_beyond(notes[key], image) for key in ("bbox", "boxes") if key in notes):
                beyond.append(str(reader.image_ids[index]))
            if rows_of is not None:
                picture = reader.picture(index)
                content = picture if isinstance(picture, bytes) else picture.read_bytes()
                rows_of.setdefault(blake2b(content, digest_size=16).digest(), []).append(index)
        except FgvczooError as error:
            problems.append(str(error))
    if beyond:
        report.add("note", f"{len(beyond)} pictures have a box beyond their border, such as {_some(beyond)}")
    for problem in problems[:_SHOWN]:
        report.add("wrong", problem)
    if len(problems) > _SHOWN:
        report.add("wrong", f"and {len(problems) - _SHOWN} more pictures like these")
    what = "pictures and segmentations" if "mask" in keys else "pictures"
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
