"""Image classification: metrics, prediction of files, and the staged training step that papers fill in."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from fgvczoo.batch import Batch
from fgvczoo.errors import FgvczooError
from fgvczoo.preprocess import read_image
from fgvczoo.tasks.base import StagedModule

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Prediction:
    """The classes of one image, best first.

    label, index, score: the best class. labels, indices, scores: the best few; scores are softmax probabilities.
    source: the file, where one was given.
    """

    label: str
    index: int
    score: float
    labels: tuple[str, ...]
    indices: tuple[int, ...]
    scores: tuple[float, ...]
    source: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def _repr_html_(self) -> str:
        """In a notebook: a bar for each class."""
        rows = "".join(
            f'<tr><td style="text-align:left">{html.escape(label)}</td><td>{score:.1%}</td>'
            f'<td style="width:12em"><div style="background:#3b7dd8;height:0.8em;width:{score:.1%}"></div></td></tr>'
            for label, score in zip(self.labels, self.scores)
        )
        caption = f"<caption>{html.escape(self.source)}</caption>" if self.source is not None else ""
        return f"<table>{caption}{rows}</table>"


class ClassificationModule(StagedModule):
    """Base of all classifiers: `forward` gives logits (B, C); top-1 and top-5 accuracy are watched.

    metadata_groups: what it reads of an image besides its pixels (place, date, ...); see `nn.metadata`.
    """

    metadata_groups: tuple[str, ...] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.num_classes < 2:
            raise FgvczooError(f"num_classes={self.num_classes}; a classifier needs at least 2")
        self.val_metrics = self._metrics("val/")
        self.test_metrics = self._metrics("test/")

    def _metrics(self, prefix: str) -> MetricCollection:
        metrics: dict[str, Any] = {"top1": MulticlassAccuracy(self.num_classes, average="micro")}
        if self.num_classes > 5:
            metrics["top5"] = MulticlassAccuracy(self.num_classes, average="micro", top_k=5)
        return MetricCollection(metrics, prefix=prefix)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.val_metrics.update(self.evaluation_logits(batch), batch["label"])
        self.log_dict(self.val_metrics, prog_bar=True, batch_size=len(batch["label"]))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.test_metrics.update(self.evaluation_logits(batch), batch["label"])
        self.log_dict(self.test_metrics, batch_size=len(batch["label"]))

    def evaluation_logits(self, batch: Batch) -> Tensor:
        """Logits (B, C) of a validation or test batch; papers override it to watch more than the sum."""
        return self(batch["image"])

    def predict_step(self, batch: Batch, batch_idx: int) -> list[Prediction]:
        return self._predictions(self(batch["image"]).softmax(dim=1), top=5, sources=[None] * len(batch["image"]))

    def class_index(self, target: int | str) -> int:
        """The index of a class given by name or index. Raises `FgvczooError` for one that the model does not have."""
        if isinstance(target, str):
            if target not in self.class_names:
                raise FgvczooError(
                    f"target={target!r} is no class of this model; classes are {', '.join(self.class_names[:5])}, ..."
                )
            return self.class_names.index(target)
        if not 0 <= target < self.num_classes:
            raise FgvczooError(f"target={target}: classes are 0..{self.num_classes - 1}")
        return target

    # -- files --------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def predict(
        self,
        images: Any,
        *,
        top: int = 5,
        box: Box | None = None,
        metadata: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None = None,
    ) -> Prediction | list[Prediction]:
        """Classifies one image (path, bytes, PIL, array or tensor, see `read_image`) or a list of them.

        top: how many classes a result lists. box: x0, y0, x1, y1 in pixels, cut out of each image before anything else
        (models trained on box crops expect it). metadata: what is known of the image (of each, or of all), for models
        that read it, such as {"lat": 46.9, "lon": 7.4, "date": "2021-06-05 14:30"}; see `MetadataEncoder.read`. A list
        gives a list, in its order.

        Raises `FgvczooError` for what is not an image, for a box outside it, and for metadata that the model does not
        read.
        """
        many = isinstance(images, (list, tuple))
        sources = list(images) if many else [images]
        if metadata is not None and not self.metadata_groups:
            raise FgvczooError(f"{self.paper} reads no metadata; leave metadata out")
        if not sources:
            return []
        given = [metadata] * len(sources) if metadata is None or isinstance(metadata, Mapping) else list(metadata)
        if len(given) != len(sources):
            raise FgvczooError(f"metadata of {len(given)} images for {len(sources)}; give one each, or one for all")
        was_training = self.training
        self.eval()
        try:
            tensors = [self.preprocess(crop(read_image(source), box)) for source in sources]
            scores = self.prediction_logits(torch.stack(tensors).to(self.device), given).softmax(dim=1)
        finally:
            self.train(was_training)
        names = [str(source) if isinstance(source, (str, Path)) else None for source in sources]
        results = self._predictions(scores, top, names)
        return results if many else results[0]

    def prediction_logits(self, images: Tensor, metadata: Sequence[Mapping[str, Any] | None]) -> Tensor:
        """Logits (B, C) of preprocessed images and what is known of each; papers that read metadata override it."""
        return self(images)

    def _predictions(self, scores: Tensor, top: int, sources: Sequence[str | None]) -> list[Prediction]:
        best, indices = scores.float().cpu().topk(min(top, self.num_classes), dim=1)
        return [
            Prediction(
                label=self.class_names[ids[0]],
                index=ids[0],
                score=values[0],
                labels=tuple(self.class_names[i] for i in ids),
                indices=tuple(ids),
                scores=tuple(values),
                source=source,
            )
            for values, ids, source in zip(best.tolist(), indices.tolist(), sources)
        ]


def crop(image: np.ndarray, box: Box | None) -> np.ndarray:
    """The part of an image (H, W, 3) inside a box x0, y0, x1, y1, rounded to whole pixels and clipped to the image."""
    if box is None:
        return image
    height, width = image.shape[:2]
    x0, y0, x1, y1 = (round(v) for v in box)
    x0, y0, x1, y1 = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
    if x1 <= x0 or y1 <= y0:
        raise FgvczooError(
            f"box {tuple(box)} holds no pixel of an image of {width} x {height}; expected x0,y0,x1,y1 in pixels"
        )
    return image[y0:y1, x0:x1]
