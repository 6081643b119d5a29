"""What a retrieval model finds: a query and its neighbours side by side, those of its class marked."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fgvczoo.errors import FgvczooError
from fgvczoo.explain.overlay import enlarge
from fgvczoo.explain.page import Explained, image_tag, render, write
from fgvczoo.preprocess import read_image
from fgvczoo.progress import progress
from fgvczoo.tasks.base import DataSource
from fgvczoo.tasks.classification import Box, crop
from fgvczoo.tasks.retrieval import Index, Neighbour, RetrievalModule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIDE = 160
BATCH = 32


@dataclass(frozen=True)
class Gallery:
    """What is searched: an index, and the picture of each of its items, RGB uint8 (H, W, 3), by its place."""

    index: Index
    picture: Callable[[int], np.ndarray]

    @classmethod
    def of_data(cls, model: RetrievalModule, data: DataSource, split: str = "test") -> Gallery:
        """A split of a data module, cut as the model sees it."""

        def picture(place: int) -> np.ndarray:
            row = data.row(data.find(index.names[place]))
            return crop(data.picture(row["index"]), row["crop"])

        index = model.index_of(data, split)
        return cls(index, picture)

    @classmethod
    def of_files(
        cls, model: RetrievalModule, files: Sequence[Path], folder: Path, index: Index | None = None
    ) -> Gallery:
        """Image files below a folder, named by their paths within it; the class of one is the name of the folder that
        it lies in, if that is not `folder` itself. index: one that was made of them before."""
        names = [str(file.relative_to(folder)) for file in files]
        labels = [file.parent.name if file.parent != folder else None for file in files]
        if index is None:
            parts = [
                model.embed([str(file) for file in files[start : start + BATCH]])
                for start in progress(range(0, len(files), BATCH), "indexing")
            ]
            index = Index(torch.cat(parts), tuple(names), tuple(labels), model.fingerprint())
        elif list(index.names) != names:
            raise FgvczooError(
                f"the index has {len(index.names)} images and {folder} {len(names)}, or others; delete the index to "
                "make it anew"
            )
        return cls(index, lambda place: read_image(folder / index.names[place]))


@dataclass(frozen=True)
class Found:
    """A neighbour with its picture. right: whether it is of the query's class; None where either is unknown. details:
    what the model says of the pair, by name."""

    neighbour: Neighbour
    picture: np.ndarray
    right: bool | None
    details: dict[str, float]


@dataclass(frozen=True)
class ContactSheet(Explained):
    """A query, and what is found by each part of the embedding: name ("" is the whole) -> nearest first.

    image: RGB uint8 (H, W, 3). name: of the query. label: its class, where known.
    """

    image: np.ndarray
    name: str
    label: str | None
    rows: dict[str, tuple[Found, ...]]

    title = "Neighbours"

    def section(self, name: str) -> str:
        """HTML; name: what the query is called."""
        return _section(self, name)

    def to_dict(self) -> dict[str, Any]:
        """JSON values, without pictures."""
        return {
            "query": self.name,
            "label": self.label,
            "neighbours": {
                name or "all": [{**f.neighbour.to_dict(), "right": f.right, **f.details} for f in row]
                for name, row in self.rows.items()
            },
        }

    def figure(self) -> Figure:
        """The query and its neighbours as a matplotlib figure, a row for each part of the embedding."""
        from matplotlib.figure import Figure

        columns = 1 + max((len(row) for row in self.rows.values()), default=0)
        figure = Figure(figsize=(1.5 * columns, 1.9 * len(self.rows)), layout="constrained")
        axes = figure.subplots(len(self.rows), columns, squeeze=False)
        for axis in axes.flat:
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_frame_on(False)
        for line, (name, row) in zip(axes, self.rows.items()):
            line[0].imshow(self.image)
            line[0].set_title(f"{self.label or 'query'}\n{name}".strip(), fontsize=7)
            for axis, found in zip(line[1:], row):
                axis.imshow(found.picture)
                axis.set_title(f"{found.neighbour.label or ''}\n{found.neighbour.distance:.3g}", fontsize=7)
                axis.set_frame_on(True)
                for spine in axis.spines.values():
                    spine.set(linewidth=3, color=_COLOURS[found.right], linestyle="--" if found.right is False else "-")
        return figure

    def _repr_html_(self) -> str:
        page = html.escape(render([self], [self.name]))
        return f'<iframe srcdoc="{page}" style="width:100%;height:40em;border:0"></iframe>'

    def save(self, path: str | Path) -> Path:
        """Writes the page (.html, self-contained), the figure (.png, .pdf, .svg) or the values (.json)."""
        return save_sheets([self], path)


_COLOURS = {True: "#1a7f5a", False: "#b4442f", None: "#d9dee3"}


def explain_retrieval(
    model: RetrievalModule,
    images: Sequence[Any],
    gallery: Gallery,
    *,
    top: int = 10,
    boxes: Sequence[Box | None] | None = None,
    labels: Sequence[str | None] | None = None,
    own: Sequence[int] | None = None,
) -> list[ContactSheet]:
    """The nearest items of a gallery for each image (as `predict` takes them).

    top: neighbours of each. boxes: cut out of the images first. labels: their classes, where known. own: places of the
    images themselves in the gallery, which are left out, -1 where they are not there. Leaves the module in eval mode.
    """
    if top < 1:
        raise FgvczooError(f"top={top}; expected at least 1")
    model.eval()
    pictures = [crop(read_image(image), box) for image, box in zip(images, boxes or [None] * len(images))]
    queries = model.embed(pictures)
    names = [str(image) if isinstance(image, (str, Path)) else "" for image in images]
    told = list(labels) if labels is not None else [None] * len(images)
    parts = list(model.named_embeddings(queries[:1]))
    found = {part: model.search(queries, gallery.index, top, own=own, name=part) for part in parts}
    sheets = []
    for number, (picture, name, label) in enumerate(zip(pictures, names, told)):
        rows = {
            part: tuple(_found(model, queries[number], neighbour, gallery, label) for neighbour in found[part][number])
            for part in parts
        }
        sheets.append(ContactSheet(picture, name, label, rows))
    return sheets


def _found(
    model: RetrievalModule, query: torch.Tensor, neighbour: Neighbour, gallery: Gallery, label: str | None
) -> Found:
    right = None if label is None or neighbour.label is None else label == neighbour.label
    details = model.pair_details(query, gallery.index.embeddings[neighbour.place])
    return Found(neighbour, gallery.picture(neighbour.place), right, details)


def save_sheets(sheets: Sequence[ContactSheet], path: str | Path) -> Path:
    """Writes sheets by the file's ending: .html or .json (all of them), .png, .pdf, .svg (one)."""
    return write(sheets, path, [sheet.name for sheet in sheets])


def _section(sheet: ContactSheet, name: str) -> str:
    known = [found.right for row in sheet.rows.values() for found in row if found.right is not None]
    told = "<p class='soft'>Solid frames: of the query's class; dashed frames: of another one.</p>" if known else ""
    label = f"<p>{html.escape(sheet.label)}</p>" if sheet.label else ""
    rows = "\n".join(_row(part, row) for part, row in sheet.rows.items())
    return f"""<section>
<div class="head">{image_tag(enlarge(sheet.image, 2 * SIDE), "the query")}
<div><h1>Nearest to this image</h1><p class="soft">{html.escape(name)}</p>{label}{told}</div></div>
{rows}
</section>"""


def _row(part: str, row: Sequence[Found]) -> str:
    title = f"<h2>{html.escape(part)}</h2>" if part else ""
    items = "\n".join(_item(rank, found) for rank, found in enumerate(row, 1))
    return f'{title}<ol class="sheet">\n{items}\n</ol>'


def _item(rank: int, found: Found) -> str:
    mark = {True: "right", False: "wrong", None: ""}[found.right]
    said = {True: "same class", False: "another class", None: "class unknown"}[found.right]
    details = "".join(f"<br>{html.escape(key)} {value:.3g}" for key, value in found.details.items())
    label = html.escape(found.neighbour.label or found.neighbour.name)
    picture = image_tag(enlarge(found.picture, SIDE), f"neighbour {rank}, {said}")
    return (
        f'<li class="{mark}">{picture}{label}<br><span class="soft">{found.neighbour.distance:.4g}{details}</span></li>'
    )
