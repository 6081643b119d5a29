"""ProtoPNet as a LightningModule: stages, projection, pruning, explanation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fgvczoo.batch import Batch
from fgvczoo.explain.prototypes import PrototypeModule
from fgvczoo.models.protopnet.losses import LossWeights, average_separation, loss_terms, pair_distance, total_loss
from fgvczoo.models.protopnet.network import Activation, AddOn, Head, ProtoPNetNetwork
from fgvczoo.models.protopnet.pruning import Pruning, kept_prototypes
from fgvczoo.tasks.base import DataSource
from fgvczoo.tasks.stages import Group, Stage


class ProtoPNet(PrototypeModule):
    """Prototypical part network (Chen, Li et al., "This Looks Like That: Deep Learning for Interpretable Image
    Recognition", NeurIPS 2019).

    Args:
        num_classes, class_names, preprocess: from the data; preprocess as keyword values of `Preprocess`.
        backbone, out_index, backbone_options: the trunk, as `nn.backbones.Backbone` takes them.
        backbone_weights: timm tag or file, loaded at the start of a fresh fit; None: random.
        prototypes_per_class, prototype_classes, prototype_dim, prototype_window, add_on, activation: see
            `ProtoPNetNetwork`.
        class_agnostic: prototypes belong to no class, in losses and projection.
        loss: coefficients, see `LossWeights`.
        pruning: see `Pruning`.
        stages, plan: see `tasks.stages`. Groups: backbone, add_on, prototypes, last_layer, pretrain_head. Actions:
            project, prune. The stage called "pretrain" trains the trunk with a linear head by cross entropy.
    """

    paper = "protopnet"
    actions = {**PrototypeModule.actions, "prune": "prune"}

    def __init__(
        self,
        num_classes: int,
        class_names: list[str] | None = None,
        preprocess: dict[str, Any] | None = None,
        backbone: str = "vgg19",
        backbone_weights: str | None = None,
        out_index: int | None = None,
        backbone_options: dict[str, Any] | None = None,
        prototypes_per_class: int = 10,
        prototype_classes: list[int] | None = None,
        prototype_dim: int = 128,
        prototype_window: tuple[int, int] = (1, 1),
        add_on: AddOn = "regular",
        activation: Activation = "log",
        class_agnostic: bool = False,
        loss: LossWeights | None = None,
        pruning: Pruning | None = None,
        stages: dict[str, Stage] | None = None,
        plan: list[str | dict[str, int]] | None = None,
    ) -> None:
        stages = stages if stages is not None else default_stages()
        plan = plan if plan is not None else DEFAULT_PLAN
        network = ProtoPNetNetwork(
            num_classes,
            backbone,
            prototypes_per_class=prototypes_per_class,
            prototype_classes=prototype_classes,
            prototype_dim=prototype_dim,
            prototype_window=prototype_window,
            add_on=add_on,
            activation=activation,
            out_index=out_index,
            backbone_options=backbone_options,
        )
        super().__init__(network, num_classes, class_names, preprocess, backbone_weights, stages, plan)
        self.save_hyperparameters(logger=False)
        self.class_agnostic = class_agnostic
        self.loss_weights = LossWeights(**loss) if isinstance(loss, dict) else loss or LossWeights()
        self.pruning = Pruning(**pruning) if isinstance(pruning, dict) else pruning or Pruning()
        self.pretrain_head = nn.Linear(network.backbone.channels, num_classes)
        self.prepare_plan()

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) -> logits (B, C)."""
        logits: Tensor = self.network(images).logits
        return logits

    # -- training -----------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        labels = batch["label"]
        features = self.network.backbone(batch["image"])
        if self.stage_name == "pretrain":
            return self.pretraining_step(features, labels)
        head: Head = self.network.head
        output = head(features)
        terms = loss_terms(head, output, labels, self.class_agnostic)
        loss = total_loss(terms, self.loss_weights)
        with torch.no_grad():
            watched = {"pair_distance": pair_distance(head.prototypes.vectors)}
            if not self.class_agnostic:
                class_of = head.prototypes.class_of
                watched["average_separation"] = average_separation(output.distance, labels, class_of)
        logged = {f"train/{name}": term.detach() for name, term in (terms | watched).items()}
        self.log_dict(logged, on_step=False, on_epoch=True)
        self.log("train/loss", loss.detach(), prog_bar=True, on_step=False, on_epoch=True)
        return loss

    # -- pruning --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prune(self, data: DataSource | None = None) -> None:
        """Drops prototypes whose nearest training images are of mixed classes, with their connections (see `Pruning`).

        In a plan it follows a projection, and a last-layer stage follows it; the optimisers start anew. On a trained
        model: `model.prune(data)`. Leaves the module in eval mode.
        """
        head: Head = self.network.head
        nearest = self.nearest_images(data, split="projection", k=self.pruning.neighbours)["part"]
        if nearest.label.shape[1] < self.pruning.neighbours:
            self.say(f"pruning: there are only {nearest.label.shape[1]} images; all of them count as neighbours")
        class_of = head.prototypes.class_of
        kept = kept_prototypes(nearest.label.to(class_of.device), class_of, self.pruning)
        self.say(f"pruning: {len(kept)} of {len(class_of)} prototypes stay")
        if self.pruning.keep_one:
            own = (nearest.label.to(class_of.device) == class_of[:, None]).sum(dim=1)[kept]
            spared = class_of[kept][own < self.pruning.threshold].tolist()
            if spared:
                names = ", ".join(self.class_names[c] for c in spared[:5])
                self.say(f"pruning: {len(spared)} classes keep one prototype that misses the threshold ({names})")
        if self.sources["part"]:
            self.sources["part"] = [self.sources["part"][old] for old in kept.tolist()]
        pictures = self.prototype_pictures
        self.prototype_pictures = {
            f"part.{new}": pictures[f"part.{old}"] for new, old in enumerate(kept.tolist()) if f"part.{old}" in pictures
        }
        head.keep_(kept)
        self.parameters_replaced()

    # -- plain state ----------------------------------------------------------------------------------------------

    def state_values(self) -> dict[str, Any]:
        return {**super().state_values(), "num_prototypes": len(self.network.head.prototypes)}

    def restore_state_values(self, state: dict[str, Any]) -> None:
        super().restore_state_values(state)
        if state["num_prototypes"] != len(self.network.head.prototypes):
            self.network.head.resize_(state["num_prototypes"])


# The authors' run up to epoch 30: projections at the end of epochs 10, 20 and 30, each followed by 20 passes for the
# last layer. It ends with one, so that the prototypes of the result are patches.
DEFAULT_PLAN: list[str | dict[str, int]] = [
    *({"warm": 5}, {"joint": 6}, "project", {"last_layer": 20}),
    *({"joint": 10}, "project", {"last_layer": 20}),
    *({"joint": 10}, "project", {"last_layer": 20}),
]


def default_stages() -> dict[str, Stage]:
    """The authors' optimisers (Adam throughout); the joint rates fall to a tenth after every 5 epochs."""
    heads = {"add_on": Group(3e-3, 1e-3), "prototypes": Group(3e-3)}
    return {
        "warm": Stage(heads),
        "joint": Stage(
            {"backbone": Group(1e-4, 1e-3), **heads}, schedule="milestones", milestones=[5, 10, 15, 20, 25], gamma=0.1
        ),
        "last_layer": Stage({"last_layer": Group(1e-4)}),
    }
