"""ST-ProtoPNet as a LightningModule: alternation, stages, evaluation of each branch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics.classification import MulticlassAccuracy

from fgvczoo.batch import Batch
from fgvczoo.errors import FgvczooError
from fgvczoo.explain.prototypes import PrototypeModule
from fgvczoo.models.st_protopnet.losses import LossWeights, branch_loss, branch_terms
from fgvczoo.models.st_protopnet.network import STProtoPNetNetwork, Variant
from fgvczoo.tasks.stages import Group, Stage


class STProtoPNet(PrototypeModule):
    """Support and trivial prototypes (Wang et al., "Learning Support and Trivial Prototypes for Interpretable Image
    Classification", ICCV 2023).

    Args:
        num_classes, class_names, preprocess: from the data; preprocess as keyword values of `Preprocess`.
        backbone, out_index, backbone_options: the trunk, as `nn.backbones.Backbone` takes them.
        backbone_weights: timm tag or file, loaded at the start of a fresh fit; None: random.
        variant: "cropped" or "full", see `STProtoPNetNetwork`.
        prototypes_per_class: in each of the two branches.
        prototype_dim: channels of a prototype.
        loss: coefficients, see `LossWeights`.
        stages, plan: see `tasks.stages`. Groups: backbone, add_on, prototypes, last_layer, pretrain_head. Action:
            project. The stage called "pretrain" trains the trunk with a linear head by cross entropy; any other stage
            trains with the losses of the two branches in turn.
        idle_branch: "skip" leaves the branch whose turn it is not untouched by the optimiser; "zero_grad" gives it zero
            gradients, so that its momentum and weight decay go on acting, as in the authors' runs (torch 1.10).
    """

    paper = "st-protopnet"

    def __init__(
        self,
        num_classes: int,
        class_names: list[str] | None = None,
        preprocess: dict[str, Any] | None = None,
        backbone: str = "resnet34",
        backbone_weights: str | None = None,
        out_index: int | None = None,
        backbone_options: dict[str, Any] | None = None,
        variant: Variant = "cropped",
        prototypes_per_class: int = 5,
        prototype_dim: int = 64,
        loss: LossWeights | None = None,
        stages: dict[str, Stage] | None = None,
        plan: list[str | dict[str, int]] | None = None,
        idle_branch: str = "skip",
    ) -> None:
        stages = stages if stages is not None else default_stages()
        plan = plan if plan is not None else DEFAULT_PLAN
        network = STProtoPNetNetwork(
            num_classes,
            backbone,
            variant=variant,
            prototypes_per_class=prototypes_per_class,
            prototype_dim=prototype_dim,
            out_index=out_index,
            backbone_options=backbone_options,
        )
        super().__init__(network, num_classes, class_names, preprocess, backbone_weights, stages, plan)
        self.save_hyperparameters(logger=False)
        if idle_branch not in ("skip", "zero_grad"):
            raise FgvczooError(f"idle_branch={idle_branch!r}; expected skip or zero_grad")
        self.idle_branch = idle_branch
        self.loss_weights = LossWeights(**loss) if isinstance(loss, dict) else loss or LossWeights()
        self.pretrain_head = nn.Linear(network.backbone.channels, num_classes)
        self.test_branches = nn.ModuleDict(
            {name: MulticlassAccuracy(num_classes, average="micro") for name in network.branches}
        )
        self.prepare_plan()

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) -> logits (B, C), the sum of both branches'."""
        return self.network(images).logits

    # -- training -----------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch["image"], batch["label"]
        features = self.network.backbone(images)
        if self.stage_name == "pretrain":
            return self.pretraining_step(features, labels)
        name = self.branch_of(batch_idx)
        branch = self.network.branches[name]
        terms = branch_terms(name, branch, branch(features), labels)
        loss = branch_loss(name, terms, self.loss_weights)
        logged = {f"train/{name}_{key}": term.detach() for key, term in terms.items()}
        self.log_dict(logged, on_step=False, on_epoch=True)
        self.log("train/loss", loss.detach(), prog_bar=True, on_step=False, on_epoch=True)
        return loss

    def branch_of(self, batch_idx: int) -> str:
        """Even optimiser steps of an epoch train the trivial branch, odd ones the support branch (section 3.4)."""
        step = batch_idx // self.trainer.accumulate_grad_batches
        return "trivial" if step % 2 == 0 else "support"

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if self.idle_branch == "zero_grad":
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if "prototypes" in self.plan.stages[self.stage_name].groups:
            for branch in self.network.branches.values():
                branch.prototypes.normalize_()

    # -- evaluation ---------------------------------------------------------------------------------------------

    def evaluation_logits(self, batch: Batch) -> Tensor:
        output = self.network(batch["image"])
        if self.trainer.testing:
            for name, metric in self.test_branches.items():
                assert isinstance(metric, MulticlassAccuracy)
                metric.update(getattr(output, name).logits, batch["label"])
                self.log(f"test/top1_{name}_only", metric, batch_size=len(batch["label"]))
        return output.logits


# The authors' run on cropped pictures with a ResNet or VGG trunk, with the projection moved to the end: after it
# nothing but the last layer trains, so the prototypes of the result are patches.
DEFAULT_PLAN: list[str | dict[str, int]] = [{"warm": 5}, {"joint": 25}, "project", {"last_layer": 10}]


def default_stages() -> dict[str, Stage]:
    """The authors' optimisers for cropped pictures with a ResNet or VGG trunk (Adam throughout)."""
    heads = {"add_on": Group(3e-3, 5e-4), "prototypes": Group(3e-3)}
    return {
        "warm": Stage(heads),
        "joint": Stage(
            {"backbone": Group(1e-4, 5e-4), **heads}, schedule="milestones", milestones=[2, 4, 6, 8], gamma=0.2
        ),
        "last_layer": Stage({"last_layer": Group(1e-4)}),
    }
