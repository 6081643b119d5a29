from itertools import groupby

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fgvczoo.data.samplers import BalancedBatchSampler, EpochBatchSampler, ExactSampler, PKBatchSampler
from fgvczoo.errors import FgvczooError

lengths = st.integers(1, 60)
processes = st.integers(1, 4)
classes = st.lists(st.integers(0, 5), min_size=1, max_size=40)  # labels of rows


def make(length, batch_size, world_size=1, rank=0, **options):
    return EpochBatchSampler(length, batch_size, seed=3, world_size=world_size, rank=rank, **options)


@given(lengths, st.integers(1, 9), st.integers(0, 3))
def test_one_process_sees_every_row_once(length, batch_size, epoch):
    sampler = make(length, batch_size)
    sampler.epoch = epoch
    batches = list(sampler)
    assert len(batches) == len(sampler)
    assert sorted(row for batch in batches for _, row in batch) == list(range(length))
    assert {place for batch in batches for place, _ in batch} == {epoch}
    assert {len(batch) for batch in batches[:-1]} <= {batch_size}


@given(lengths, st.integers(1, 4), processes)
def test_processes_share_the_batches_of_one(length, share, world_size):
    alone = list(make(length, share * world_size))
    ranks = [list(make(length, share * world_size, world_size, rank)) for rank in range(world_size)]
    lens = {len(make(length, share * world_size, world_size, rank)) for rank in range(world_size)}
    assert lens == {len(rank) for rank in ranks} and len(lens) == 1
    for whole, *shares in zip(alone, *ranks):
        assert len({len(share) for share in shares}) == 1
        joined = [pair for share in shares for pair in share]
        assert joined == whole[: len(whole) // world_size * world_size]
    assert 0 <= len(alone) - len(ranks[0]) <= 1


def test_epochs_differ_and_repeat():
    sampler = make(20, 5)
    orders = []
    for epoch in (0, 1, 0):
        sampler.epoch = epoch
        orders.append([row for batch in sampler for _, row in batch])
    assert orders[0] == orders[2] != orders[1]
    other = EpochBatchSampler(20, 5, seed=4)
    assert [row for batch in other for _, row in batch] != orders[0]


def test_without_shuffling_rows_stay_in_order():
    assert [row for batch in make(7, 3, shuffle=False) for _, row in batch] == list(range(7))


def test_a_resumed_epoch_goes_on_where_it_stopped_and_later_ones_are_whole():
    whole, resumed = make(23, 4), make(23, 4)
    whole.epoch = resumed.epoch = resumed.first = 2
    resumed.skip = 4
    assert list(resumed) == list(whole)[4:]
    assert len(resumed) == len(whole) == 6
    whole.epoch = resumed.epoch = 3
    assert list(resumed) == list(whole)


def test_reading_ahead_keeps_the_epoch():
    sampler = make(8, 2)
    batches = iter(sampler)
    first = next(batches)
    sampler.epoch = 5
    assert [first, *batches] == list(make(8, 2))


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(FgvczooError, match="multiple of 3"):
        make(10, 4, world_size=3)
    with pytest.raises(FgvczooError, match="at least 1"):
        make(10, 0)


# --- repeated augmentation, and classes equally often


@given(lengths, st.integers(1, 3), st.integers(1, 3), st.integers(2, 3))
def test_repeats_lie_side_by_side_and_are_shared_as_in_one_process(length, share, world_size, repeats):
    batch_size = share * world_size * repeats
    alone = list(make(length, batch_size, repeats=repeats))
    ranks = [list(make(length, batch_size, world_size, rank, repeats=repeats)) for rank in range(world_size)]
    assert [len(make(length, batch_size, world_size, rank, repeats=repeats)) for rank in range(world_size)] == [
        len(own) for own in ranks
    ]
    rows = [row for batch in alone for _, row, _ in batch]
    assert len(set(rows)) * repeats == len(rows) <= length
    for batch in alone:
        assert [number for *_, number in batch] == [*range(repeats)] * (len(batch) // repeats)
    for whole, *shares in zip(alone, *ranks):
        joined = [item for own in shares for item in own]
        assert joined == whole[: len(joined)] and len(whole) - len(joined) < world_size * repeats


def test_a_batch_that_repeats_do_not_fill_is_refused():
    with pytest.raises(FgvczooError, match="batch_size=4 with repeats=3: expected a multiple of 6"):
        make(10, 4, world_size=2, repeats=3)


@given(classes, st.integers(1, 6), st.integers(0, 2))
def test_every_class_is_drawn_as_often_as_any_other(labels, batch_size, epoch):
    labels = np.array(labels)
    sampler = BalancedBatchSampler(labels, batch_size, seed=3)
    sampler.epoch = epoch
    rows = np.array([row for batch in sampler for _, row in batch])
    assert len(rows) == len(labels)
    of_class = np.bincount(labels[rows], minlength=6)[np.unique(labels)]
    assert of_class.max() - of_class.min() <= 1
    for label in np.unique(labels):  # and its images alike
        of_row = np.bincount(rows, minlength=len(labels))[labels == label]
        assert of_row.max() - of_row.min() <= 1
    shares = [BalancedBatchSampler(labels, 2, seed=3, world_size=2, rank=rank) for rank in (0, 1)]
    one = BalancedBatchSampler(labels, 2, seed=3)
    joined = [[*first, *second] for first, second in zip(*shares)]
    assert joined == list(one)[: len(joined)]


# --- P x K


def drawn(labels, batch_size, k, *, epoch=0, seed=3, **options) -> list[list[int]]:
    sampler = PKBatchSampler(np.array(labels), batch_size, k, seed=seed, **options)
    sampler.epoch = epoch
    batches = list(sampler)
    assert len(batches) == len(sampler) and {place for batch in batches for place, _ in batch} == {epoch}
    return [[row for _, row in batch] for batch in batches]


@given(classes, st.integers(1, 5), st.data())
def test_a_batch_is_whole_classes_until_it_is_full(labels, k, data):
    sizes = np.minimum(np.bincount(labels), k)
    batch_size = data.draw(st.integers(1, int(sizes.sum())))
    for batch in drawn(labels, batch_size, k, batches_per_epoch=4):
        assert len(batch) == batch_size == len(set(batch))
        groups = [(label, len(list(rows))) for label, rows in groupby(labels[row] for row in batch)]
        assert len({label for label, _ in groups}) == len(groups)  # side by side
        # K of each, or all that a small class has; only the last class may be cut.
        assert all(number == sizes[label] for label, number in groups[:-1])
        assert groups[-1][1] <= sizes[groups[-1][0]]


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 3))
def test_processes_share_the_classes_of_one(world_size, p, k, epoch):
    labels = np.arange(60) % 12
    alone = drawn(labels, world_size * p * k, k, epoch=epoch)
    ranks = [
        drawn(labels, world_size * p * k, k, epoch=epoch, world_size=world_size, rank=rank)
        for rank in range(world_size)
    ]
    assert [[row for share in shares for row in share] for shares in zip(*ranks, strict=True)] == alone
    assert all((np.bincount(labels[batch]) % k == 0).all() for shares in ranks for batch in shares)


def test_batches_of_classes_are_drawn_from_seed_epoch_and_number():
    labels = np.arange(40) % 8
    first = drawn(labels, 8, 2, batches_per_epoch=30)
    assert first == drawn(labels, 8, 2, batches_per_epoch=30)
    assert first[:5] == drawn(labels, 8, 2) and len({tuple(batch) for batch in first}) == 30
    assert not {*map(tuple, first)} & {*map(tuple, drawn(labels, 8, 2, epoch=1))}
    assert not {*map(tuple, first)} & {*map(tuple, drawn(labels, 8, 2, seed=4))}
    resumed = PKBatchSampler(labels, 8, 2, seed=3, batches_per_epoch=30)
    resumed.skip = 11
    assert [[row for _, row in batch] for batch in resumed] == first[11:]
    resumed.epoch = 1
    assert len(list(resumed)) == 30


def test_classes_and_their_images_are_drawn_evenly():
    """40 classes of 3 to 12 images, 3000 batches of 10 x 2: each class is in a quarter of them, its images alike."""
    labels = np.repeat(np.arange(40), np.arange(40) % 10 + 3)
    batches = np.array(drawn(labels, 20, 2, batches_per_epoch=3000))
    of_class = np.bincount(labels[batches].reshape(-1), minlength=40) / 2
    assert np.abs(of_class / 3000 - 0.25).max() < 5 * np.sqrt(0.25 * 0.75 / 3000)
    of_row, expected = np.bincount(batches.reshape(-1), minlength=len(labels)), 1500 / np.bincount(labels)[labels]
    assert (np.abs(of_row - expected) < 5 * np.sqrt(expected)).all()


def test_the_batches_of_a_published_protocol():
    """100 classes of 58 to 60 images, 128 of them with 5 of a class: 25 classes and 3 images of one more."""
    labels = np.repeat(np.arange(100), np.arange(100) % 3 + 58)
    for batch in drawn(labels, 128, 5, batches_per_epoch=100):
        assert sorted(np.bincount(labels[batch])[np.unique(labels[batch])]) == [3] + [5] * 25
    assert len(drawn(labels, 112, 2)) == len(labels) // 112


def test_a_batch_that_the_classes_cannot_fill_is_refused():
    with pytest.raises(FgvczooError, match="batch_size=6 with images_per_class=2: 3 classes have 5 images"):
        drawn([0, 0, 0, 1, 2, 2], 6, 2)
    with pytest.raises(FgvczooError, match="multiple of 2"):
        drawn([0, 0, 1], 3, 2, world_size=2)
    assert len(drawn([0, 0, 0, 1, 2, 2], 5, 2)) == 1


# --- everything but training


@given(st.integers(0, 60), processes)
def test_exact_shares_hold_every_row_once_in_order(length, world_size):
    shares = [list(ExactSampler(length, world_size=world_size, rank=rank)) for rank in range(world_size)]
    assert [row for share in shares for row in share] == list(range(length))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert [len(ExactSampler(length, world_size=world_size, rank=rank)) for rank in range(world_size)] == [
        *map(len, shares)
    ]
