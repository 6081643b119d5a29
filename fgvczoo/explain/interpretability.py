"""How well a prototype network's explanations hold, in numbers: the scores of `fgvczoo.metrics` over a data module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric

from fgvczoo.errors import FgvczooError
from fgvczoo.metrics import (
    Consistency,
    DeletionAUC,
    HeatmapScores,
    Stability,
    class_activation,
    heatmap,
    object_mask,
    own_pairs,
    part_hits,
    perturb,
)
from fgvczoo.progress import progress
from fgvczoo.tasks.prototypes import PrototypeClassifier

if TYPE_CHECKING:
    from fgvczoo.data.base import FGVCDataModule

IMAGES = 16  # whose maps of all prototypes are in memory at once
HALF_SIZE = 36 / 224  # of the square around a peak, as a share of the picture's shorter side


@torch.no_grad()
def interpretability(
    model: PrototypeClassifier,
    datamodule: FGVCDataModule,
    limit: int | None = None,
    *,
    target: Literal["label", "predicted"] = "label",
    split: str = "test",
    seed: int = 0,
) -> dict[str, float]:
    """Scores the explanations of a prototype network on a split, with a progress bar; docs/metrics.md defines them.

    The heat map of an image is the mean map of the prototypes of one class, averaged over the network's heads
    (ST-ProtoPNet: trivial and support). `datamodule.keys` decide what is computed: `deletion_auc` always, with "mask"
    `content_heatmap`, `oirr` and `iou` at the sizes of the original pictures, with "parts" `consistency` and
    `stability` over the prototypes of all heads.

    Args:
        model: its mode is kept.
        datamodule: the data.
        limit: only the first images of the split.
        target: whose prototypes are looked at: those of the labelled class, or of the predicted one.
        split: of the data module.
        seed: of the noise of `stability`, which is drawn from it and from the image's row.

    Returns:
        The scores, and on what they rest: `images`, `constant_maps`, `content_heatmap_skipped`, `oirr_skipped`,
        `prototypes_left_out`. Several processes share the images and all return the scores of the whole split.

    Raises:
        FgvczooError: a model without prototypes, or whose prototypes belong to no class; an unknown split or target;
            limit below 1; an empty split; target "label" where there are no labels.
    """
    if not isinstance(model, PrototypeClassifier) or model.class_agnostic:
        raise FgvczooError(f"{model.paper}: interpretability is defined for models whose prototypes belong to classes")
    if target not in ("label", "predicted"):
        raise FgvczooError(f"target={target!r}; expected 'label' or 'predicted'")
    if limit is not None and limit < 1:
        raise FgvczooError(f"limit={limit}; expected at least 1")
    was_training = model.training
    model.eval()
    try:
        scores = _Scores(model, datamodule, seed)
        for piece in _pieces(datamodule, split, limit):
            images = piece["image"].to(model.device)
            if target == "predicted":
                classes = model(images).argmax(1)
            elif "label" in piece:
                classes = piece["label"].to(model.device)
            else:
                raise FgvczooError(f"{datamodule.dataset_name} has no labels; give target='predicted'")
            scores.update(images, piece["index"], classes, piece.get("parts"))
        return scores.compute()
    finally:
        model.train(was_training)


class _Scores:
    """The metrics that the data module's keys allow, fed with images and the classes whose prototypes are looked at."""

    def __init__(self, model: PrototypeClassifier, data: FGVCDataModule, seed: int) -> None:
        self.network, self.data, self.seed = model.network, data, seed
        self.heads = model.network.heads
        self.class_of = torch.cat([head.prototypes.class_of for head in self.heads.values()])
        self.metrics: dict[str, Metric] = {"deletion": DeletionAUC()}
        if "mask" in data.keys:
            self.metrics["heatmaps"] = HeatmapScores()
        if "parts" in data.keys:
            num_parts = len(data.reader.annotations(0, ("parts",))["parts"])
            self.metrics["consistency"] = Consistency(len(self.class_of), num_parts)
            self.metrics["stability"] = Stability(len(self.class_of))
        for metric in self.metrics.values():
            metric.to(model.device)

    def update(self, images: Tensor, index: Tensor, classes: Tensor, parts: Tensor | None) -> None:
        maps = self.maps(images)
        owners = [head.prototypes.class_of for head in self.heads.values()]
        of_class = [class_activation(found, owner, classes) for found, owner in zip(maps, owners)]
        activation = torch.stack(of_class).mean(0)
        size = (images.shape[2], images.shape[3])
        self.metrics["deletion"].update(self.probabilities, images, heatmap(activation, size))
        if "heatmaps" in self.metrics:
            self.metrics["heatmaps"].update(activation, [_mask(self.data, row) for row in index.tolist()])
        if parts is not None:
            image, prototype = own_pairs(classes, self.class_of)
            located, half_size = parts.to(images.device)[image], round(HALF_SIZE * min(size))
            noisy = self.maps(perturb(images, index, seed=self.seed))
            hits, noisy_hits = (
                part_hits(torch.cat(found, dim=1)[image, prototype], located, size, half_size)
                for found in (maps, noisy)
            )
            self.metrics["consistency"].update(hits, located[..., 2] > 0, prototype)
            self.metrics["stability"].update(hits, noisy_hits, prototype)

    def maps(self, images: Tensor) -> list[Tensor]:
        """What each head's prototypes find, (B, P, H, W)."""
        features = self.network.features(images)
        return [head.evidence_map(features[name]) for name, head in self.heads.items()]

    def probabilities(self, images: Tensor) -> Tensor:
        """The mean of the heads' softmaxes, (B, C): what deletion follows, though prediction sums their logits."""
        features = self.network.features(images)
        each = [head.head(features[name]).logits.softmax(1) for name, head in self.heads.items()]
        return torch.stack(each).mean(0)

    def compute(self) -> dict[str, float]:
        results: dict[str, Any] = {}
        for metric in self.metrics.values():
            results |= metric.compute()  # counts that two of them give are the same
        return {name: value.item() for name, value in results.items()}


def _pieces(data: FGVCDataModule, split: str, limit: int | None) -> Iterator[dict[str, Any]]:
    """The first images of a split, this process's share of them, in batches of at most `IMAGES`."""
    loader = data.loader(split)
    rows = torch.as_tensor(data.splits[split][:limit])
    if not len(rows):
        raise FgvczooError(f"{data.dataset_name}: the split {split!r} is empty")
    first_process = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
    for batch in progress(loader, "evaluating", show=first_process):
        wanted = torch.isin(batch["index"], rows).nonzero()[:, 0]
        if not len(wanted):
            return  # the loader keeps the split's order: what follows is beyond the limit
        for piece in wanted.split(IMAGES):
            yield {key: batch[key][piece] for key in ("image", "index", "label", "parts") if key in batch}


def _mask(data: FGVCDataModule, row: int) -> Tensor:
    """The object on the part of the original picture that the network sees, (h, w) bool."""
    mask = data.reader.annotations(row, ("mask",))["mask"]
    if (crop := data.reader.crop(row)) is not None:
        x0, y0, x1, y1 = crop
        mask = mask[max(y0, 0) : y1, max(x0, 0) : x1]
    height, width = data.preprocess.size
    seen = data.preprocess.boxes_backward(np.array([[0, 0, width, height]]), *mask.shape)[0]
    x0, y0, x1, y1 = np.rint(seen).astype(int).tolist()
    return object_mask(torch.from_numpy(mask[y0:y1, x0:x1]))
