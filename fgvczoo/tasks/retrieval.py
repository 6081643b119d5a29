"""Image retrieval: embeddings of files, a searchable index, the metrics of a set that is its own gallery."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from fgvczoo.batch import Batch
from fgvczoo.errors import FgvczooError
from fgvczoo.files import atomic_path
from fgvczoo.metrics.clustering import clustering_scores
from fgvczoo.metrics.retrieval import KS, RetrievalMetrics
from fgvczoo.metrics.retrieval_search import DISTANCES, nearest
from fgvczoo.preprocess import read_image
from fgvczoo.progress import progress
from fgvczoo.tasks.base import DataSource, Needs, StagedModule
from fgvczoo.tasks.classification import Box, crop


@dataclass(frozen=True)
class Embedding:
    """What the network makes of one image: a vector, near those of images of the same class. source: the file, where
    one was given."""

    vector: tuple[float, ...]
    source: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"source": self.source, "vector": list(self.vector)}

    def _repr_html_(self) -> str:
        shown = ", ".join(f"{value:.3f}" for value in self.vector[:8])
        return f"<p>{html.escape(self.source or '')} ({shown}, ...), {len(self.vector)} dimensions</p>"


@dataclass(frozen=True)
class Neighbour:
    """An item of an index that is near a query. place: in the index. name: the file or image id. label: its class,
    where known. distance: in the unit of the model's ranking."""

    place: int
    name: str
    label: str | None
    distance: float

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"name": self.name, "label": self.label, "distance": self.distance}


@dataclass(frozen=True)
class Index:
    """Embeddings (N, D) of a gallery, float32, on the CPU. names: of the items, N; labels: their classes, None where
    unknown. model: what made the embeddings, see `RetrievalModule.fingerprint`."""

    embeddings: Tensor
    names: tuple[str, ...]
    labels: tuple[str | None, ...]
    model: str

    def __len__(self) -> int:
        return len(self.names)

    def save(self, path: str | Path) -> Path:
        """Writes a .safetensors file, whole or not at all."""
        path = Path(path)
        if path.suffix != ".safetensors":
            raise FgvczooError(f"{path}: an index ends in .safetensors")
        told = {"names": self.names, "labels": self.labels, "model": self.model}
        with atomic_path(path) as temporary:
            save_file({"embeddings": self.embeddings.contiguous()}, temporary, {"fgvczoo.index": json.dumps(told)})
        return path

    @classmethod
    def load(cls, path: str | Path) -> Index:
        """The index of a file that `save` wrote. Raises `FgvczooError` for any other."""
        try:
            with safe_open(str(path), "pt") as file:
                told = json.loads((file.metadata() or {})["fgvczoo.index"])
                embeddings = file.get_tensor("embeddings")
            index = cls(embeddings.float(), tuple(told["names"]), tuple(told["labels"]), str(told["model"]))
        except FileNotFoundError:
            raise FgvczooError(f"{path}: no such file; `fgvczoo retrieve --index` writes one") from None
        except (SafetensorError, OSError, KeyError, TypeError, ValueError):
            raise FgvczooError(
                f"{path}: not an index of fgvczoo, or a damaged one; delete it to make it anew"
            ) from None
        if index.embeddings.ndim != 2 or not len(index.embeddings) == len(index.names) == len(index.labels):
            raise FgvczooError(f"{path}: a damaged index; delete it to make it anew")
        return index


class RetrievalModule(StagedModule):
    """Base of embedding models: `forward` gives embeddings (B, D); Recall@1 on the test classes is watched.

    eval_distance: of the ranking, see `metrics.retrieval.retrieval_ranks`. ks: of Recall@K. clustering: also NMI and F1
    of k-means with as many clusters as classes. frozen_batch_norm: batch norms keep their running statistics; scale and
    bias are trained.
    """

    needs = Needs(splits=("train", "test"))
    output_names: ClassVar[tuple[str, ...]] = ("embedding",)

    def __init__(
        self,
        *args: Any,
        eval_distance: str = "euclidean",
        ks: Sequence[int] = KS,
        clustering: bool = False,
        frozen_batch_norm: bool = False,
    ) -> None:
        super().__init__(*args)
        if eval_distance not in DISTANCES:
            raise FgvczooError(f"eval_distance={eval_distance!r}; expected {', '.join(DISTANCES)}")
        self.eval_distance, self.ks, self.clustering = eval_distance, tuple(ks), clustering
        self.frozen_batch_norm = frozen_batch_norm
        self.metrics: dict[str, RetrievalMetrics] = {}

    # -- training -----------------------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        if self.frozen_batch_norm:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()

    def check_embeddings(self, embeddings: Tensor, batch: Batch) -> None:
        """Raises `FgvczooError` that names the rows of the data whose embeddings (B, D) are not finite."""
        bad = (~embeddings.detach().isfinite()).any(1)
        if bool(bad.any()):
            rows = batch["index"][bad.to(batch["index"].device)].tolist()
            raise FgvczooError(
                f"training diverged: no finite embeddings of rows {', '.join(map(str, rows[:5]))}; lower the learning "
                "rate"
            )

    # -- evaluation ---------------------------------------------------------------------------------------------

    def named_embeddings(self, embeddings: Tensor) -> dict[str, Tensor]:
        """What is evaluated of embeddings (B, D): parts of them by name; "" is the whole."""
        return {"": embeddings}

    def new_metric(self) -> RetrievalMetrics:
        """The metric of an evaluation."""
        return RetrievalMetrics(self.ks, self.eval_distance)

    def _evaluate(self, batch: Batch) -> None:
        for name, embeddings in self.named_embeddings(self(batch["image"])).items():
            if name not in self.metrics:
                self.metrics[name] = self.new_metric()
            self.metrics[name].update(embeddings, batch["label"], batch["index"])

    def _log_evaluation(self, split: str) -> None:
        scores: dict[str, Tensor] = {}
        for name, metric in self.metrics.items():
            prefix = f"{split}/{name}_" if name else f"{split}/"
            found = metric.compute()
            if split == "test" and self.clustering and not name:
                embeddings = metric.evaluated.embeddings
                if self.eval_distance == "cosine":
                    embeddings = F.normalize(embeddings, dim=1)
                found |= clustering_scores(embeddings, metric.evaluated.labels)
            scores |= {f"{prefix}{key}": value.float() for key, value in found.items() if key != "num_queries"}
        scores |= {f"{split}/{key}": value.float() for key, value in self.further_scores().items()}
        self.log_dict(scores, prog_bar=split == "val")
        self.metrics = {}

    def further_scores(self) -> dict[str, Tensor]:
        """Scalars that compare what was evaluated, by name; from `self.metrics`."""
        return {}

    def on_validation_epoch_start(self) -> None:
        self.metrics = {}

    def on_test_epoch_start(self) -> None:
        self.metrics = {}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self(batch["image"])

    # -- files --------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def embed(self, images: Sequence[Any], *, box: Box | None = None) -> Tensor:
        """Images (see `read_image`) -> (N, D) float32 on the CPU. box: x0, y0, x1, y1 in pixels, cut out first."""
        was_training = self.training
        self.eval()
        try:
            tensors = [self.preprocess(crop(read_image(image), box)) for image in images]
            return self(torch.stack(tensors).to(self.device)).float().cpu()
        finally:
            self.train(was_training)

    def predict(self, images: Any, *, box: Box | None = None) -> Embedding | list[Embedding]:
        """The embedding of one image (path, bytes, PIL, array or tensor) or of each of a list, in its order.

        box: x0, y0, x1, y1 in pixels, cut out of each image before anything else. Raises `FgvczooError` for what is not
        an image and for a box outside it.
        """
        many = isinstance(images, (list, tuple))
        sources = list(images) if many else [images]
        if not sources:
            return []
        results = [
            Embedding(tuple(vector), str(source) if isinstance(source, (str, Path)) else None)
            for vector, source in zip(self.embed(sources, box=box).tolist(), sources)
        ]
        return results if many else results[0]

    # -- index --------------------------------------------------------------------------------------------------

    def fingerprint(self) -> str:
        """The paper and a number that changes with the weights: an index of other weights is of no use."""
        total = 0.0
        for place, tensor in enumerate(self.state_dict().values(), 1):
            values = tensor.detach().double().flatten().cpu()
            total += place * float((values * torch.linspace(1, 2, len(values), dtype=torch.float64)).sum())
        return f"{self.paper} {total.hex()} {self.preprocess.to_dict()}"

    @torch.inference_mode()
    def index_of(self, data: DataSource, split: str = "test") -> Index:
        """The index of a split, whose items are named by the set's own image ids. Leaves the module in eval mode."""
        self.eval()
        embeddings, rows = [], []
        for batch in progress(data.loader(split), "indexing", show=self._trainer is None):
            embeddings.append(self(batch["image"].to(self.device)).float().cpu())
            rows += batch["index"].tolist()
        described = [data.row(row) for row in rows]
        return Index(
            torch.cat(embeddings),
            tuple(str(row["image_id"]) for row in described),
            tuple(str(row["class_name"]) for row in described),
            self.fingerprint(),
        )

    def search(
        self, queries: Tensor, index: Index, k: int = 10, *, own: Sequence[int] | None = None, name: str = ""
    ) -> list[list[Neighbour]]:
        """The k nearest items of an index for each query (Q, D), nearest first, exactly.

        own: of each query its own place in the index, which is left out, -1 where it is not there. name: by this part
        of the embeddings, see `named_embeddings`. Raises `FgvczooError` for an index of other weights.
        """
        if index.embeddings.shape[1] != queries.shape[1] or index.model != self.fingerprint():
            raise FgvczooError(
                f"the index was made by another model ({index.model.split(' ')[0]}, {index.embeddings.shape[1]} "
                "dimensions) or other weights; make it anew"
            )
        parts = (self.named_embeddings(rows)[name] for rows in (queries.cpu(), index.embeddings))
        mine, gallery = parts
        places = None if own is None else torch.tensor(list(own))
        distances, found = nearest(mine, gallery, k, distance=self.eval_distance, own=places)
        return [
            [
                Neighbour(place, index.names[place], index.labels[place], distance)
                for place, distance in zip(row.tolist(), values.tolist())
                if place >= 0
            ]
            for row, values in zip(found, distances)
        ]

    def pair_details(self, query: Tensor, item: Tensor) -> dict[str, float]:
        """What more is to be said of a query (D,) and a neighbour (D,), by name."""
        return {}


def standard_loss(name: str, options: dict[str, Any] | None, **more: Any) -> nn.Module:
    """A loss of pytorch-metric-learning by the name of its class. more: arguments beside `options`, such as distance.

    Raises `FgvczooError` for an unknown name and for arguments that it does not take.
    """
    from pytorch_metric_learning import losses

    return _of_library(losses, nn.Module, "loss", name, options, more)


def standard_miner(name: str, options: dict[str, Any] | None, **more: Any) -> nn.Module:
    """A miner of pytorch-metric-learning by the name of its class; as `standard_loss`."""
    from pytorch_metric_learning import miners

    return _of_library(miners, nn.Module, "miner", name, options, more)


def _of_library(
    module: Any, base: type, what: str, name: str, options: dict[str, Any] | None, more: dict[str, Any]
) -> Any:
    cls: Callable[..., Any] | None = getattr(module, name, None)
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise FgvczooError(f"{what}={name!r}: pytorch-metric-learning has no such {what}")
    try:
        return cls(**(options or {}), **more)
    except Exception as error:  # whatever a constructor does with wrong values
        raise FgvczooError(f"{what}_options of {name}: {error or type(error).__name__}") from None


def own_places(names: Iterable[str], index: Index) -> list[int]:
    """The place of each name in an index, -1 where it is not there."""
    places = {name: place for place, name in enumerate(index.names)}
    return [places.get(name, -1) for name in names]
