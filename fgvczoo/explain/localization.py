"""The explanation of a localisation model: image, map, box, and the truth where it is known."""

from __future__ import annotations

import html
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch
from torch import Tensor

from fgvczoo.explain.overlay import BOX_COLOUR, enlarge, tint
from fgvczoo.explain.page import Explained, image_tag
from fgvczoo.metrics.localization_boxes import prepare_maps
from fgvczoo.nn.backbones import Backbone
from fgvczoo.nn.cam import grad_cam
from fgvczoo.preprocess import read_image
from fgvczoo.tasks.classification import Box, ClassificationModule, crop
from fgvczoo.tasks.localization import LocalizationModule, on_picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIDE = 360
TRUTH_COLOUR = (60, 200, 90)


@dataclass
class LocalizationExplanation(Explained):
    """Where a class is on an image.

    image: RGB uint8 (h, w, 3). class_name: the explained class. predicted: the most likely one. probability: softmax of
    the explained class. map: float32 (h, w) in [0, 1]. box: x0, y0, x1, y1 in pixels, ends exclusive. truth: boxes
    (n, 4) of the object, where known; iou: the best overlap of `box` with one of them. classes: the maps of single
    classes, (name, probability, map), highest score first.
    """

    image: np.ndarray
    class_name: str
    predicted: str
    probability: float
    map: np.ndarray
    box: Box
    truth: np.ndarray
    iou: float | None
    classes: list[tuple[str, float, np.ndarray]]

    frame_height = 40

    def to_dict(self) -> dict[str, Any]:
        """JSON values, without image and maps."""
        return {
            "class": self.class_name,
            "predicted": self.predicted,
            "probability": self.probability,
            "box": list(self.box),
            "truth": self.truth.tolist(),
            "iou": self.iou,
            "classes": [{"class": name, "probability": share} for name, share, _ in self.classes],
        }

    @property
    def title(self) -> str:
        return f"Where is {self.class_name}?"

    def section(self, name: str) -> str:
        """HTML; name: what the image is called."""
        asked = "" if self.class_name == self.predicted else f" (the model predicts {html.escape(self.predicted)})"
        file = f'<p class="soft">{html.escape(name)}</p>' if name else ""
        x0, y0, x1, y1 = (round(value) for value in self.box)
        against = (
            f"Its overlap with the annotated box, which is green, is {self.iou:.0%} (intersection over union)."
            if self.iou is not None
            else ""
        )
        cards = "\n".join(
            f'<li class="card"><figure>{image_tag(tint(self.image, own, SIDE), "the map of a class")}</figure>'
            f'<p class="what">{html.escape(label)}</p><p class="sum">{share:.1%}</p></li>'
            for label, share, own in self.classes
        )
        return f"""<section>
<div class="head">{image_tag(self.framed(), "the image with its box")}
{image_tag(tint(self.image, self.map, SIDE), "the map on the image")}
<div><h1>{html.escape(self.title)}</h1>{file}
<p>Probability {self.probability:.1%}{asked}.</p>
<p>The box, {x0}, {y0} to {x1}, {y1} pixels, is around what the map has above its threshold. {against}</p>
<p class="soft">The model was trained with names of classes alone, without boxes.</p>
</div></div>
<h2>Maps of single classes</h2>
<ul class="cards">
{cards}
</ul>
</section>"""

    def framed(self) -> np.ndarray:
        """The image with the box, and green the true ones; the longer side `SIDE` pixels."""
        large = np.ascontiguousarray(enlarge(self.image, SIDE)).copy()
        scale = SIDE / max(self.image.shape[:2])
        for boxes, colour in ((self.truth, TRUTH_COLOUR), (np.array([self.box]), BOX_COLOUR)):
            for x0, y0, x1, y1 in np.rint(boxes * scale).astype(int).tolist():
                cv2.rectangle(large, (x0, y0), (max(x1 - 1, x0), max(y1 - 1, y0)), colour, 3)
        return large

    def figure(self) -> Figure:
        """Image and box, the map, the maps of single classes."""
        from matplotlib.figure import Figure

        shown = [(self.framed(), self.class_name), (tint(self.image, self.map, SIDE), "map")]
        shown += [(tint(self.image, own, SIDE), f"{name}\n{share:.1%}") for name, share, own in self.classes]
        figure = Figure(figsize=(2.4 * len(shown), 3), layout="constrained")
        for axis, (picture, name) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown):
            axis.imshow(picture)
            axis.set_axis_off()
            axis.set_title(name, fontsize=9, parse_math=False)
        return figure


class MapModule(LocalizationModule):
    """A localisation model that has a map of its own for every class: it shows them with the explanation."""

    @abstractmethod
    def single_maps(self, images: Tensor, classes: Tensor) -> Tensor:
        """One preprocessed image (1, 3, h, w), classes (N,) -> their own maps (N, H, W)."""

    def explain(
        self,
        image: Any,
        *,
        target: int | str | None = None,
        top: int = 6,
        box: Box | None = None,
        truth: Sequence[Box] | np.ndarray | None = None,
    ) -> LocalizationExplanation:
        """Where a class is: the map and its box, and the maps of the highest-scored classes alone.

        Args:
            image: as `predict` takes it.
            target: class index or name; None: the predicted one.
            top: how many classes' own maps are shown.
            box: as `predict` takes it.
            truth: boxes (n, 4) of the object in pixels of the picture, to compare with.

        Leaves the model in eval mode. Raises `FgvczooError` for an unknown target, and as `predict` does.
        """
        picture = crop(read_image(image), box)
        size = picture.shape[:2]
        self.eval()
        wanted = None if target is None else self.class_index(target)
        images = self.preprocess(picture)[None]
        logits, maps = self.localized(images, None if wanted is None else torch.tensor([wanted], device=self.device))
        shares = logits[0].float().softmax(0)
        best = shares.topk(min(top, self.num_classes)).indices
        with torch.no_grad():
            own = prepare_maps(self.single_maps(images.to(self.device), best), self.preprocess.size, self.dialect)
        predicted = int(shares.argmax())
        explained = predicted if wanted is None else wanted
        found = self.box_of(maps[0], size)
        boxes = np.asarray(truth if truth is not None else [], np.float64).reshape(-1, 4)
        return LocalizationExplanation(
            image=picture,
            class_name=self.class_names[explained],
            predicted=self.class_names[predicted],
            probability=float(shares[explained]),
            map=on_picture(maps[0].numpy(), self.preprocess, size),
            box=found,
            truth=boxes,
            iou=max((_overlap(found, other) for other in boxes.tolist()), default=None),
            classes=[
                (self.class_names[c], float(shares[c]), on_picture(heat.numpy(), self.preprocess, size))
                for c, heat in zip(best.tolist(), own)
            ],
        )


def classifier_maps(
    model: ClassificationModule, images: Tensor, classes: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Grad-CAM of any classifier of the zoo at the end of its trunk: preprocessed images (B, 3, h, w) -> logits (B, C),
    maps (B, H, W). A localisation model gives its own maps. Leaves the model in eval mode."""
    model.eval()
    if isinstance(model, LocalizationModule):
        with torch.no_grad():
            return model.localize(images, classes)
    trunk = next(module for module in model.modules() if isinstance(module, Backbone))
    return grad_cam(model, trunk, images, classes)


def _overlap(one: Sequence[float], other: Sequence[float]) -> float:
    """IoU of boxes with exclusive ends."""
    sides = [max(0.0, min(one[a + 2], other[a + 2]) - max(one[a], other[a])) for a in (0, 1)]
    both = sides[0] * sides[1]
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return both / union if (union := sum(areas) - both) > 0 else 0.0
