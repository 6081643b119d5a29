"""DM2: relations against the written-out losses, triplet samplers, temporal diversity, and the module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import fgvczoo
from fgvczoo import FgvczooError
from fgvczoo.models.dm2 import relations
from fgvczoo.models.dm2.losses import cohort_losses, triplet_loss
from fgvczoo.models.dm2.network import ensemble
from fgvczoo.models.dm2.updates import GradientAccumulator, follow
from fgvczoo.nn import triplets as T
from fgvczoo.nn.embeddings import euclidean_distances
from tests.conftest import RECIPES


def rows(seed: int, items: int, dim: int) -> Tensor:
    return torch.randn(items, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def written_angle(student: Tensor, teacher: Tensor) -> Tensor:
    def angles(e: Tensor) -> Tensor:
        unit = F.normalize(e - e[:, None], dim=2)
        return unit @ unit.transpose(1, 2)

    return F.smooth_l1_loss(angles(student), angles(teacher))


def written_distance(student: Tensor, teacher: Tensor) -> Tensor:
    def relative(e: Tensor) -> Tensor:
        squared = (e[:, None] - e).square().sum(2)
        distance = squared.clamp(min=1e-12).sqrt() * (1 - torch.eye(len(e)))
        return distance / distance[distance > 0].mean()

    return F.smooth_l1_loss(relative(student), relative(teacher))


@given(st.integers(0, 1000), st.integers(2, 9), st.integers(2, 6), st.sampled_from([1.0, 1e-3]))
@settings(max_examples=40)
def test_relational_losses_are_the_written_ones(seed: int, items: int, dim: int, near: float) -> None:
    """Values and gradients, also where one item is a near duplicate of another, against float64."""
    student, teacher = rows(seed, items, dim), rows(seed + 1, items, dim + 2)
    student[1] = student[0] + near * student[1]
    for ours, written in (
        (relations.angle_loss, written_angle),
        (relations.distance_loss, written_distance),
    ):
        one, two = student.float().requires_grad_(), student.float().double().requires_grad_()
        loss, truth = ours(one, teacher.float()), written(two, teacher.float().double())
        torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-7)
        loss.backward()
        truth.backward()
        assert one.grad is not None and two.grad is not None
        size = float(two.grad.norm())
        torch.testing.assert_close(one.grad.double(), two.grad, rtol=1e-4, atol=1e-6 + 1e-5 * size)


def test_coincident_items_have_finite_losses_and_gradients() -> None:
    for student in (torch.ones(4, 3), torch.tensor([[1.0, 0], [1, 0], [0, 1]])):
        leaf = student.clone().requires_grad_()
        loss = relations.angle_loss(leaf, torch.randn(len(student), 5))
        loss = loss + relations.distance_loss(leaf, torch.randn(len(student), 5))
        loss.backward()
        assert bool(loss.isfinite()) and leaf.grad is not None and bool(leaf.grad.isfinite().all())


def test_two_items_have_no_relations_to_teach() -> None:
    distance, angle = relations.mutual_losses([torch.randn(2, 3), torch.randn(2, 4)])
    assert not distance.any() and not angle.any()
    assert not relations.mutual_losses([torch.randn(1, 3)] * 2)[1].any()


def test_no_gradient_flows_to_a_peer() -> None:
    members = [rows(n, 5, 4).requires_grad_() for n in range(3)]
    losses = cohort_losses(members, [T.all_triplets(torch.tensor([0, 0, 1, 1, 1]))] * 3)
    (losses.distance[0] + losses.angle[0] + losses.triplet[0]).backward()
    assert members[0].grad is not None and bool(members[0].grad.any())
    assert all(m.grad is None or not m.grad.any() for m in members[1:])


# -- triplets -------------------------------------------------------------------------------------------------------

label_lists = st.lists(st.integers(0, 3), min_size=1, max_size=12)


@given(label_lists, st.integers(0, 1000), st.sampled_from(T.SAMPLERS))
def test_triplets_are_an_anchor_a_positive_and_a_negative(labels: list[int], seed: int, sampler: str) -> None:
    y = torch.tensor(labels)
    unit = F.normalize(rows(seed, len(labels), 5).float(), dim=1)
    found = T.sample_triplets(sampler, unit, y, generator=T.step_generator(seed, 1))
    anchor, positive, negative = found.unbind(1)
    assert bool((y[anchor] == y[positive]).all()) and bool((anchor != positive).all())
    assert bool((y[anchor] != y[negative]).all())
    pairs = len(T.positive_pairs(y)[0]) if len(set(labels)) > 1 else 0
    if sampler != "all":
        assert len(found) == pairs
    assert torch.equal(found, T.sample_triplets(sampler, unit, y, generator=T.step_generator(seed, 1)))


@given(label_lists, st.integers(0, 1000), st.sampled_from([3, 16, 512]))
def test_distance_weights_are_distributions(labels: list[int], seed: int, dim: int) -> None:
    y = torch.tensor(labels)
    unit = F.normalize(rows(seed, len(labels), dim).float(), dim=1)
    unit[0] = -unit[-1]  # antipodes
    probability, _ = T.distance_weights(euclidean_distances(unit), y, dim)
    assert bool(probability.isfinite().all()) and not probability[T.same_class(y)].any()
    has = (~T.same_class(y)).any(1)
    torch.testing.assert_close(probability.sum(1), has.float())


def test_orthogonal_negatives_fall_back_to_uniform() -> None:
    """At the start of training in many dimensions; other implementations draw nothing there."""
    y = torch.arange(6) // 2
    probability, uniform = T.distance_weights(euclidean_distances(torch.eye(6)), y, 6)
    assert bool(uniform.all())
    torch.testing.assert_close(probability, (~T.same_class(y)).float() / 4)
    without, _ = T.distance_weights(euclidean_distances(torch.eye(6)), y, 6, upper_cutoff=None)
    torch.testing.assert_close(without, probability)


def test_draws_follow_their_probabilities() -> None:
    y = torch.tensor([0, 0, 1, 1, 1])
    probability = torch.zeros(5, 5)
    probability[:2, 2:] = torch.tensor([0.2, 0.0, 0.8])
    probability[2:, 0] = 1.0
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([T.draw_negatives(probability, y, generator) for _ in range(2000)])
    own = drawn[drawn[:, 0] == 0, 2]
    assert float((own == 2).double().mean()) == pytest.approx(0.2, abs=0.03) and not bool((own == 3).any())
    assert bool((drawn[drawn[:, 0] > 1, 2] == 0).all())


def test_without_triplets_the_loss_is_0_with_gradients() -> None:
    embeddings = torch.randn(3, 4, requires_grad=True)
    triplet_loss(embeddings, T.all_triplets(torch.zeros(3, dtype=torch.int64))).backward()
    assert embeddings.grad is not None and not embeddings.grad.any()


# -- temporal diversity ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("intervals", "mode", "message"),
    [([2, 3], "skip", "all are above 1"), ([1, 0], "skip", "at least 1"), ([1], "median", "update_mode='median'")],
)
def test_intervals_that_cannot_be(intervals: list[int], mode: str, message: str) -> None:
    with pytest.raises(FgvczooError, match=message):
        GradientAccumulator(intervals, mode)


def test_between_updates_not_even_weight_decay_moves_a_member() -> None:
    slow = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([slow], lr=0.1, weight_decay=0.5)
    accumulator = GradientAccumulator([1, 2])
    for step, moved in ((1, False), (2, True), (3, False)):
        before = slow.detach().clone()
        slow.grad = torch.ones(1)
        accumulator.apply(step, [[], [slow]])
        optimizer.step()
        assert bool((slow != before).any()) == moved


def test_a_follower_is_the_moving_average() -> None:
    member, leader = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    nn.init.constant_(leader.weight, 3.0)
    leader.running_mean += 5
    follow(member, leader, 0.75)
    assert member.weight.tolist() == [1.5, 1.5] and member.running_mean.tolist() == [5.0, 5.0]


# -- the module -----------------------------------------------------------------------------------------------------


def create(**options: Any) -> Any:
    options = {"backbones": ["test_resnet", "test_resnet"], "out_index": 1, "embedding_dim": 8} | options
    return fgvczoo.create("dm2", num_classes=2, **options)


def test_the_ensemble_averages_squared_distances() -> None:
    members = [F.normalize(rows(n, 5, 4), dim=1) for n in range(3)]
    mean = torch.stack([euclidean_distances(m).square() for m in members]).mean(0)
    torch.testing.assert_close(euclidean_distances(ensemble(members)).square(), mean)
    model = create().eval()
    images = torch.randn(3, 3, 48, 48)
    parts = model.named_embeddings(model(images))
    assert list(parts) == ["", "member0", "member1"]
    torch.testing.assert_close(parts["member1"], model(images, member=1))
    torch.testing.assert_close(parts[""].norm(dim=1), torch.ones(3))


def test_members_start_apart_or_alike() -> None:
    torch.manual_seed(0)
    apart, alike = create(), create(model_diversity=False)
    assert not torch.equal(*(m.head.weight for m in apart.network))
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in alike.network)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"intervals": [1]}, "2 members need one each"),
        ({"intervals": [2, 2]}, "all are above 1"),
        ({"update_mode": "ema", "backbones": ["test_resnet", "test_convnext"]}, "equal architecture"),
        ({"model_diversity": False, "backbones": ["test_resnet", "test_convnext"]}, "one architecture"),
        ({"relation_on": "logits"}, "relation_on='logits'"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(FgvczooError, match=message):
        create(**options)


def fit(fgvczoo_in: Any, birds: Path, *more: str, run: str = "run") -> tuple[int, str, str]:
    recipe = RECIPES / "dm2-tiny.yaml"
    return fgvczoo_in("fit", "--config", recipe, "--run", run, "--data.root", birds, *more)


def test_training_refuses_what_it_cannot_do(birds: Path, fgvczoo_in: Any) -> None:
    for more, message in (
        (["--trainer.accumulate_grad_batches", "2"], "its own intervals"),
        (["--data.view_augmentations", "[flip]"], "a view for each of 2 members, the batch has 1"),
        (
            ["--model.backbones", "[test_resnet]", "--model.intervals", "[1]", "--data.view_augmentations", "[flip]"],
            "at least two",
        ),
    ):
        status, _, err = fit(fgvczoo_in, birds, *more)
        assert status == 2 and message in err


@pytest.mark.parametrize("mode", ["accumulate_mean", "ema"])
def test_resumed_inside_an_interval_equals_unbroken(mode: str, birds: Path, fgvczoo_in: Any) -> None:
    """An epoch of 4 steps ends within the second member's interval of 3: its gradients so far are in the checkpoint."""
    more = ["--model.update_mode", mode]
    assert fit(fgvczoo_in, birds, *more, run="whole")[0] == 0
    assert fit(fgvczoo_in, birds, *more, "--trainer.max_epochs", "1", run="cut")[0] == 0
    assert fit(fgvczoo_in, birds, *more, "--ckpt_path", "last", run="cut")[0] == 0
    states = [fgvczoo.load(Path("runs") / run).state_dict() for run in ("whole", "cut")]
    assert all(torch.equal(a, b) for a, b in zip(*(state.values() for state in states)))


def test_a_member_that_diverges_teaches_nobody(birds: Path) -> None:
    model = create()
    model.log = lambda *args, **options: None
    broken = torch.full((4, 8), torch.nan)
    assert model._alive([torch.ones(4, 8), broken]) == [0]
    for _ in range(8):
        model._alive([torch.ones(4, 8), broken])
    with pytest.raises(FgvczooError, match="member 1 had no finite embeddings in 10 steps"):
        model._alive([torch.ones(4, 8), broken])


def test_an_rkd_checkpoint_is_a_cohort_of_one() -> None:
    from fgvczoo.models.dm2.network import Cohort

    cohort = Cohort(["resnet18"], [16])
    state = {
        ("base." + key.removeprefix("members.0.backbone.trunk.")) if "backbone" in key else
        key.replace("members.0.head", "linear"): value
        for key, value in cohort.state_dict().items()
    }  # fmt: skip
    model = fgvczoo.from_official("dm2", state)
    assert model.hparams["backbones"] == ["resnet18"] and model.hparams["embedding_dim"] == 16
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(model(images), cohort.eval()(images))
    with pytest.raises(FgvczooError, match="no key of a network"):
        fgvczoo.from_official("dm2", state | {"other.weight": torch.ones(1)})
