"""Measures the indexes of sets of millions of images at their real sizes: `python benchmarks/indexes.py NAME...`.

NAME: inaturalist (2021), places365, vggface2, imagenet; all by default. Of each it writes lists or folders of as many
images as the real set has, and an empty file for each picture, in a temporary folder (as many inodes as images). Then,
in fresh processes: the first open, which makes the index, and later ones; and the private memory (smaps_rollup) of
loading workers after each has looked up 20,000 random rows (iNaturalist: with place and date), beside that of workers
of an index of a few hundred images. Writes results/indexes.json and .md; a set that is not named keeps what it has
there.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from report import processor

from fgvczoo.files import write_text

RESULTS = Path(__file__).parent / "results"
WORKERS, ROWS, OPENS = 4, 20_000, 5
TARGETS = {"open": 5.0, "private": 50.0}


def touch(file: Path | str) -> None:
    """An empty file; quicker than `Path.touch`."""
    os.close(os.open(file, os.O_CREAT | os.O_WRONLY))


def write_inaturalist(root: Path, images: int, classes: int) -> None:
    """Lists with the fields of the real ones, and empty pictures."""
    folders = [
        f"{c:05d}_Animalia_Chordata_Aves_Passeriformes_Turdidae_Turdus_specieslongname{c}" for c in range(classes)
    ]
    categories = [
        {
            "id": c, "name": f"Turdus specieslongname{c}", "common_name": f"Thrush {c}", "supercategory": "Birds",
            "kingdom": "Animalia", "phylum": "Chordata", "class": "Aves", "order": "Passeriformes",
            "family": "Turdidae", "genus": f"Turdus{c // 5}", "specific_epithet": f"specieslongname{c}",
            "image_dir_name": folders[c],
        }
        for c in range(classes)
    ]  # fmt: skip
    for split, count, first in (("train", images, 0), ("val", 10 * classes, images)):
        for folder in folders:
            (root / split / folder).mkdir(parents=True)
        with (root / f"{split}.json").open("w") as file:
            file.write('{"info": {"year": 2021}, "images": [')
            for number in range(count):
                date = f"2019-{number % 12 + 1:02d}-14 {number % 24:02d}:10:00+00:00"
                name = f"{split}/{folders[number % classes]}/{number:08x}-0000-4000-8000-{number:012x}.jpg"
                item = {
                    "id": first + number, "width": 500, "height": 333, "file_name": name, "license": 3,
                    "rights_holder": "Somebody Somewhere", "date": date,
                    "latitude": number % 18000 / 100 - 90, "longitude": number % 36000 / 100 - 180,
                    "location_uncertainty": 12,
                }  # fmt: skip
                if number % 13 == 0:
                    item |= {"latitude": None, "longitude": None}
                file.write((", " if number else "") + json.dumps(item))
                touch(root / name)
            file.write('], "annotations": [')
            for number in range(count):
                note = {"id": first + number, "image_id": first + number, "category_id": number % classes}
                file.write((", " if number else "") + json.dumps(note))
            file.write(f'], "licenses": [], "categories": {json.dumps(categories)}}}')


def write_places365(root: Path, images: int, classes: int) -> None:
    """images: of training; one in 50 more of validation."""
    root.mkdir()
    names = [f"/{chr(97 + c % 26)}/some_scene_{c:03d}" for c in range(classes)]
    (root / "categories_places365.txt").write_text("".join(f"{name} {c}\n" for c, name in enumerate(names)))
    for name in names:
        (root / f"data_256_standard{name}").mkdir(parents=True)
    (root / "val_256").mkdir()
    with (root / "places365_train_standard.txt").open("w") as file:
        for number in range(images):
            label = number * classes // images
            file.write(f"{names[label]}/{number:08d}.jpg {label}\n")
            touch(f"{root}/data_256_standard{names[label]}/{number:08d}.jpg")
    with (root / "places365_val.txt").open("w") as file:
        for number in range(36_500 if classes == 365 else classes):
            file.write(f"Places365_val_{number:08d}.jpg {number % classes}\n")
            touch(f"{root}/val_256/Places365_val_{number:08d}.jpg")


def write_vggface2(root: Path, images: int, classes: int) -> None:
    """images: of training and testing; the last 500 of 9,131 identities are tested."""
    tested = max(classes * 500 // 9_131, 1)
    for split, first, last in (("train", 0, classes - tested), ("test", classes - tested, classes)):
        (root / split).mkdir(parents=True)
        with (root / f"{split}_list.txt").open("w") as file:
            for person in range(first, last):
                (root / split / f"n{person:06d}").mkdir()
                for number in range(images * person // classes, images * (person + 1) // classes):
                    path = f"n{person:06d}/{number % 1000:04d}_01.jpg"
                    file.write(f"{path}\n")
                    touch(f"{root}/{split}/{path}")


def write_imagenet(root: Path, images: int, classes: int) -> None:
    """Folders of training and of validation, 50 images a class."""
    for split, count in (("train", images), ("val", 50 * classes)):
        for c in range(classes):
            folder = root / split / f"n{c:08d}"
            folder.mkdir(parents=True)
            for number in range(count * c // classes, count * (c + 1) // classes):
                touch(f"{folder}/n{c:08d}_{number}.JPEG")


class Set(NamedTuple):
    """What writes a copy; images and classes of the real set; what is read of a row in a worker."""

    write: Callable[[Path, int, int], None]
    images: int
    classes: int
    what: str
    keys: tuple[str, ...] = ()


SETS = {
    "inaturalist": Set(write_inaturalist, 2_686_843, 10_000, "iNaturalist 2021, JSON lists", ("metadata",)),
    "places365": Set(write_places365, 1_803_460, 365, "Places365, text lists"),
    "vggface2": Set(write_vggface2, 3_310_000, 9_131, "VGGFace2, text lists"),
    "imagenet": Set(write_imagenet, 1_281_167, 1_000, "ImageNet-1k, folders of classes"),
}


def opened(name: str, root: str) -> dict[str, float]:
    """Seconds to make the reader in this process, and its peak memory in MiB."""
    from fgvczoo.zoo.registry import dataset_class

    reader_class = dataset_class(name).reader_class
    start = time.perf_counter()
    reader = reader_class(root)
    reader.require(SETS[name].keys)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": seconds, "peak_mib": peak, "rows": len(reader), "private_mib": workers(reader, SETS[name].keys)}


def private() -> float:
    """Private memory of this process, clean and dirty, MiB."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private")) / 1024


def look(reader, keys, seed: int, answers) -> None:
    import numpy as np

    for row in np.random.default_rng(seed).integers(0, len(reader), ROWS).tolist():
        reader.annotations(row, keys)
        reader.label(row)
        reader.picture(row)
    answers.put(private())


def workers(reader, keys) -> float:
    """The largest private memory of forked workers that look up rows, MiB."""
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    started = [context.Process(target=look, args=(reader, keys, seed, answers)) for seed in range(WORKERS)]
    for process in started:
        process.start()
    found = [answers.get() for _ in started]
    for process in started:
        process.join()
    return max(found)


def run(name: str, root: Path, cache: Path) -> dict[str, float]:
    """`opened` in a fresh process."""
    done = subprocess.run(
        [sys.executable, __file__, name, "--open", str(root)],
        env={**os.environ, "FGVCZOO_CACHE": str(cache)}, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def measure(name: str, base: Path) -> dict[str, object]:
    """Of the copies `copy` and `small` in a folder."""
    cache = base / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    first = run(name, base / "copy", cache)
    later = [run(name, base / "copy", cache) for _ in range(OPENS)]
    size = sum(file.stat().st_size for file in cache.rglob("*.arrow"))
    run(name, base / "small", cache)
    least = run(name, base / "small", cache)
    lists = [file for pattern in ("*.json", "*.txt") for file in (base / "copy").glob(pattern)]
    private_mib = max(one["private_mib"] for one in later)
    return {
        "images": int(first["rows"]),
        "lists_gb": sum(file.stat().st_size for file in lists) / 1e9,
        "index_mb": size / 1e6,
        "first_open_s": first["seconds"], "first_peak_mib": first["peak_mib"],
        "later_open_s": [one["seconds"] for one in later],
        "worker_private_mib": private_mib,
        "worker_private_small_mib": least["private_mib"],
        "worker_private_for_index_mib": private_mib - least["private_mib"],
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), **{n: version(n) for n in ("torch", "pyarrow", "numpy")}},
    }  # fmt: skip


def report(results: dict[str, dict]) -> str:
    lines = [
        "# The indexes of sets of millions of images", "",
        "Generated copies of the real lengths. First open: reads lists or folders, looks for every picture, writes the",
        f"index. Later opens: the slowest of {OPENS}, each in a fresh process; target {TARGETS['open']:g} s. Private:",
        f"of the largest of {WORKERS} workers, above that of an index of a few hundred images; target",
        f"{TARGETS['private']:g} MiB.", "",
        "| set | images | lists, GB | index, MB | first open, s | its peak, GiB | later opens, s | private, MiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for name, found in results.items():
        lines.append(
            f"| {SETS[name].what} | {found['images']:,} | {found['lists_gb']:.2f} | {found['index_mb']:.0f} | "
            f"{found['first_open_s']:.0f} | {found['first_peak_mib'] / 1024:.1f} | {max(found['later_open_s']):.2f} | "
            f"{found['worker_private_for_index_mib']:.1f} |"
        )
    lines.append("")
    for name, found in results.items():
        versions = ", ".join(f"{package} {number}" for package, number in found["versions"].items())
        lines.append(f"{name}: {found['machine']}; {versions}. `python benchmarks/indexes.py {name}`\n")
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--images", type=int, help="fewer of them, to try; results are not written then")
    parser.add_argument("--open", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="where copies are written, kept and found again")
    parser.add_argument("--write", action="store_true", help="only write the copies")
    options = parser.parse_args()
    names = options.names or list(SETS)
    if options.open:
        print(json.dumps(opened(names[0], options.open)))
        return
    file = RESULTS / "indexes.json"
    results = json.loads(file.read_text()) if file.is_file() else {}
    base = options.folder or Path(tempfile.mkdtemp())
    try:
        for name in names:
            own, (write, images, classes, *_) = base / name, SETS[name]
            if not own.is_dir():
                own.mkdir(parents=True)
                write(own / "copy", options.images or images, classes if options.images is None else 100)
                write(own / "small", 200, 10)
            if not options.write:
                results[name] = measure(name, own)
    finally:
        if options.folder is None:
            shutil.rmtree(base, ignore_errors=True)
    results = {name: results[name] for name in SETS if name in results}
    print(report(results))
    if options.images is None and not options.write:
        write_text(file, json.dumps(results, indent=1) + "\n")
        write_text(RESULTS / "indexes.md", report(results))


if __name__ == "__main__":
    main()
