"""What metadata changed about a prediction: scores with it, without it, without each group; over places and months."""

from __future__ import annotations

import html
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fgvczoo.errors import FgvczooError
from fgvczoo.explain.overlay import enlarge
from fgvczoo.explain.page import Explained, data_uri, image_tag
from fgvczoo.nn.metadata import MetadataEncoder
from fgvczoo.preprocess import Preprocess, read_image
from fgvczoo.tasks.classification import Box, crop

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIDE = 360
CELL = 15.0  # degrees of the map of places
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


class ReadsMetadata(Protocol):
    """A classifier whose scores depend on metadata."""

    @property
    def paper(self) -> str: ...

    class_names: list[str]
    preprocess: Preprocess
    encoder: MetadataEncoder

    def class_index(self, target: int | str) -> int: ...

    def scores_given(self, image: Tensor, raw: Mapping[str, Tensor]) -> Tensor:
        """Class probabilities (M, C) of one preprocessed image (3, h, w) under M sets of raw metadata values, (M, k)
        of each group; on the CPU."""


@dataclass
class MetadataExplanation(Explained):
    """What metadata changed about one image's prediction.

    image: RGB uint8 (h, w, 3). class_name: the explained class. predicted: the most likely one, with all metadata.
    probability: of the explained class. given: the metadata in words, by group; "missing" where there is none.
    classes: the best classes with all metadata and without any, the explained one among them. scores: case ("all
    metadata", "no metadata", "without place", ...) -> probabilities of `classes`. latitudes, longitudes: degrees, the
    centres of the cells of `places`, (rows from the north, columns), the probability of the explained class there at
    the given date; None for a model that reads no place. months: (12,) its probability in each month at the given
    place and hour; None for a model that reads no date. place: latitude, longitude; None where missing. month: from 1.
    """

    image: np.ndarray
    class_name: str
    predicted: str
    probability: float
    given: dict[str, str]
    classes: list[str]
    scores: dict[str, list[float]]
    latitudes: np.ndarray
    longitudes: np.ndarray
    places: np.ndarray | None
    months: np.ndarray | None
    place: tuple[float, float] | None
    month: int | None

    frame_height = 40

    def to_dict(self) -> dict[str, Any]:
        """JSON values, without the image."""
        return {
            "class": self.class_name,
            "predicted": self.predicted,
            "probability": self.probability,
            "metadata": self.given,
            "scores": {case: dict(zip(self.classes, values)) for case, values in self.scores.items()},
            "places": None
            if self.places is None
            else {
                "latitudes": self.latitudes.tolist(),
                "longitudes": self.longitudes.tolist(),
                "probability": self.places.tolist(),
            },
            "months": None if self.months is None else self.months.tolist(),
        }

    @property
    def title(self) -> str:
        return f"What metadata says of {self.class_name}"

    def section(self, name: str) -> str:
        """HTML; name: what the image is called."""
        asked = "" if self.class_name == self.predicted else f" (the model predicts {html.escape(self.predicted)})"
        file = f'<p class="soft">{html.escape(name)}</p>' if name else ""
        known = "; ".join(f"{group}: {text}" for group, text in self.given.items())
        cases = "".join(f"<th>{html.escape(case)}</th>" for case in self.scores)
        rows = "".join(
            f"<tr><td>{html.escape(label)}</td>"
            + "".join(f"<td>{values[place]:.1%}</td>" for values in self.scores.values())
            + "</tr>"
            for place, label in enumerate(self.classes)
        )
        pictures = ""
        if self.places is not None or self.months is not None:
            pictures = (
                f"<h2>Probability of {html.escape(self.class_name)} elsewhere, and in other months</h2>"
                f'<img src="{data_uri(self._over_places_and_months())}" alt="probability over places and months"'
                ' style="max-width:100%">'
                '<p class="soft">The picture stays, one group of the metadata moves, the others are as given. The map'
                f" has cells of {CELL:g} degrees; a cross marks the given place, the darker bar the given month.</p>"
            )
        return f"""<section>
<div class="head">{image_tag(enlarge(self.image, SIDE), "the image")}
<div><h1>{html.escape(self.title)}</h1>{file}
<p>Probability {self.probability:.1%}{asked}.</p>
<p>Given: {html.escape(known)}.</p></div></div>
<h2>With and without it</h2>
<table><tr><th>class</th>{cases}</tr>{rows}</table>
{pictures}
</section>"""

    def figure(self) -> Figure:
        """The image, the scores of every case, and the probability over places and months."""
        from matplotlib.figure import Figure

        count = 2 + (self.places is not None) + (self.months is not None)
        figure = Figure(figsize=(4 * count, 3.4), layout="constrained")
        axes = list(figure.subplots(1, count))
        axes[0].imshow(enlarge(self.image, SIDE))
        axes[0].set_axis_off()
        # Names of classes are no mathematics, though they may hold dollar signs.
        title = f"{self.class_name}\n{self.probability:.1%}"
        axes[0].set_title(title, fontsize=9, parse_math=False)
        place = self.classes.index(self.class_name)
        cases = list(self.scores)[::-1]
        axes[1].barh(cases, [self.scores[case][place] for case in cases], color="#3b7dd8")
        axes[1].set_xlim(0, 1)
        axes[1].set_title("probability", fontsize=9)
        self._draw(axes[2:])
        return figure

    def _over_places_and_months(self) -> bytes:
        from matplotlib.figure import Figure

        count = (self.places is not None) + (self.months is not None)
        figure = Figure(figsize=(5 * count, 3), layout="constrained")
        self._draw(list(figure.subplots(1, count, squeeze=False)[0]))
        content = io.BytesIO()
        figure.savefig(content, format="jpg", dpi=110)
        return content.getvalue()

    def _draw(self, axes: list[Any]) -> None:
        rest = iter(axes)
        if self.places is not None:
            axis = next(rest)
            drawn = axis.imshow(self.places, extent=(-180, 180, -90, 90), vmin=0, vmax=1, cmap="viridis")
            axis.figure.colorbar(drawn, ax=axis, shrink=0.7)
            if self.place is not None:
                axis.plot(self.place[1], self.place[0], "+", color="white", markersize=14, markeredgewidth=2)
            axis.set_xticks(range(-180, 181, 60))
            axis.set_yticks(range(-90, 91, 30))
            axis.set_title("over places (longitude, latitude)", fontsize=9)
        if self.months is not None:
            axis = next(rest)
            colours = ["#1f4e8c" if number == self.month else "#8db4e2" for number in range(1, 13)]
            axis.bar(_MONTHS, self.months, color=colours)
            axis.set_ylim(0, 1)
            axis.tick_params(axis="x", rotation=60, labelsize=8)
            axis.set_title("over months", fontsize=9)


def explain_metadata(
    model: ReadsMetadata,
    image: Any,
    *,
    target: int | str | None = None,
    top: int = 6,
    box: Box | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> MetadataExplanation:
    """Explains one image; arguments as `MetaFormer.explain` has them. Raises `FgvczooError` for a model that reads no
    metadata."""
    encoder = model.encoder
    if not encoder.names:
        raise FgvczooError(f"this {model.paper} reads no metadata, so there is nothing of it to explain; use predict")
    picture = crop(read_image(image), box)
    pixels = model.preprocess(picture)
    raw = encoder.read(metadata or {})
    missing = {name: tensor[0] for name, tensor in encoder.missing(1).items()}
    cases = {"all metadata": raw, "no metadata": missing}
    if len(encoder.names) > 1:
        cases |= {f"without {name}": {**raw, name: missing[name]} for name in encoder.names}
    stacked = {name: torch.stack([case[name] for case in cases.values()]) for name in encoder.names}
    scores = model.scores_given(pixels, stacked)
    predicted = int(scores[0].argmax())
    index = predicted if target is None else model.class_index(target)
    both = torch.maximum(scores[0], scores[1]).clone()
    both[index] = 2  # it is always among them
    best = both.topk(min(max(top, 1), len(both))).indices
    shown = best[scores[0, best].argsort(descending=True)].tolist()
    latitudes, longitudes = np.arange(90 - CELL / 2, -90, -CELL), np.arange(-180 + CELL / 2, 180, CELL)
    places = months = place = month = None
    if "place" in encoder.names:
        grid = torch.cartesian_prod(torch.from_numpy(latitudes), torch.from_numpy(longitudes)).float()
        found = _moved(model, pixels, raw, "place", grid)[:, index]
        places = found.view(len(latitudes), len(longitudes)).numpy()
        if not raw["place"].isnan().any():
            place = float(raw["place"][0]), float(raw["place"][1])
    if "date" in encoder.names:
        dates = raw["date"].repeat(12, 1)
        dates[:, 0] = torch.arange(1, 13)
        if dates[:, 1].isnan().all():
            dates[:, 1] = 12  # noon, where no hour is given
        if dates[:, 2].isnan().all():
            dates[:, 2] = 15
        months = _moved(model, pixels, raw, "date", dates)[:, index].numpy()
        month = None if math.isnan(float(raw["date"][0])) else int(raw["date"][0])
    return MetadataExplanation(
        image=picture,
        class_name=model.class_names[index],
        predicted=model.class_names[predicted],
        probability=float(scores[0, index]),
        given={name: _words(name, raw[name]) for name in encoder.names},
        classes=[model.class_names[c] for c in shown],
        scores={case: scores[row, shown].tolist() for row, case in enumerate(cases)},
        latitudes=latitudes,
        longitudes=longitudes,
        places=places,
        months=months,
        place=place,
        month=month,
    )


def _moved(model: ReadsMetadata, pixels: Tensor, raw: Mapping[str, Tensor], name: str, values: Tensor) -> Tensor:
    """Probabilities with one group at each of M values, the others as given."""
    others = {key: value.expand(len(values), *value.shape) for key, value in raw.items()}
    return model.scores_given(pixels, {**others, name: values})


def _words(name: str, values: Tensor) -> str:
    """A group's raw values for people."""
    if name == "place" and not values.isnan().any():
        return f"latitude {float(values[0]):.4g}, longitude {float(values[1]):.4g}"
    if name == "date" and not values[0].isnan():
        hour = "" if values[1].isnan() else f", hour {int(values[1])}"
        return f"month {int(values[0])}{hour}"
    return "missing" if values.isnan().any() else f"{values.numel()} numbers"
