"""One golden case: its configuration, weights, inputs and expected outputs, and the comparison with ours."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
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
        """What the authors' implementation gives, by name: tensors, and plain values where it is ragged or no shape is
        given. Of a large X only parts and moments are known, as X.first64 and X.moments, or X.slice, X.mean, X.std."""
        arrays = self.path.with_suffix(".npz")
        stored = dict(np.load(arrays)) if arrays.exists() else {}
        outputs: dict[str, Any] = {}
        for key, spec in self.spec["outputs"].items():
            if "abs_sum" in spec:
                outputs[f"{key}.first64"] = torch.from_numpy(stored[spec["npz"]])
                outputs[f"{key}.moments"] = torch.tensor([spec[name] for name in ("mean", "std", "abs_sum")])
            elif "slice" in spec:
                outputs[f"{key}.slice"] = _part(spec, stored)
                for moment in ("mean", "std"):
                    outputs[f"{key}.{moment}"] = torch.tensor(spec[moment], dtype=torch.float64)
            elif spec.get("shape", "ragged") == "ragged":
                outputs[key] = spec["values"]
            else:
                outputs[key] = _output(key, spec, stored)
        return outputs

    def tolerance(self, output: str) -> dict[str, float]:
        """Of all outputs, or of those whose names match, or of those of their kind (scores, maps, ...)."""
        chosen = dict(self.spec.get("tolerance_overrides", {}).get(output, self.spec["tolerance"]))
        if all(isinstance(value, (dict, str)) for value in chosen.values()):
            patterns = [(pattern, pattern) for pattern in chosen] + [pair for pair in _KINDS if pair[1] in chosen]
            whole = output.rpartition(".")[0] if output.endswith((".slice", ".mean", ".std")) else output
            found = [key for pattern, key in patterns if fnmatch(whole, pattern)]
            chosen = chosen[found[0]] if found else _UNTOLD
            if isinstance(chosen, str) and chosen.startswith("exact"):
                chosen = {"rtol": 0.0, "atol": 0.0}
            chosen = {"rtol": 0.0, **chosen}
        if chosen.pop("box", "exact") != "exact" or set(chosen) != {"rtol", "atol"}:
            raise ValueError(f"{self.path}: tolerance {chosen} of {output}: expected rtol and atol")
        return chosen

    def compare(self, ours: Mapping[str, Any]) -> list[Verdict]:
        """Every expected output against ours. `X.summary`, `X.first64`, `X.slice` and the like are taken from our X."""
        return [self._verdict(name, truth, ours) for name, truth in self.outputs.items()]

    def _verdict(self, name: str, truth: Any, ours: Mapping[str, Any]) -> Verdict:
        value = ours.get(name)
        whole, _, view = name.rpartition(".")
        if value is None and whole in ours:
            if view == "slice":
                value = ours[whole].detach()[_index(self.spec["outputs"][whole]["slice"])]
            elif view in VIEWS:
                value = VIEWS[view](ours[whole])
        if value is None:
            return Verdict(name, False, "the adapter gives no such output")
        if not isinstance(truth, Tensor):
            return Verdict(name, value == truth, f"{value}, expected {truth}"[:500])
        value = value.detach()
        # Of an output without a type, whole numbers, too, are compared as numbers.
        if "dtype" not in self.spec["outputs"].get(name, {}) and truth.dtype == torch.float64:
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


# Kinds of outputs, where tolerances are given by kind.
_KINDS = (
    ("*grad_norm/*", "grad_norms"),
    ("loss_*", "losses"),
    ("bas", "losses"),
    ("area", "losses"),
    ("*M_*", "maps"),
    ("*map*", "maps"),
    ("*score*", "scores"),
    ("S*", "scores"),
    ("after_forward/*", "scores"),
)
_UNTOLD = {"rtol": 1e-9, "atol": 1e-9}  # of outputs that a case says no tolerance of: labels, counts, rates


def _moments(values: Tensor) -> Tensor:
    """Mean, population standard deviation, sum of absolute values."""
    values = values.double()
    return torch.stack([values.mean(), values.std(correction=0), values.abs().sum()]).float()


VIEWS = {
    "mean": lambda values: values.double().mean(),
    "std": lambda values: values.double().std(correction=0),
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


def _part(spec: Mapping[str, Any], stored: Mapping[str, np.ndarray]) -> Tensor:
    """The stored part of an output: `slice` is the index that took it from the whole."""
    values = stored[spec["npz"]] if "npz" in spec else np.array(spec["values"])
    return torch.from_numpy(values).double()


def _index(text: str) -> tuple[Any, ...]:
    """A numpy index as text, "[:, 0, ::3]", as a value."""
    parts = []
    for part in re.sub(r"\s", "", text).strip("[]").split(","):
        numbers = [int(number) if number else None for number in part.split(":")]
        parts.append(slice(*numbers) if len(numbers) > 1 else numbers[0])
    return tuple(parts)


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
