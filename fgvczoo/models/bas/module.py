"""BAS as a LightningModule."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fgvczoo.batch import Batch
from fgvczoo.errors import FgvczooError, FgvczooWarning
from fgvczoo.explain.localization import MapModule
from fgvczoo.models.bas.losses import LossWeights, loss_terms, total_loss
from fgvczoo.models.bas.network import BASNetwork
from fgvczoo.tasks.base import Needs
from fgvczoo.tasks.stages import Group, Stage


class GeneratedMaps(MapModule):
    """What both forms of BAS share: the groups and maps of their network, the loss and how it is logged."""

    network: BASNetwork
    losses: LossWeights

    def groups(self) -> dict[str, nn.Module]:
        return {
            "backbone": self.network.trunk,
            "classifier": self.network.classifier,
            "generator": self.network.generator,
        }

    def logged_loss(self, terms: dict[str, Tensor], **watched: Tensor) -> Tensor:
        """The weighted sum of the loss's terms; logs it, them, and what else is watched."""
        loss = total_loss(terms, self.losses)
        values = {f"train/{name}": value.detach() for name, value in (terms | watched).items()}
        self.log_dict(values, on_step=False, on_epoch=True)
        self.log("train/loss", loss.detach(), prog_bar=True, on_step=False, on_epoch=True)
        return loss

    def single_maps(self, images: Tensor, classes: Tensor) -> Tensor:
        return self.network.maps_of(self.network.features(images), classes)[0]


class BAS(GeneratedMaps):
    """Background Activation Suppression (Zhai, Wu et al., IJCV 2023; Wu, Zhai, Cao, CVPR 2022).

    Args:
        num_classes, class_names, preprocess: from the data; preprocess as keyword values of `Preprocess`.
        backbone, backbone_options: a VGG, ResNet, MobileNetV1 or Inception-V3 of timm.
        backbone_weights: timm tag or file, loaded at the start of a fresh fit; None: random.
        hidden: channels inside of the classification head.
        relu_class_maps: the conference form.
        top_k: K, how many of the highest-scored classes' maps are averaged for a map. 1: the map of the class alone.
        losses: weights of the terms.
        dialect, threshold, ten_crop: of the evaluation, see `LocalizationModule`.
        stages, plan: see `tasks.stages`. Groups: backbone, classifier, generator. In a stage named "pretrain" only the
            classification loss is trained: a stand-in for an ImageNet trunk where training starts from random weights.
    """

    paper = "bas"
    needs = Needs(splits=("train", "test"))

    def __init__(
        self,
        num_classes: int,
        class_names: list[str] | None = None,
        preprocess: dict[str, Any] | None = None,
        backbone: str = "resnet50",
        backbone_weights: str | None = None,
        backbone_options: dict[str, Any] | None = None,
        hidden: int = 1024,
        relu_class_maps: bool = False,
        top_k: int = 1,
        losses: LossWeights | None = None,
        dialect: str = "bas",
        threshold: float = 0.1,
        ten_crop: bool = False,
        stages: dict[str, Stage] | None = None,
        plan: list[str | dict[str, int]] | None = None,
    ) -> None:
        stages = stages if stages is not None else {"joint": paper_stage([80])}
        plan = plan if plan is not None else [{"joint": 120}]
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
        if top_k < 1:
            raise FgvczooError(f"top_k={top_k}; expected at least 1")
        if top_k > num_classes:
            warnings.warn(f"top_k={top_k} of {num_classes} classes: all of them", FgvczooWarning, stacklevel=2)
        self.top_k = min(top_k, num_classes)
        self.losses = losses if isinstance(losses, LossWeights) else LossWeights(**(losses or {}))
        self.network = BASNetwork(num_classes, backbone, backbone_options, hidden, relu_class_maps)
        self.prepare_plan()

    def localize(self, images: Tensor, classes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, 3, h, w) -> scores (B, C), maps (B, H, W) in [0, 1]: of the given classes, or the mean of the K
        highest-scored."""
        features = self.network.features(images)
        scores = self.network.class_maps(features).mean(dim=(2, 3))
        if self.top_k == 1:
            classes = scores.argmax(1) if classes is None else classes
            return scores, self.network.foreground(features, classes)[:, 0]
        if self.top_k == self.num_classes:
            return scores, self.network.fused_map(features, torch.full_like(scores, 1 / self.top_k))
        top = scores.topk(self.top_k, dim=1).indices
        return scores, self.network.fused_map(features, torch.zeros_like(scores).scatter(1, top, 1 / self.top_k))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch["image"], batch["label"]
        if self.stage_name == "pretrain":
            loss = F.cross_entropy(self.network(images), labels)
            self.log("train/pretrain_loss", loss.detach(), prog_bar=True, on_step=False, on_epoch=True)
            return loss
        output = self.network.training_output(images, labels)
        saturated = (output.background_score > output.score).float().mean()
        return self.logged_loss(loss_terms(output, labels, self.losses), saturated=saturated)


def paper_stage(milestones: list[int]) -> Stage:
    """The paper's optimiser: SGD with Nesterov momentum, ten times the rate for the heads, twice that for biases."""
    groups = {
        "backbone": Group(1e-3, 5e-4, bias_lr=2e-3),
        "classifier": Group(1e-2, 5e-4, bias_lr=2e-2),
        "generator": Group(1e-2, 5e-4, bias_lr=2e-2),
    }
    options = {"momentum": 0.9, "nesterov": True}
    return Stage(groups, "SGD", options, schedule="milestones", milestones=milestones, gamma=0.1)
