"""Two gloo processes give what one process gives: weights, projection, metrics.

As everywhere in the library this holds without train-mode batch norm (here: a trunk with layer norm), without
augmentation being drawn differently (it is drawn from seed, epoch and row), and for equal shares of each batch.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fgvczoo.nn.prototypes import Projector
from fgvczoo.zoo.load import load
from tests.conftest import RECIPES

RETRIEVAL = ["--model.out_index", "1"]
# Of MetaFormer what has no batch norm: masking, mixing and drop path are drawn for the global batch.
TRANSFORMERS = "{" + ", ".join(f"{name}: {{lr: 1.0e-3}}" for name in ("stage_3", "stage_4", "metadata", "head")) + "}"
TRUNKS = {
    "bas": ["--model.backbone", "vgg11", "--model.backbone_options", "null"],
    "cam": ["--model.backbone", "test_convnext", "--model.out_index", "1"],
    "dsml": ["--model.backbone", "test_convnext", *RETRIEVAL],
    "dm2": ["--model.backbones", "[test_convnext,test_convnext]", *RETRIEVAL],
    "metaformer": ["--model.stages", f"{{train: {{groups: {TRANSFORMERS}, schedule: cosine-updates, base_batch: 8}}}}"],
    "st-protopnet": ["--model.backbone", "test_convnext", "--model.out_index", "1"],
    "protopnet": ["--model.backbone", "test_convnext", "--model.out_index", "1"],
    "prototree": ["--model.backbone", "test_convnext", "--model.out_index", "1"],
    "linear": ["--model.backbone", "test_convnext", "--model.out_index", "1"],
}


def arguments(subcommand: str, paper: str, run: Path, birds: Path, processes: int) -> list[str]:
    return [
        *(subcommand, "--config", str(RECIPES / f"{paper}-tiny.yaml"), "--run", str(run), "--data.root", str(birds)),
        *("--trainer.devices", str(processes), *TRUNKS[paper]),
        *(["--ckpt_path", "last"] if subcommand == "test" else []),
    ]


def two_processes(subcommand: str, paper: str, run: Path, birds: Path) -> str:
    """As a user starts them: one command, which starts the second process itself."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fgvczoo", *arguments(subcommand, paper, run, birds, 2)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("paper", sorted(TRUNKS))
def test_two_processes_are_one(paper: str, tmp_path: Path, birds: Path, fgvczoo_in) -> None:
    one_out = ""
    for subcommand in ("fit", "test"):
        status, one_out, err = fgvczoo_in(*arguments(subcommand, paper, tmp_path / "one", birds, 1))
        assert status == 0, err
    two_processes("fit", paper, tmp_path / "two", birds)
    two_out = two_processes("test", paper, tmp_path / "two", birds)
    models = [load(tmp_path / "one"), load(tmp_path / "two")]
    one, two = (model.state_dict() for model in models)
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-3, atol=1e-4, msg=key)
    for key in ("sources", "source_dataset", "branches"):
        assert _rounded(models[0].state_values().get(key)) == _rounded(models[1].state_values().get(key))
    assert accuracies(one_out) and accuracies(one_out) == accuracies(two_out)


def accuracies(out: str) -> list[str]:
    return [
        line.split()[1] + line.split()[3] for line in out.splitlines() if "test/top" in line or "test/recall" in line
    ]


def _rounded(value: object) -> object:
    if isinstance(value, float):
        return round(value, 2)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def projected(order: list[int], batch: int) -> Projector:
    """A projection over images in a given order and batch size; every second image is the copy of its neighbour."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(12, 4, 3, 3, generator=generator).repeat_interleave(2, dim=0)[:12]
    labels, class_of = torch.arange(12) // 2 % 3, torch.tensor([0, 0, 1, 1, 2, 2])
    vectors = torch.randn(6, 4, generator=generator)
    value, cell = torch.einsum("bdn,pd->bpn", features.flatten(2), vectors).max(dim=2)
    projector = Projector(class_of)
    for start in range(0, len(order), batch):
        rows = torch.tensor(order[start : start + batch])
        projector.update(features[rows], value[rows], cell[rows], labels[rows], rows)
    return projector


@pytest.mark.parametrize("batch", [1, 5, 12])
def test_projection_does_not_depend_on_order_or_batches(batch: int) -> None:
    """Ties between copies go to the lowest index."""
    expected = projected(list(range(12)), 12)
    for order in (list(range(12)), list(reversed(range(12))), [*range(6, 12), *range(6)]):
        found = projected(order, batch)
        for key in ("sample", "cell", "value", "patch", "grid"):
            assert torch.equal(getattr(found, key), getattr(expected, key)), key
    assert (expected.sample % 2 == 0).all()


def test_a_class_without_images_is_not_found() -> None:
    projector = Projector(torch.tensor([0, 1]))
    projector.update(
        torch.ones(1, 2, 1, 1),
        torch.ones(1, 2),
        torch.zeros(1, 2, dtype=torch.int64),
        torch.tensor([0]),
        torch.tensor([4]),
    )
    assert projector.found.tolist() == [True, False] and projector.sample.tolist() == [4, -1]


def test_nan_stops_a_projection() -> None:
    from fgvczoo import FgvczooError

    projector = Projector(torch.tensor([0]))
    with pytest.raises(FgvczooError, match="diverged"):
        projector.update(
            torch.ones(1, 2, 1, 1),
            torch.full((1, 1), torch.nan),
            torch.zeros(1, 1, dtype=torch.int64),
            torch.tensor([0]),
            torch.tensor([0]),
        )
