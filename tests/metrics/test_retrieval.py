"""Retrieval search and metrics: against brute force in float64, pytorch-metric-learning, torchmetrics and faiss."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics.functional.retrieval import retrieval_hit_rate, retrieval_r_precision

from fgvczoo import FgvczooError
from fgvczoo.errors import FgvczooWarning
from fgvczoo.metrics import retrieval as R
from fgvczoo.metrics.retrieval_hashing import distance_counts, hamming_distances, tie_averaged_precision
from fgvczoo.metrics.retrieval_search import DISTANCES, Relevance, codes, nearest
from tests.metrics.processes import in_two_processes


def brute(queries: Tensor, gallery: Tensor, distance: str) -> Tensor:
    """All distances in float64, by differences."""
    q, g = queries.double(), gallery.double()
    if distance == "hamming":
        return (codes(q)[:, None] != codes(g)).sum(2).double()
    if distance == "cosine":  # of unit rows as float32 has them, half the squared distance
        q, g = (torch.nn.functional.normalize(x, dim=1).float().double() for x in (q, g))
    if distance == "snr":
        q, g = ((x - x.mean(1, keepdim=True)).float().double() for x in (q, g))
    return (q[:, None] - g).square().sum(2)


def ranking(distance: Tensor, own: bool) -> Tensor:
    """By distance, then place; without the own item."""
    order = distance.argsort(dim=1, stable=True)
    if not own:
        return order
    keep = order != torch.arange(len(order))[:, None]
    return order[keep].view(len(order), -1)


@st.composite
def embeddings(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Rows with duplicates, near duplicates, zeros and constants; labels with lone ones."""
    seed, items, dim = draw(st.integers(0, 10_000)), draw(st.integers(2, 40)), draw(st.integers(2, 9))
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(items, dim, generator=generator) + draw(st.sampled_from([0.0, 50.0]))
    again = torch.randint(items, (items // 2,), generator=generator)
    rows[again] = rows[again.flip(0)] + draw(st.sampled_from([0.0, 1e-4])) * torch.randn(len(again), dim)
    if draw(st.booleans()):
        rows[0] = 0
    return rows, torch.randint(draw(st.integers(1, 8)), (items,), generator=generator)


@given(embeddings(), st.sampled_from(DISTANCES), st.integers(1, 12), st.sampled_from([2**8, 2**12, 2**24]))
@settings(max_examples=60)
def test_nearest_is_the_order_of_float64(given_: tuple[Tensor, Tensor], distance: str, k: int, memory: int) -> None:
    rows, _ = given_
    if distance == "cosine":
        rows = rows[rows.norm(dim=1) > 0]
        if len(rows) < 2:
            return
    truth = brute(rows, rows, distance)
    found, place = nearest(rows, rows, k, distance=distance, own=torch.arange(len(rows)), memory=memory)
    wanted = ranking(truth, own=True)[:, :k]
    # Equal up to what float64 itself cannot tell apart.
    gap = (truth.gather(1, place) - truth.gather(1, wanted)).abs()
    assert float((gap / (1 + truth.abs().amax())).max()) < 1e-13
    assert all(len(set(row)) == len(row) and n not in row for n, row in enumerate(place.tolist()))
    if distance == "euclidean":
        size = rows.double().square().sum(1)
        error = (found.double().square() - truth.gather(1, place)).abs()
        assert bool((error <= 1e-6 * (size[:, None] + size[place])).all())


@given(embeddings(), st.sampled_from(DISTANCES), st.sampled_from([2**10, 2**24]))
@settings(max_examples=40)
def test_ranks_by_counting_are_those_of_sorting(given_: tuple[Tensor, Tensor], distance: str, memory: int) -> None:
    rows, labels = given_
    counted = R.retrieval_ranks(rows, labels, distance=distance, memory=memory)
    sorted_ = R.retrieval_ranks(rows, labels, distance=distance, k=len(rows))
    assert torch.equal(counted[1], sorted_[1])
    width = max(counted[0].shape[1], sorted_[0].shape[1])
    padded = [torch.nn.functional.pad(r, (0, width - r.shape[1]), value=torch.inf) for r in (counted[0], sorted_[0])]
    assert torch.equal(*padded)


def test_sampled_thresholds_lose_nothing() -> None:
    """Galleries beyond 4 k take the path that guesses where the k-th neighbour lies, also where the guess is wrong."""
    generator = torch.Generator().manual_seed(0)
    gallery = torch.randn(5000, 16, generator=generator).sort(0).values  # ordered: a strided sample misleads
    queries = gallery[::100] + 0.01
    truth = brute(queries, gallery, "euclidean").argsort(dim=1, stable=True)[:, :20]
    for memory in (2**17, 2**26):
        assert torch.equal(nearest(queries, gallery, 20, memory=memory)[1], truth)


@pytest.mark.parametrize("order", ["ascending", "descending", "random"])
def test_ties_over_several_blocks_lose_nothing(order: str) -> None:
    """More items than a block has; all distances come several times, in different blocks."""
    generator = torch.Generator().manual_seed(0)
    gallery = torch.randint(-3, 4, (10_000, 3), generator=generator).float()
    queries = gallery[:7] + 0.25
    truth = torch.cdist(queries.double(), gallery.double())
    if order != "random":
        gallery = gallery[truth[0].argsort(descending=order == "descending", stable=True)]
        truth = torch.cdist(queries.double(), gallery.double())
    distances, place = nearest(queries, gallery, 20)
    sorted_, places = (truth**2).round(decimals=9).sort(dim=1, stable=True)
    assert torch.equal(place, places[:, :20])
    torch.testing.assert_close(distances.double(), sorted_[:, :20].sqrt(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["random", "twins", "equal", "one cluster"])
@pytest.mark.parametrize("memory", [2**18, 2**28])
def test_a_set_in_itself_of_several_tiles(kind: str, memory: int) -> None:
    """Each product serves both of its items; ties and clusters that the sample misjudges lose nothing."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2600, 8, generator=generator)
    if kind == "twins":
        rows[1300:] = rows[:1300]
    if kind == "equal":
        rows[:] = rows[0]
    if kind == "one cluster":
        rows[:40] = rows[0] + 1e-3 * rows[:40]
    own = torch.arange(len(rows))
    own[::7] = -1  # these find themselves
    truth = torch.cdist(rows.double(), rows.double(), compute_mode="donot_use_mm_for_euclid_dist")
    truth[own >= 0, own[own >= 0]] = torch.inf
    sorted_, places = truth.sort(dim=1, stable=True)
    distances, place = nearest(rows, rows, 50, own=own, memory=memory)
    assert torch.equal(place, places[:, :50])
    torch.testing.assert_close(distances.double(), sorted_[:, :50], rtol=1e-6, atol=1e-6)


def test_near_duplicates_keep_their_distances() -> None:
    rows = torch.randn(50, 64) + 100
    copies = rows + 1e-3 * torch.randn(50, 64)
    distance, place = nearest(rows, copies, 1)
    assert torch.equal(place[:, 0], torch.arange(50))
    torch.testing.assert_close(
        distance[:, 0].double(), (rows.double() - copies.double()).norm(dim=1), rtol=1e-6, atol=0
    )


def test_equal_values_to_faiss() -> None:
    faiss = pytest.importorskip("faiss")
    rows = torch.nn.functional.normalize(torch.randn(3000, 48), dim=1)
    index = faiss.IndexFlatL2(48)
    index.add(rows.numpy())
    theirs, _ = index.search(rows[:200].numpy(), 50)
    ours, _ = nearest(rows[:200], rows, 50)
    np.testing.assert_allclose(ours.numpy() ** 2, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_metrics_agree_with_pytorch_metric_learning(seed: int) -> None:
    calculator = pytest.importorskip("pytorch_metric_learning.utils.accuracy_calculator")
    inference = pytest.importorskip("pytorch_metric_learning.utils.inference")
    from pytorch_metric_learning.distances import LpDistance

    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(30, (150,), generator=generator)
    rows = torch.randn(150, 8, generator=generator) + torch.randn(30, 8, generator=generator)[labels]
    knn = inference.CustomKNN(LpDistance(normalize_embeddings=False))
    theirs = calculator.AccuracyCalculator(
        include=("precision_at_1", "r_precision", "mean_average_precision_at_r", "mean_average_precision",
                 "mean_reciprocal_rank"),
        k=None, knn_func=knn, device=torch.device("cpu"),
    ).get_accuracy(rows, labels)  # fmt: skip
    ranks, counts = R.retrieval_ranks(rows, labels)
    values = R.retrieval_values(ranks, counts)
    for name, other in (
        ("recall_at_1", "precision_at_1"),
        ("r_precision", "r_precision"),
        ("map_at_r", "mean_average_precision_at_r"),
        ("mean_average_precision", "mean_average_precision"),
        ("mean_reciprocal_rank", "mean_reciprocal_rank"),
    ):
        assert float(R.mean_over_queries(values[name], counts)) == pytest.approx(theirs[other], abs=1e-6), name


def test_single_queries_agree_with_torchmetrics() -> None:
    generator = torch.Generator().manual_seed(1)
    rows, labels = torch.randn(40, 6, generator=generator), torch.randint(6, (40,), generator=generator)
    ranks, counts = R.retrieval_ranks(rows[:10], labels[:10], rows[10:], labels[10:])
    distance = brute(rows[:10], rows[10:], "euclidean")
    for query in range(10):
        target = labels[10:] == labels[query]
        if not bool(target.any()):
            continue
        score = -distance[query].float()
        assert float(R.r_precision(ranks, counts)[query]) == pytest.approx(float(retrieval_r_precision(score, target)))
        hit = retrieval_hit_rate(score, target, top_k=3)
        assert float(R.recall_at_k(ranks, 3)[query]) == float(hit)


def test_multi_label_relevance_is_a_common_tag() -> None:
    query, gallery = torch.tensor([[1, 0, 1], [0, 0, 0]]), torch.tensor([[0, 1, 0], [1, 1, 0], [0, 0, 1]])
    ranks, counts = R.retrieval_ranks(torch.tensor([[0.0], [0.0]]), query, torch.tensor([[0.0], [1.0], [2.0]]), gallery)
    assert counts.tolist() == [2, 0] and ranks[0, :2].tolist() == [2, 3]


# -- definitions at the edges ---------------------------------------------------------------------------------------


def test_all_embeddings_equal_rank_by_index() -> None:
    rows = torch.ones(6, 3)
    place = nearest(rows, rows, 5, own=torch.arange(6))[1]
    assert place.tolist() == [[n for n in range(6) if n != query] for query in range(6)]


def test_a_zero_vector_is_similar_to_nothing_under_cosine() -> None:
    gallery = torch.tensor([[-1.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    distance, place = nearest(torch.tensor([[2.0, 0.0], [0.0, 0.0]]), gallery, 3, distance="cosine")
    assert place[0].tolist() == [2, 1, 0] and distance[0].tolist() == [0.0, 1.0, 2.0]
    assert place[1].tolist() == [0, 1, 2] and distance[1].tolist() == [1.0, 1.0, 1.0]


def test_lone_queries_are_left_out_and_counted() -> None:
    metric = R.RetrievalMetrics([1])
    metric.update(torch.tensor([[0.0], [0.1], [9.0]]), torch.tensor([0, 0, 1]), torch.arange(3))
    found = metric.compute()
    assert float(found["recall_at_1"]) == 1 and int(found["num_queries_without_match"]) == 1
    missed = R.RetrievalMetrics([1], lone="miss")
    missed.update(torch.tensor([[0.0], [0.1], [9.0]]), torch.tensor([0, 0, 1]), torch.arange(3))
    assert float(missed.compute()["recall_at_1"]) == pytest.approx(2 / 3)


@pytest.mark.parametrize("items", [1, 3])
def test_without_any_match_the_result_is_undefined(items: int) -> None:
    metric = R.RetrievalMetrics([1])
    metric.update(torch.randn(items, 2), torch.arange(items), torch.arange(items))
    with pytest.warns(FgvczooWarning, match="undefined"):
        found = metric.compute()
    assert found["recall_at_1"].isnan() and int(found["num_queries_without_match"]) == items


def test_labels_beyond_float32_stay_apart() -> None:
    labels = torch.tensor([16_777_216, 16_777_217, 16_777_216, -5])
    _, counts = R.retrieval_ranks(torch.randn(4, 3), labels)
    assert counts.tolist() == [1, 0, 1, 0]


def test_mistakes_are_one_line() -> None:
    rows, labels = torch.randn(4, 3), torch.arange(4)
    bad = rows.clone()
    bad[2, 1] = torch.nan
    with pytest.raises(FgvczooError, match="row 2 is not finite"):
        R.retrieval_ranks(bad, labels)
    with pytest.raises(FgvczooError, match="distance='l1'"):
        nearest(rows, rows, 1, distance="l1")
    with pytest.raises(FgvczooError, match="k=0"):
        nearest(rows, rows, 0)
    with pytest.raises(FgvczooError, match="at least one"):
        nearest(rows[:0], rows, 1)
    with pytest.raises(FgvczooError, match="3 labels"):
        R.retrieval_ranks(rows, labels[:3])
    with pytest.raises(FgvczooError, match="at least 2 dimensions"):
        nearest(rows[:, :1], rows[:, :1], 1, distance="snr")


def test_repeats_of_a_padding_sampler_count_once() -> None:
    rows, labels = torch.randn(5, 3), torch.tensor([0, 0, 1, 1, 2])
    once, padded = R.RetrievalMetrics([1]), R.RetrievalMetrics([1])
    once.update(rows, labels, torch.arange(5))
    again = torch.tensor([4, 0, 1, 2, 3, 4, 0])
    padded.update(rows[again], labels[again], again)
    assert once.compute() == padded.compute()
    other = R.RetrievalMetrics([1])
    other.update(torch.randn(2, 3), labels[:2], torch.tensor([7, 7]))
    with pytest.raises(FgvczooError, match="row 7 of the data came with several"):
        other.compute()
    short = R.RetrievalMetrics([1], items=6)
    short.update(rows, labels, torch.arange(5))
    with pytest.raises(FgvczooError, match="5 different items of 6"):
        short.compute()


def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(4)
    labels = torch.randint(5, (31,), generator=generator)
    rows = torch.randn(31, 4, generator=generator) + labels[:, None]

    def work(rank: int) -> dict[str, Tensor]:
        metric = R.RetrievalMetrics([1, 2], full=True)
        shares = [torch.arange(16, 31), torch.tensor([*range(16), 30])]  # unequal, out of order, one repeated
        metric.update(rows[shares[rank]], labels[shares[rank]], shares[rank])
        return metric.compute()

    one = R.RetrievalMetrics([1, 2], full=True)
    one.update(rows, labels, torch.arange(31))
    expected = one.compute()
    for found in in_two_processes(work, tmp_path):
        assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_bootstrap_interval_holds_the_mean() -> None:
    values = torch.rand(200, dtype=torch.float64)
    low, high = R.bootstrap_interval(values)
    assert low < float(values.mean()) < high and (low, high) == R.bootstrap_interval(values)
    assert all(np.isnan(R.bootstrap_interval(values[:0])))


@given(st.integers(0, 1000), st.integers(2, 6))
@settings(max_examples=25)
def test_tie_averaging_is_the_mean_over_orders(seed: int, bits: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    query, gallery = torch.randn(1, bits, generator=generator), torch.randn(5, bits, generator=generator)
    labels = torch.randint(2, (5,), generator=generator)
    items, relevant = distance_counts(query, gallery, Relevance(torch.tensor([1]), labels))
    distance = hamming_distances(query, gallery)[0].double()
    turns = torch.tensor(list(itertools.permutations(range(5))))
    hits = labels[(distance + turns / 10).argsort(dim=1)] == 1
    expected = R.average_precision(R.ranks_of_hits(hits), hits.sum(1)).mean()
    assert float(tie_averaged_precision(items, relevant)) == pytest.approx(float(expected))
