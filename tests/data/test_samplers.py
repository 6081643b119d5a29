import pytest
from hypothesis import given
from hypothesis import strategies as st

from fgvczoo.data.samplers import EpochBatchSampler, ExactSampler
from fgvczoo.errors import FgvczooError

lengths = st.integers(1, 60)
processes = st.integers(1, 4)


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


@given(st.integers(0, 60), processes)
def test_exact_shares_hold_every_row_once_in_order(length, world_size):
    shares = [list(ExactSampler(length, world_size=world_size, rank=rank)) for rank in range(world_size)]
    assert [row for share in shares for row in share] == list(range(length))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert [len(ExactSampler(length, world_size=world_size, rank=rank)) for rank in range(world_size)] == [
        *map(len, shares)
    ]
