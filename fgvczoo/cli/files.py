"""Image files in, tables out: what `predict` and `explain` share."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fgvczoo.errors import FgvczooError
from fgvczoo.explain.pictures import prototype_pictures
from fgvczoo.files import atomic_path
from fgvczoo.preprocess import read_image
from fgvczoo.progress import progress
from fgvczoo.tasks.classification import Box, ClassificationModule, Prediction, crop
from fgvczoo.tasks.localization import LocalizedPrediction
from fgvczoo.tasks.retrieval import Index, RetrievalModule
from fgvczoo.zoo.build import data_from_provenance

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"})
BATCH = 32
COCO = ".coco.json"  # the ending of tables of boxes


def image_files(paths: Sequence[Path]) -> list[Path]:
    """The given files as they are; folders stand for the image files below them, sorted."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
            if not inside:
                raise FgvczooError(f"{path}: no image files in this folder")
            files += inside
        else:
            files.append(path)
    return files


def parse_box(text: str) -> Box:
    """ "X0,Y0,X1,Y1" as four numbers."""
    try:
        x0, y0, x1, y1 = (float(part) for part in text.split(","))
    except ValueError:
        raise FgvczooError(f"--box {text}: expected four numbers X0,Y0,X1,Y1 in pixels") from None
    return x0, y0, x1, y1


def metadata_finder(model: Any, given: str | None) -> Callable[[Path], dict[str, Any] | None] | None:
    """What is known of each file beside its pixels.

    given: of all files, "lat=46.9,lon=7.4,date=2021-06-05 14:30"; or a .csv table with a column `path` (or `file`,
    `file_name`: a path, or a name alone) and any of lat, lon, date, month, hour; what is not in it is missing. None:
    nothing is known, and None comes back.

    Raises `FgvczooError` for a model that reads no metadata, and for what cannot be read.
    """
    if given is None:
        return None
    if not getattr(model, "metadata_groups", ()):
        raise FgvczooError(f"--metadata: {model.paper} reads no metadata; leave it out")
    if not given.endswith(".csv"):
        pairs = [part.partition("=") for part in given.split(",")]
        if any(not equals or not key.strip() for key, equals, _ in pairs):
            raise FgvczooError(f"--metadata {given}: expected NAME=VALUE,... as in lat=46.9,lon=7.4, or a .csv file")
        values: dict[str, Any] = {key.strip(): value.strip() for key, _, value in pairs}
        model.encoder.read(values, "--metadata")
        return lambda path: values
    table = _metadata_table(Path(given), model)
    return lambda path: table.get(str(path), table.get(str(path.absolute()), table.get(path.name)))


def _metadata_table(file: Path, model: Any) -> dict[str, dict[str, Any]]:
    """The rows of a table by what their file is called there; other columns are left out."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as handle:
            table = csv.DictReader(handle)
            columns = [name for name in table.fieldnames or () if name in model.encoder.words]
            path = next((name for name in ("path", "file", "file_name") if name in (table.fieldnames or ())), None)
            if path is None or not columns:
                raise FgvczooError(
                    f"{file}: expected a column path and some of {', '.join(model.encoder.words)}; it has"
                    f" {', '.join(table.fieldnames or ()) or 'none'}"
                )
            rows: dict[str, dict[str, Any]] = {}
            for row in table:
                rows[row[path]] = {name: row[name] or None for name in columns}
                model.encoder.read(rows[row[path]], f"{file}: line {table.line_num}")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise FgvczooError(f"{file}: cannot be read as a table ({error})") from None
    return rows


def parse_device(name: str) -> torch.device:
    """A device of this machine by its name; "auto": the accelerator, else the CPU."""
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise FgvczooError(f"--device {name}: {reason}; expected auto, cpu, cuda or cuda:0") from None
    return device


def predict_files(
    model: ClassificationModule,
    files: Sequence[Path],
    boxes: Callable[[Path], Box | None],
    *,
    top: int,
    unreadable: list[str],
    metadata: Callable[[Path], dict[str, Any] | None] | None = None,
) -> list[Prediction]:
    """Classifies files in batches, read by several threads, with a progress bar; what cannot be read is listed in
    `unreadable` and left out. metadata: what is known of a file, for models that read it."""

    results: list[Prediction] = []
    for images, names in _read(files, boxes, "predicting", unreadable):
        given: dict[str, Any] = {} if metadata is None else {"metadata": [metadata(Path(name)) for name in names]}
        predictions = model.predict(images, top=top, **given)
        assert isinstance(predictions, list)
        results += [replace(prediction, source=name) for prediction, name in zip(predictions, names)]
    return results


def embed_files(
    model: RetrievalModule, files: Sequence[Path], boxes: Callable[[Path], Box | None], *, unreadable: list[str]
) -> tuple[Tensor, list[str]]:
    """Embeddings (N, D) of files and their names, as `predict_files` reads them."""
    parts, read = [], []
    for images, names in _read(files, boxes, "embedding", unreadable):
        if images:
            parts.append(model.embed(images))
            read += names
    return torch.cat(parts) if parts else torch.zeros(0, 0), read


def _read(
    files: Sequence[Path], boxes: Callable[[Path], Box | None], title: str, unreadable: list[str]
) -> Iterator[tuple[list[np.ndarray], list[str]]]:
    """Batches of pictures and their names."""

    def read(path: Path) -> np.ndarray | FgvczooError:
        try:
            return crop(read_image(path), boxes(path))
        except FgvczooError as error:
            return error

    with ThreadPoolExecutor() as pool:
        for batch in progress(list(_batches(files)), title):
            images, names = [], []
            for path, image in zip(batch, pool.map(read, batch)):
                if isinstance(image, FgvczooError):
                    unreadable.append(str(image))
                else:
                    images.append(image)
                    names.append(str(path))
            yield images, names


def _batches(files: Sequence[Path]) -> Iterator[Sequence[Path]]:
    for start in range(0, len(files), BATCH):
        yield files[start : start + BATCH]


def check_table(path: Path | None, more: tuple[str, ...] = ()) -> None:
    """Raises `FgvczooError` for a file that `write_predictions` could not write; before anything is computed."""
    if path is not None and path.suffix not in (*_TABLES, *more):
        raise FgvczooError(f"-o {path}: expected a name ending in {', '.join((*_TABLES, *more))}")


def write_embeddings(embeddings: Tensor, names: Sequence[str], model: str, path: Path) -> None:
    """By the ending: .safetensors (an index that `tasks.retrieval.Index` loads), .parquet or .json (source, vector), or
    .csv (source, then a column for each dimension); whole or not at all."""
    if path.suffix == ".safetensors":
        Index(embeddings, tuple(names), (None,) * len(names), model).save(path)
        return
    rows = [{"source": name, "vector": vector} for name, vector in zip(names, embeddings.tolist())]
    with atomic_path(path) as temporary:
        if path.suffix == ".csv":
            with temporary.open("w", newline="", encoding="utf-8") as file:
                table = csv.writer(file)
                table.writerow(["source", *(f"e{number}" for number in range(embeddings.shape[1]))])
                table.writerows([row["source"], *row["vector"]] for row in rows)
        else:
            _TABLES[path.suffix](rows, temporary)


def write_predictions(results: Sequence[Prediction], path: Path) -> None:
    """A .csv (file, label, score, and the best few), .json or .parquet table, by the ending; whole or not at all."""
    check_table(path)
    with atomic_path(path) as temporary:
        if path.name.endswith(COCO):
            temporary.write_text(json.dumps(coco_boxes(results), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        else:
            _TABLES[path.suffix]([result.to_dict() for result in results], temporary)


def coco_boxes(results: Sequence[Prediction]) -> dict[str, Any]:
    """Boxes of localisation models as COCO has them: images, annotations with one box each and its score, categories.

    A box is x, y, width, height in pixels; category ids count from 1. Raises `FgvczooError` for results without boxes.
    """
    located = [result for result in results if isinstance(result, LocalizedPrediction)]
    if len(located) != len(results):
        raise FgvczooError(f"-o NAME{COCO}: this model gives no boxes; give a localisation model")
    names = sorted({(result.index, result.label) for result in located})
    images, annotations = [], []
    for number, result in enumerate(located, 1):
        x0, y0, x1, y1 = result.box
        images.append({"id": number, "file_name": result.source, "height": result.size[0], "width": result.size[1]})
        annotations.append(
            {
                "id": number,
                "image_id": number,
                "category_id": result.index + 1,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": (x1 - x0) * (y1 - y0),
                "iscrowd": 0,
                "score": result.score,
            }
        )
    categories = [{"id": index + 1, "name": label} for index, label in names]
    return {"images": images, "annotations": annotations, "categories": categories}


def write_maps(results: Sequence[Prediction], folder: Path) -> int:
    """The maps of localisation models, FOLDER/NAME_OF_THE_IMAGE.npy, float32 (height, width) in [0, 1]; how many.

    Raises `FgvczooError` for results without maps, and for two images of one name.
    """
    names = [Path(result.source or str(number)).name for number, result in enumerate(results)]
    if len(set(names)) < len(names):
        raise FgvczooError(f"--maps {folder}: several images have one name; predict one folder at a time")
    for name, result in zip(names, results):
        heat = getattr(result, "map", None)
        if heat is None:
            raise FgvczooError("--maps: this model gives no maps; give a localisation model")
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder / f"{name}.npy") as temporary, temporary.open("wb") as file:
            np.save(file, heat)
    return len(results)


def truth_finder(model: Any, root: Path) -> Callable[[Path], np.ndarray]:
    """The annotated boxes (n, 4) of the data set's own images, by their path; none for other images."""
    reader = data_from_provenance(model, root).reader
    index_of = {str(reader.picture(index).absolute()): index for index in range(len(reader))}

    def find(path: Path) -> np.ndarray:
        index = index_of.get(str(path.absolute()), index_of.get(str(path.resolve())))
        row = {} if index is None else reader.row(index)
        return np.asarray(row.get("boxes", [row["bbox"]] if "bbox" in row else []), np.float64).reshape(-1, 4)

    return find


def _write_json(rows: list[dict[str, Any]], path: Path) -> None:
    path.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_parquet(rows: list[dict[str, Any]], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)


def _write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["file", "label", "score", "labels", "scores"])
        for row in rows:
            scores = " ".join(f"{score:.6f}" for score in row["scores"])
            table.writerow([row["source"], row["label"], f"{row['score']:.6f}", "|".join(row["labels"]), scores])


_TABLES: dict[str, Callable[[list[dict[str, Any]], Path], None]] = {
    ".csv": _write_csv,
    ".json": _write_json,
    ".parquet": _write_parquet,
}


def box_finder(model: Any, root: Path, box: Box | None) -> Callable[[Path], Box | None]:
    """Boxes of the data set's own images, by their path; gives the model the pictures of its prototypes on the way."""
    data = data_from_provenance(model, root)
    if getattr(model, "sources", None):
        model.prototype_pictures = prototype_pictures(model.sources, data)
    reader = data.reader
    if reader.crop(0) is None:  # whole pictures
        return lambda path: box
    index_of = {str(reader.picture(index).absolute()): index for index in range(len(reader))}

    def find(path: Path) -> Box | None:
        index = index_of.get(str(path.absolute()), index_of.get(str(path.resolve())))
        return box or (None if index is None else reader.crop(index))

    return find
