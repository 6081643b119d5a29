"""ProtoTree as a LightningModule: stages, the leaves' counts, pruning, projection, evaluation, explanation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fgvczoo.batch import Batch
from fgvczoo.errors import FgvczooError
from fgvczoo.explain.tree import TreeExplanation, WholeTree, explain_image, explain_tree
from fgvczoo.metrics.routing import RoutingScores
from fgvczoo.models.prototree.network import Normalization, Output, ProtoTreeNetwork, Routing, TreeHead
from fgvczoo.models.prototree.tree import Tree
from fgvczoo.nn.backbones import split_trunk
from fgvczoo.nn.prototypes import Projector, patch_boxes, sum_ranks
from fgvczoo.tasks.base import DataSource
from fgvczoo.tasks.classification import Box
from fgvczoo.tasks.prototypes import ProjectedClassifier
from fgvczoo.tasks.stages import Group, Stage

ROUTINGS: tuple[Routing, ...] = ("distributed", "sample_max", "greedy")


class ProtoTree(ProjectedClassifier):
    """Neural prototype tree (Nauta, van Bree, Seifert, "Neural Prototype Trees for Interpretable Fine-grained Image
    Recognition", CVPR 2021).

    Args:
        num_classes, class_names, preprocess: from the data; preprocess as keyword values of `Preprocess`.
        backbone, out_index, backbone_options: the trunk, as `nn.backbones.Backbone` takes them.
        backbone_weights: timm tag or file, loaded at the start of a fresh fit; None: random.
        height, branches, prototype_dim, leaf_normalization: see `ProtoTreeNetwork`.
        last_block: an inner module of the trunk ("layer4.2") that is a group of its own; None: there is no such group.
        leaf_gain: what each step's evidence for the leaves is multiplied by. The authors' log mode has e, by a mistake.
        leaf_passes: 0: the leaves learn in every step. n: they are set n times from the un-augmented training images
            before each epoch instead, in eval mode, and fixed in it.
        routing: by which `forward` classifies: "distributed" (over all leaves), "sample_max" or "greedy" (one leaf, see
            `TreeHead.leaf`). The attribute may be set at any time.
        pruning_threshold: a leaf whose classes all have at most this probability is flat; None: see
            `default_threshold`.
        class_agnostic: projection searches images of all classes, not only of those of the leaves under the branch.
        stages, plan: see `tasks.stages`. Groups: backbone, last_block, add_on, prototypes, leaves, pretrain_head.
            Actions: prune, project, evaluate. Where a stage names the group leaves, gradients train them instead of
            counts. The stage called "pretrain" trains the trunk with a linear head by cross entropy.
    """

    paper = "prototree"
    actions = {**ProjectedClassifier.actions, "prune": "prune", "evaluate": "evaluate"}

    def __init__(
        self,
        num_classes: int,
        class_names: list[str] | None = None,
        preprocess: dict[str, Any] | None = None,
        backbone: str = "resnet50",
        backbone_weights: str | None = None,
        out_index: int | None = None,
        backbone_options: dict[str, Any] | None = None,
        height: int = 9,
        branches: list[list[int]] | None = None,
        prototype_dim: int = 256,
        last_block: str | None = None,
        leaf_normalization: Normalization = "softmax",
        leaf_gain: float = 1.0,
        leaf_passes: int = 0,
        routing: Routing = "distributed",
        pruning_threshold: float | None = None,
        class_agnostic: bool = False,
        stages: dict[str, Stage] | None = None,
        plan: list[str | dict[str, int]] | None = None,
    ) -> None:
        network = ProtoTreeNetwork(
            num_classes,
            backbone,
            height=height,
            branches=branches,
            prototype_dim=prototype_dim,
            leaf_normalization=leaf_normalization,
            out_index=out_index,
            backbone_options=backbone_options,
        )
        stages = stages if stages is not None else default_stages(last_block)
        plan = plan if plan is not None else DEFAULT_PLAN
        super().__init__(network, num_classes, class_names, preprocess, backbone_weights, stages, plan)
        self.save_hyperparameters(logger=False)
        if routing not in ROUTINGS:
            raise FgvczooError(f"routing={routing!r}; expected {', '.join(ROUTINGS)}")
        if not leaf_gain > 0 or leaf_passes < 0:
            raise FgvczooError(f"leaf_gain={leaf_gain}, leaf_passes={leaf_passes}; expected above 0, and at least 0")
        threshold = default_threshold(num_classes) if pruning_threshold is None else pruning_threshold
        if not 0 < threshold < 1:
            raise FgvczooError(f"pruning_threshold={threshold}; expected a probability between 0 and 1")
        self.last_block, self.routing, self.class_agnostic = last_block, routing, class_agnostic
        self.leaf_gain, self.leaf_passes, self.pruning_threshold = leaf_gain, leaf_passes, threshold
        self.pretrain_head = nn.Linear(network.backbone.channels, num_classes)
        self.routing_scores = RoutingScores()
        self.is_pruned = branches is not None
        self._counts_before: Tensor | None = None  # when the epoch began
        self._evidence: Tensor | None = None  # of the forwards since the last step of the optimiser
        self.prepare_plan()
        if any("leaves" in self.plan.stages[name].groups for name in self.plan.used):
            if leaf_normalization == "counts":
                raise FgvczooError("leaf_normalization=counts: gradients would make counts negative; take softmax")
            nn.init.normal_(network.head.leaves.counts)

    def groups(self) -> dict[str, nn.Module]:
        head: TreeHead = self.network.head
        trunk: dict[str, nn.Module] = {"backbone": self.network.backbone}
        if self.last_block is not None:
            trunk["backbone"], trunk["last_block"] = split_trunk(self.network.backbone, self.last_block)
        return {
            **trunk,
            "add_on": head.add_on,
            "prototypes": head.prototypes,
            "leaves": head.leaves,
            "pretrain_head": self.pretrain_head,
        }

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) -> log-probabilities (B, K), by the routing of this model."""
        head: TreeHead = self.network.head
        return head.logits(self.network(images), self.routing)

    # -- training -----------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        super().on_train_start()
        leaves = len(self.network.head.tree.leaves)
        if leaves < self.num_classes and not self.is_pruned:
            self.say(
                f"{leaves} leaves for {self.num_classes} classes: some will be the likeliest of none; raise height"
            )
        if self._counts_before is not None:  # of a checkpoint
            self._counts_before = self._counts_before.to(self.device)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        if batch_idx == 0:  # not so in a run resumed within an epoch, whose checkpoint has them
            if self.leaf_passes and self._counting():
                self._count_anew()
            self._counts_before = self.network.head.leaves.counts.detach().clone()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        labels = batch["label"]
        features = self.network.backbone(batch["image"])
        if self.stage_name == "pretrain":
            return self.pretraining_step(features, labels)
        head: TreeHead = self.network.head
        _, reach = head.route(head.features(features))
        joint = head.leaves.joint(reach, labels)
        loss = -joint.logsumexp(dim=1).mean()
        if self._counting() and not self.leaf_passes:
            evidence = head.leaves.evidence(joint.detach(), labels)
            self._evidence = evidence if self._evidence is None else self._evidence.to(evidence) + evidence
        self.log("train/loss", loss.detach(), prog_bar=True, on_step=False, on_epoch=True)
        return loss

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self._evidence is None:
            return
        # Counts are sums over the images of a step, however they are split over forwards and processes. They come from
        # the outputs before the step, as in the authors' code.
        evidence, self._evidence = sum_ranks(self._evidence), None
        assert self._counts_before is not None
        self.network.head.leaves.update_(self.leaf_gain * evidence, self._counts_before, self._steps_per_epoch())

    def on_train_epoch_end(self) -> None:
        if self._counting() and self._counts_before is not None:
            now, before = (counts.argmax(dim=1) for counts in (self.network.head.leaves.counts, self._counts_before))
            self.log("train/leaf_labels_changed", (now != before).float().mean())
        super().on_train_epoch_end()

    def _counting(self) -> bool:
        """Whether this stage's leaves learn from counts."""
        return self.stage_name != "pretrain" and "leaves" not in self.plan.stages[self.stage_name].groups

    def _steps_per_epoch(self) -> int:
        batches = self.trainer.num_training_batches
        if math.isinf(batches):
            raise FgvczooError(
                "prototree forgets a share of its counts in each step of an epoch, and this data does not say how long "
                "an epoch is; give --trainer.limit_train_batches"
            )
        return math.ceil(batches / self.trainer.accumulate_grad_batches)

    @torch.no_grad()
    def _count_anew(self) -> None:
        """Sets the counts from all training images, `leaf_passes` times; nothing else changes, so one pass will do."""
        leaves = self.network.head.leaves
        modes = {module: module.training for module in self.modules()}
        self.eval()
        data, reach, labels = self._data(None), [], []
        for batch in self._batches(data, "train_plain", "counting"):
            reach.append(self.network(batch["image"].to(self.device)).reach)
            labels.append(batch["label"].to(self.device))
        for module, mode in modes.items():
            module.training = mode
        for _ in range(self.leaf_passes):
            parts = [leaves.evidence(leaves.joint(rows, own), own) for rows, own in zip(reach, labels)]
            counted = torch.stack(parts).sum(0) if parts else torch.zeros_like(leaves.counts)
            leaves.counts.copy_(self.leaf_gain * sum_ranks(counted))

    # -- pruning and projection -----------------------------------------------------------------------------------

    @torch.no_grad()
    def prune(self, data: DataSource | None = None) -> None:
        """Drops subtrees that say nothing, and the questions that led to them (see `TreeHead.prune_`).

        In a plan it comes before the projection, as in the paper; the optimisers start anew. `data` is not read.
        """
        head: TreeHead = self.network.head
        before, classes = len(head.tree), self.num_classes
        likeliest = head.leaves.log_distribution().amax(dim=1).exp()
        sharp = int((likeliest > self.pruning_threshold).sum())
        kept = head.prune_(self.pruning_threshold).tolist()
        self.is_pruned = True
        if self.sources["tree"]:
            self.sources["tree"] = [self.sources["tree"][old] for old in kept]
        pictures = self.prototype_pictures
        self.prototype_pictures = {
            f"tree.{new}": pictures[f"tree.{old}"] for new, old in enumerate(kept) if f"tree.{old}" in pictures
        }
        self.say(
            f"pruning: {sharp} of {before + 1} leaves have a class above {self.pruning_threshold:.3g}; {len(kept)} of "
            f"{before} prototypes and {len(kept) + 1} leaves stay"
        )
        if not sharp:
            self.say("pruning: all leaves are flat; train longer, or lower pruning_threshold")
        without = classes - len(torch.unique(head.leaves.counts.argmax(dim=1)))
        if without:
            self.say(f"pruning: {without} of {classes} classes are the likeliest one of no leaf")
        self.parameters_replaced()

    def _projector(self, head: TreeHead) -> Projector:
        return Projector(head.classes_below(), any_class=self.class_agnostic)

    def _report(self, name: str, projector: Projector) -> None:
        tree: Tree = self.network.head.tree
        missing = [tree.branches[row] for row in torch.nonzero(~projector.found).flatten().tolist()]
        if missing:
            nodes = ", ".join(str(node) for node in missing[:5])
            self.say(f"projection: no image of the classes below {len(missing)} nodes ({nodes}); their prototypes stay")
        distance = -projector.value[projector.found].double().log()
        if len(distance):
            spread = float(distance.std(correction=0))
            self.say(f"projection: distances to the nearest patch were {float(distance.mean()):.4f} +- {spread:.4f}")
        super()._report(name, projector)

    def boxes_of(self, maps: Tensor) -> np.ndarray:
        """The patches where maps (N, H, W) are largest, as regions of the preprocessed image (see `patch_boxes`)."""
        grid = maps.shape[1], maps.shape[2]
        return patch_boxes(maps.flatten(1).argmax(dim=1), grid, self.preprocess.size)

    # -- evaluation -------------------------------------------------------------------------------------------------

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        output = self.network(batch["image"])
        self.test_metrics.update(self.network.head.logits(output, self.routing), batch["label"])
        self.log_dict(self.test_metrics, batch_size=len(batch["label"]))
        self._score(self.routing_scores, output, batch["label"])

    def on_test_epoch_end(self) -> None:
        scores = {f"test/{name}": value for name, value in self.routing_scores.compute().items() if name != "top1"}
        self.routing_scores.reset()
        self.log_dict({**scores, "test/prototypes": float(len(self.network.head.tree))})

    @torch.no_grad()
    def evaluate(self, data: DataSource | None = None, *, split: str = "test") -> dict[str, float]:
        """The scores of `RoutingScores` on a split, of the tree as it is now. In a plan it says what pruning and
        projection cost: it logs test/top1_trained, _pruned or _projected. Leaves the module in eval mode."""
        data = self._data(data)
        self.eval()
        scores = RoutingScores().to(self.device)
        for batch in self._batches(data, split, "evaluating"):
            self._score(scores, self.network(batch["image"].to(self.device)), batch["label"].to(self.device))
        values = {name: float(value) for name, value in scores.compute().items()}
        head: TreeHead = self.network.head
        state = "projected" if self.prototypes_are_patches else "pruned" if self.is_pruned else "trained"
        self.say(f"{state}: {len(head.tree)} prototypes, {split} top-1 {values['top1']:.4f}")
        if self._trainer is not None and self._trainer.training:
            self.log(f"{split}/top1_{state}", values["top1"], rank_zero_only=True)
        return values

    def _score(self, scores: RoutingScores, output: Output, labels: Tensor) -> None:
        head: TreeHead = self.network.head
        lengths = [head.tree.depth[leaf] for leaf in head.tree.leaves]
        depth = torch.tensor(lengths, device=labels.device)
        scores.update(
            labels,
            {routing: head.logits(output, routing) for routing in ROUTINGS},
            {routing: depth[head.leaf(output, routing)] for routing in ROUTINGS[1:]},
        )

    # -- plain state ----------------------------------------------------------------------------------------------

    def state_values(self) -> dict[str, Any]:
        return {
            **super().state_values(),
            "is_pruned": self.is_pruned,
            "branches": self.network.head.tree.to_list() if self.is_pruned else None,
        }

    def restore_state_values(self, state: dict[str, Any]) -> None:
        super().restore_state_values(state)
        self.is_pruned = bool(state["is_pruned"])
        height, branches = self.network.height, state["branches"]
        tree = Tree.complete(height) if branches is None else Tree.of(branches, height)
        if tree != self.network.head.tree:
            self.network.head.reshape_(tree)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["prototree"] = {"counts_before": self._counts_before, "evidence": self._evidence}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._counts_before, self._evidence = (checkpoint["prototree"][key] for key in ("counts_before", "evidence"))

    # -- explanation --------------------------------------------------------------------------------------------

    def explain(
        self, image: Any, *, target: int | str | None = None, top: int = 5, box: Box | None = None
    ) -> TreeExplanation:
        """Which questions decide an image: the greedy path through the tree, with the patch that answers each.

        image, box: as `predict` takes them. target: a class, by index or name: the path to the leaf that speaks most
        for it, instead. top: how many classes of a leaf are listed.
        """
        return explain_image(self, image, target=target, top=top, box=box)

    def explain_model(self, *, top: int = 5) -> WholeTree:
        """The whole tree. top: how many classes of a leaf are listed."""
        return explain_tree(self, top=top)


def default_threshold(num_classes: int) -> float:
    """Twice the probability of a class in a uniform leaf, at least the paper's 0.01, which that is for 200 classes; for
    two or three classes halfway between uniform and certain."""
    return max(0.01, min(2 / num_classes, (1 + 1 / num_classes) / 2))


# The authors' 100 epochs on CUB-200-2011.
DEFAULT_PLAN: list[str | dict[str, int]] = [{"frozen": 30}, {"joint": 70}, "prune", "project"]


def default_stages(last_block: str | None) -> dict[str, Stage]:
    """The authors' optimiser and rates: first the head and the trunk's last block, then everything; the rates halve
    after 60, 70, 80 and 90 epochs of all."""
    groups = {name: Group(1e-3) for name in ("add_on", "prototypes")}
    if last_block is not None:
        groups["last_block"] = Group(1e-3)
    options = {"eps": 1e-7}
    return {
        "frozen": Stage(groups, "AdamW", options),
        "joint": Stage(
            {"backbone": Group(1e-5), **groups},
            "AdamW",
            options,
            schedule="milestones",
            milestones=[30, 40, 50, 60],
            gamma=0.5,
        ),
    }
