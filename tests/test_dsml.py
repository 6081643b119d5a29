"""DSML: the distance's properties, losses at their edges, and the module's options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fgvczoo
from fgvczoo import FgvczooError
from fgvczoo.models.dsml import losses as L
from fgvczoo.models.dsml.distance import snr_distance, snr_distance_pairs
from fgvczoo.models.dsml.pml import SNRDistance
from fgvczoo.nn.embeddings import euclidean_distances, squared_distances
from tests.conftest import RECIPES
from tests.data.cifar.make import make_cifar10
from tests.metrics.processes import in_two_processes

seeds = st.integers(0, 10_000)


def rows(seed: int, items: int = 7, dim: int = 12) -> Tensor:
    return torch.randn(items, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def broadcast(anchors: Tensor, others: Tensor) -> Tensor:
    return (anchors[:, None] - others).var(2) / anchors.var(1)[:, None]


@given(seeds, st.integers(2, 20), st.floats(0, 100), st.sampled_from([1.0, 1e-3, 1e-5]))
def test_equals_the_definition_in_float64_also_for_near_duplicates(
    seed: int, dim: int, mean: float, noise: float
) -> None:
    anchors = (rows(seed, 6, dim) + mean).float()
    others = (anchors + noise * rows(seed + 1, 6, dim)).float()
    truth = broadcast(anchors.double(), others.double())
    torch.testing.assert_close(snr_distance(anchors, others).double(), truth, rtol=2e-6, atol=1e-12)
    torch.testing.assert_close(snr_distance_pairs(anchors, others).double(), truth.diagonal(), rtol=2e-6, atol=1e-12)


@given(seeds, st.floats(-50, 50), st.floats(0.01, 100))
def test_invariances(seed: int, shift: float, scale: float) -> None:
    a, b = rows(seed), rows(seed + 1)
    d = snr_distance(a, b)
    torch.testing.assert_close(snr_distance(a + shift, b - 2 * shift), d)
    torch.testing.assert_close(snr_distance(scale * a, scale * b), d)
    assert bool((d >= 0).all()) and bool((snr_distance(a).diagonal() == 0).all())
    back = snr_distance(b, a).T
    torch.testing.assert_close(d / back, b.var(1) / a.var(1)[:, None])
    torch.testing.assert_close(snr_distance(a, torch.ones_like(b)), torch.ones(len(a), len(b), dtype=torch.float64))


@given(seeds)
def test_unit_rows_without_mean_make_it_the_squared_euclidean_distance(seed: int) -> None:
    a = rows(seed)
    a = torch.nn.functional.normalize(a - a.mean(1, keepdim=True), dim=1)
    torch.testing.assert_close(snr_distance(a), squared_distances(a))


def test_gradients() -> None:
    a, b = rows(0, 3, 5).requires_grad_(), rows(1, 4, 5).requires_grad_()
    assert torch.autograd.gradcheck(snr_distance, (a, b))
    assert torch.autograd.gradcheck(lambda x: euclidean_distances(x), (a,))
    (snr_distance(a, b) * rows(2, 3, 4)).sum().backward()
    for tensor in (a, b):  # the distance never moves a mean
        assert tensor.grad is not None and float(tensor.grad.sum(1).abs().max()) < 1e-12


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32])
def test_constant_and_equal_features_are_finite(kind: torch.dtype) -> None:
    a = torch.tensor([[1.0, 1, 1], [1, 2, 3], [1, 2, 3]], dtype=kind, requires_grad=True)
    d = snr_distance(a)
    assert d.dtype == torch.float32 and bool(d.isfinite().all())
    assert float(d[1, 2]) == 0 and float(d[0, 0]) == 0
    L.n_pair(L.similarity(d)).backward()
    assert a.grad is not None and bool(a.grad.isfinite().all())
    with pytest.raises(FgvczooError, match="at least 2 dimensions"):
        snr_distance(torch.ones(3, 1))


def test_its_library_takes_it_as_its_own() -> None:
    from pytorch_metric_learning import distances, losses

    embeddings, labels = torch.randn(12, 6), torch.arange(12) % 4
    for normalize in (False, True):
        ours = losses.ContrastiveLoss(0.1, 2.0, distance=SNRDistance(normalize))
        theirs = losses.ContrastiveLoss(0.1, 2.0, distance=distances.SNRDistance(normalize_embeddings=normalize))
        torch.testing.assert_close(ours(embeddings, labels), theirs(embeddings, labels), rtol=1e-4, atol=1e-6)
    triplets = losses.TripletMarginLoss(0.2, distance=SNRDistance())
    assert bool(triplets(embeddings, labels).isfinite())


STRUCTURES = {
    "contrastive": lambda d, y: L.contrastive(d, y),
    "triplet": lambda d, y: L.triplet(d, y),
    "lifted": lambda d, y: L.lifted(d, y),
    "generalised lifted": lambda d, y: L.generalised_lifted(d, y),
}


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("labels", [[0], [0, 0, 0], [0, 1, 2], [0, 0, 1]])
def test_batches_without_pairs_have_gradients_that_are_not_nan(name: str, labels: list[int]) -> None:
    embeddings = torch.randn(len(labels), 4, requires_grad=True)
    loss = STRUCTURES[name](snr_distance(embeddings), torch.tensor(labels))
    loss.backward()
    assert bool(loss.isfinite()) and embeddings.grad is not None and bool(embeddings.grad.isfinite().all())
    if name in ("triplet", "lifted") and len(set(labels)) != 2:
        assert float(loss) == 0 and not embeddings.grad.any()


def test_n_pair_takes_two_items_of_each_class() -> None:
    anchor, positive = L.pairs_of_classes(torch.tensor([3, 1, 3, 3, 2, 1]))
    assert (anchor.tolist(), positive.tolist()) == ([0, 1], [2, 5])
    anchor, positive = L.pairs_of_classes(torch.tensor([0, 1, 2]))
    assert not len(anchor) and not len(positive)
    assert float(L.n_pair(torch.zeros(1, 1))) == 0


def test_reductions_differ_and_none_is_nan() -> None:
    values = torch.tensor([0.0, 0.0, 3.0])
    assert float(L.reduce(values, "mean")) == 1 and float(L.reduce(values, "mean_nonzero")) == 3
    assert float(L.reduce(values[:0], "mean")) == 0 and float(L.reduce(values[:2], "mean_nonzero")) == 0
    with pytest.raises(FgvczooError, match="reduction='sum'"):
        L.reduce(values, "sum")


def tiny(**options: Any) -> Any:
    return fgvczoo.create("dsml", num_classes=2, backbone="test_resnet", out_index=1, embedding_dim=8, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"structure": "contrastive"},
        {"structure": "lifted"},
        {"structure": "n_pair", "similarity": "negative_distance"},
        {"structure": "n_pair", "distance": "euclidean", "normalize": True},
        {"structure": "hashing", "eval_distance": "hamming"},
        {"structure": "MultiSimilarityLoss"},
        {"structure": "ProxyAnchorLoss", "structure_options": {"num_classes": 2, "embedding_size": 8},
         "distance": "euclidean", "normalize": True},
        {"structure": "TripletMarginLoss", "sampler": "MultiSimilarityMiner"},
    ],
)  # fmt: skip
def test_every_structure_gives_gradients_to_all_groups(options: dict[str, Any]) -> None:
    if options["structure"] == "ProxyAnchorLoss":
        options = options | {"distance": "snr", "structure": "ProxyNCALoss"}
        stages = {"train": {"groups": {g: {"lr": 1e-3} for g in ("backbone", "head", "loss")}}}
        options |= {"stages": stages, "plan": [{"train": 1}]}
    model = tiny(**options)
    labels = torch.tensor([0, 0, 1, 1])
    loss = model.structure_loss(model(torch.randn(4, 3, 48, 48)), labels)
    loss.backward()
    assert bool(loss.isfinite())
    for name, group in model.groups().items():
        assert any(p.grad is not None and bool(p.grad.any()) for p in group.parameters()), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"structure": "tripplet"}, "did you mean triplet"),
        ({"structure": "NoSuchLoss"}, "has no such loss"),
        ({"structure": "MultiSimilarityLoss", "structure_options": {"a": 1}}, "structure_options|loss_options"),
        ({"sampler": "semi"}, "did you mean semihard"),
        ({"distance": "l2"}, "expected snr or euclidean"),
        ({"eval_distance": "l2"}, "eval_distance='l2'"),
        ({"reduction": "sum"}, "reduction='sum'"),
        ({"similarity": "dot"}, "similarity='dot'"),
    ],
)
def test_mistakes_name_what_is_known(options: dict[str, Any], message: str) -> None:
    with pytest.raises(FgvczooError, match=message):
        tiny(**options)


def test_collapsed_codes_are_told() -> None:
    model = tiny(structure="hashing", eval_distance="hamming")
    metric = model.new_metric()
    metric.update(torch.ones(4, 8), torch.tensor([0, 0, 1, 1]), torch.arange(4))
    metric.compute()
    model.metrics = {"": metric}
    with pytest.warns(UserWarning, match="collapsed"):
        assert float(model.further_scores()["distinct_codes"]) == 1


def test_a_diverged_network_names_the_rows() -> None:
    model = tiny()
    with pytest.raises(FgvczooError, match="rows 7"):
        model.check_embeddings(torch.tensor([[1.0], [torch.nan]]), {"index": torch.tensor([3, 7])})


def test_batch_norm_can_keep_its_statistics() -> None:
    from torch.nn import BatchNorm2d

    model = tiny(frozen_batch_norm=True).train()
    model._trainer = type("T", (), {"global_step": 0, "global_rank": 0, "current_epoch": 0})()
    model.on_train_batch_start({}, 0)
    norms = [module for module in model.modules() if isinstance(module, BatchNorm2d)]
    assert norms and not any(norm.training for norm in norms) and all(norm.weight.requires_grad for norm in norms)


@pytest.mark.parametrize("structure", ["triplet", "contrastive", "n_pair"])
def test_two_processes_have_the_gradients_of_one(structure: str, tmp_path: Path) -> None:
    """Mining across the global batch: each process has half of every class's items, and so no positive of its own."""
    from fgvczoo.nn.embeddings import gather_batch

    embeddings, labels = rows(3, 8, 6).float(), torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    model = tiny(structure=structure)

    def gradient(own: Tensor, y: Tensor) -> Tensor:
        own = own.clone().requires_grad_()
        every, labels = gather_batch(own), gather_batch(y)
        (model.structure_loss(every, labels) + 0.1 * L.zero_mean(every)).backward()
        assert own.grad is not None
        return own.grad

    one = gradient(embeddings, labels)
    halves = in_two_processes(lambda rank: gradient(embeddings.chunk(2)[rank], labels.chunk(2)[rank]), tmp_path)
    torch.testing.assert_close(torch.cat(halves) / 2, one)  # DDP averages


def test_hashing_searches_the_gallery_of_its_protocol(tmp_path: Path, fgvczoo_in: Any) -> None:
    make_cifar10(tmp_path / "cifar", per_batch=102)
    recipe = yaml.safe_load((RECIPES / "dsml-tiny.yaml").read_text())
    recipe["card"] |= {"dataset": "cifar10", "num_classes": 3}
    recipe["model"]["init_args"] |= {"structure": "hashing", "eval_distance": "hamming", "clustering": False}
    options = {"protocol": "hashing-1", "augmentation": "flip", "preprocess": {"size": [32, 32]}}
    recipe["data"] = {
        "class_path": "fgvczoo.data.cifar.CIFAR10DataModule",
        "init_args": options | {"batch_size": 8, "eval_batch_size": 100},
    }
    recipe["trainer"]["limit_train_batches"] = 2
    Path("hash.yaml").write_text(yaml.safe_dump(recipe))
    common = ("--config", "hash.yaml", "--run", "run", "--data.root", tmp_path / "cifar")
    status, _, err = fgvczoo_in("fit", *common)
    assert status == 0, err
    status, _, err = fgvczoo_in("test", *common, "--ckpt_path", "last")
    assert status == 0, err
    found = json.loads(Path("runs/run/test.json").read_text())
    names = ("map", "map_min", "map_tie_averaged", "radius_precision", "empty_balls")
    assert all(0 <= found[f"test/{name}"] <= 1 for name in names) and found["test/distinct_codes"] >= 1
    assert 0.2 < found["test/map_tie_averaged"] < 0.6  # noise: the share of a class
    assert fgvczoo_in("test", *common, "--ckpt_path", "last", "--model.map_at", "5")[0] == 0
    assert "test/map_at_5" in json.loads(Path("runs/run/test.json").read_text())
