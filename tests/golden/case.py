"""One golden case: its configuration, weights, inputs and expected outputs, and the comparison with ours."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import synth

# What may describe an input; anything else would change its numbers, so it must not be passed over.
_INPUT_KEYS = {"kind", "name", "shape", "high", "then", "values", "dtype", "note", "abs", "scale", "shift", "map"}


@dataclass(frozen=True)
class Verdict:
    """One output of a case: its name, whether it passes, and what to know if it does not."""

    output: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Case:
    """A case as its file describes it. `spec` is the file, `path` where it lies."""

    path: Path
    spec: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> Case:
        return cls(path, json.loads(path.read_text()))

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def paper(self) -> str:
        return str(self.spec.get("paper", self.path.parent.name))

    @property
    def config(self) -> dict[str, Any]:
        return dict(self.spec["config"])

    @cached_property
    def state(self) -> dict[str, Tensor]:
        """The authors' state dict, under their keys."""
        return {key: torch.from_numpy(synth.weight(key, shape)) for key, shape in self.spec["state"].items()}

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        """By name, as generated; what `then` says of one is for the adapter to do."""
        return {key: _input(key, spec) for key, spec in self.spec["inputs"].items()}

    @property
    def then(self) -> dict[str, str]:
        """What is to be done with a generated input before it is used, in the case's words; by input."""
        return {key: spec["then"] for key, spec in self.spec["inputs"].items() if "then" in spec}

    @property
    def constants(self) -> dict[str, str]:
        """Tensors of the authors' state dict that are not in `state`, in the case's words; by key."""
        return dict(self.spec.get("constants", {}))

    @cached_property
    def outputs(self) -> dict[str, Any]:
        """What the authors' implementation gives, by name: tensors, and plain values where no shape is given. Of a
        large one only the first 64 values and some moments are known, as X.first64 and X.moments."""
        arrays = self.path.with_suffix(".npz")
        stored = dict(np.load(arrays)) if arrays.exists() else {}
        outputs: dict[str, Any] = {}
        for key, spec in self.spec["outputs"].items():
            if "slice" in spec:
                outputs[f"{key}.first64"] = torch.from_numpy(stored[spec["npz"]])
                outputs[f"{key}.moments"] = torch.tensor([spec[name] for name in ("mean", "std", "abs_sum")])
            elif "shape" in spec:
                outputs[key] = _output(key, spec, stored)
            else:
                outputs[key] = spec["values"]
        return outputs

    def tolerance(self, output: str) -> dict[str, float]:
        chosen = dict(self.spec.get("tolerance_overrides", {}).get(output, self.spec["tolerance"]))
        if chosen.pop("box", "exact") != "exact" or set(chosen) != {"rtol", "atol"}:
            raise ValueError(f"{self.path}: tolerance {chosen} of {output}: expected rtol and atol")
        return chosen

    def compare(self, ours: Mapping[str, Any]) -> list[Verdict]:
        """Every expected output against ours. `X.summary`, `X.first64` and the like are taken from our X."""
        return [self._verdict(name, truth, ours) for name, truth in self.outputs.items()]

    def _verdict(self, name: str, truth: Any, ours: Mapping[str, Any]) -> Verdict:
        value = ours.get(name)
        whole, _, view = name.rpartition(".")
        if value is None and view in VIEWS and whole in ours:
            value = VIEWS[view](ours[whole])
        if value is None:
            return Verdict(name, False, "the adapter gives no such output")
        if not isinstance(truth, Tensor):
            return Verdict(name, value == truth, f"{value}, expected {truth}"[:500])
        value = value.detach()
        if truth.dtype == torch.float64:  # of an output without a type: whole numbers, too, are compared as numbers
            value = value.double()
        if value.shape != truth.shape:
            return Verdict(name, False, f"shape {tuple(value.shape)}, expected {tuple(truth.shape)}")
        if value.is_floating_point() != truth.is_floating_point():
            return Verdict(name, False, f"type {value.dtype}, expected {truth.dtype}")
        if not truth.is_floating_point():
            wrong = int((value != truth).sum())
            return Verdict(name, wrong == 0, f"{wrong} of {truth.numel()} differ")
        tolerance = self.tolerance(name)
        value, truth = value.double(), truth.double()
        error = (value - truth).abs()
        passed = torch.isclose(value, truth, rtol=tolerance["rtol"], atol=tolerance["atol"], equal_nan=True)
        used = (error / (tolerance["atol"] + tolerance["rtol"] * truth.abs())).nan_to_num(nan=0.0)
        detail = f"largest error {_largest(error):.2g}, {_largest(used):.2g} of the tolerance"
        if not passed.all():
            detail += f", {int((~passed).sum())} of {truth.numel()} outside"
        return Verdict(name, bool(passed.all()), detail)


def _largest(values: Tensor) -> float:
    return float(values.max()) if values.numel() else 0.0


def _summary(values: Tensor) -> Tensor:
    """Mean, population standard deviation, smallest, largest, Euclidean norm."""
    values = values.double()
    return torch.stack([values.mean(), values.std(correction=0), values.min(), values.max(), values.norm()])


def _moments(values: Tensor) -> Tensor:
    """Mean, population standard deviation, sum of absolute values."""
    values = values.double()
    return torch.stack([values.mean(), values.std(correction=0), values.abs().sum()]).float()


VIEWS = {
    "moments": _moments,
    "summary": _summary,
    "first64": lambda values: values.flatten()[:64],
    "shape": lambda values: torch.tensor(values.shape),
}


def _input(key: str, spec: Mapping[str, Any]) -> Tensor:
    unknown = set(spec) - _INPUT_KEYS
    if unknown:
        raise ValueError(f"input {key}: unknown description {', '.join(sorted(unknown))}")
    if "values" in spec:
        values = torch.tensor(spec["values"])
        return values.reshape(spec["shape"]) if "shape" in spec else values
    match spec["kind"]:
        case "array":
            values = torch.from_numpy(synth.array(spec["name"], spec["shape"]))
            values = (values.abs() if spec.get("abs") else values) * spec.get("scale", 1) + spec.get("shift", 0)
            if spec.get("map", "sigmoid") != "sigmoid":
                raise ValueError(f"input {key}: unknown map {spec['map']!r}")
            return values.sigmoid() if "map" in spec else values
        case "image":
            return torch.from_numpy(synth.image(spec["name"], spec["shape"]))
        case "integers":
            return torch.from_numpy(synth.integers(spec["name"], spec["shape"], spec["high"]))
        case kind:
            raise ValueError(f"input {key}: unknown kind {kind!r}")


def _output(key: str, spec: Mapping[str, Any], stored: Mapping[str, np.ndarray]) -> Tensor:
    # Outputs without a type are numbers to all their digits, whole ones too.
    dtype = getattr(torch, spec.get("dtype", "float64"))
    values = (
        torch.from_numpy(stored[spec["npz"]]) if "npz" in spec else torch.tensor(spec["values"], dtype=torch.float64)
    )
    return values.to(dtype).reshape(spec["shape"])


def find_cases(folder: Path) -> Iterator[Case]:
    """The cases of a folder that holds them, or that holds one folder of them a paper; in order of their paths."""
    for path in sorted([*folder.glob("*.json"), *folder.glob("*/*.json")]):
        yield Case.read(path)


def adapter(paper: str) -> Any:
    """The module that computes a paper's cases with our code, None where there is none."""
    name = f"{__package__}.adapters.{paper.replace('-', '_')}"
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


def run(case: Case, module: Any) -> list[Verdict]:
    """The case through an adapter; one that raises fails every output."""
    try:
        ours = module.run(case)
    except Exception as error:
        return [Verdict(name, False, f"{type(error).__name__}: {error}") for name in case.outputs]
    return case.compare(ours)
