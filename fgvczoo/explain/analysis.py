"""ProtoPNet's two analyses (section 3 of the paper), for any prototype network.

Local: what the prototypes say of one image. Global: the images that are most like each prototype.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from fgvczoo.explain.pictures import framed
from fgvczoo.nn.prototypes import PrototypeHead, activation_boxes
from fgvczoo.preprocess import read_image
from fgvczoo.tasks.base import DataSource
from fgvczoo.tasks.classification import Box, crop
from fgvczoo.tasks.prototypes import PrototypeClassifier


@dataclass(frozen=True)
class Points:
    """What one prototype gives a class on an image: similarity times the weight of its connection to the class.

    kind: the head it belongs to. prototype: its number there. prototype_class: the class it stands for. box: x0, y0,
    x1, y1 of its activated region in pixels of the image, for the most similar prototypes only.
    """

    kind: str
    prototype: int
    prototype_class: str
    similarity: float
    weight: float
    box: tuple[int, int, int, int] | None = None

    @property
    def points(self) -> float:
        return self.similarity * self.weight

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "box": list(self.box) if self.box else None, "points": self.points}


@dataclass(frozen=True)
class ScoreSheet:
    """The points that a class gets from its own prototypes, most similar first; its logit holds those of others too."""

    class_name: str
    logit: float
    rows: tuple[Points, ...]

    @property
    def points(self) -> float:
        return sum(row.points for row in self.rows)


@dataclass(frozen=True)
class LocalAnalysis:
    """One image. predicted: its class. most_similar: the prototypes of any class that are most like a place on it, with
    their weights for the predicted class. sheets: of the classes with the largest logits. misconnected: prototypes
    (kind, number) whose strongest connection is not to their own class; there should be none.
    """

    predicted: str
    most_similar: tuple[Points, ...]
    sheets: tuple[ScoreSheet, ...]
    misconnected: tuple[tuple[str, int], ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "predicted": self.predicted,
            "most_similar": [row.to_dict() for row in self.most_similar],
            "sheets": [
                {
                    "class": sheet.class_name,
                    "logit": sheet.logit,
                    "points": sheet.points,
                    "rows": [row.to_dict() for row in sheet.rows],
                }
                for sheet in self.sheets
            ],
            "misconnected": [list(place) for place in self.misconnected],
        }


@torch.inference_mode()
def local_analysis(
    model: PrototypeClassifier, image: Any, *, top: int = 10, classes: int = 50, box: Box | None = None
) -> LocalAnalysis:
    """What the prototypes say of one image.

    image, box: as `predict` takes them. top: how many of the most similar prototypes. classes: how many score sheets.
    Both are cut to what the model has. Leaves the model in eval mode.
    """
    picture = crop(read_image(image), box)
    model.eval()
    features = model.network.features(model.preprocess(picture)[None].to(model.device))
    height, width = picture.shape[:2]
    return analyse(model.network.heads, features, (height, width), model.class_names, top=top, classes=classes)


def analyse(
    heads: Mapping[str, PrototypeHead],
    features: Mapping[str, Tensor],
    size: tuple[int, int],
    class_names: Sequence[str],
    *,
    top: int,
    classes: int,
) -> LocalAnalysis:
    """`local_analysis` from the feature map (1, D, H, W) of each head, of a picture of size (height, width)."""
    outputs = {name: head.head(features[name]) for name, head in heads.items()}
    logits = torch.stack([output.logits[0] for output in outputs.values()]).sum(0)
    evidence = {name: output.evidence[0] for name, output in outputs.items()}
    ranking = sorted(
        ((name, number, value) for name, values in evidence.items() for number, value in enumerate(values.tolist())),
        key=lambda entry: -entry[2],
    )

    def points(entry: tuple[str, int, float], label: int, with_box: bool) -> Points:
        name, number, value = entry
        head = heads[name]
        region = None
        if with_box:
            x0, y0, x1, y1 = activation_boxes(head.evidence_map(features[name])[0, [number]], size)[0].tolist()
            region = (x0, y0, x1, y1)
        own = class_names[int(head.prototypes.class_of[number])]
        return Points(name, number, own, value, float(head.last_layer.weight[label, number]), region)

    predicted = int(logits.argmax())
    best = logits.topk(min(classes, len(logits))).indices.tolist()
    members = defaultdict(list)
    for entry in ranking:
        members[int(heads[entry[0]].prototypes.class_of[entry[1]])].append(entry)
    return LocalAnalysis(
        predicted=class_names[predicted],
        most_similar=tuple(points(entry, predicted, True) for entry in ranking[:top]),
        sheets=tuple(
            ScoreSheet(class_names[c], float(logits[c]), tuple(points(entry, c, False) for entry in members[c]))
            for c in best
        ),
        misconnected=tuple(
            (name, number)
            for name, head in heads.items()
            for number in torch.nonzero(head.last_layer.weight.argmax(0) != head.prototypes.class_of).flatten().tolist()
        ),
    )


@dataclass(frozen=True)
class Neighbour:
    """An image that is like a prototype.

    image: the data set's own id. index: its row. class_name: its class. similarity: of its best patch, or of this
    patch. cell: flat place in the feature map. box: x0, y0, x1, y1 of the prototype's activated region on it, in pixels
    of the original picture.
    """

    image: str
    index: int
    class_name: str
    similarity: float
    cell: int
    box: tuple[float, float, float, float]


@torch.inference_mode()
def global_analysis(
    model: PrototypeClassifier,
    data: DataSource,
    *,
    split: str = "train_plain",
    k: int = 6,
    patches: bool = False,
    prototypes: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, dict[int, tuple[Neighbour, ...]]]:
    """The k images of a split that are most like each prototype, best first: head -> prototype -> neighbours.

    In the training images of a projected model the first one is the prototype itself. patches: rank every patch instead
    of the best one of each image. prototypes: head -> numbers, to look at some of them. Leaves the model in eval mode.
    """
    found = model.nearest_images(data, split=split, k=k, patches=patches)
    chosen = prototypes or {name: range(nearest.count) for name, nearest in found.items()}
    wanted: dict[int, list[tuple[str, int, int]]] = defaultdict(list)  # row of the data -> head, prototype, rank
    for name, numbers in chosen.items():
        for number in numbers:
            for rank, sample in enumerate(found[name].sample[number].tolist()):
                wanted[sample].append((name, number, rank))
    described: dict[tuple[str, int, int], Neighbour] = {}
    for sample, places in wanted.items():  # one image at a time: its maps serve all prototypes that it is near to
        features = model.network.features(data.sample(sample)["image"][None].to(model.device))
        for name in {place[0] for place in places}:
            here = [place for place in places if place[0] == name]
            maps = model.network.heads[name].evidence_map(features[name])[0, [number for _, number, _ in here]]
            for place, box in zip(here, model.boxes_on(data, sample, maps)):
                nearest, (_, number, rank) = found[name], place
                described[place] = Neighbour(
                    image=str(data.row(sample)["image_id"]),
                    index=sample,
                    class_name=model.class_names[int(nearest.label[number, rank])],
                    similarity=float(nearest.value[number, rank]),
                    cell=int(nearest.cell[number, rank]),
                    box=tuple(float(v) for v in box),  # type: ignore[arg-type]
                )
    return {
        name: {
            number: tuple(described[name, number, rank] for rank in range(found[name].sample.shape[1]))
            for number in numbers
        }
        for name, numbers in chosen.items()
    }


def draw_neighbours(neighbours: Sequence[Sequence[Neighbour]], data: DataSource) -> Figure:
    """The neighbours of some prototypes as a figure: a row for each prototype, best first, their regions framed."""
    columns = max(len(row) for row in neighbours)
    figure = Figure(figsize=(1.8 * columns, 2.1 * len(neighbours)), layout="constrained")
    axes = figure.subplots(len(neighbours), columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for row, found in zip(axes, neighbours):
        for axis, neighbour in zip(row, found):
            axis.imshow(framed(neighbour.image, neighbour.box, data))
            axis.set_title(f"{neighbour.class_name}\n{neighbour.similarity:.2f}", fontsize=7)
    return figure
