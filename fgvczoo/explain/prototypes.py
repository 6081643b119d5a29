"""The explanation of a prototype network: which prototypes, where on the image, how much each contributes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fgvczoo.nn.prototypes import PrototypeSource

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class Evidence:
    """One prototype's part in the logit of the explained class.

    kind: the branch or set that it belongs to ("trivial", "support"). prototype: its number there.
    prototype_class: the class that it stands for. similarity: to its best patch of the image. weight: of the connection
    to the explained class. rival_weight: of that to the best other class. map: similarity on the image (h, w), only for
    the shown ones. source: the training patch that the prototype is, once projected. picture: that training image, JPEG
    bytes, where it may be shown.
    """

    kind: str
    prototype: int
    prototype_class: str
    similarity: float
    weight: float
    rival_weight: float
    source: PrototypeSource | None = None
    picture: bytes | None = None
    map: np.ndarray | None = None

    @property
    def contribution(self) -> float:
        """Similarity times weight: what it adds to the logit."""
        return self.similarity * self.weight

    @property
    def advantage(self) -> float:
        """What it adds to the lead over the best other class: similarity times the difference of the weights."""
        return self.similarity * (self.weight - self.rival_weight)


@dataclass
class PrototypeExplanation:
    """Why an image gets a class. `evidence` holds every prototype, largest contribution first; the first `shown` have
    maps. The contributions sum to `logit`, the advantages to `logit - rival_logit`.

    image: RGB uint8 (h, w, 3). class_name: the explained class. predicted: the most likely one. probability: softmax of
    the explained class. rival: the best other class, with its logit. dataset: where the prototypes come from.
    prototypes_are_patches: whether they still equal training patches, that is, nothing that they rest on was trained
    since their projection.
    """

    image: np.ndarray
    class_name: str
    predicted: str
    probability: float
    logit: float
    rival: str | None
    rival_logit: float
    evidence: list[Evidence]
    shown: int
    dataset: str | None
    prototypes_are_patches: bool

    def to_dict(self) -> dict[str, Any]:
        """JSON values, without pictures and maps."""
        return {
            "class": self.class_name,
            "predicted": self.predicted,
            "probability": self.probability,
            "logit": self.logit,
            "rival": self.rival,
            "rival_logit": self.rival_logit,
            "dataset": self.dataset,
            "prototypes_are_patches": self.prototypes_are_patches,
            "evidence": [
                {
                    "kind": e.kind,
                    "prototype": e.prototype,
                    "class": e.prototype_class,
                    "similarity": e.similarity,
                    "weight": e.weight,
                    "contribution": e.contribution,
                    "advantage": e.advantage,
                    "source": e.source.to_dict() if e.source is not None else None,
                }
                for e in self.evidence
            ],
        }

    def figure(self) -> Figure:
        """The shown prototypes as a matplotlib figure: the image, each map with its box, each prototype's picture."""
        from fgvczoo.explain.figure import draw

        return draw(self)

    def save(self, path: str | Path) -> Path:
        """Writes the page (.html, self-contained), the figure (.png, .pdf, .svg) or the values (.json)."""
        from fgvczoo.explain.page import write

        return write([self], path)
