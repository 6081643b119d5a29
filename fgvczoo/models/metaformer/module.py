"""MetaFormer as a LightningModule: metadata masking, mixed batches, evaluation with and without metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fgvczoo.batch import Batch
from fgvczoo.errors import FgvczooError, did_you_mean
from fgvczoo.explain.metadata import MetadataExplanation, explain_metadata
from fgvczoo.models.metaformer.losses import soft_cross_entropy, soft_targets
from fgvczoo.models.metaformer.network import SIZES, MetaFG, Size
from fgvczoo.nn.metadata import MetadataEncoder, MetadataMasking
from fgvczoo.tasks.base import Needs
from fgvczoo.tasks.classification import Box, ClassificationModule, Prediction
from fgvczoo.tasks.mixing import Mixing, drawn_seed, own_share, rank, torch_generator, world_size
from fgvczoo.tasks.stages import Group, Stage

# What keeps the draws of a batch apart.
_MIX, _MASK, _DROP = 11, 12, 13
_AT_ONCE = 64  # sets of metadata in one pass


class MetaFormer(ClassificationModule):
    """MetaFormer (Diao, Jiang, Wen, Sun, Yuan, "MetaFormer: A Unified Meta Framework for Fine-Grained Recognition",
    arXiv 2203.02751, 2022): a hybrid of convolutions and transformers whose attention also reads tokens made of
    metadata.

    Args:
        num_classes: from the data.
        class_names: from the data.
        preprocess: from the data, keyword values of `Preprocess`; height and width are multiples of 32.
        network: "metafg_0", "metafg_1" or "metafg_2".
        metadata: the groups that it reads, in the order of their tokens: {date: month-hour, place: sphere},
            {attributes: 312}, {text: [32, 768]}; see `nn.metadata.MetadataEncoder`. None: vision only.
        conv_widths: channels of the stem and stages 1, 2, in place of the network's.
        conv_depths: blocks of stages 1, 2, in place of the network's.
        attention_widths: channels of stages 3, 4, in place of the network's.
        attention_depths: blocks of stages 3, 4, in place of the network's.
        num_heads: of attention, in place of the network's 8.
        drop_path: rate of the last block.
        only_last_cls: classify by the class token of the last stage alone.
        label_smoothing: share of a target that is spread over all classes.
        mixing: Mixup and CutMix; see `tasks.mixing.Mixing`.
        mix_metadata: metadata of mixed pairs is mixed, too; by default it is the first image's, as the authors have it.
        masking: how much metadata is set to missing in training; see `nn.metadata.MetadataMasking`.
        zero_is_missing: a latitude or longitude of exactly 0 counts as missing, as in the authors' code.
        stages: see `tasks.stages`. Groups: stem, stage_1 to stage_4, metadata (where it reads some), head.
        plan: see `tasks.stages`.
    """

    paper = "metaformer"

    def __init__(
        self,
        num_classes: int,
        class_names: list[str] | None = None,
        preprocess: dict[str, Any] | None = None,
        network: str = "metafg_0",
        metadata: dict[str, str | int | list[int]] | None = None,
        conv_widths: tuple[int, int, int] | None = None,
        conv_depths: tuple[int, int] | None = None,
        attention_widths: tuple[int, int] | None = None,
        attention_depths: tuple[int, int] | None = None,
        num_heads: int | None = None,
        drop_path: float = 0.1,
        only_last_cls: bool = False,
        label_smoothing: float = 0.1,
        mixing: Mixing | None = None,
        mix_metadata: bool = False,
        masking: MetadataMasking | None = None,
        zero_is_missing: bool = False,
        stages: dict[str, Stage] | None = None,
        plan: list[str | dict[str, int]] | None = None,
    ) -> None:
        if network not in SIZES:
            raise FgvczooError(f"network={network!r}; known are {', '.join(SIZES)}{did_you_mean(network, SIZES)}")
        if not 0 <= label_smoothing < 1:
            raise FgvczooError(f"label_smoothing={label_smoothing}; expected a number in [0, 1)")
        named = SIZES[network]
        size = Size(
            conv_widths or named.conv_widths,
            conv_depths or named.conv_depths,
            attention_widths or named.attention_widths,
            attention_depths or named.attention_depths,
            num_heads or named.num_heads,
        )
        stages = stages if stages is not None else default_stages(bool(metadata))
        plan = plan if plan is not None else [{"train": 300}]
        super().__init__(num_classes, class_names, preprocess, None, stages, plan)
        self.save_hyperparameters(logger=False)
        self.encoder = MetadataEncoder(metadata or {}, zero_is_missing)
        self.metadata_groups = self.encoder.names
        keys = {"attributes" if name == "attributes" else "metadata" for name in self.metadata_groups}
        self.needs = Needs(keys=tuple(sorted(keys)))
        self.network = MetaFG(num_classes, size, self.preprocess.size, self.encoder.shapes, drop_path, only_last_cls)
        self.label_smoothing, self.mix_metadata = label_smoothing, mix_metadata
        self.mixing = Mixing(**mixing) if isinstance(mixing, dict) else mixing or Mixing()
        self.masking = MetadataMasking(**masking) if isinstance(masking, dict) else masking or MetadataMasking()
        if self.metadata_groups:
            self.val_masked_metrics, self.test_masked_metrics = (
                self._metrics(f"{split}/without_metadata_") for split in ("val", "test")
            )
        self.prepare_plan()

    def groups(self) -> dict[str, nn.Module]:
        network = self.network
        metadata = {"metadata": network.metadata} if self.metadata_groups else {}
        return {
            "stem": network.stem,
            **{f"stage_{n}": getattr(network, f"stage_{n}") for n in (1, 2, 3, 4)},
            **metadata,
            "head": nn.ModuleList([network.aggregation, network.classifier]),
        }

    def forward(self, images: Tensor, metadata: Sequence[Tensor] | None = None) -> Tensor:
        """(B, 3, H, W) and encoded metadata, (B, k) or (B, t, k) of each group -> logits (B, C). None: all missing."""
        logits: Tensor = self.network(images, metadata)
        return logits

    # -- metadata -------------------------------------------------------------------------------------------------

    def vectors(self, batch: Batch) -> list[Tensor] | None:
        """The encoded groups of a batch; None for a model that reads none."""
        return self.encoder.encode(self._raw(batch), batch.get("metadata_valid")) if self.metadata_groups else None

    def encode(self, metadata: Sequence[Mapping[str, Any] | None]) -> list[Tensor]:
        """The encoded groups of what a person writes of each image, on the model's device."""
        rows = [
            self.encoder.read(given or {}, "metadata" if len(metadata) == 1 else f"metadata of image {number}")
            for number, given in enumerate(metadata, 1)
        ]
        stacked = {name: torch.stack([row[name] for row in rows]) for name in self.metadata_groups}
        return [group.to(self.device) for group in self.encoder.encode(stacked)]

    def prediction_logits(self, images: Tensor, metadata: Sequence[Mapping[str, Any] | None]) -> Tensor:
        return self(images, self.encode(metadata) if self.metadata_groups else None)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if self.metadata_groups:  # here, where its numbers are not yet on another device
            rows = [f"row {index} of the data" for index in batch["index"].tolist()]
            self.encoder.check(self._raw(batch), rows, batch.get("metadata_valid"))
        return batch

    def _raw(self, batch: Batch) -> dict[str, Tensor]:
        known = batch.get("metadata", {})
        return {**known, "attributes": batch["attributes"]} if "attributes" in batch else known

    # -- training and evaluation ----------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, epoch = batch["image"], self.trainer.current_epoch
        total = len(images) * world_size()
        height, width = images.shape[2:]
        mix = self.mixing.draw((height, width), np.random.default_rng(drawn_seed(epoch, batch_idx, _MIX)))
        targets = mix.targets(soft_targets(batch["label"], self.num_classes, self.label_smoothing))
        vectors = self.vectors(batch)
        if vectors is not None:
            masked = self._masked_rows(len(images), epoch, batch_idx).to(images.device)
            vectors = [group.masked_fill(masked.view(-1, *[1] * (group.ndim - 1)), 0) for group in vectors]
            if self.mix_metadata:
                vectors = [mix.targets(group) for group in vectors]
        generator = torch_generator(drawn_seed(epoch, batch_idx, _DROP))
        draws = own_share(torch.rand(self.network.branches, total, generator=generator), dim=1)
        loss = soft_cross_entropy(self.network(mix.images(images), vectors, draws), targets)
        self.log("train/loss", loss.detach(), prog_bar=True, on_step=False, on_epoch=True)
        return loss

    def _masked_rows(self, count: int, epoch: int, batch_idx: int) -> Tensor:
        progress, seed = epoch / self.plan.epochs, drawn_seed(epoch, batch_idx, _MASK)
        if self.masking.per_process:
            return self.masking.rows(count, progress, torch_generator((*seed, rank())))
        return own_share(self.masking.rows(count * world_size(), progress, torch_generator(seed)))

    def evaluation_logits(self, batch: Batch) -> Tensor:
        return self(batch["image"], self.vectors(batch))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if self.metadata_groups:
            self.val_masked_metrics.update(self(batch["image"]), batch["label"])
            self.log_dict(self.val_masked_metrics, batch_size=len(batch["label"]))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        super().test_step(batch, batch_idx)
        if self.metadata_groups:
            self.test_masked_metrics.update(self(batch["image"]), batch["label"])
            self.log_dict(self.test_masked_metrics, batch_size=len(batch["label"]))

    def predict_step(self, batch: Batch, batch_idx: int) -> list[Prediction]:
        scores = self.evaluation_logits(batch).softmax(dim=1)
        return self._predictions(scores, top=5, sources=[None] * len(scores))

    # -- explanation ----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def scores_given(self, image: Tensor, raw: Mapping[str, Tensor]) -> Tensor:
        """Class probabilities (M, C) of one preprocessed image (3, H, W) under M sets of raw metadata values, on the
        CPU. The convolutions, which read none, run once."""
        was_training = self.training
        self.eval()
        try:
            first, second = self.network.convolutions(image[None].to(self.device))
            groups = [group.to(self.device) for group in self.encoder.encode(raw)]
            scores = []
            for parts in zip(*(group.split(_AT_ONCE) for group in groups)):
                one, two = (part.expand(len(parts[0]), -1, -1, -1) for part in (first, second))
                scores.append(self.network.fuse(one, two, parts).logits.softmax(dim=1).float().cpu())
        finally:
            self.train(was_training)
        return torch.cat(scores)

    def explain(
        self,
        image: Any,
        *,
        target: int | str | None = None,
        top: int = 6,
        box: Box | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> MetadataExplanation:
        """What metadata changed: the best classes with it, without it, and without each of its groups; where a model
        reads place or date, also how the class's probability depends on them.

        image, box, metadata: as `predict` takes them. target: class index or name to explain; None: the predicted one.
        top: how many classes are compared.
        """
        return explain_metadata(self, image, target=target, top=top, box=box, metadata=metadata)


def default_stages(metadata: bool) -> dict[str, Stage]:
    """The authors' settings for fine-tuning on CUB-200-2011: AdamW, rates for a total batch of 512."""
    names = ("stem", "stage_1", "stage_2", "stage_3", "stage_4", *(("metadata",) if metadata else ()), "head")
    return {
        "train": Stage(
            {name: Group(5e-5, 0.05, decay="matrices") for name in names},
            optimizer="AdamW",
            schedule="cosine-updates",
            warmup=20,
            warmup_from=1e-3,
            minimum=1e-2,
            base_batch=512,
        )
    }
