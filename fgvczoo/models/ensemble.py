"""Several trained models as one: prototype networks whose logits are summed (ProtoPNet, section 3.1), and classifiers
whose probabilities are averaged (ProtoTree)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fgvczoo.batch import Batch
from fgvczoo.errors import FgvczooError
from fgvczoo.explain.prototypes import PrototypeModule
from fgvczoo.nn.prototypes import PrototypeHead, PrototypeNetwork, connection_l1
from fgvczoo.tasks.classification import Box, ClassificationModule
from fgvczoo.tasks.prototypes import PrototypeClassifier
from fgvczoo.tasks.stages import Group, Stage


class EnsembleNetwork(PrototypeNetwork):
    """The members' networks; a head is called NUMBER.NAME, as in "0.trivial"."""

    def __init__(self, members: Sequence[PrototypeNetwork]) -> None:
        super().__init__()
        self.members: Any = nn.ModuleList(members)

    @property
    def heads(self) -> dict[str, PrototypeHead]:
        return {f"{number}.{name}": head for number, net in enumerate(self.members) for name, head in net.heads.items()}

    def features(self, images: Tensor) -> dict[str, Tensor]:
        return {
            f"{number}.{name}": features
            for number, network in enumerate(self.members)
            for name, features in network.features(images).items()
        }

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, h, w), normalised -> the sum of the members' logits (B, C)."""
        return torch.stack([network(images).logits for network in self.members]).sum(0)


class PrototypeEnsemble(PrototypeModule):
    """Trained prototype networks of any papers and trunks as one classifier, whose evidence is that of all of them.

        PrototypeEnsemble([fgvczoo.load("runs/a"), fgvczoo.load("runs/b")]).predict("bird.jpg")

    The members keep their networks, which it shares. In a fit only the last layers train, by cross entropy of the
    summed logits and the L1 norm of the connections to other classes.

    Args:
        models: at least one; class names, their order and preprocessing must be the same.
        l1: coefficient of the L1 norm.
        stages: see `tasks.stages`. Groups: backbone, add_on, prototypes, last_layer, of all members.
        plan: of these stages.

    Raises `FgvczooError` where members do not fit each other.
    """

    paper = "ensemble"

    def __init__(
        self,
        models: Sequence[PrototypeClassifier],
        l1: float = 1e-4,
        stages: dict[str, Stage] | None = None,
        plan: list[str | dict[str, int]] | None = None,
    ) -> None:
        _check_members(models)
        first = models[0]
        super().__init__(
            EnsembleNetwork([model.network for model in models]),
            first.num_classes,
            first.class_names,
            first.preprocess.to_dict(),
            None,
            stages if stages is not None else {"last_layer": Stage({"last_layer": Group(1e-4)})},
            plan if plan is not None else [{"last_layer": 20}],
        )
        self.l1 = l1
        for number, model in enumerate(models):
            self.sources |= {f"{number}.{name}": sources for name, sources in model.sources.items()}
            self.prototype_pictures |= {f"{number}.{key}": file for key, file in model.prototype_pictures.items()}
        datasets = {model.source_dataset for model in models}
        self.source_dataset = first.source_dataset if len(datasets) == 1 else None
        self.prototypes_are_patches = all(model.prototypes_are_patches for model in models)
        self.prepare_plan()

    def groups(self) -> dict[str, nn.Module]:
        heads = self.network.heads.values()
        return {
            "backbone": nn.ModuleList(network.backbone for network in self.network.members),
            "add_on": nn.ModuleList(head.add_on for head in heads),
            "prototypes": nn.ModuleList(head.prototypes for head in heads),
            "last_layer": nn.ModuleList(head.last_layer for head in heads),
        }

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) -> logits (B, C)."""
        logits: Tensor = self.network(images)
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        norms = [
            connection_l1(head.last_layer.weight, head.prototypes.class_of) for head in self.network.heads.values()
        ]
        loss = F.cross_entropy(self(batch["image"]), batch["label"]) + self.l1 * torch.stack(norms).sum()
        self.log("train/loss", loss.detach(), prog_bar=True, on_step=False, on_epoch=True)
        return loss


class ProbabilityEnsemble(ClassificationModule):
    """Trained classifiers of any papers and trunks as one, whose probabilities are the mean of theirs.

        ProbabilityEnsemble([fgvczoo.load(f"runs/tree{seed}") for seed in range(5)]).predict("bird.jpg")

    The members are shared and not trained any further.

    Args:
        models: at least one; class names, their order and preprocessing must be the same.

    Raises `FgvczooError` where members do not fit each other.
    """

    paper = "ensemble"

    def __init__(self, models: Sequence[ClassificationModule]) -> None:
        _check_members(models)
        first = models[0]
        stages = {"none": Stage({"members": Group(0.0)})}
        arguments = first.num_classes, first.class_names, first.preprocess.to_dict()
        super().__init__(*arguments, None, stages, [{"none": 1}])
        self.members: Any = nn.ModuleList(models)
        self.prepare_plan()

    def groups(self) -> dict[str, nn.Module]:
        return {"members": self.members}

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) -> log of the mean probabilities (B, C)."""
        each = torch.stack([member(images).log_softmax(dim=1) for member in self.members])
        return each.logsumexp(dim=0) - math.log(len(self.members))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        raise FgvczooError("an ensemble of trained models does not train; train its members one by one")

    def explain(
        self, image: Any, *, target: int | str | None = None, top: int = 5, box: Box | None = None
    ) -> list[Any]:
        """Each member's own explanation of one class, the ensemble's where none is named; `fgvczoo.explain.page.write`
        puts all of them on one page."""
        explained = self.predict(image, top=1, box=box).index if target is None else target
        return [member.explain(image, target=explained, top=top, box=box) for member in self.members]


def _check_members(models: Sequence[ClassificationModule]) -> None:
    """Raises `FgvczooError` where there is none, or two differ in what they must share."""
    if not models:
        raise FgvczooError("an ensemble needs at least one model")
    for number, model in enumerate(models[1:], start=1):
        for what in ("class_names", "preprocess"):
            if getattr(model, what) != getattr(models[0], what):
                raise FgvczooError(f"ensemble: {what} of model {number} differ from those of model 0; they must agree")
