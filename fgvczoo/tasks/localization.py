"""Weakly supervised localisation: classifiers that also say where, and the protocol that measures it."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from fgvczoo.batch import Batch
from fgvczoo.errors import FgvczooError, FgvczooWarning
from fgvczoo.metrics.localization import BoxLocalization, PixelLocalization
from fgvczoo.metrics.localization_boxes import map_boxes, prepare_maps, truth_boxes
from fgvczoo.preprocess import Preprocess, read_image
from fgvczoo.tasks.classification import Box, ClassificationModule, Prediction, crop

# What `test` reports of each metric; the rest is there for who uses the metric alone.
_OF_BOXES = ("gt_known_loc", "top1_loc", "top5_loc", "mean_iou")
_OF_SWEEP = ("max_box_acc", "max_box_acc_v2", "max_box_acc_v2_30", "max_box_acc_v2_50", "max_box_acc_v2_70")
_OF_PIXELS = ("pxap", "peak_iou")


@dataclass(frozen=True)
class LocalizedPrediction(Prediction):
    """The classes of one image, and where the best one is.

    box: x0, y0, x1, y1 in pixels of the picture, ends exclusive. size: its height and width. map: float32 (height,
    width) in [0, 1]; 0 where the network did not look.
    """

    box: Box = (0.0, 0.0, 0.0, 0.0)
    size: tuple[int, int] = (0, 0)
    map: np.ndarray | None = field(default=None, compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON values, without the map."""
        return {key: value for key, value in replace(self, map=None)._plain().items() if key != "map"}

    def _plain(self) -> dict[str, Any]:
        return super().to_dict()


class LocalizationModule(ClassificationModule):
    """Base of classifiers with maps: `forward` gives logits (B, C), maps (B, H, W) of the classes that they name.

    A subclass defines `localize`. Accuracy is watched as of any classifier; beside it, on the picture as the network
    sees it:

    - `gt_known_loc`, `top1_loc`, `top5_loc`, `mean_iou`: at one threshold, by the paper's rules.
    - `max_box_acc`, `max_box_acc_v2` and its terms: the community's protocol, thresholds swept (test alone).
    - `pxap`, `peak_iou`: where the batch has `mask` (test alone).

    dialect: the rules of the first, a name of `metrics.DIALECTS`. threshold: theirs. ten_crop: the classes of test
    images are those of the mean probability of ten crops (needs the preprocessing "squash-center").
    """

    output_names: ClassVar[tuple[str, ...]] = ("logits", "map")

    def __init__(
        self, *args: Any, dialect: str = "wsol", threshold: float = 0.2, ten_crop: bool = False, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        if ten_crop and self.preprocess.crop != "squash-center":
            raise FgvczooError(
                f"ten_crop with preprocess.crop={self.preprocess.crop}: crops are cut as squash-center does; set it"
            )
        self.dialect, self.threshold, self.ten_crop = dialect, threshold, ten_crop
        self.val_boxes: Metric = BoxLocalization(dialect, [threshold], self.num_classes)
        self.test_boxes: Metric = BoxLocalization(dialect, [threshold], self.num_classes)
        self.test_sweep = BoxLocalization("wsol")
        self.test_pixels = PixelLocalization()
        self._told = False

    @abstractmethod
    def localize(self, images: Tensor, classes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, 3, h, w) -> logits (B, C), maps (B, H, W) of any range, higher where the object is.

        classes: (B,) whose maps are wanted; None: the predicted ones.
        """

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, h, w) -> logits (B, C), maps (B, H, W) of the predicted classes."""
        return self.localize(images)

    # -- evaluation ---------------------------------------------------------------------------------------------

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("test", batch)

    def on_validation_epoch_end(self) -> None:
        self._report("val", self.val_boxes, _OF_BOXES)

    def on_test_epoch_end(self) -> None:
        self._report("test", self.test_boxes, _OF_BOXES)
        self._report("test", self.test_sweep, _OF_SWEEP)
        if self.test_pixels.true.sum():
            self._report("test", self.test_pixels, _OF_PIXELS)
        self.test_pixels.reset()

    def _evaluate(self, split: str, batch: Batch) -> None:
        labels, metrics = batch["label"], getattr(self, f"{split}_metrics")
        with self._gradients():
            logits, maps = self.localize(batch["image"], labels)
        logits, maps = logits.detach(), maps.detach()
        if not logits.isfinite().all():
            rows = batch["index"][~logits.isfinite().all(dim=1)].tolist()
            raise FgvczooError(f"scores of rows {rows[:5]} are NaN or infinite; the network has diverged, train anew")
        scores = self._ten_crops(batch["index"]) if self.ten_crop and split == "test" else logits
        metrics.update(scores, labels)
        self.log_dict(metrics, prog_bar=split == "val", batch_size=len(labels))
        size = self.preprocess.size
        rows = [self._truth(int(index)) for index in batch["index"]]
        used: list[tuple[str, BoxLocalization]] = [(self.dialect, getattr(self, f"{split}_boxes"))]
        if split == "test":
            used.append(("wsol", self.test_sweep))
        for dialect, metric in used:
            truth = [truth_boxes(boxes, original, size, dialect, self._resized()) for boxes, original in rows]
            metric.update(prepare_maps(maps, size, dialect), truth, labels, scores)
        if split == "test" and "mask" in batch:
            self.test_pixels.update(prepare_maps(maps, size, "wsol"), batch["mask"].cpu())

    def _gradients(self) -> Any:
        """Evaluation runs without gradients; maps that are made of them override it."""
        return torch.no_grad()

    def _resized(self) -> tuple[int, int] | None:
        """What pictures are resized to before the middle is cut out."""
        if self.preprocess.crop == "squash":
            return None
        if self.preprocess.crop == "squash-center":
            height, width = (round(length / self.preprocess.crop_fraction) for length in self.preprocess.size)
            return height, width
        raise FgvczooError(f"preprocess.crop={self.preprocess.crop}: localisation is measured on squashed pictures")

    def _truth(self, index: int) -> tuple[np.ndarray, tuple[int, int]]:
        """Boxes of a row in its picture, and the size of that picture."""
        row = self.trainer.datamodule.row(index)  # type: ignore[attr-defined]
        boxes = np.asarray(row.get("boxes", [row["bbox"]] if "bbox" in row else []), np.float64).reshape(-1, 4)
        height, width = row["height"], row["width"]
        if row["crop"] is not None:
            x0, y0, x1, y1 = row["crop"]
            boxes, height, width = boxes - np.array([x0, y0, x0, y0]), y1 - y0, x1 - x0
        return boxes, (height, width)

    def _ten_crops(self, indices: Tensor) -> Tensor:
        """Mean probabilities (B, C) over the four corners and the middle of the resized pictures, and their mirrors."""
        resized, data = self._resized(), self.trainer.datamodule  # type: ignore[attr-defined]
        assert resized is not None
        whole = replace(self.preprocess, size=resized, crop="squash")
        (height, width), means = self.preprocess.size, []
        down, right = resized[0] - height, resized[1] - width
        corners = [(0, 0), (0, right), (down, 0), (down, right), (round(down / 2), round(right / 2))]
        for index in indices.tolist():
            image = whole(data.picture(index)).to(self.device)
            crops = torch.stack([image[:, y : y + height, x : x + width] for y, x in corners])
            logits, _ = self.localize(torch.cat([crops, crops.flip(3)]))
            means.append(logits.detach().float().softmax(1).mean(0))
        return torch.stack(means)

    def _report(self, split: str, metric: Metric, names: Sequence[str]) -> None:
        counted = getattr(metric, "counted", None)
        if counted is None or metric.compute()["images"] > 0:
            values = metric.compute()
            self.log_dict({f"{split}/{name}": values[name].float() for name in names if name in values})
        elif not self._told:
            warnings.warn("no image has a box: localisation is not measured", FgvczooWarning, stacklevel=2)
            self._told = True
        metric.reset()

    # -- files --------------------------------------------------------------------------------------------------

    def predict(  # type: ignore[override]
        self, images: Any, *, top: int = 5, box: Box | None = None
    ) -> LocalizedPrediction | list[LocalizedPrediction]:
        """As `ClassificationModule.predict`, with a map and a box of the best class."""
        many = isinstance(images, (list, tuple))
        sources = list(images) if many else [images]
        if not sources:
            return []
        pictures = [crop(read_image(source), box) for source in sources]
        was_training = self.training
        self.eval()
        try:
            logits, maps = self.localized(torch.stack([self.preprocess(picture) for picture in pictures]))
        finally:
            self.train(was_training)
        names = [str(source) if isinstance(source, (str, Path)) else None for source in sources]
        results = [
            self._with_box(prediction, heat, picture.shape[:2])
            for prediction, heat, picture in zip(self._predictions(logits.softmax(1), top, names), maps, pictures)
        ]
        return results if many else results[0]

    def predict_step(self, batch: Batch, batch_idx: int) -> list[LocalizedPrediction]:  # type: ignore[override]
        with self._gradients():
            logits, maps = self.localize(batch["image"])
        plain = self._predictions(logits.detach().softmax(1), top=5, sources=[None] * len(maps))
        prepared = prepare_maps(maps, self.preprocess.size, self.dialect)
        return [self._with_box(each, heat, self.preprocess.size) for each, heat in zip(plain, prepared)]

    def localized(self, images: Tensor, classes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits (B, C) and prepared maps (B, h, w) in [0, 1] of preprocessed images; without gradients."""
        with self._gradients():
            logits, maps = self.localize(images.to(self.device), classes)
        return logits.detach(), prepare_maps(maps, self.preprocess.size, self.dialect)

    def box_of(self, heat: Tensor, size: tuple[int, int]) -> Box:
        """The box of a prepared map (h, w) in a picture of that size: pixels, ends exclusive, inside of the picture."""
        found = map_boxes(heat, [self.threshold], self.dialect).at(0)
        height, width = size
        x0, y0, x1, y1 = self.preprocess.boxes_backward(found[None].astype(np.float64), height, width)[0]
        return (
            float(np.clip(x0, 0, width)),
            float(np.clip(y0, 0, height)),
            float(np.clip(x1, 0, width)),
            float(np.clip(y1, 0, height)),
        )

    def _with_box(self, prediction: Prediction, heat: Tensor, size: tuple[int, int]) -> LocalizedPrediction:
        return LocalizedPrediction(
            **{name: getattr(prediction, name) for name in Prediction.__dataclass_fields__},
            box=self.box_of(heat, size),
            size=(int(size[0]), int(size[1])),
            map=on_picture(heat.numpy(), self.preprocess, size),
        )


def on_picture(heat: np.ndarray, preprocess: Preprocess, size: tuple[int, int]) -> np.ndarray:
    """A map of what the network saw (h, w), laid on the picture (H, W) that it was cut from: float32, 0 elsewhere."""
    height, width = size
    seen = preprocess.boxes_backward(np.array([[0, 0, heat.shape[1], heat.shape[0]]], np.float64), height, width)[0]
    x0, y0, x1, y1 = (round(float(value)) for value in seen)
    x0, y0, x1, y1 = max(x0, 0), max(y0, 0), max(min(x1, width), x0 + 1), max(min(y1, height), y0 + 1)
    laid = np.zeros((height, width), np.float32)
    part = cv2.resize(heat.astype(np.float32), (x1 - x0, y1 - y0), interpolation=cv2.INTER_LINEAR)
    laid[y0:y1, x0:x1] = part[: height - y0, : width - x0]
    return laid
