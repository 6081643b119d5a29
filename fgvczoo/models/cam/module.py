"""A plain classifier and its class activation map."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from fgvczoo.batch import Batch
from fgvczoo.explain.localization import MapModule
from fgvczoo.nn.backbones import Backbone
from fgvczoo.nn.cam import cam
from fgvczoo.tasks.base import Needs
from fgvczoo.tasks.stages import Group, Stage


class CAM(MapModule):
    """Mean-pooled features of a trunk, a linear layer, cross entropy; the map is the class's weighted sum of features.

    Args:
        num_classes, class_names, preprocess: from the data; preprocess as keyword values of `Preprocess`.
        backbone, out_index, backbone_options: the trunk, as `nn.backbones.Backbone` takes them.
        backbone_weights: timm tag or file, loaded at the start of a fresh fit; None: random.
        dialect, threshold, ten_crop: of the evaluation, see `LocalizationModule`.
        stages, plan: see `tasks.stages`. Groups: backbone, head.
    """

    paper = "cam"
    needs = Needs(splits=("train", "test"))

    def __init__(
        self,
        num_classes: int,
        class_names: list[str] | None = None,
        preprocess: dict[str, Any] | None = None,
        backbone: str = "resnet50",
        backbone_weights: str | None = None,
        out_index: int | None = None,
        backbone_options: dict[str, Any] | None = None,
        dialect: str = "wsol",
        threshold: float = 0.2,
        ten_crop: bool = False,
        stages: dict[str, Stage] | None = None,
        plan: list[str | dict[str, int]] | None = None,
    ) -> None:
        both = {"backbone": Group(1e-4, 5e-4), "head": Group(1e-3, 5e-4)}
        stages = stages if stages is not None else {"train": Stage(both, schedule="cosine")}
        plan = plan if plan is not None else [{"train": 30}]
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
        self.backbone = Backbone(backbone, out_index=out_index, options=backbone_options)
        self.head = nn.Linear(self.backbone.channels, num_classes)
        self.prepare_plan()

    def groups(self) -> dict[str, nn.Module]:
        return {"backbone": self.backbone, "head": self.head}

    def localize(self, images: Tensor, classes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, 3, h, w) -> logits (B, C), class activation maps (B, H, W)."""
        features = self.backbone(images)
        logits = self.head(features.mean(dim=(2, 3)))
        return logits, cam(features, self.head.weight, logits.argmax(1) if classes is None else classes)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.head(self.backbone(batch["image"]).mean(dim=(2, 3))), batch["label"])
        self.log("train/loss", loss.detach(), prog_bar=True, on_step=False, on_epoch=True)
        return loss

    def single_maps(self, images: Tensor, classes: Tensor) -> Tensor:
        features = self.backbone(images).expand(len(classes), -1, -1, -1)
        return cam(features, self.head.weight, classes)
