"""Stages: what is frozen, which rates hold when, and that a broken run ends where an unbroken one does."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fgvczoo import FgvczooError
from fgvczoo.tasks.stages import Plan, Stage
from fgvczoo.zoo.build import build_model
from fgvczoo.zoo.load import load
from fgvczoo.zoo.recipe import read_recipe
from fgvczoo.zoo.registry import model_class
from tests.conftest import RECIPES

TINY = RECIPES / "st-protopnet-tiny.yaml"


def stages() -> dict[str, Stage]:
    return {
        "warm": Stage({"head": {"lr": 1.0}}),  # type: ignore[dict-item]
        "joint": Stage({"head": {"lr": 1.0}}, schedule="milestones", milestones=[2, 3], gamma=0.5),  # type: ignore[dict-item]
    }


def test_a_plan_is_a_function_of_the_epoch() -> None:
    plan = Plan(
        stages(), [{"warm": 2}, {"joint": 2}, "project", {"warm": 1}, {"joint": 2}, "project"], ["head"], ["project"]
    )
    assert plan.epochs == 7
    assert [plan.phase(e).stage for e in range(7)] == ["warm", "warm", "joint", "joint", "warm", "joint", "joint"]
    # A stage that comes back goes on where its schedule stopped.
    assert [plan.learning_rate_factor(e) for e in range(7)] == [1, 1, 1, 1, 1, 0.5, 0.25]
    assert [plan.actions_after(e) for e in range(7)] == [(), (), (), ("project",), (), (), ("project",)]


def test_cosine_falls_from_one_to_nearly_zero() -> None:
    stage = Stage({"head": {"lr": 1.0}}, schedule="cosine", warmup=2)  # type: ignore[dict-item]
    factors = [stage.factor(e, 12) for e in range(12)]
    assert factors[0] < factors[1] < factors[2] == 1.0
    assert all(a > b for a, b in itertools.pairwise(factors[2:])) and 0 < factors[-1] < 0.05


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ([], "nothing to train"),
        (["project"], "before any stage"),
        ([{"wram": 1}], "did you mean warm"),
        ([{"warm": 1}, "projct"], "did you mean project"),
        ([{"warm": -1}], "whole number"),
        ([{"warm": 1, "joint": 1}], "one stage"),
    ],
)
def test_what_cannot_run_is_refused(plan: list, message: str) -> None:
    with pytest.raises(FgvczooError, match=message):
        Plan(stages(), plan, ["head"], ["project"])


def test_stages_are_checked() -> None:
    for bad, message in (
        ({"warm": {"groups": {"haed": {"lr": 1.0}}}}, "did you mean head"),
        ({"warm": {"groups": {}}}, "trains nothing"),
        ({"warm": {"groups": {"head": {"lr": 1.0}}, "optimizer": "Adamm"}}, "Adamm"),
        ({"warm": {"groups": {"head": {"lr": 1.0}}, "schedule": "steep"}}, "steep"),
        ({"warm": {"grups": {}}}, "did you mean groups"),
    ):
        with pytest.raises(FgvczooError, match=message):
            Plan(bad, [{"warm": 1}], ["head"], [])  # type: ignore[arg-type]


def test_only_the_stage_groups_move(birds: Path, fgvczoo_in) -> None:
    """After a last-layer stage alone, trunk, add-on and prototypes are bit for bit what they were."""
    recipe = read_recipe(TINY)
    from lightning.pytorch import seed_everything

    seed_everything(3, verbose=False)
    before = build_model(recipe, num_classes=4).state_dict()
    arguments = ("fit", "--config", TINY, "--data.root", birds, "--model.plan", '[{"last_layer": 2}]')
    assert fgvczoo_in(*arguments)[0] == 0
    after = load(Path("runs/st-protopnet-tiny")).state_dict()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved == {"network.trivial.last_layer.weight", "network.support.last_layer.weight"}


def test_projected_prototypes_are_unit_patches(birds: Path, fgvczoo_in) -> None:
    assert fgvczoo_in("fit", "--config", TINY, "--data.root", birds)[0] == 0
    model = load(Path("runs/st-protopnet-tiny"))
    from fgvczoo import build_data

    data = build_data(read_recipe(TINY), root=str(birds))
    assert model.prototypes_are_patches
    for name, branch in model.network.branches.items():
        for number, source in enumerate(model.sources[name]):
            row = data.find(source.image)
            assert data.row(row)["label"] == int(branch.prototypes.class_of[number])
            features = branch.features(model.network.backbone(data.sample(row)["image"][None]))
            patch = features[0, :, source.cell[0], source.cell[1]]
            torch.testing.assert_close(branch.prototypes.vectors[number], patch / patch.norm(), atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module", params=["st-protopnet", "protopnet", "prototree"])
def paper(request: pytest.FixtureRequest) -> str:
    """Papers whose plans hold all that a resumed run could miss: actions, stages that come back, pruned shapes."""
    return request.param


def fit(paper: str, run: Path, birds: Path, *more: str) -> list[str]:
    recipe = RECIPES / f"{paper}-tiny.yaml"
    options = ["--config", str(recipe), "--run", str(run), "--data.root", str(birds), *more]
    return [sys.executable, "-m", "fgvczoo", "fit", *options]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load(run).state_dict()


@pytest.fixture(scope="module")
def unbroken(paper: str, tmp_path_factory: pytest.TempPathFactory, birds: Path) -> dict[str, torch.Tensor]:
    from fgvczoo.cli import main

    run = tmp_path_factory.mktemp("unbroken") / "run"
    assert main(fit(paper, run, birds)[3:]) == 0
    return weights(run)


def assert_equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    different = [key for key in one if not torch.equal(one[key], two[key])]
    assert not different


@pytest.mark.parametrize("epochs", [1, 2, 3, 4])
def test_resumed_after_any_epoch_is_equal_to_the_bit(
    epochs: int, paper: str, birds: Path, tmp_path: Path, unbroken: dict[str, torch.Tensor], fgvczoo_in
) -> None:
    """Stops at the end of an epoch: after pretraining, warm-up, in the joint stage, after projection and pruning."""
    run = tmp_path / "run"
    assert fgvczoo_in(*fit(paper, run, birds, "--trainer.max_epochs", str(epochs))[3:])[0] == 0
    assert fgvczoo_in(*fit(paper, run, birds, "--ckpt_path", "last")[3:])[0] == 0
    assert_equal(unbroken, weights(run))
    assert (run / "metrics.1.csv").is_file() and (run / "metrics.csv").is_file()


@pytest.mark.parametrize("step", [6, 13, 18])
def test_interrupted_mid_epoch_is_equal_to_the_bit(
    step: int,
    paper: str,
    birds: Path,
    tmp_path: Path,
    unbroken: dict[str, torch.Tensor],
    fgvczoo_in,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ctrl-C leaves a checkpoint at the end of the batch; the status is the shell's for it."""
    module = model_class(paper)
    run = tmp_path / "run"
    training_step = module.training_step

    def press(self, batch, batch_idx):
        if self.trainer.global_step == step:
            os.kill(os.getpid(), signal.SIGINT)
        return training_step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(module, "training_step", press)
        status, _, err = fgvczoo_in(*fit(paper, run, birds)[3:])
    assert status == 130 and "--ckpt_path last" in err
    assert fgvczoo_in(*fit(paper, run, birds, "--ckpt_path", "last")[3:])[0] == 0
    assert_equal(unbroken, weights(run))


def test_killed_run_resumes_equal_to_the_bit(
    paper: str, birds: Path, tmp_path: Path, unbroken: dict[str, torch.Tensor], fgvczoo_in
) -> None:
    """kill -9 as soon as a second epoch's checkpoint is there."""
    run = tmp_path / "run"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        fit(paper, run, birds), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    last = run / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 120
    while not last.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert last.exists(), "the run ended before its first checkpoint"
    assert fgvczoo_in(*fit(paper, run, birds, "--ckpt_path", "last")[3:])[0] == 0
    assert_equal(unbroken, weights(run))


def test_pretrained_weights_are_read_once(birds: Path, tmp_path: Path, fgvczoo_in) -> None:
    """A resumed run needs neither the file nor the network any more."""
    from fgvczoo.nn.backbones import Backbone

    file, run = tmp_path / "trunk.pt", tmp_path / "run"
    torch.manual_seed(5)
    torch.save(Backbone("test_resnet", out_index=2).trunk.state_dict(), file)
    options = ("--model.backbone_weights", str(file))
    assert fgvczoo_in(*fit("protopnet", run, birds, *options, "--trainer.max_epochs", "1")[3:])[0] == 0
    file.unlink()
    assert fgvczoo_in(*fit("protopnet", run, birds, *options, "--ckpt_path", "last")[3:])[0] == 0
