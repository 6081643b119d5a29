"""DM2 as a module: a cohort that teaches itself, diverse on purpose."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from fgvczoo.batch import Batch
from fgvczoo.errors import FgvczooError
from fgvczoo.explain.contact_sheet import ContactSheet, Gallery, explain_retrieval
from fgvczoo.metrics.retrieval import KS, mean_over_queries
from fgvczoo.models.dm2.losses import cohort_losses
from fgvczoo.models.dm2.network import Cohort
from fgvczoo.models.dm2.relations import mutual_losses
from fgvczoo.models.dm2.updates import MODES, GradientAccumulator, follow
from fgvczoo.nn.embeddings import gather_batch
from fgvczoo.nn.triplets import sample_triplets, step_generator
from fgvczoo.tasks.classification import Box
from fgvczoo.tasks.retrieval import RetrievalModule
from fgvczoo.tasks.stages import Group, Stage

# Steps in a row in which a member may be without finite embeddings before training stops.
LOST_STEPS = 10


class DM2(RetrievalModule):
    """Diversified mutual metric learning (Park, Kim et al., ECCV 2020 workshops), reconstructed: the paper's equations
    and settings could not be read; relational losses and the frame are those of the first author's RKD.

    K embedding networks learn from labels (a triplet loss) and from the relations that their peers see among the items
    of the batch. Model diversity: each head has its own start, and each member may have its own backbone. Temporal
    diversity: members update at different frequencies. View diversity: each member sees its own augmentation.

    Args:
        num_classes, class_names, preprocess: from the data; preprocess as keyword values of `Preprocess`.
        backbones: one for each member: K is their number.
        out_index, backbone_options: of every trunk, as `nn.backbones.Backbone` takes them.
        backbone_weights: timm tag or file, loaded into every trunk at the start of a fresh fit; None: random.
        embedding_dim: D of every member.
        intervals: T_i, member i updates every T_i-th step; None: 1, 2, 1, 2, ... At least one is 1.
        update_mode: what a slower member does with the gradients in between, see `updates.GradientAccumulator`; or
            "ema": members whose interval is above 1 follow member 0 with decay `ema_decay`, without gradients.
        model_diversity: heads start apart, and trunks where they start from random weights; False: all alike.
        view_diversity: member i sees `batch["views"][i]`; False: all see the image.
        margin, sampler: of the triplet loss, see `nn.triplets.sample_triplets`.
        distance_weight, angle_weight: w_D and w_A. ramp_epochs: over which they grow from 0: untrained peers teach
            noise.
        relation_on: "unit" embeddings, or "raw" outputs.
        head_seed: of the members' heads.
        ks, clustering, frozen_batch_norm: see `RetrievalModule`.
        stages, plan: see `tasks.stages`. Groups: backbones, heads.
    """

    paper = "dm2"

    def __init__(
        self,
        num_classes: int,
        class_names: list[str] | None = None,
        preprocess: dict[str, Any] | None = None,
        backbones: Sequence[str] = ("resnet50", "resnet50"),
        backbone_weights: str | None = None,
        out_index: int | None = None,
        backbone_options: dict[str, Any] | None = None,
        embedding_dim: int = 512,
        intervals: Sequence[int] | None = None,
        update_mode: str = "accumulate_mean",
        ema_decay: float = 0.999,
        model_diversity: bool = True,
        view_diversity: bool = False,
        margin: float = 0.2,
        sampler: str = "distance_weighted",
        distance_weight: float = 1.0,
        angle_weight: float = 2.0,
        ramp_epochs: int = 5,
        relation_on: str = "unit",
        head_seed: int = 0,
        ks: Sequence[int] = KS,
        clustering: bool = False,
        frozen_batch_norm: bool = False,
        stages: dict[str, Stage] | None = None,
        plan: list[str | dict[str, int]] | None = None,
    ) -> None:
        if stages is None:
            both = {"backbones": Group(5e-5, 1e-5), "heads": Group(5e-5, 1e-5)}
            stages = {"joint": Stage(both, schedule="milestones", milestones=[40, 60])}
        plan = plan if plan is not None else [{"joint": 80}]
        super().__init__(
            *(num_classes, class_names, preprocess, backbone_weights, stages, plan),
            ks=ks,
            clustering=clustering,
            frozen_batch_norm=frozen_batch_norm,
        )
        self.save_hyperparameters(logger=False)
        count = len(backbones)
        self.intervals = tuple(intervals) if intervals is not None else tuple(1 + i % 2 for i in range(count))
        if len(self.intervals) != count:
            raise FgvczooError(f"intervals={list(self.intervals)}: {count} members need one each")
        if update_mode not in MODES:
            raise FgvczooError(f"update_mode={update_mode!r}; expected {', '.join(MODES)}")
        if update_mode == "ema" and (self.intervals[0] != 1 or len(set(backbones)) > 1):
            raise FgvczooError("update_mode='ema': the members follow member 0, of interval 1 and equal architecture")
        if relation_on not in ("unit", "raw"):
            raise FgvczooError(f"relation_on={relation_on!r}; expected 'unit' or 'raw'")
        self.network = Cohort(
            backbones,
            [embedding_dim] * count,
            out_index=out_index,
            backbone_options=backbone_options,
            head_seed=head_seed,
        )
        if not model_diversity:
            first, *others = self.network
            if len(set(backbones)) > 1:
                raise FgvczooError("model_diversity: false needs one architecture; give equal backbones")
            for member in others:
                member.load_state_dict(first.state_dict())
        self.update_mode, self.ema_decay = update_mode, ema_decay
        self.view_diversity, self.margin, self.sampler = view_diversity, margin, sampler
        self.distance_weight, self.angle_weight = distance_weight, angle_weight
        self.ramp_epochs, self.relation_on = ramp_epochs, relation_on
        mode = "skip" if update_mode == "ema" else update_mode
        self.accumulator = GradientAccumulator(self.intervals, mode)
        self._lost = [0] * count
        self.prepare_plan()

    def groups(self) -> dict[str, nn.Module]:
        return {
            "backbones": nn.ModuleList(member.backbone for member in self.network),
            "heads": nn.ModuleList(member.head for member in self.network),
        }

    def forward(self, images: Tensor, member: int | None = None) -> Tensor:
        """(B, 3, h, w) -> the ensemble's embeddings (B, K D), or one member's (B, D); rows of unit length."""
        return self.network(images, member)

    # -- training -----------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.trainer.accumulate_grad_batches != 1:
            raise FgvczooError(
                f"accumulate_grad_batches={self.trainer.accumulate_grad_batches}: DM2 accumulates "
                "by its own intervals, leave it at 1"
            )
        if len(self.network) == 1 and (self.distance_weight or self.angle_weight):
            raise FgvczooError(
                "mutual learning needs at least two members; name more backbones, or set distance_weight and "
                "angle_weight to 0"
            )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        count = len(self.network)
        views = self._views(batch)
        raw = [gather_batch(output.float()) for output in self.network.raw(views)]
        labels = gather_batch(batch["label"])
        alive = self._alive(raw)
        raw = [output if number in alive else torch.zeros_like(output) for number, output in enumerate(raw)]
        unit = [F.normalize(output, dim=1) for output in raw]
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        triplets = [
            sample_triplets(
                self.sampler, e, labels, generator=step_generator(seed, self.trainer.global_step * count + number)
            )
            for number, e in enumerate(unit)
        ]
        relations = unit if self.relation_on == "unit" else raw
        losses = cohort_losses(
            [unit[number] for number in alive],
            [triplets[number] for number in alive],
            margin=self.margin,
            relation_on=[relations[number] for number in alive],
        )
        ramp = min(1.0, self.trainer.current_epoch / self.ramp_epochs) if self.ramp_epochs else 1.0
        total = losses.total(ramp * self.distance_weight, ramp * self.angle_weight).sum()
        for name, value in (("triplet", losses.triplet), ("distance", losses.distance), ("angle", losses.angle)):
            self.log(f"train/{name}_loss", value.detach().mean(), prog_bar=True, on_step=False, on_epoch=True)
        return total

    def _views(self, batch: Batch) -> list[Tensor]:
        count = len(self.network)
        if not self.view_diversity:
            return [batch["image"]] * count
        views = batch.get("views")
        if views is None or len(views) != count:
            given = "none" if views is None else str(len(views))
            raise FgvczooError(
                f"view_diversity needs a view for each of {count} members, the batch has {given}; give "
                "data.view_augmentations that many, or set view_diversity: false"
            )
        return views

    def _alive(self, raw: Sequence[Tensor]) -> list[int]:
        """The members with finite outputs. One that has none takes no part in the step, nor teaches others."""
        alive = []
        for number, output in enumerate(raw):
            fine = bool(output.detach().isfinite().all())
            self._lost[number] = 0 if fine else self._lost[number] + 1
            if fine:
                alive.append(number)
            if self._lost[number] >= LOST_STEPS:
                raise FgvczooError(
                    f"training diverged: member {number} had no finite embeddings in {LOST_STEPS} steps; lower the "
                    "learning rate"
                )
        if len(alive) < len(raw):
            self.log("train/lost_members", float(len(raw) - len(alive)), on_step=False, on_epoch=True)
        if not alive:
            raise FgvczooError("training diverged: no member has finite embeddings; lower the learning rate")
        return alive

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        members = [list(member.parameters()) for member in self.network]
        self.accumulator.apply(self.trainer.global_step + 1, members)
        for number, interval in enumerate(self.intervals):
            follows = self.update_mode == "ema" and interval > 1
            if follows or self._lost[number]:
                for parameter in members[number]:
                    parameter.grad = None

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.update_mode == "ema":
            leader, *others = self.network
            for member, interval in zip(others, self.intervals[1:]):
                if interval > 1:
                    follow(member, leader, self.ema_decay)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["fgvczoo"]["accumulated"] = self.accumulator.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.accumulator.restore(checkpoint["fgvczoo"].get("accumulated", []) or self.accumulator.state(), self.device)

    # -- evaluation ---------------------------------------------------------------------------------------------

    def named_embeddings(self, embeddings: Tensor) -> dict[str, Tensor]:
        """The ensemble's embeddings (B, K D), and within them those of each member."""
        count = len(self.network)
        if count == 1:
            return {"": embeddings}
        parts = embeddings.split([member.dim for member in self.network], dim=1)
        return {"": embeddings} | {f"member{number}": part * count**0.5 for number, part in enumerate(parts)}

    def further_scores(self) -> dict[str, Tensor]:
        """Recall@K of the mean and the best member, how much members differ in relations, and the share of queries on
        which exactly one is right."""
        members = [metric.evaluated for name, metric in self.metrics.items() if name]
        if not members:
            return {}
        scores: dict[str, Tensor] = {}
        for key in (f"recall_at_{k}" for k in self.ks):
            each = torch.stack([mean_over_queries(member.values[key], member.counts) for member in members])
            scores |= {f"member_mean_{key}": each.mean(), f"member_best_{key}": each.max()}
        right = torch.stack([member.values[f"recall_at_{self.ks[0]}"] for member in members])
        scores["one_member_right"] = (right.sum(0) == 1).double().mean()
        distance, angle = mutual_losses([member.embeddings[:256] for member in members])  # some items tell
        return scores | {"relation_distance": distance.mean(), "relation_angle": angle.mean()}

    # -- explanation --------------------------------------------------------------------------------------------

    def explain(
        self, image: Any, gallery: Gallery, *, top: int = 10, box: Box | None = None, label: str | None = None
    ) -> ContactSheet:
        """What is nearest to an image in a gallery, by the ensemble and by each member.

        image, box: as `predict` takes them. label: its class, where known, to mark what is right.
        """
        (sheet,) = explain_retrieval(self, [image], gallery, top=top, boxes=[box], labels=[label])
        return sheet
