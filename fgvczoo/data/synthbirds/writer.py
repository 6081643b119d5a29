"""Writing a copy: CUB-200-2011's files, and what SynthBirds has besides."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fgvczoo.data.synthbirds.annotations import ATTRIBUTE_GROUPS, ATTRIBUTE_NAMES, CERTAINTIES, annotate, clicks
from fgvczoo.data.synthbirds.drawing import CUB_PART_NAMES, Drawing, draw
from fgvczoo.data.synthbirds.genotypes import (
    CUB_PARTS_OF,
    class_folder,
    class_name,
    genotypes,
    pair_letters,
    sibling_pairs,
)
from fgvczoo.data.synthbirds.habitats import Sighting, sighting, tile
from fgvczoo.data.synthbirds.sizes import SIZES, Size, as_size, check_seed
from fgvczoo.errors import FgvczooError
from fgvczoo.files import cache_folder, write_bytes

VERSION = "1.0"
STAMP = "synthbirds.json"  # written last: a root without it is unfinished
CUB = "CUB_200_2011"
_UNFINISHED = ".unfinished"  # holds the stamp and the temporary files of a copy in the making
_QUALITY = 95
_GREY_EVERY, _GREY_AT = 50, 25  # the images that are grey-scale files
_SIX_FIELDS = (2, 23)  # the image and the attribute whose line has a field too many

_README = f"""SynthBirds {VERSION}: drawn birds in the layout of CUB-200-2011.

Every picture is drawn by fgvczoo from a seed; no photograph is among them. Classes come in pairs of siblings that
differ in one part (sibling_pairs.csv). The files are those of CUB-200-2011, which this set does not contain, and
metadata.csv, train.json, val.json (place and date), satellite/ (a tile for each image), sibling_pairs.csv.
"""

_METADATA_HEADER = "image_id,latitude,longitude,date,hour,location_uncertainty\n"
_GROUP_SIZES = [len(values) for values in ATTRIBUTE_GROUPS.values()]


def default_root(size: str | Size, seed: int = 0) -> Path:
    """Where `make` puts a copy unless told otherwise: a folder of the cache."""
    value = as_size(size)
    names = [name for name, known in SIZES.items() if known == value]
    free = f"{value.pairs}x{value.train_per_class}+{value.test_per_class}x{value.min_side}-{value.max_side}"
    return cache_folder() / f"synthbirds-{VERSION}-{names[0] if names else free}-{seed}"


def make(
    root: str | Path | None = None,
    size: str | Size = "small",
    *,
    seed: int = 0,
    workers: int | None = None,
    progress: bool = True,
    image_folder_view: bool = False,
) -> Path:
    """Draws a copy of the data set and returns its root, which holds attributes.txt and CUB_200_2011/.

    root: the folder to write to, new, empty, or an unfinished copy of the same size and seed, which is completed;
        a finished one is returned at once. By default `default_root(size, seed)`.
    size: a name in `SIZES` or a `Size`.
    seed: another seed gives other classes and other images.
    workers: processes; by default one for every 300 images, as far as there are processors. The files do not depend
        on it.
    progress: show a bar on stderr.
    image_folder_view: also lay out ROOT/image_folder/{train,test}/CLASS/, with links to the images where possible.

    Raises `FgvczooError` when the root holds something else, or another version, size or seed, or cannot be written,
    and for an argument out of range.
    """
    size = as_size(size)
    check_seed(seed)
    if workers is not None and (not isinstance(workers, int) or workers < 1):
        raise FgvczooError(f"workers={workers!r}; expected a whole number of at least 1")
    root = Path(root) if root is not None else default_root(size, seed)
    stamp = (
        json.dumps({"format": "synthbirds", "version": VERSION, "seed": seed, "size": asdict(size)}, indent=2) + "\n"
    )
    try:
        if not _is_finished(root, stamp):
            _write_copy(_Copy(root, uuid.uuid4().hex, size, seed), stamp, workers, progress)
        if image_folder_view:
            _write_image_folder(root)
    except OSError as error:
        raise FgvczooError(f"{error.filename or root}: cannot be written ({error.strerror or error})") from None
    return root


def _is_finished(root: Path, stamp: str) -> bool:
    """Whether `root` is a whole copy with this stamp; refuses a root that is or would become anything else."""
    for path, finished in ((root / STAMP, True), (root / _UNFINISHED / STAMP, False)):
        if path.is_file():
            found = path.read_bytes()
            if found != stamp.encode():
                raise FgvczooError(
                    f"{root}: holds SynthBirds {_summary(found)}, not {_summary(stamp.encode())}; give another root"
                )
            return finished
    if root.exists() and (not root.is_dir() or any(path.name != _UNFINISHED for path in root.iterdir())):
        if (root / STAMP).is_file():  # another process has just finished it
            return _is_finished(root, stamp)
        raise FgvczooError(f"{root}: holds other files and no SynthBirds; give a new or an empty folder")
    return False


def _summary(stamp: bytes) -> str:
    try:
        found = json.loads(stamp)
        sizes = ", ".join(f"{name} {number}" for name, number in found["size"].items())
        return f"{found['version']} of seed {found['seed']} ({sizes})"
    except (ValueError, LookupError, AttributeError, TypeError):
        return f"with an unreadable {STAMP}"


@dataclass(frozen=True)
class _Copy:
    """A copy in the making, as its worker processes know it. run: a name of this attempt."""

    root: Path
    run: str
    size: Size
    seed: int

    @property
    def cub(self) -> Path:
        return self.root / CUB

    def write(self, path: Path, content: str | bytes) -> None:
        """Whole or not at all, and with no temporary file where a reader of the images could find it."""
        temporary = self.root / _UNFINISHED / f"{self.run}-{os.getpid()}"
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        try:
            temporary.replace(path)
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.replace(path)


class _ClassFiles(NamedTuple):
    """What a class adds to the index files: text by file name, and rows of train.json and val.json."""

    text: dict[str, str]
    train: list[dict[str, Any]]
    val: list[dict[str, Any]]


def _write_copy(copy: _Copy, stamp: str, workers: int | None, progress: bool) -> None:
    genotypes(copy.size.pairs, copy.seed)  # too many classes: say so before anything is written
    try:
        (copy.root / _UNFINISHED).mkdir(parents=True, exist_ok=True)
        copy.write(copy.root / _UNFINISHED / STAMP, stamp)
        parts: list[_ClassFiles] = []
        with _mapper(copy.size, workers) as run, _progress_bar(copy.size, progress) as advance:
            for part in run(_write_class, [copy] * copy.size.classes, range(copy.size.classes)):
                parts.append(part)
                advance()
        _write_index(copy, parts)
        copy.write(copy.root / STAMP, stamp)
    except FileNotFoundError:
        # Another process was making the same copy, finished first and cleared the temporary files.
        if not _is_finished(copy.root, stamp):
            raise
    shutil.rmtree(copy.root / _UNFINISHED, ignore_errors=True)


@contextmanager
def _mapper(size: Size, workers: int | None) -> Iterator[Callable[..., Iterator[_ClassFiles]]]:
    """A `map` over that many processes, in the order of its arguments."""
    if workers is None:
        processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = min(processors, 1 + size.classes * size.per_class // 300)
    if workers == 1:
        yield map
        return
    # Forked workers do not import the caller's script again, as spawned ones must; only Linux forks safely.
    pool = ProcessPoolExecutor(workers, get_context("fork" if sys.platform == "linux" else "spawn"))
    try:
        yield pool.map
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _progress_bar(size: Size, shown: bool) -> Iterator[Callable[[], None]]:
    """A function that advances the bar by one class."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not shown) as bar:
        task = bar.add_task("drawing SynthBirds", total=size.classes * size.per_class)
        yield lambda: bar.advance(task, size.per_class)


def _write_class(copy: _Copy, class_id: int) -> _ClassFiles:
    """Writes the pictures of a class that are not there yet, and returns its part of the index files."""
    size, folder = copy.size, class_folder(class_id)
    files = _ClassFiles({}, [], [])
    lines: dict[str, list[str]] = {name: [] for name in _INDEX_FILES}
    present = []
    for index in range(size.per_class):
        image_id, train = size.image_id(class_id, index), size.is_train(index)
        drawing = draw(copy.seed, class_id, index, size)
        stem = f"{folder}/{class_name(class_id)}_{index:04d}_{image_id}"
        _write_pictures(copy, drawing, stem, image_id)
        attributes = annotate(drawing)
        present.append(attributes.present)
        seen = sighting(copy.seed, class_id, index)
        x0, y0, x1, y1 = drawing.box
        lines["images.txt"].append(f"{image_id} {stem}.jpg")
        lines["image_class_labels.txt"].append(f"{image_id} {class_id + 1}")
        lines["train_test_split.txt"].append(f"{image_id} {int(train)}")
        lines["bounding_boxes.txt"].append(f"{image_id} {x0:.1f} {y0:.1f} {x1 - x0:.1f} {y1 - y0:.1f}")
        lines["parts/part_locs.txt"] += [
            f"{image_id} {part} {x:.1f} {y:.1f} {visible:.0f}"
            for part, (x, y, visible) in enumerate(drawing.parts.tolist(), 1)
        ]
        lines["parts/part_click_locs.txt"] += [
            f"{image_id} {part} {x:.1f} {y:.1f} {visible:.0f} {seconds:.3f}"
            for part, made in enumerate(clicks(drawing).tolist(), 1)
            for x, y, visible, seconds in made
        ]
        lines["attributes/image_attribute_labels.txt"] += _attribute_lines(image_id, *attributes)
        lines["metadata.csv"].append(_metadata_line(image_id, seen))
        (files.train if train else files.val).append(_inat_image(image_id, class_id, stem, drawing, seen))
    percentages = 100 * np.mean(present, axis=0)
    lines["attributes/class_attribute_labels_continuous.txt"].append(" ".join(f"{x:.6g}" for x in percentages))
    lines["classes.txt"].append(f"{class_id + 1} {folder}")
    files.text.update({name: "\n".join(rows) + "\n" for name, rows in lines.items()})
    return files


_INDEX_FILES = (
    *("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt", "bounding_boxes.txt"),
    *("parts/part_locs.txt", "parts/part_click_locs.txt", "attributes/image_attribute_labels.txt"),
    *("attributes/class_attribute_labels_continuous.txt", "metadata.csv"),
)


def _write_pictures(copy: _Copy, drawing: Drawing, stem: str, image_id: int) -> None:
    image = copy.cub / "images" / f"{stem}.jpg"
    mask = copy.cub / "segmentations" / f"{stem}.png"
    satellite = copy.cub / "satellite" / f"{image_id}.jpg"
    if not mask.exists():
        copy.write(mask, _encoded(Image.fromarray(drawing.visible_mask).convert("L"), "PNG"))
    if not satellite.exists():
        copy.write(satellite, _encoded(Image.fromarray(tile(drawing.seed, drawing.class_id, drawing.index)), "JPEG"))
    if not image.exists():
        picture = Image.fromarray(drawing.image)
        grey = image_id % _GREY_EVERY == _GREY_AT
        copy.write(image, _encoded(picture.convert("L") if grey else picture, "JPEG"))


def _encoded(picture: Image.Image, kind: str) -> bytes:
    content = io.BytesIO()
    picture.save(content, kind, **({"quality": _QUALITY} if kind == "JPEG" else {}))
    return content.getvalue()


def _attribute_lines(image_id: int, present: np.ndarray, certainty: np.ndarray, seconds: np.ndarray) -> list[str]:
    times = np.repeat([f"{time:.3f}" for time in seconds.tolist()], _GROUP_SIZES).tolist()
    rows = enumerate(zip(present.tolist(), certainty.tolist(), times), 1)
    lines = [f"{image_id} {attribute} {here:d} {sure} {time}" for attribute, (here, sure, time) in rows]
    if image_id == _SIX_FIELDS[0]:
        fields = lines[_SIX_FIELDS[1] - 1].split()
        lines[_SIX_FIELDS[1] - 1] = " ".join([*fields[:4], "0", fields[4]])
    return lines


def _metadata_line(image_id: int, seen: Sighting | None) -> str:
    if seen is None:
        return f"{image_id},,,,,"
    year, month, day = seen.date
    date = f"{year}-{month:02d}-{day:02d}"
    return f"{image_id},{seen.latitude},{seen.longitude},{date},{seen.hour},{seen.location_uncertainty}"


def _inat_image(image_id: int, class_id: int, stem: str, drawing: Drawing, seen: Sighting | None) -> dict[str, Any]:
    """A row of "images"; `category_id` stands here until `_inat` moves it to the annotations."""
    year, month, day = seen.date if seen else (0, 0, 0)
    return {
        "id": image_id,
        "width": drawing.scene.width,
        "height": drawing.scene.height,
        "file_name": f"images/{stem}.jpg",
        "license": 0,
        "rights_holder": "fgvczoo",
        "date": f"{year}-{month:02d}-{day:02d} {seen.hour:02d}:00:00+00:00" if seen else None,
        "latitude": seen.latitude if seen else None,
        "longitude": seen.longitude if seen else None,
        "location_uncertainty": seen.location_uncertainty if seen else None,
        "category_id": class_id,
    }


def _inat(copy: _Copy, images: list[dict[str, Any]]) -> str:
    """A file in the style of iNaturalist 2021; siblings share a genus."""
    genera = [pair_letters(class_id // 2) for class_id in range(copy.size.classes)]
    categories = [
        {
            "id": class_id,
            "name": f"Synthavis{genus} {genus.lower()}{class_id % 2 + 1}",
            "common_name": class_name(class_id).replace("_", " "),
            "supercategory": "Birds",
            "kingdom": "Animalia",
            "phylum": "Chordata",
            "class": "Aves",
            "order": "Synthiformes",
            "family": "Synthidae",
            "genus": f"Synthavis{genus}",
            "specific_epithet": f"{genus.lower()}{class_id % 2 + 1}",
            "image_dir_name": class_folder(class_id),
        }
        for class_id, genus in enumerate(genera)
    ]
    annotations = [
        {"id": image["id"], "image_id": image["id"], "category_id": image.pop("category_id")} for image in images
    ]
    content = {
        "info": {"description": "SynthBirds", "version": VERSION},
        "images": images,
        "categories": categories,
        "annotations": annotations,
        "licenses": [{"id": 0, "name": "Apache-2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"}],
    }
    return json.dumps(content) + "\n"


def _sibling_table(copy: _Copy) -> str:
    table = "class,sibling,factor,class_value,sibling_value,part,part_ids,pair_type\n"
    looks = genotypes(copy.size.pairs, copy.seed)
    for pair in sibling_pairs(copy.size.pairs):
        one, other = pair.classes
        values = f"{getattr(looks[one], pair.factor)},{getattr(looks[other], pair.factor)}"
        ids = " ".join(map(str, CUB_PARTS_OF[pair.part]))
        table += f"{one + 1},{other + 1},{pair.factor},{values},{pair.part},{ids},{pair.type}\n"
    return table


def _write_index(copy: _Copy, parts: list[_ClassFiles]) -> None:
    def numbered(names: tuple[str, ...]) -> str:
        return "".join(f"{number} {name}\n" for number, name in enumerate(names, 1))

    copy.write(copy.root / "attributes.txt", numbered(ATTRIBUTE_NAMES))
    files = {name: "".join(part.text[name] for part in parts) for name in _INDEX_FILES}
    files["metadata.csv"] = _METADATA_HEADER + files["metadata.csv"]
    files |= {
        "README": _README,
        "parts/parts.txt": numbered(CUB_PART_NAMES),
        "attributes/certainties.txt": numbered(CERTAINTIES),
        "sibling_pairs.csv": _sibling_table(copy),
        "train.json": _inat(copy, [row for part in parts for row in part.train]),
        "val.json": _inat(copy, [row for part in parts for row in part.val]),
    }
    for name, content in files.items():
        copy.write(copy.cub / name, content)


def _write_image_folder(root: Path) -> None:
    """ROOT/image_folder/{train,test}/CLASS/: hard links, or copies where the file system has none."""
    images = (line.split()[1] for line in (root / CUB / "images.txt").read_text(encoding="utf-8").splitlines())
    flags = (line.split()[1] for line in (root / CUB / "train_test_split.txt").read_text(encoding="utf-8").splitlines())
    for image, flag in zip(images, flags):
        link = root / "image_folder" / ("train" if flag == "1" else "test") / image
        if not link.exists():
            link.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(root / CUB / "images" / image, link)
            except OSError:
                write_bytes(link, (root / CUB / "images" / image).read_bytes())
