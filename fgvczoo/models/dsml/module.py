"""DSML as a module: an embedding network under a structure and a distance."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fgvczoo.batch import Batch
from fgvczoo.errors import FgvczooError, FgvczooWarning, did_you_mean
from fgvczoo.explain.contact_sheet import ContactSheet, Gallery, explain_retrieval
from fgvczoo.metrics.retrieval import KS, RetrievalMetrics
from fgvczoo.metrics.retrieval_hashing import HashingMetrics
from fgvczoo.metrics.retrieval_search import codes
from fgvczoo.models.dsml import losses as L
from fgvczoo.models.dsml.distance import SMALLEST_VARIANCE, snr_distance
from fgvczoo.nn.embeddings import EmbeddingNetwork, euclidean_distances, gather_batch
from fgvczoo.nn.triplets import SAMPLERS, positive_pairs, sample_triplets, step_generator
from fgvczoo.progress import progress
from fgvczoo.tasks.base import DataSource
from fgvczoo.tasks.classification import Box
from fgvczoo.tasks.retrieval import RetrievalModule, standard_loss, standard_miner
from fgvczoo.tasks.stages import Group, Stage

STRUCTURES = ("contrastive", "triplet", "lifted", "n_pair", "hashing")
DISTANCES = ("snr", "euclidean")


class DSML(RetrievalModule):
    """Deep metric learning by the signal-to-noise ratio (Yuan et al., CVPR 2019).

    Args:
        num_classes, class_names, preprocess: from the data; preprocess as keyword values of `Preprocess`.
        backbone, out_index, backbone_options: the trunk, as `nn.backbones.Backbone` takes them.
        backbone_weights: timm tag or file, loaded at the start of a fresh fit; None: random.
        embedding_dim: M; of codes, their bits.
        normalize_output: `forward` gives rows of unit length.
        distance: "snr", or "euclidean", its twin.
        normalize: rows of unit length before the distance, which the paper does not do.
        structure: "contrastive", "triplet", "lifted", "n_pair", "hashing" (triplet, and `quantization_weight` times the
            quantisation), or the name of a loss of pytorch-metric-learning, with `structure_options`.
        margin: None: 0.2 for triplets and hashing, 1 otherwise. positive_margin: of the contrastive structure.
        similarity: of "n_pair": "snr" or "negative_distance".
        sampler: of the triplets: "all", or a name of `nn.triplets.sample_triplets`; for a loss of that library, None or
            the name of one of its miners, with `sampler_options`. Distance-weighted sampling takes place in Euclidean
            distances of unit rows, whatever the loss's distance.
        regulariser_weight: of the zero-mean regulariser. reduction: "mean_nonzero" or "mean".
        eval_distance, ks, clustering, frozen_batch_norm: see `RetrievalModule`. With "hamming" and data that have a
            "gallery" split, `test` gives the numbers of `HashingMetrics` for the queries in it. map_at: their k.
        stages, plan: see `tasks.stages`. Groups: backbone, head, and loss where the loss has parameters.
    """

    paper = "dsml"

    def __init__(
        self,
        num_classes: int,
        class_names: list[str] | None = None,
        preprocess: dict[str, Any] | None = None,
        backbone: str = "resnet50",
        backbone_weights: str | None = None,
        out_index: int | None = None,
        backbone_options: dict[str, Any] | None = None,
        embedding_dim: int = 512,
        normalize_output: bool = False,
        distance: str = "snr",
        normalize: bool = False,
        structure: str = "triplet",
        structure_options: dict[str, Any] | None = None,
        margin: float | None = None,
        positive_margin: float = 0.0,
        similarity: str = "snr",
        sampler: str | None = "all",
        sampler_options: dict[str, Any] | None = None,
        regulariser_weight: float = 0.005,
        quantization_weight: float = 0.1,
        reduction: str = "mean_nonzero",
        eval_distance: str = "euclidean",
        ks: Sequence[int] = KS,
        clustering: bool = False,
        map_at: int | None = None,
        frozen_batch_norm: bool = False,
        stages: dict[str, Stage] | None = None,
        plan: list[str | dict[str, int]] | None = None,
    ) -> None:
        if stages is None:
            stages = {"train": Stage({"backbone": Group(1e-5, 4e-4), "head": Group(1e-5, 4e-4)})}
        plan = plan if plan is not None else [{"train": 150}]
        super().__init__(
            *(num_classes, class_names, preprocess, backbone_weights, stages, plan),
            eval_distance=eval_distance,
            ks=ks,
            clustering=clustering,
            frozen_batch_norm=frozen_batch_norm,
        )
        self.save_hyperparameters(logger=False)
        self.network = EmbeddingNetwork(
            backbone,
            embedding_dim,
            out_index=out_index,
            backbone_options=backbone_options,
            normalize=normalize_output,
        )
        if distance not in DISTANCES:
            raise FgvczooError(f"distance={distance!r}; expected {' or '.join(DISTANCES)}")
        self.distance, self.normalize = distance, normalize
        self.structure, self.reduction = structure, reduction
        own = structure in ("triplet", "hashing")
        self.margin = margin if margin is not None else 0.2 if own else 1.0
        self.positive_margin, self.similarity = positive_margin, similarity
        self.sampler, self.sampler_options = sampler, dict(sampler_options or {})
        self.regulariser_weight, self.quantization_weight = regulariser_weight, quantization_weight
        self.loss: nn.Module | None = None
        self.miner: nn.Module | None = None
        if structure not in STRUCTURES:
            self._standard(structure, structure_options)
        elif own and sampler not in SAMPLERS:
            raise FgvczooError(
                f"sampler={sampler!r}; expected {', '.join(SAMPLERS)}{did_you_mean(str(sampler), SAMPLERS)}"
            )
        L.reduce(torch.zeros(0), reduction)
        L.similarity(torch.ones(1), similarity)
        self.hashing = HashingMetrics(map_at)
        self._empty_batches = 0
        self.prepare_plan()

    def _standard(self, name: str, options: dict[str, Any] | None) -> None:
        """The loss and miner of pytorch-metric-learning."""
        from pytorch_metric_learning.distances import LpDistance

        from fgvczoo.models.dsml.pml import SNRDistance

        if not name[:1].isupper():
            raise FgvczooError(
                f"structure={name!r}; expected {', '.join(STRUCTURES)}, or a class of pytorch-metric-learning's losses"
                + did_you_mean(name, STRUCTURES)
            )
        kind = SNRDistance if self.distance == "snr" else LpDistance
        self.loss = standard_loss(name, options, distance=kind(normalize_embeddings=self.normalize))
        if self.sampler not in (None, "all"):
            self.miner = standard_miner(str(self.sampler), self.sampler_options)

    def groups(self) -> dict[str, nn.Module]:
        groups: dict[str, nn.Module] = {"backbone": self.network.backbone, "head": self.network.head}
        if self.loss is not None and any(True for _ in self.loss.parameters()):
            groups["loss"] = self.loss
        return groups

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) -> embeddings (B, M)."""
        return self.network(images)

    # -- training -----------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        own = self(batch["image"]).float()
        self.check_embeddings(own, batch)
        # Every process sees the global batch and computes the same loss.
        embeddings, labels = gather_batch(own), gather_batch(self._labels(batch))
        if not len(positive_pairs(labels)[0]):
            self._empty_batches += 1
        loss = self.structure_loss(embeddings, labels)
        regulariser = L.zero_mean(embeddings)
        self.log("train/structure_loss", loss.detach(), prog_bar=True, on_step=False, on_epoch=True)
        self.log("train/zero_mean", regulariser.detach(), on_step=False, on_epoch=True)
        return loss + self.regulariser_weight * regulariser

    def on_train_epoch_end(self) -> None:
        self.log("train/empty_batches", float(self._empty_batches))
        self._empty_batches = 0
        super().on_train_epoch_end()

    def _labels(self, batch: Batch) -> Tensor:
        """What makes items alike: the class, or when hashing images of several classes (B, C) a common one."""
        return batch["labels"] if self.structure == "hashing" and "labels" in batch else batch["label"]

    def structure_loss(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of embeddings (N, M) without the regulariser."""
        if self.loss is not None:
            # Library code that knows nothing of autocast.
            with torch.autocast(embeddings.device.type, enabled=False):
                mined = (self.miner(embeddings, labels),) if self.miner is not None else ()
                return self.loss(embeddings, labels, *mined)
        if self.structure == "n_pair":
            anchor, positive = L.pairs_of_classes(labels)
            distance = self.distances(embeddings[anchor], embeddings[positive])
            return L.n_pair(L.similarity(distance, self.similarity))
        distance = self.distances(embeddings)
        if self.structure == "contrastive":
            return L.contrastive(
                distance,
                labels,
                positive_margin=self.positive_margin,
                negative_margin=self.margin,
                reduction=self.reduction,
            )
        if self.structure == "lifted":
            return L.lifted(distance, labels, margin=self.margin)
        loss = self._triplet(embeddings, distance, labels)
        if self.structure == "hashing":
            loss = loss + self.quantization_weight * L.quantization(embeddings)
        return loss

    def distances(self, anchors: Tensor, others: Tensor | None = None) -> Tensor:
        """(Q, M), (G, M) -> (Q, G), rows are anchors."""
        if self.distance == "snr":
            return snr_distance(anchors, others, normalize=self.normalize)
        if self.normalize:
            anchors, others = F.normalize(anchors, dim=1), None if others is None else F.normalize(others, dim=1)
        return euclidean_distances(anchors, others)

    def _triplet(self, embeddings: Tensor, distance: Tensor, labels: Tensor) -> Tensor:
        if self.sampler == "all":
            return L.triplet(distance, labels, margin=self.margin, reduction=self.reduction)
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        triplets = sample_triplets(
            str(self.sampler),
            F.normalize(embeddings.detach(), dim=1),
            labels,
            generator=step_generator(seed, self.trainer.global_step),
            **self.sampler_options,
        )
        return L.triplet_of(distance, triplets, margin=self.margin, reduction=self.reduction)

    # -- evaluation ---------------------------------------------------------------------------------------------

    def new_metric(self) -> RetrievalMetrics:
        if self.eval_distance != "hamming":
            return super().new_metric()
        # As hashing is evaluated: MAP over whole rankings, queries without a match as 0.
        return RetrievalMetrics(self.ks, "hamming", full=True, lone="miss")

    @property
    def _data(self) -> DataSource:
        data: DataSource = self.trainer.datamodule  # type: ignore[attr-defined]
        return data

    @property
    def _has_gallery(self) -> bool:
        """Whether the data have a protocol of hashing: "test" are queries to its gallery then."""
        return self.eval_distance == "hamming" and "gallery" in self._data.splits

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        if not self._has_gallery:
            super().test_step(batch, batch_idx)
        else:
            self.hashing.update(self(batch["image"]), self._labels(batch), batch["index"], gallery=False)

    def on_test_epoch_end(self) -> None:
        if not self._has_gallery:
            super().on_test_epoch_end()
            return
        with torch.inference_mode():
            for batch in progress(self._data.loader("gallery"), "the gallery", show=self.global_rank == 0):
                outputs = self(batch["image"].to(self.device))
                labels, index = self._labels(batch).to(self.device), batch["index"].to(self.device)
                self.hashing.update(outputs, labels, index, gallery=True)
        name = "map" if self.hashing.k is None else f"map_at_{self.hashing.k}"
        scores = {key.replace("map", name): value for key, value in self.hashing.compute().items()}
        self.log_dict({f"test/{key}": value.float() for key, value in scores.items()})
        self.hashing.reset()

    def further_scores(self) -> dict[str, Tensor]:
        if self.eval_distance != "hamming":
            return {}
        distinct = len(codes(self.metrics[""].evaluated.embeddings).unique(dim=0))
        if distinct < 2:
            warnings.warn("all items have the same code: the hash has collapsed", FgvczooWarning, stacklevel=2)
        return {"distinct_codes": torch.tensor(float(distinct))}

    def pair_details(self, query: Tensor, item: Tensor) -> dict[str, float]:
        """Variance of the signal (the query) and of the noise, and the SNR distance, their ratio."""
        signal, noise = (float(x.double().var(correction=0)) for x in (query, item - query))
        return {"signal": signal, "noise": noise, "d": noise / max(signal, SMALLEST_VARIANCE)}

    # -- explanation --------------------------------------------------------------------------------------------

    def explain(
        self, image: Any, gallery: Gallery, *, top: int = 10, box: Box | None = None, label: str | None = None
    ) -> ContactSheet:
        """What is nearest to an image in a gallery, with the variances of signal and noise of each pair.

        image, box: as `predict` takes them. label: its class, where known, to mark what is right.
        """
        (sheet,) = explain_retrieval(self, [image], gallery, top=top, boxes=[box], labels=[label])
        return sheet
