"""Clustering scores against scikit-learn, and k-means."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fgvczoo import FgvczooError
from fgvczoo.metrics import clustering as C

assignments = st.lists(st.tuples(st.integers(0, 4), st.integers(-2, 3)), min_size=1, max_size=40)


@given(assignments)
def test_scores_are_those_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    judge = pytest.importorskip("sklearn.metrics")
    labels, clusters = (torch.tensor(values) for values in zip(*pairs))
    given_ = labels.numpy(), clusters.numpy()
    assert float(C.mutual_information(labels, clusters)) == pytest.approx(judge.mutual_info_score(*given_), abs=1e-12)
    assert float(C.adjusted_mutual_information(labels, clusters)) == pytest.approx(
        judge.adjusted_mutual_info_score(*given_), abs=1e-7
    )
    for average in ("arithmetic", "geometric"):
        ours = float(C.normalized_mutual_information(labels, clusters, average=average))
        theirs = judge.normalized_mutual_info_score(*given_, average_method=average)
        assert ours == pytest.approx(theirs, abs=1e-9) and -1e-12 <= ours <= 1 + 1e-12
    (_, other), (missed, both) = judge.pair_confusion_matrix(*given_)
    scores = C.pair_f1(labels, clusters)
    assert float(scores["pair_precision"]) == pytest.approx(both / (both + other) if both + other else 0)
    assert float(scores["pair_recall"]) == pytest.approx(both / (both + missed) if both + missed else 0)


def test_one_class_and_one_cluster() -> None:
    same, apart = torch.zeros(4, dtype=torch.int64), torch.arange(4)
    assert float(C.normalized_mutual_information(same, same)) == 1
    assert float(C.normalized_mutual_information(same, apart)) == 0
    assert float(C.purity(same, apart)) == 1 and float(C.pair_f1(apart, apart)["pair_f1"]) == 0


def test_kmeans_finds_what_is_apart_and_repeats_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 4
    rows = 10 * torch.eye(4)[labels] + torch.randn(60, 4, generator=generator)
    found = C.kmeans(rows, 4, seed=3)
    assert float(C.normalized_mutual_information(labels, found.assignment)) == pytest.approx(1)
    assert torch.equal(found.assignment, C.kmeans(rows, 4, seed=3).assignment)
    assert set(C.clustering_scores(rows, labels)) == {"nmi", "ami", "f1"}


def test_kmeans_is_as_good_as_scikit_learns() -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    rows = torch.randn(300, 5, generator=torch.Generator().manual_seed(1))
    theirs = cluster.KMeans(8, n_init=10, random_state=0).fit(rows.numpy()).inertia_
    assert C.kmeans(rows, 8).inertia < 1.03 * theirs


def test_equal_items_and_too_many_clusters() -> None:
    assert C.kmeans(torch.ones(5, 3), 2).inertia == 0
    with pytest.raises(FgvczooError, match="6 clusters of 5 items"):
        C.kmeans(torch.ones(5, 3), 6)


def test_an_emptied_cluster_keeps_its_centre() -> None:
    found = C.lloyd(torch.tensor([[0.0], [1.0]]), torch.tensor([[0.5], [100.0]]))
    assert found.centres[:, 0].tolist() == [0.5, 100.0] and found.assignment.tolist() == [0, 0]
