"""ST-ProtoPNet as a LightningModule: alternation, stages, projection, explanation."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torchmetrics.classification import MulticlassAccuracy

from fgvczoo.batch import Batch
from fgvczoo.errors import FgvczooError
from fgvczoo.explain.prototypes import Evidence, PrototypeExplanation
from fgvczoo.models.st_protopnet.losses import LossWeights, branch_loss, branch_terms
from fgvczoo.models.st_protopnet.network import STProtoPNetNetwork, Variant
from fgvczoo.nn.prototypes import (
    Projector,
    PrototypeSource,
    duplicates,
    high_activation_box,
    upsample_map,
)
from fgvczoo.ops.nearest_patch import EPS
from fgvczoo.preprocess import read_image
from fgvczoo.tasks.base import DataSource, Needs
from fgvczoo.tasks.classification import Box, ClassificationModule, crop
from fgvczoo.tasks.stages import Group, Stage


class STProtoPNet(ClassificationModule):
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
    needs = Needs(splits=("train", "projection", "test"))
    actions = {"project": "project"}

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
        super().__init__(num_classes, class_names, preprocess, backbone_weights, stages, plan)
        self.save_hyperparameters(logger=False)
        if idle_branch not in ("skip", "zero_grad"):
            raise FgvczooError(f"idle_branch={idle_branch!r}; expected skip or zero_grad")
        self.idle_branch = idle_branch
        self.loss_weights = LossWeights(**loss) if isinstance(loss, dict) else loss or LossWeights()
        self.network = STProtoPNetNetwork(
            num_classes,
            backbone,
            variant=variant,
            prototypes_per_class=prototypes_per_class,
            prototype_dim=prototype_dim,
            out_index=out_index,
            backbone_options=backbone_options,
        )
        self.pretrain_head = nn.Linear(self.network.backbone.channels, num_classes)
        self.test_branches = nn.ModuleDict(
            {name: MulticlassAccuracy(num_classes, average="micro") for name in self.network.branches}
        )
        self.sources: dict[str, list[PrototypeSource | None]] = {name: [] for name in self.network.branches}
        self.source_dataset: str | None = None
        self.prototypes_are_patches = False
        self.prepare_plan()

    def groups(self) -> dict[str, nn.Module]:
        branches = self.network.branches.values()
        return {
            "backbone": self.network.backbone,
            "add_on": nn.ModuleList(branch.add_on for branch in branches),
            "prototypes": nn.ModuleList(branch.prototypes for branch in branches),
            "last_layer": nn.ModuleList(branch.last_layer for branch in branches),
            "pretrain_head": self.pretrain_head,
        }

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) -> logits (B, C), the sum of both branches'."""
        return self.network(images).logits

    # -- training -----------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch["image"], batch["label"]
        features = self.network.backbone(images)
        if self.stage_name == "pretrain":
            loss = F.cross_entropy(self.pretrain_head(features.mean(dim=(2, 3))), labels)
            self.log("train/pretrain_loss", loss.detach(), prog_bar=True, on_step=False, on_epoch=True)
            return loss
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
        trained = self.plan.stages[self.stage_name].groups
        if "prototypes" in trained:
            for branch in self.network.branches.values():
                branch.prototypes.normalize_()
        if trained.keys() & {"backbone", "add_on", "prototypes"}:
            self.prototypes_are_patches = False

    # -- projection ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def project(self) -> None:
        """Replaces every prototype by the most similar patch of its class among all training images, at unit length.

        One pass over the data serves both branches; all prototypes are compared as they were before it. A class without
        images keeps its prototypes.
        """
        source: DataSource = self.trainer.datamodule  # type: ignore[attr-defined]
        self.eval()  # the next epoch puts its stage's groups back into train mode
        branches = self.network.branches
        projectors = {name: Projector(branch.prototypes.class_of) for name, branch in branches.items()}
        silent = self.trainer.progress_bar_callback is None or not self.trainer.is_global_zero
        for batch in track(source.loader("projection"), "projecting", transient=True, disable=silent):
            trunk = self.network.backbone(batch["image"].to(self.device))
            labels, index = batch["label"].to(self.device), batch["index"].to(self.device)
            for name, branch in branches.items():
                features = branch.features(trunk)
                value, cell = branch.nearest(features)
                projectors[name].update(features, value, cell, labels, index)
        for name, branch in branches.items():
            projector = projectors[name]
            projector.merge_ranks()
            assert projector.patch is not None
            self.sources[name] = self._describe(source, name, projector)
            found = projector.found[:, None]
            unit = F.normalize(projector.patch, dim=1, eps=EPS)
            branch.prototypes.vectors.copy_(torch.where(found, unit, branch.prototypes.vectors))
            self._report(name, projector)
        self.source_dataset = source.dataset_name
        self.prototypes_are_patches = True

    def _describe(self, source: DataSource, name: str, projector: Projector) -> list[PrototypeSource | None]:
        """Where each prototype of a branch comes from; the box is that of its own map on its own image."""
        branch = self.network.branches[name]
        described: list[PrototypeSource | None] = [None] * len(projector)
        for sample in torch.unique(projector.sample[projector.found]).tolist():
            row = source.row(sample)
            image = source.sample(sample)["image"]
            features = branch.features(self.network.backbone(image[None].to(self.device)))
            owned = torch.nonzero(projector.sample == sample).flatten().tolist()
            maps = upsample_map(branch.nearest_map(features)[0, owned], self.preprocess.size)
            x0, y0, x1, y1 = row["crop"] or (0, 0, row["width"], row["height"])
            for prototype, activation in zip(owned, maps):
                box = self.preprocess.boxes_backward(np.array([high_activation_box(activation)]), y1 - y0, x1 - x0)[0]
                rows, columns = projector.grid[prototype].tolist()
                described[prototype] = PrototypeSource(
                    image=row["image_id"],
                    cell=divmod(int(projector.cell[prototype]), columns),
                    grid=(rows, columns),
                    value=float(projector.value[prototype]),
                    box=tuple(float(v) for v in box + [x0, y0, x0, y0]),  # type: ignore[arg-type]
                )
        return described

    def _report(self, name: str, projector: Projector) -> None:
        missing = torch.unique(projector.class_of[~projector.found]).tolist()
        if missing:
            names = ", ".join(self.class_names[c] for c in missing[:5])
            self.print(f"projection: {len(missing)} classes have no image ({names}); their {name} prototypes stay")
        self.print(
            f"projection: {int(projector.found.sum())} {name} prototypes, {duplicates(projector)} of them on a patch that "
            "another one has"
        )

    # -- evaluation ---------------------------------------------------------------------------------------------

    def evaluation_logits(self, batch: Batch) -> Tensor:
        output = self.network(batch["image"])
        if self.trainer.testing:
            for name, metric in self.test_branches.items():
                assert isinstance(metric, MulticlassAccuracy)
                metric.update(getattr(output, name).logits, batch["label"])
                self.log(f"test/top1_{name}_only", metric, batch_size=len(batch["label"]))
        return output.logits

    # -- plain state --------------------------------------------------------------------------------------------

    def state_values(self) -> dict[str, Any]:
        return {
            "sources": {
                name: [source.to_dict() if source is not None else None for source in sources]
                for name, sources in self.sources.items()
            },
            "source_dataset": self.source_dataset,
            "prototypes_are_patches": self.prototypes_are_patches,
        }

    def restore_state_values(self, state: dict[str, Any]) -> None:
        self.sources = {
            name: [
                PrototypeSource.from_dict(source) if source is not None else None for source in state["sources"][name]
            ]
            for name in self.network.branches
        }
        self.source_dataset = state["source_dataset"]
        self.prototypes_are_patches = bool(state["prototypes_are_patches"])

    # -- explanation --------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def explain(
        self, image: Any, *, target: int | str | None = None, top: int = 6, box: Box | None = None
    ) -> PrototypeExplanation:
        """Why an image gets its class: the prototypes, where each one is found on it, and what each contributes.

        image, box: as `predict` takes them. target: class index or name to explain; None: the predicted one.
        top: how many prototypes get a map. The contributions of all prototypes sum to the class's logit.
        """
        picture = crop(read_image(image), box)
        self.eval()
        tensor = self.preprocess(picture)[None].to(self.device)
        trunk = self.network.backbone(tensor)
        logits = torch.zeros(self.num_classes, device=self.device)
        evidence: list[Evidence] = []
        features = {name: branch.features(trunk) for name, branch in self.network.branches.items()}
        outputs = {name: branch.head(features[name]) for name, branch in self.network.branches.items()}
        logits = sum((output.logits[0] for output in outputs.values()), logits)
        explained = int(logits.argmax()) if target is None else self._class_index(target)
        others = logits.index_fill(0, torch.tensor([explained], device=logits.device), -torch.inf)
        rival = int(others.argmax()) if self.num_classes > 1 else None
        for name, branch in self.network.branches.items():
            weight = branch.last_layer.weight[explained]
            rival_weight = branch.last_layer.weight[rival] if rival is not None else torch.zeros_like(weight)
            for prototype, similarity in enumerate(outputs[name].evidence[0].tolist()):
                evidence.append(
                    Evidence(
                        kind=name,
                        prototype=prototype,
                        prototype_class=self.class_names[int(branch.prototypes.class_of[prototype])],
                        similarity=similarity,
                        weight=float(weight[prototype]),
                        rival_weight=float(rival_weight[prototype]),
                        source=self.sources[name][prototype] if self.sources[name] else None,
                        picture=self.prototype_pictures.get(f"{name}.{prototype}"),
                    )
                )
        evidence.sort(key=lambda e: (-e.contribution, e.kind, e.prototype))
        shown = evidence[:top]
        for entry in shown:
            branch = self.network.branches[entry.kind]
            activation = branch.evidence_map(features[entry.kind])[0, entry.prototype]
            entry.map = upsample_map(activation[None], picture.shape[:2])[0].cpu().numpy()
        return PrototypeExplanation(
            image=picture,
            class_name=self.class_names[explained],
            predicted=self.class_names[int(logits.argmax())],
            probability=float(logits.softmax(0)[explained]),
            logit=float(logits[explained]),
            rival=self.class_names[rival] if rival is not None else None,
            rival_logit=float(logits[rival]) if rival is not None else 0.0,
            evidence=evidence,
            shown=len(shown),
            dataset=self.source_dataset,
            prototypes_are_patches=self.prototypes_are_patches,
        )

    def _class_index(self, target: int | str) -> int:
        if isinstance(target, str):
            if target not in self.class_names:
                raise FgvczooError(
                    f"target={target!r} is no class of this model; classes are {', '.join(self.class_names[:5])}, ..."
                )
            return self.class_names.index(target)
        if not 0 <= target < self.num_classes:
            raise FgvczooError(f"target={target}: classes are 0..{self.num_classes - 1}")
        return target


# The authors' run on cropped pictures with a ResNet or VGG trunk, with the projection moved to the end: after it nothing
# but the last layer trains, so the prototypes of the result are patches.
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
