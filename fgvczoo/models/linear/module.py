"""A trunk, mean pooling and one linear layer: the baseline of every classifier of the zoo."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from fgvczoo.batch import Batch
from fgvczoo.nn.backbones import Backbone
from fgvczoo.tasks.base import Needs
from fgvczoo.tasks.classification import ClassificationModule
from fgvczoo.tasks.stages import Group, Stage


class LinearClassifier(ClassificationModule):
    """Mean-pooled features of a trunk, a linear layer, cross entropy.

    Args:
        num_classes, class_names, preprocess: from the data; preprocess as keyword values of `Preprocess`.
        backbone, out_index, backbone_options: the trunk, as `nn.backbones.Backbone` takes them.
        backbone_weights: timm tag or file, loaded at the start of a fresh fit; None: random.
        stages, plan: see `tasks.stages`. Groups: backbone, head.
    """

    paper = "linear"
    needs = Needs(splits=("train", "test"))

    def __init__(
        self,
        num_classes: int,
        class_names: list[str] | None = None,
        preprocess: dict[str, Any] | None = None,
        backbone: str = "resnet34",
        backbone_weights: str | None = None,
        out_index: int | None = None,
        backbone_options: dict[str, Any] | None = None,
        stages: dict[str, Stage] | None = None,
        plan: list[str | dict[str, int]] | None = None,
    ) -> None:
        both = {"backbone": Group(1e-4, 5e-4), "head": Group(1e-3, 5e-4)}
        stages = stages if stages is not None else {"train": Stage(both, schedule="cosine")}
        plan = plan if plan is not None else [{"train": 30}]
        super().__init__(num_classes, class_names, preprocess, backbone_weights, stages, plan)
        self.save_hyperparameters(logger=False)
        self.backbone = Backbone(backbone, out_index=out_index, options=backbone_options)
        self.head = nn.Linear(self.backbone.channels, num_classes)
        self.prepare_plan()

    def groups(self) -> dict[str, nn.Module]:
        return {"backbone": self.backbone, "head": self.head}

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) -> logits (B, C)."""
        return self.head(self.backbone(images).mean(dim=(2, 3)))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch["image"]), batch["label"])
        self.log("train/loss", loss.detach(), prog_bar=True, on_step=False, on_epoch=True)
        return loss
