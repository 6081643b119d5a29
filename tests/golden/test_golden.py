"""The golden cases kept here, through our public calls; and the loader itself."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from . import synth
from .__main__ import main
from .case import Case, adapter, find_cases, run

CASES = list(find_cases(Path(__file__).parent))


@pytest.mark.parametrize("case", CASES, ids=[f"{case.paper}/{case.name}" for case in CASES])
def test_case(case: Case) -> None:
    failures = [f"{v.output}: {v.detail}" for v in run(case, adapter(case.paper)) if not v.passed]
    assert not failures, "\n".join(failures)


def test_numbers_from_names_never_change() -> None:
    """The definition, pinned: a change here would make every case worthless."""
    assert synth.integers("a", (5,), 10).tolist() == [3, 2, 7, 4, 9]
    pinned = [
        (synth.array("a", (2,)), [0.0364624, -1.6887709]),
        (
            synth.image("a", (1, 1, 16, 24))[0, 0, ::15, ::9],
            [[0.0364624, -1.3137202, -1.9897006], [2.2500589, 0.4951294, 0.2295093]],
        ),
        (synth.weight("n.num_batches_tracked", ()), 0),
        (synth.weight("n.running_var", (2,)), [1.1278291, 1.1507516]),
        (synth.weight("n.running_mean", (2,)), [-0.0783544, -0.0862649]),
        (synth.weight("n.bias", (2,)), [-0.0874872, -0.0448602]),
        (synth.weight("n.weight", (2,)), [1.1297777, 1.0826743]),
        (synth.weight("token", (2,)), [0.1341152, -0.0481502]),
        (synth.weight("w.weight", (1, 2, 2)), [[[0.2496019, 0.6006289], [-0.2372059, 0.6020587]]]),
    ]
    for numbers, expected in pinned:
        np.testing.assert_allclose(numbers, expected, rtol=0, atol=1e-6)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A case of a paper of its own, in a folder of papers."""
    spec = {
        "paper": "st-protopnet",
        "config": {},
        "state": {"layer.weight": [2, 3]},
        "inputs": {"x": {"kind": "array", "name": "x", "shape": [2], "then": "doubled"}, "y": {"values": [1, 2]}},
        "outputs": {
            "a": {"shape": [2], "dtype": "float32", "values": [1.0, 2.0]},
            "b": {"shape": [2], "dtype": "int64", "npz": "b"},
            "c.summary": {"shape": [5], "dtype": "float32", "values": [1.5, 0.5, 1.0, 2.0, 5**0.5]},
            "c.first64": {"shape": [2], "dtype": "float32", "values": [1.0, 2.0]},
            "c.shape": {"shape": [1], "dtype": "int64", "values": [2]},
        },
        "tolerance": {"rtol": 0.0, "atol": 1e-6},
        "tolerance_overrides": {"a": {"rtol": 0.0, "atol": 0.1}},
    }
    folder = tmp_path / "some-paper"
    folder.mkdir()
    (folder / "small.json").write_text(json.dumps(spec))
    np.savez(folder / "small.npz", b=np.array([3, 4]))
    return folder


def test_case_reads_all_its_parts(small: Path) -> None:
    case = Case.read(small / "small.json")
    assert case.name == "small" and case.then == {"x": "doubled"} and case.constants == {}
    assert case.state["layer.weight"].shape == (2, 3) and case.inputs["y"].tolist() == [1, 2]
    assert case.outputs["b"].dtype == torch.int64


def test_comparison_passes_and_fails(small: Path) -> None:
    case = Case.read(small / "small.json")
    good = {"a": torch.tensor([1.05, 2.0]), "b": torch.tensor([3, 4]), "c": torch.tensor([1.0, 2.0])}
    assert all(verdict.passed for verdict in case.compare(good))
    for name, bad, words in (
        ("a", torch.tensor([1.2, 2.0]), "1 of 2 outside"),
        ("a", torch.tensor([torch.nan, 2.0]), "1 of 2 outside"),
        ("a", torch.tensor([1.0]), "shape"),
        ("b", torch.tensor([3, 5]), "1 of 2 differ"),
        ("b", torch.tensor([3.0, 4.0]), "type"),
    ):
        verdicts = {v.output: v for v in case.compare({**good, name: bad})}
        assert not verdicts[name].passed and words in verdicts[name].detail
        assert sum(not v.passed for v in verdicts.values()) == 1
    missing = {v.output: v.passed for v in case.compare({"a": good["a"], "b": good["b"]})}
    assert missing == {"a": True, "b": True, "c.summary": False, "c.first64": False, "c.shape": False}


def test_unknown_descriptions_are_refused(small: Path) -> None:
    case = Case.read(small / "small.json")
    spec = dict(case.spec, inputs={"x": {"kind": "array", "name": "x", "shape": [2], "power": 2}})
    with pytest.raises(ValueError, match="power"):
        _ = Case(case.path, spec).inputs
    with pytest.raises(ValueError, match="rtol and atol"):
        Case(case.path, dict(case.spec, tolerance={"exact": True})).tolerance("b")


def test_command_line(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (small, small.parent):
        assert main([str(folder)]) == 1
        assert "1 cases, 0 outputs pass, 5 fail" in capsys.readouterr().out
    assert main([str(small), "--paper", "other"]) == 1
    spec = json.loads((small / "small.json").read_text()) | {"paper": "no-such-paper"}
    (small / "small.json").write_text(json.dumps(spec))
    assert main([str(small), "--paper", "no-such-paper"]) == 1
    assert "no adapter, 1 cases not run" in capsys.readouterr().out
