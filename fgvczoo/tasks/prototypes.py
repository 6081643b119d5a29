"""Classifiers whose prototypes are projected onto training patches, and those whose logits are sums over prototypes:
projection, provenance, nearest images, last layer; what papers share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fgvczoo.batch import Batch
from fgvczoo.nn.last_layer import solve_last_layer
from fgvczoo.nn.prototypes import (
    NearestImages,
    Projector,
    PrototypeHead,
    PrototypeNetwork,
    PrototypeSource,
    activation_boxes,
    duplicates,
    gather_ranks,
    own_class,
)
from fgvczoo.progress import progress
from fgvczoo.tasks.base import DataSource, Needs
from fgvczoo.tasks.classification import ClassificationModule
from fgvczoo.tasks.stages import Stage

# Groups whose training moves prototypes off the patches, or the patches off them.
PROTOTYPES_REST_ON = {"backbone", "last_block", "add_on", "prototypes"}


class ProjectedClassifier(ClassificationModule):
    """Base of classifiers whose prototypes, in the heads of `network`, are projected onto patches of training images.

    Actions: project. A subclass builds its network, sets `pretrain_head`, names its groups, and defines
    `training_step`, which calls `pretraining_step` in the stage "pretrain".
    """

    needs = Needs(splits=("train", "projection", "test"))
    actions = {"project": "project"}
    pretrain_head: nn.Linear

    def __init__(
        self,
        network: PrototypeNetwork,
        num_classes: int,
        class_names: list[str] | None,
        preprocess: dict[str, Any] | None,
        backbone_weights: str | None,
        stages: dict[str, Stage],
        plan: Sequence[str | dict[str, int]],
    ) -> None:
        super().__init__(num_classes, class_names, preprocess, backbone_weights, stages, plan)
        self.network: Any = network
        self.sources: dict[str, list[PrototypeSource | None]] = {name: [] for name in network.heads}
        self.source_dataset: str | None = None
        self.prototypes_are_patches = False

    def pretraining_step(self, features: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy of a linear layer on the mean of the trunk's features (B, F, H, W): a stand-in for an ImageNet
        trunk where training starts from random weights."""
        loss = F.cross_entropy(self.pretrain_head(features.mean(dim=(2, 3))), labels)
        self.log("train/pretrain_loss", loss.detach(), prog_bar=True, on_step=False, on_epoch=True)
        return loss

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.plan.stages[self.stage_name].groups.keys() & PROTOTYPES_REST_ON:
            self.prototypes_are_patches = False

    # -- projection ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def project(self, data: DataSource | None = None) -> None:
        """Replaces every prototype by the most similar patch of its classes among all training images.

        One pass over the split "projection" serves all heads; all prototypes are compared as they were before it. One
        whose classes have no images stays. data: the trainer's, unless given. Leaves the module in eval mode.
        """
        data = self._data(data)
        self.eval()  # the next epoch puts its stage's groups back into train mode
        heads = self.network.heads
        projectors = {name: self._projector(head) for name, head in heads.items()}
        for batch in self._batches(data, "projection", "projecting"):
            labels, index = batch["label"].to(self.device), batch["index"].to(self.device)
            for name, features in self.network.features(batch["image"].to(self.device)).items():
                value, cell, which = self._compared(heads[name], features, labels)
                projectors[name].update(features, value, cell, labels, index, which)
        for projector in projectors.values():
            projector.merge_ranks()
        self.sources = self._describe(data, projectors)  # by the maps of the prototypes before they move
        for name, projector in projectors.items():
            assert projector.patch is not None
            heads[name].replace_(projector.patch, projector.found)
            self._report(name, projector)
        self.source_dataset = data.dataset_name
        self.prototypes_are_patches = True

    def _describe(self, data: DataSource, projectors: dict[str, Projector]) -> dict[str, list[PrototypeSource | None]]:
        """Where each prototype comes from; the box is that of its own map on its own image."""
        described: dict[str, list[PrototypeSource | None]] = {name: [None] * len(p) for name, p in projectors.items()}
        found = torch.cat([projector.sample[projector.found] for projector in projectors.values()])
        samples = torch.unique(found).tolist()  # ascending: a stream is read once
        for sample, picture in zip(samples, data.samples(samples)):
            image_id = str(data.row(sample)["image_id"])
            features = self.network.features(picture["image"][None].to(self.device))
            for name, projector in projectors.items():
                owned = torch.nonzero(projector.sample == sample).flatten().tolist()
                maps = self.network.heads[name].nearest_map(features[name])[0, owned]
                for prototype, box in zip(owned, self.boxes_on(data, sample, maps)):
                    rows, columns = projector.grid[prototype].tolist()
                    described[name][prototype] = PrototypeSource(
                        image=image_id,
                        cell=divmod(int(projector.cell[prototype]), columns),
                        grid=(rows, columns),
                        value=float(projector.value[prototype]),
                        box=tuple(float(v) for v in box),  # type: ignore[arg-type]
                    )
        return described

    def boxes_on(self, data: DataSource, sample: int, maps: Tensor) -> np.ndarray:
        """The boxes of maps (N, H, W) of a row of the data: (N, 4), x0, y0, x1, y1 in pixels of the original
        picture."""
        row = data.row(sample)
        x0, y0, x1, y1 = row["crop"] or (0, 0, row["width"], row["height"])
        boxes = self.boxes_of(maps)
        return self.preprocess.boxes_backward(boxes, y1 - y0, x1 - x0) + np.array([x0, y0, x0, y0])

    def boxes_of(self, maps: Tensor) -> np.ndarray:
        """Where maps (N, H, W) are active: (N, 4) in pixels of the preprocessed image; papers differ in what counts."""
        return activation_boxes(maps, self.preprocess.size)

    def _projector(self, head: Any) -> Projector:
        """For the head's prototypes, by the classes whose images each may come from."""
        return Projector(head.prototypes.class_of, head.prototypes.window)

    def _compared(self, head: Any, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Value, cell and number of the prototypes that each image is compared with, as `Projector.update` takes them;
        no number where it is all of them."""
        return *head.nearest(features), None

    def _report(self, name: str, projector: Projector) -> None:
        images = len(torch.unique(projector.sample[projector.found]))
        self.say(
            f"projection: {int(projector.found.sum())} {name} prototypes from {images} images, "
            f"{duplicates(projector)} of them on a patch that another one has"
        )

    # -- nearest images -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def nearest_images(
        self, data: DataSource | None = None, *, split: str = "train_plain", k: int = 6, patches: bool = False
    ) -> dict[str, NearestImages]:
        """The k images of a split, of any class, that are most like each prototype, for each head; one pass.

        patches: rank every patch, not only the best one of each image. data: the trainer's, unless given. Leaves the
        module in eval mode.
        """
        data = self._data(data)
        self.eval()
        heads = self.network.heads
        nearest = {name: NearestImages(len(head.prototypes), k) for name, head in heads.items()}
        for batch in self._batches(data, split, "ranking images"):
            for name, features in self.network.features(batch["image"].to(self.device)).items():
                head = heads[name]
                value, cell = (head.nearest_map(features), None) if patches else head.nearest(features)
                nearest[name].update(value, cell, batch["label"].to(self.device), batch["index"].to(self.device))
        for found in nearest.values():
            found.merge_ranks()
        return nearest

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
            for name in self.network.heads
        }
        self.source_dataset = state["source_dataset"]
        self.prototypes_are_patches = bool(state["prototypes_are_patches"])

    # -- the trainer, or none -----------------------------------------------------------------------------------

    def _data(self, data: DataSource | None) -> DataSource:
        return data if data is not None else self.trainer.datamodule  # type: ignore[attr-defined]

    def _batches(self, data: DataSource, split: str, title: str) -> Iterable[Batch]:
        trainer = self._trainer
        silent = trainer is None or trainer.progress_bar_callback is None or not trainer.is_global_zero
        return progress(data.loader(split), title, show=not silent)

    def say(self, line: str) -> None:
        """Prints a line, once over all processes."""
        if self._trainer is None:
            print(line)
        else:
            self.print(line)


class PrototypeClassifier(ProjectedClassifier):
    """Base of part-prototype classifiers. `forward` gives logits, the sum over the heads of `network`, of which each is
    a last layer on the evidence of its prototypes.

    Groups: backbone, add_on, prototypes, last_layer, pretrain_head. Actions: project, solve_last_layer.
    """

    actions = {**ProjectedClassifier.actions, "solve_last_layer": "solve_last_layer"}
    # Projection searches images of all classes.
    class_agnostic = False

    def groups(self) -> dict[str, nn.Module]:
        heads = self.network.heads.values()
        return {
            "backbone": self.network.backbone,
            "add_on": nn.ModuleList(head.add_on for head in heads),
            "prototypes": nn.ModuleList(head.prototypes for head in heads),
            "last_layer": nn.ModuleList(head.last_layer for head in heads),
            "pretrain_head": self.pretrain_head,
        }

    # -- projection ---------------------------------------------------------------------------------------------

    def _projector(self, head: PrototypeHead) -> Projector:
        return Projector(head.prototypes.class_of, head.prototypes.window, self.class_agnostic)

    def _compared(self, head: PrototypeHead, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return (*head.nearest(features), None) if self.class_agnostic else head.nearest_own(features, labels)

    def _report(self, name: str, projector: Projector) -> None:
        missing = torch.unique(projector.class_of[~projector.found]).tolist()
        if missing:
            names = ", ".join(self.class_names[c] for c in missing[:5])
            self.say(f"projection: {len(missing)} classes have no image ({names}); their {name} prototypes stay")
        super()._report(name, projector)

    # -- last layer ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def solve_last_layer(self, data: DataSource | None = None, *, l1: float = 1e-4) -> None:
        """The last-layer step as the convex problem that it is: one pass over the un-augmented training images stores
        the similarities, then each head's cross entropy plus `l1` on the connections to other classes is minimised,
        with exact zeros (ProtoPNet, section 2.2). Every rank solves the same problem. Leaves the module in eval mode.
        """
        data = self._data(data)
        self.eval()
        heads = self.network.heads
        evidence: dict[str, list[Tensor]] = {name: [] for name in heads}
        labels: list[Tensor] = []
        for batch in self._batches(data, "train_plain", "similarities"):
            labels.append(batch["label"].to(self.device))
            for name, features in self.network.features(batch["image"].to(self.device)).items():
                evidence[name].append(heads[name].head(features).evidence)
        own: dict[str, Tensor | None] = {"labels": torch.cat(labels)}
        own |= {name: torch.cat(parts) for name, parts in evidence.items()}
        every: list[dict[str, Any]] = gather_ranks(own) or [own]
        target = torch.cat([rank["labels"] for rank in every])
        for name, head in heads.items():
            similarity, weight = torch.cat([rank[name] for rank in every]), head.last_layer.weight
            penalised = ~own_class(torch.arange(self.num_classes, device=weight.device), head.prototypes.class_of)
            found = solve_last_layer(similarity, target, weight, penalised, l1=l1)
            weight.copy_(found.weight)
            zeros = int((found.weight[penalised] == 0).sum())
            self.say(
                f"last layer: objective {found.objective:.4f} after {found.iterations} iterations; {zeros} of "
                f"{int(penalised.sum())} {name} connections to other classes are 0"
            )
