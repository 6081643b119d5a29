"""BAS for segmentation seeds as a LightningModule: several classes a picture, one of them drawn at each step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fgvczoo.batch import Batch
from fgvczoo.metrics.segmentation import SeedIoU
from fgvczoo.models.bas.losses import LossWeights, loss_terms, present_against_absent
from fgvczoo.models.bas.module import GeneratedMaps
from fgvczoo.models.bas.network import BASNetwork
from fgvczoo.models.bas.seeds import SCALES, Seeds, seeds_of
from fgvczoo.preprocess import read_image
from fgvczoo.tasks.base import Needs
from fgvczoo.tasks.stages import Group, Stage


class BASSegmentation(GeneratedMaps):
    """The segmentation form of BAS (Zhai, Wu et al., IJCV 2023): its maps are seeds of segmentation.

    A batch's classes are its `labels` (B, C); without that key, the one of `label`. `test` reports `seed_miou`, where
    the data have `labels` and `mask`, else what any localisation model reports.

    Args:
        num_classes, class_names, preprocess, backbone, backbone_weights, backbone_options: as `BAS`; a ResNet.
        losses: weights of the terms.
        scales, with_cam: of the seeds, see `seeds.seeds_of`.
        dialect, threshold, ten_crop: of the evaluation, see `LocalizationModule`.
        stages, plan: see `tasks.stages`. Groups: backbone, classifier, generator.
    """

    paper = "bas-segmentation"
    needs = Needs(splits=("train", "test"))

    def __init__(
        self,
        num_classes: int,
        class_names: list[str] | None = None,
        preprocess: dict[str, Any] | None = None,
        backbone: str = "resnet50",
        backbone_weights: str | None = None,
        backbone_options: dict[str, Any] | None = None,
        losses: LossWeights | None = None,
        scales: list[float] | None = None,
        with_cam: bool = False,
        dialect: str = "bas",
        threshold: float = 0.3,
        ten_crop: bool = False,
        stages: dict[str, Stage] | None = None,
        plan: list[str | dict[str, int]] | None = None,
    ) -> None:
        # The authors' optimiser: a momentum of 1e-4, no bias is trained.
        groups = {"backbone": Group(5e-3, 1e-4, bias_lr=0.0)}
        groups |= {name: Group(5e-2, 1e-4, bias_lr=0.0) for name in ("classifier", "generator")}
        joint = Stage(groups, "SGD", {"momentum": 1e-4}, schedule="polynomial")
        stages = stages if stages is not None else {"joint": joint}
        plan = plan if plan is not None else [{"joint": 10}]
        super().__init__(
            num_classes,
            class_names,
            preprocess,
            backbone_weights,
            stages,
            plan,
            dialect=dialect,
            threshold=threshold,
            ten_crop=ten_crop,
        )
        self.save_hyperparameters(logger=False)
        losses = losses if losses is not None else LossWeights(guidance=0.2, area=1.2)
        self.losses = losses if isinstance(losses, LossWeights) else LossWeights(**losses)
        self.scales, self.with_cam = tuple(scales) if scales else SCALES, with_cam
        self.network = BASNetwork(num_classes, backbone, backbone_options, segmentation=True)
        self.test_seeds = SeedIoU(num_classes)
        self.prepare_plan()

    def localize(self, images: Tensor, classes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, 3, h, w) -> logits (B, C), the foreground maps (B, H, W) of the given or highest-scored classes."""
        features = self.network.features(images)
        scores = self.network.class_maps(features).mean(dim=(2, 3))
        return scores, self.network.foreground(features, scores.argmax(1) if classes is None else classes)[:, 0]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        labels = batch["label"]
        present = (batch["labels"] if "labels" in batch else F.one_hot(labels, self.num_classes)).bool()
        known = present.any(1)
        # The stream is set at every step, see `StagedModule`: a resumed run draws the same classes. A picture without
        # a class has none to draw: it counts in the classification loss alone.
        drawn = torch.multinomial(torch.where(known[:, None], present.float(), 1.0), 1)[:, 0]
        output = self.network.training_output(batch["image"], drawn)
        kept = replace(output, **{name: getattr(output, name)[known] for name in output.__dataclass_fields__})
        if known.any():
            terms = loss_terms(kept, drawn[known], self.losses)
        else:
            terms = dict.fromkeys(("guidance", "bas", "area"), output.scores.sum() * 0)
        terms["classification"] = present_against_absent(output.scores, present)
        return self.logged_loss(terms)

    def seeds(self, image: Any, classes: list[int | str]) -> Seeds:
        """Seeds of one picture, a path or array, for the classes that are known to be in it, by name or index."""
        self.eval()
        numbers = torch.tensor([self.class_index(name) for name in classes], dtype=torch.int64)
        return seeds_of(self.network, read_image(image), numbers, self.preprocess, self.scales, self.with_cam)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        if not ("labels" in batch and "mask" in batch):
            super().test_step(batch, batch_idx)
            return
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        for index, present in zip(batch["index"].tolist(), batch["labels"]):
            picture, mask = data.picture(index), data.reader.annotations(index, ["mask"])["mask"]
            found = self.seeds(picture, torch.nonzero(present).flatten().tolist())
            self.test_seeds.update(found.maps.to(self.device), found.classes.to(self.device), self._mask(mask))

    def _mask(self, mask: np.ndarray) -> Tensor:
        return torch.from_numpy(mask.astype(np.int64)).to(self.device)

    def on_test_epoch_end(self) -> None:
        if not self.test_seeds.images:
            super().on_test_epoch_end()
            return
        values = self.test_seeds.compute()
        self.log_dict({"test/seed_miou": values["miou"].float(), "test/seed_threshold": values["threshold"].float()})
        self.test_seeds.reset()
