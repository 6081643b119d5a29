"""Measures the index of iNaturalist 2021 at its real size: `python benchmarks/inaturalist_index.py [--images 2686843]`.

Writes lists of that many images with the fields of the real ones, and an empty file for each picture, in a temporary
folder (about 5 GB, and as many inodes as images). Then, in fresh processes: the first open, which makes the index, and
later ones; and the private memory (smaps_rollup) of loading workers after each has looked up 20,000 random rows with
place and date, beside that of workers of an index of 100 images. Writes results/inaturalist_index.json and .md.
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
from importlib.metadata import version
from pathlib import Path

from report import processor

from fgvczoo.files import write_text

RESULTS = Path(__file__).parent / "results"
CLASSES, WORKERS, ROWS, OPENS = 10_000, 4, 20_000, 5
TARGETS = {"open": 5.0, "private": 50.0}


def write_copy(root: Path, images: int, classes: int) -> None:
    """Lists and empty pictures."""
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
                os.close(os.open(root / name, os.O_CREAT | os.O_WRONLY))
            file.write('], "annotations": [')
            for number in range(count):
                note = {"id": first + number, "image_id": first + number, "category_id": number % classes}
                file.write((", " if number else "") + json.dumps(note))
            file.write(f'], "licenses": [], "categories": {json.dumps(categories)}}}')


def opened(root: str) -> dict[str, float]:
    """Seconds to make the data module in this process, and its peak memory in MiB."""
    from fgvczoo.data.inaturalist import INaturalistDataModule

    start = time.perf_counter()
    data = INaturalistDataModule(root, keys=["metadata"])
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": seconds, "peak_mib": peak, "rows": len(data.reader), "private_mib": workers(data)}


def private() -> float:
    """Private memory of this process, clean and dirty, MiB."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private")) / 1024


def look(data, seed: int, answers) -> None:
    import numpy as np

    reader = data.reader
    for row in np.random.default_rng(seed).integers(0, len(reader), ROWS).tolist():
        reader.annotations(row, ["metadata"])
        reader.label(row)
        reader.picture(row)
    answers.put(private())


def workers(data) -> float:
    """The largest private memory of forked workers that look up rows, MiB."""
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    started = [context.Process(target=look, args=(data, seed, answers)) for seed in range(WORKERS)]
    for process in started:
        process.start()
    found = [answers.get() for _ in started]
    for process in started:
        process.join()
    return max(found)


def run(root: Path, cache: Path) -> dict[str, float]:
    """`opened` in a fresh process."""
    done = subprocess.run(
        [sys.executable, __file__, "--open", str(root)],
        env={**os.environ, "FGVCZOO_CACHE": str(cache)}, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2_686_843)
    parser.add_argument("--open", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="where the temporary copy is written; kept if it is there already")
    options = parser.parse_args()
    if options.open:
        print(json.dumps(opened(options.open)))
        return
    base = options.folder or Path(tempfile.mkdtemp())
    root, small, cache = base / "copy", base / "small", base / "cache"
    try:
        if not root.is_dir():
            write_copy(root, options.images, CLASSES if options.images > 1_000_000 else 100)
            write_copy(small, 100, 10)
        shutil.rmtree(cache, ignore_errors=True)
        first = run(root, cache)
        later = [run(root, cache) for _ in range(OPENS)]
        run(small, cache)
        least = run(small, cache)
        [file] = [f for f in (cache / "inaturalist").glob("*.arrow") if f.stat().st_size > 1e6] or [None]
        result = {
            "images": int(first["rows"]),
            "lists_gb": sum((root / name).stat().st_size for name in ("train.json", "val.json")) / 1e9,
            "index_mb": file.stat().st_size / 1e6 if file else None,
            "first_open_s": first["seconds"], "first_peak_mib": first["peak_mib"],
            "later_open_s": [one["seconds"] for one in later],
            "worker_private_mib": max(one["private_mib"] for one in later),
            "worker_private_small_mib": least["private_mib"],
            "machine": f"{processor()}, {os.cpu_count()} cores",
            "versions": {"python": platform.python_version(), **{n: version(n) for n in ("torch", "pyarrow", "numpy")}},
        }  # fmt: skip
    finally:
        if options.folder is None:
            shutil.rmtree(base, ignore_errors=True)
    extra = result["worker_private_mib"] - result["worker_private_small_mib"]
    result |= {"worker_private_for_index_mib": extra, "targets": TARGETS}
    slowest = max(result["later_open_s"])
    first_open = f"{result['first_open_s']:.0f} s, peak {result['first_peak_mib'] / 1024:.1f} GiB"
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    lines = [
        "# The index of iNaturalist 2021", "",
        f"{result['images']:,} images (training and validation), lists of {result['lists_gb']:.2f} GB.", "",
        "| what | measured | target |", "| --- | --- | --- |",
        f"| first open: reads the lists, looks for every picture, writes the index | {first_open} | |",
        f"| later opens, slowest of {OPENS} | {slowest:.2f} s | {TARGETS['open']:g} s |",
        f"| private memory of a worker, largest of {WORKERS} | {result['worker_private_mib']:.0f} MiB | |",
        f"| the same with an index of 100 images | {result['worker_private_small_mib']:.0f} MiB | |",
        f"| so for the index | {extra:.0f} MiB | {TARGETS['private']:g} MiB |", "",
        f"{result['machine']}; {versions}. `python benchmarks/inaturalist_index.py`",
    ]  # fmt: skip
    print("\n".join(lines))
    if options.images == parser.get_default("images"):
        write_text(RESULTS / "inaturalist_index.json", json.dumps(result, indent=1) + "\n")
        write_text(RESULTS / "inaturalist_index.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
