"""Place and date as numbers: what is missing, what is refused, and that masking does not depend on the split."""

from __future__ import annotations

import datetime
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fgvczoo import FgvczooError
from fgvczoo.nn.metadata import (
    MetadataEncoder,
    MetadataMasking,
    month_and_day,
    month_and_hour,
    parse_date,
    place_on_sphere,
    place_wrapped,
)

GEO = MetadataEncoder({"date": "month-hour", "place": "sphere"})
NAN = math.nan


def encoded(**given: object) -> list[list[float]]:
    raw = {name: value[None] for name, value in GEO.read(given).items()}
    return [group[0].tolist() for group in GEO.encode(raw)]


@given(st.floats(-90, 90), st.floats(-180, 180))
def test_places_lie_on_the_sphere_and_meet_at_the_date_line(latitude: float, longitude: float) -> None:
    place = torch.tensor([[latitude, longitude], [latitude, -180.0], [latitude, 180.0]], dtype=torch.float64)
    on_sphere = place_on_sphere(place)
    assert torch.allclose(on_sphere.norm(dim=1), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(on_sphere[1], on_sphere[2], rtol=0, atol=1e-9)
    wrapped = place_wrapped(place.float())
    torch.testing.assert_close(wrapped[1], wrapped[2], rtol=0, atol=1e-5)


def test_what_is_missing_is_zero_by_group() -> None:
    assert encoded() == [[0.0] * 4, [0.0] * 3]
    date, place = encoded(lat=0.0, lon=0.0)
    assert date == [0.0] * 4 and place == [1.0, 0.0, 0.0]  # 0, 0 is a place
    date, place = encoded(date="2021-06-05 06:00", lat=None, lon=None)
    assert place == [0.0] * 3 and date == pytest.approx([0, -1, 1, 0], abs=1e-6)
    assert encoded(date="2021-06-05")[0] == pytest.approx([0, -1, 0, 0], abs=1e-6)  # no hour
    assert encoded(lat=NAN, lon=3.0)[1] == [0.0] * 3
    official = MetadataEncoder({"place": "sphere"}, zero_is_missing=True)
    assert official.encode({"place": torch.tensor([[0.0, 20.0], [1.0, 2.0]])})[0].abs().sum(1).gt(0).tolist() == [0, 1]
    half = GEO.encode({"place": torch.ones(2, 2), "date": torch.ones(2, 2)}, {"place": torch.tensor([True, False])})
    assert half[1][1].tolist() == [0.0] * 3 and half[1][0].any() and half[0].any(dim=1).all()


def test_one_moment_in_many_words() -> None:
    expected = encoded(date="2021-06-05 14:30:00")
    for date in (
        "2021-06-05T14:30",
        " 2021-06-05 14:59:59+02:00",
        "2021-06-05 14",
        datetime.datetime(2021, 6, 5, 14),
        (6, 14),
    ):
        assert encoded(date=date) == expected
    assert encoded(month=6, hour="14") == encoded(date="2021-06-05", hour=14) == expected
    assert encoded(place=(46.9, 7.4)) == encoded(lat="46.9", lon=7.4) == encoded(latitude=46.9, longitude=7.4)


@pytest.mark.parametrize(
    "given_, words",
    [
        ({"lat": 46.9, "lon": 190}, "longitude 190; expected -180..180"),
        ({"lat": -90.5, "lon": 0}, "latitude -90.5"),
        ({"lat": math.inf, "lon": 0}, "latitude inf"),
        ({"lat": 1}, "latitude alone is no place"),
        ({"lat": "north", "lon": 1}, "'north' is no number"),
        ({"place": 3}, "expected latitude and longitude"),
        ({"date": "2021-02-30"}, "no day 30 in that month"),
        ({"date": "2021-13-01"}, "month 13; expected 1..12"),
        ({"date": "2021-12-01 25:00"}, "the time 25:00"),
        ({"month": 13}, "month 13; expected 1..12"),
        ({"month": 1, "hour": 24}, "hour 24; expected 0..23"),
        ({"date": "yesterday"}, "expected YYYY-MM-DD"),
        ({"date": 6}, "date 6; expected a text"),
        ({"altitude": 3}, "reads no 'altitude'.*did you mean latitude"),
    ],
)
def test_nonsense_is_one_line_that_names_the_row(given_: dict[str, object], words: str) -> None:
    with pytest.raises(FgvczooError, match=f"^row 7.*{words}"):
        GEO.read(given_, "row 7")


def test_batches_are_checked_where_they_are_valid() -> None:
    raw = {"place": torch.tensor([[0.0, 190.0], [NAN, 3.0], [1.0, 190.0]])}
    place = MetadataEncoder({"place": "sphere"})
    place.check(raw, ["a", "b", "c"], {"place": torch.tensor([False, True, False])})
    with pytest.raises(FgvczooError, match=r"^c: longitude 190"):
        place.check(raw, ["a", "b", "c"], {"place": torch.tensor([False, True, True])})
    with pytest.raises(FgvczooError, match="no metadata 'date', only place"):
        GEO.encode(raw)


def test_vectors_are_taken_as_they_are() -> None:
    encoder = MetadataEncoder({"attributes": 3, "text": [2, 4]})
    assert encoder.shapes == (("attributes", 3, 1), ("text", 4, 2))
    raw = {"attributes": torch.tensor([[1.0, 0, 1], [NAN, 0, 1]]), "text": torch.ones(2, 2, 4)}
    attributes, text = encoder.encode(raw, {"text": torch.tensor([True, False])})
    assert attributes.tolist() == [[1, 0, 1], [0, 0, 0]] and text.sum(dim=(1, 2)).tolist() == [8, 0]
    assert encoder.read({"attributes": [1, 0, 1]})["text"].isnan().all()
    with pytest.raises(FgvczooError, match=r"attributes of shape \(2,\); expected \(3,\)"):
        encoder.read({"attributes": [1, 0]})
    with pytest.raises(FgvczooError, match="attributes 'red' are no numbers"):
        encoder.read({"attributes": "red"})
    with pytest.raises(FgvczooError, match="infinite"):
        encoder.read({"attributes": [1, 0, math.inf]})


@pytest.mark.parametrize(
    "groups", [{"place": "cube"}, {"place": 3}, {"attributes": "all"}, {"text": [1, 2, 3]}, {"a": 0}]
)
def test_unknown_encodings_are_refused(groups: dict[str, object]) -> None:
    with pytest.raises(FgvczooError, match="metadata "):
        MetadataEncoder(groups)  # type: ignore[arg-type]


def test_days_where_there_are_days() -> None:
    dates = torch.tensor([[12.0, NAN, 31.0], [3.0, 1.0, NAN]])
    torch.testing.assert_close(month_and_day(dates), torch.tensor([[0.0, 1, 0, 1], [0, 0, 0, 0]]), rtol=0, atol=1e-6)
    assert month_and_hour(dates)[0, 2:].tolist() == [0, 0]
    with pytest.raises(FgvczooError, match="needs the day"):
        month_and_day(dates[:, :2])
    assert parse_date("2020-02-29 ").day == 29


@given(st.integers(1, 40), st.floats(-1, 2), st.floats(0, 1))
def test_masking_keeps_its_share(batch: int, progress: float, probability: float) -> None:
    masking = MetadataMasking(probability=probability)
    count = masking.count(batch, progress)
    assert 0 <= count <= batch
    rows = masking.rows(batch, progress, torch.Generator().manual_seed(0))
    assert int(rows.sum()) == count
    assert masking.count(batch, 1.0) == 0 and MetadataMasking().count(batch, 0.0) == batch
    assert MetadataMasking("constant", probability).count(batch, progress) == int(batch * probability)


def test_masking_is_checked() -> None:
    with pytest.raises(FgvczooError, match="probability=2"):
        MetadataMasking(probability=2)
    with pytest.raises(FgvczooError, match="schedule='cosine'"):
        MetadataMasking("cosine")  # type: ignore[arg-type]
