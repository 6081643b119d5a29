"""The explanation of a prototype network: which prototypes, where on the image, how much each contributes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fgvczoo.explain.page import Explained, prototype_section
from fgvczoo.metrics.heatmaps import upsample
from fgvczoo.nn.prototypes import PrototypeSource
from fgvczoo.preprocess import read_image
from fgvczoo.tasks.classification import Box, crop
from fgvczoo.tasks.prototypes import PrototypeClassifier

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
class PrototypeExplanation(Explained):
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

    @property
    def title(self) -> str:
        """Of the page."""
        return f"Why {self.class_name}?"

    def section(self, name: str) -> str:
        """HTML of the page's part on this image, which is called `name`."""
        return prototype_section(self, name)

    def figure(self) -> Figure:
        """The shown prototypes as a matplotlib figure: the image, each map with its box, each prototype's picture."""
        from fgvczoo.explain.figure import draw

        return draw(self)


@torch.inference_mode()
def explain_prototypes(
    model: PrototypeClassifier,
    image: Any,
    *,
    target: int | str | None = None,
    top: int = 6,
    box: Box | None = None,
) -> PrototypeExplanation:
    """Why an image gets its class: the prototypes, where each one is found on it, and what each contributes.

    image, box: as `predict` takes them. target: class index or name to explain; None: the predicted one. top: how many
    prototypes get a map. The contributions of all prototypes of all heads sum to the class's logit. Leaves the model in
    eval mode. Raises `FgvczooError` for an unknown target, and as `predict` does.
    """
    picture = crop(read_image(image), box)
    model.eval()
    heads = model.network.heads
    features = model.network.features(model.preprocess(picture)[None].to(model.device))
    outputs = {name: head.head(features[name]) for name, head in heads.items()}
    logits = sum((output.logits[0] for output in outputs.values()), torch.zeros(model.num_classes, device=model.device))
    explained = int(logits.argmax()) if target is None else model.class_index(target)
    others = logits.index_fill(0, torch.tensor([explained], device=logits.device), -torch.inf)
    rival = int(others.argmax()) if model.num_classes > 1 else None
    evidence: list[Evidence] = []
    for name, head in heads.items():
        weight = head.last_layer.weight[explained]
        rival_weight = head.last_layer.weight[rival] if rival is not None else torch.zeros_like(weight)
        for prototype, similarity in enumerate(outputs[name].evidence[0].tolist()):
            evidence.append(
                Evidence(
                    kind=name,
                    prototype=prototype,
                    prototype_class=model.class_names[int(head.prototypes.class_of[prototype])],
                    similarity=similarity,
                    weight=float(weight[prototype]),
                    rival_weight=float(rival_weight[prototype]),
                    source=model.sources[name][prototype] if model.sources[name] else None,
                    picture=model.prototype_pictures.get(f"{name}.{prototype}"),
                )
            )
    evidence.sort(key=lambda e: (-e.contribution, e.kind, e.prototype))
    shown = evidence[:top]
    for name, head in heads.items():
        entries = [entry for entry in shown if entry.kind == name]
        if entries:
            maps = head.evidence_map(features[name])[0, [entry.prototype for entry in entries]]
            for entry, activation in zip(entries, upsample(maps, picture.shape[:2])):
                entry.map = activation.cpu().numpy()
    return PrototypeExplanation(
        image=picture,
        class_name=model.class_names[explained],
        predicted=model.class_names[int(logits.argmax())],
        probability=float(logits.softmax(0)[explained]),
        logit=float(logits[explained]),
        rival=model.class_names[rival] if rival is not None else None,
        rival_logit=float(logits[rival]) if rival is not None else 0.0,
        evidence=evidence,
        shown=len(shown),
        dataset=model.source_dataset,
        prototypes_are_patches=model.prototypes_are_patches,
    )


class PrototypeModule(PrototypeClassifier):
    """A part-prototype classifier that shows the prototypes with the explanation."""

    def explain(
        self, image: Any, *, target: int | str | None = None, top: int = 6, box: Box | None = None
    ) -> PrototypeExplanation:
        """Why an image gets its class: the prototypes, where each one is found on it, and what each contributes.

        image, box: as `predict` takes them. target: class index or name to explain; None: the predicted one.
        top: how many prototypes get a map. The contributions of all prototypes sum to the class's logit.
        """
        return explain_prototypes(self, image, target=target, top=top, box=box)
