"""What comes with a picture besides its pixels: place, date, attributes, vectors of text; as numbers for a network.

Raw values, as batches carry them (`metadata` name -> (B, k), `metadata_valid`): `place` latitude and longitude in
degrees, `date` month 1..12, hour 0..23 and, where a data set has it, day 1..31. What is not known is NaN, or not valid.
A missing group is encoded as zeros, which no known value gives.
"""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fgvczoo.errors import FgvczooError, did_you_mean

Masking = Literal["linear", "constant"]
Description = str | int | list[int]


class MetadataShape(NamedTuple):
    """What a network takes of a group: `tokens` vectors of `width` numbers."""

    name: str
    width: int
    tokens: int = 1


# -- encodings: raw values (..., k) -> vectors (..., width); missing ones -> zeros -------------------------------------


def place_on_sphere(place: Tensor) -> Tensor:
    """Latitude, longitude in degrees -> the point on the unit sphere, (..., 3) (MetaFormer, section 3.3)."""
    latitude, longitude = place.deg2rad().unbind(-1)
    flat = latitude.cos()
    return _known(torch.stack([flat * longitude.cos(), flat * longitude.sin(), latitude.sin()], dim=-1))


def place_wrapped(place: Tensor) -> Tensor:
    """Latitude, longitude in degrees -> sine and cosine of pi lat / 90 and of pi lon / 180, (..., 4) (BirdSAT). Both
    poles coincide."""
    latitude, longitude = (math.pi * place / torch.tensor([90.0, 180.0], device=place.device)).unbind(-1)
    return _known(torch.stack([latitude.sin(), latitude.cos(), longitude.sin(), longitude.cos()], dim=-1))


def month_and_hour(date: Tensor) -> Tensor:
    """Month 1..12 and hour 0..23 as places on two circles: sine and cosine each, (..., 4). Without an hour its two
    numbers are 0."""
    month, hour = _circle(date[..., 0], 12), _circle(date[..., 1], 24)
    return torch.cat([_known(month), torch.where(date[..., :1].isnan(), 0, _known(hour))], dim=-1)


def month_alone(date: Tensor) -> Tensor:
    """As `month_and_hour`, of dates whose hour means nothing (iNaturalist 2017): its two numbers are 0."""
    month = _known(_circle(date[..., 0], 12))
    return torch.cat([month, torch.zeros_like(month)], dim=-1)


def month_and_day(date: Tensor) -> Tensor:
    """Month 1..12 and day 1..31 as places on two circles of 12 and 31, (..., 4) (BirdSAT). Raises `FgvczooError` for
    dates without the column of days."""
    if date.shape[-1] < 3:
        raise FgvczooError("dates of month and hour; the encoding month-day needs the day, too")
    return _known(torch.cat([_circle(date[..., 0], 12), _circle(date[..., 2], 31)], dim=-1))


def _circle(value: Tensor, period: float) -> Tensor:
    angle = 2 * math.pi / period * value
    return torch.stack([angle.sin(), angle.cos()], dim=-1)


def _known(encoded: Tensor) -> Tensor:
    """Zeros where a number of the vector is not known."""
    return torch.where(encoded.isnan().any(dim=-1, keepdim=True), 0, encoded)


Encoding = Callable[[Tensor], Tensor]
ENCODINGS: dict[str, dict[str, tuple[Encoding, int]]] = {
    "place": {"sphere": (place_on_sphere, 3), "wrapped": (place_wrapped, 4)},
    "date": {"month-hour": (month_and_hour, 4), "month": (month_alone, 4), "month-day": (month_and_day, 4)},
}
"""Group -> name of an encoding -> (function, numbers that it gives)."""


class MetadataEncoder:
    """The groups that a model reads, and how.

    groups: name in the batch -> for place and date the name of an encoding (see `ENCODINGS`), for others the length of
        their vector, or [tokens, length] of several. The order is that of the network's tokens.
    zero_is_missing: a latitude or longitude of exactly 0 counts as missing, as in MetaFormer's code.
    """

    def __init__(self, groups: Mapping[str, Description], zero_is_missing: bool = False) -> None:
        self.zero_is_missing = zero_is_missing
        self.shapes: tuple[MetadataShape, ...] = tuple(_shape(name, text) for name, text in groups.items())
        self._encodings = {name: ENCODINGS[name][text][0] for name, text in groups.items() if isinstance(text, str)}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(shape.name for shape in self.shapes)

    @property
    def words(self) -> list[str]:
        """What `read` takes: the names of the groups, and of the columns of place and date."""
        columns = [word for name in self.names if name in COLUMNS for word in COLUMNS[name]]
        return [*self.names, *columns, *(short for short, long in _ALIASES.items() if long in columns)]

    def missing(self, count: int) -> dict[str, Tensor]:
        """Raw values of `count` pictures of which nothing is known."""
        return {shape.name: torch.full((count, *self._raw(shape)), torch.nan) for shape in self.shapes}

    def _raw(self, shape: MetadataShape) -> tuple[int, ...]:
        if shape.name in self._encodings:
            return (len(COLUMNS[shape.name]),)
        return (shape.width,) if shape.tokens == 1 else (shape.tokens, shape.width)

    def encode(self, raw: Mapping[str, Tensor], valid: Mapping[str, Tensor] | None = None) -> list[Tensor]:
        """Vectors of each group, (B, width) or (B, tokens, width), float32; zeros where it is missing.

        raw: of each group (B, k) or (B, t, k); a group that is not there raises `FgvczooError`. valid: (B,) bool each;
        groups without an entry are valid where they are not NaN.
        """
        encoded = []
        for shape in self.shapes:
            if shape.name not in raw:
                raise FgvczooError(f"no metadata {shape.name!r}, only {', '.join(raw) or 'none'}; the model reads it")
            values = raw[shape.name].float()
            if valid is not None and shape.name in valid:
                known = valid[shape.name].view(-1, *[1] * (values.ndim - 1))
                values = torch.where(known, values, torch.nan)
            if self.zero_is_missing and shape.name == "place":
                values = torch.where((values == 0).any(dim=-1, keepdim=True), torch.nan, values)
            if shape.name in self._encodings:
                encoded.append(self._encodings[shape.name](values))
            else:
                gone = values.flatten(1).isnan().any(dim=1).view(-1, *[1] * (values.ndim - 1))
                encoded.append(torch.where(gone, 0, values))
        return encoded

    # -- what people write ----------------------------------------------------------------------------------------

    def read(self, given: Mapping[str, Any], where: str = "metadata") -> dict[str, Tensor]:
        """Raw values of one picture from what a person writes.

        given: `lat`, `lon` (or latitude, longitude; degrees) or `place` (both); `date` ("2021-06-05 14:30", a datetime,
        or month and hour as numbers), or `month`, `hour`; other groups by their names, as arrays. None, NaN and what is
        not named are missing.

        Raises `FgvczooError`, which begins with `where`, for values outside their ranges, days that do not exist,
        vectors of another length, and metadata that the model does not read.
        """
        values = {_ALIASES.get(key, key): value for key, value in given.items()}
        for key in given:
            if key not in self.words:
                raise FgvczooError(
                    f"{where}: the model reads no {key!r}, only {', '.join(self.names)}{did_you_mean(key, self.words)}"
                )
        raw = {name: tensor[0] for name, tensor in self.missing(1).items()}
        for shape in self.shapes:
            if shape.name == "place":
                raw["place"] = _place(values, where)
            elif shape.name == "date":
                raw["date"] = _date(values, where)
            elif (vector := values.get(shape.name)) is not None:
                try:
                    tensor = torch.as_tensor(np.asarray(vector, np.float32))
                except (TypeError, ValueError):
                    raise FgvczooError(f"{where}: {shape.name} {str(vector)[:40]!r} are no numbers") from None
                if tuple(tensor.shape) != self._raw(shape):
                    raise FgvczooError(
                        f"{where}: {shape.name} of shape {tuple(tensor.shape)}; expected {self._raw(shape)}"
                    )
                raw[shape.name] = tensor
        self.check({name: tensor[None] for name, tensor in raw.items()}, [where])
        return raw

    def check(
        self, raw: Mapping[str, Tensor], rows: Sequence[object], valid: Mapping[str, Tensor] | None = None
    ) -> None:
        """Raises `FgvczooError` naming the row of a value outside its range: latitude -90..90, longitude -180..180,
        month 1..12, hour 0..23, day 1..31, infinite numbers. NaN, and what is not valid, is missing."""
        for name in self.names:
            values = raw.get(name)
            if values is None:
                continue
            used = torch.ones(len(values), dtype=torch.bool)
            if valid is not None and name in valid:
                used = valid[name].cpu()
            if name not in COLUMNS:
                bad = used & values.cpu().isinf().flatten(1).any(dim=1)
                if bad.any():
                    raise FgvczooError(f"{rows[int(bad.nonzero()[0])]}: {name} has a number that is infinite")
                continue
            for column, (what, (low, high)) in zip(values.cpu().unbind(-1), COLUMNS[name].items()):
                bad = used & ~column.isnan() & ~((column >= low) & (column <= high))
                if bad.any():
                    place = int(bad.nonzero()[0])
                    raise FgvczooError(
                        f"{rows[place]}: {what} {column[place]:g}; expected {low:g}..{high:g}, or nothing where it is"
                        " not known"
                    )


COLUMNS: dict[str, dict[str, tuple[float, float]]] = {
    "place": {"latitude": (-90, 90), "longitude": (-180, 180)},
    "date": {"month": (1, 12), "hour": (0, 23), "day": (1, 31)},
}
"""Group -> what its raw columns hold, and their ranges."""
_ALIASES = {"lat": "latitude", "lon": "longitude", "lng": "longitude"}


def _shape(name: str, described: Description) -> MetadataShape:
    if name in ENCODINGS:
        if not isinstance(described, str) or described not in ENCODINGS[name]:
            raise FgvczooError(f"metadata {name}: {described!r}; encodings are {', '.join(ENCODINGS[name])}")
        return MetadataShape(name, ENCODINGS[name][described][1])
    numbers = [described] if isinstance(described, int) else described
    if isinstance(numbers, str) or not 1 <= len(numbers) <= 2 or min(numbers) < 1:
        raise FgvczooError(f"metadata {name}: {described!r}; expected the length of its vector, or [tokens, length]")
    return MetadataShape(name, numbers[-1], numbers[0] if len(numbers) == 2 else 1)


# -- dates and places in words -----------------------------------------------------------------------------------------


class Date(NamedTuple):
    """month 1..12, hour 0..23 or NaN, day 1..31."""

    month: float
    hour: float
    day: float


_DATE = re.compile(r"(\d{1,4})-(\d{1,2})-(\d{1,2})(?:[ T]+(\d{1,2})(?::(\d{1,2}))?(?::(\d{1,2})(?:\.\d+)?)?)?\s*(.*)")
_ZONE = re.compile(r"(Z|UTC|[+-]\d{2}:?\d{2})?")
_OFFICIAL_DAY = re.compile(r"(\d+)-(\d+)-(\d+)")
_OFFICIAL_HOUR = re.compile(r"(\d+)-(\d+)-(\d+) (\d+):(\d+):(\d+)")


def parse_date(text: str, where: str = "date") -> Date:
    """ "YYYY-MM-DD", alone or with "hh:mm:ss" (or a part of it) behind a blank or a T; a time zone is accepted and left
    out of account: the local clock counts. Without a time the hour is NaN. An empty text is a missing date, all NaN.

    Raises `FgvczooError` for another form and for a day or hour that does not exist.
    """
    text = text.strip()
    if not text:
        return Date(math.nan, math.nan, math.nan)
    found = _DATE.fullmatch(text)
    if found is None or not _ZONE.fullmatch(found[7]):
        raise FgvczooError(f"{where}: date {text!r}; expected YYYY-MM-DD or YYYY-MM-DD hh:mm:ss")
    year, month, day, hour, minute = (int(part or 0) for part in found.groups()[:5])
    if not 1 <= month <= 12:
        raise FgvczooError(f"{where}: date {text!r} has month {month}; expected 1..12")
    if hour > 23 or minute > 59:
        raise FgvczooError(f"{where}: date {text!r} has the time {hour}:{minute:02}; expected 0:00..23:59")
    try:
        datetime.date(max(year, 1), month, day)
    except ValueError:
        raise FgvczooError(f"{where}: date {text!r}: there is no day {day} in that month") from None
    return Date(month, hour if found[4] else math.nan, day)


def parse_official_date(text: str | None, with_hour: bool = True) -> Date:
    """As MetaFormer's code reads dates: one blank between date and time, nothing is checked, and all is missing where
    the text does not fit (with_hour: also a date without a time)."""
    found = (_OFFICIAL_HOUR if with_hour else _OFFICIAL_DAY).match((text or "").strip())
    if found is None:
        return Date(math.nan, math.nan, math.nan)
    return Date(int(found[2]), int(found[4]) if with_hour else math.nan, int(found[3]))


def _number(value: Any, where: str, what: str) -> float:
    if value is None or value == "":
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError):
        raise FgvczooError(f"{where}: {what} {value!r} is no number") from None


def _place(values: Mapping[str, Any], where: str) -> Tensor:
    if values.get("place") is not None:
        if np.shape(values["place"]) != (2,):
            raise FgvczooError(f"{where}: place {values['place']!r}; expected latitude and longitude")
        pair = list(values["place"])
    elif ("latitude" in values) != ("longitude" in values):
        given = "latitude" if "latitude" in values else "longitude"
        raise FgvczooError(f"{where}: {given} alone is no place; give latitude and longitude")
    else:
        pair = [values.get("latitude"), values.get("longitude")]
    return torch.tensor([_number(v, where, what) for v, what in zip(pair, COLUMNS["place"])], dtype=torch.float32)


def _date(values: Mapping[str, Any], where: str) -> Tensor:
    date = values.get("date")
    if isinstance(date, datetime.datetime):
        found = Date(date.month, date.hour, date.day)
    elif isinstance(date, datetime.date):
        found = Date(date.month, math.nan, date.day)
    elif isinstance(date, str):
        found = parse_date(date, where)
    elif date is None or (isinstance(date, float) and math.isnan(date)):
        found = Date(*(_number(values.get(what), where, what) for what in COLUMNS["date"]))
    elif not isinstance(date, Sequence | np.ndarray | Tensor) or not 1 <= len(date) <= 3:
        raise FgvczooError(f"{where}: date {date!r}; expected a text, a datetime, or month and hour")
    else:
        numbers = [_number(value, where, "date") for value in date]
        found = Date(*(numbers + [math.nan] * (3 - len(numbers)))[:3])
    if math.isnan(found.hour):
        found = found._replace(hour=_number(values.get("hour"), where, "hour"))
    return torch.tensor(found, dtype=torch.float32)


# -- masking -----------------------------------------------------------------------------------------------------------


@dataclass
class MetadataMasking:
    """How much metadata is set to missing in training, so that a model learns to see before it learns to ask.

    schedule: "linear": the share falls from `probability` in the first epoch towards 0 after the last; "constant": it
        is `probability` throughout.
    probability: in [0, 1].
    per_process: each process masks that share of its own part of a batch, as MetaFormer's code does; by default the
        share is that of the global batch, and does not depend on how it is split.
    """

    schedule: Masking = "linear"
    probability: float = 1.0
    per_process: bool = False

    def __post_init__(self) -> None:
        if self.schedule not in ("linear", "constant"):
            raise FgvczooError(f"masking.schedule={self.schedule!r}; expected linear or constant")
        if not 0 <= self.probability <= 1:
            raise FgvczooError(f"masking.probability={self.probability}; expected a number in [0, 1]")

    def count(self, batch: int, progress: float) -> int:
        """How many of `batch` samples are masked. progress: epochs done, as a share of all; cut to [0, 1]."""
        left = 1 - min(max(progress, 0.0), 1.0) if self.schedule == "linear" else 1.0
        return int(batch * (self.probability * left))

    def rows(self, batch: int, progress: float, generator: torch.Generator) -> Tensor:
        """(batch,) bool, where metadata is masked: a random choice of `count` rows."""
        chosen = torch.zeros(batch, dtype=torch.bool)
        chosen[torch.randperm(batch, generator=generator)[: self.count(batch, progress)]] = True
        return chosen
