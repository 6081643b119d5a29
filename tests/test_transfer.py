"""Training that starts from trained weights: other classes, another paper, the same again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fgvczoo
from fgvczoo import FgvczooError
from fgvczoo.tasks.base import StagedModule
from fgvczoo.zoo.load import load
from fgvczoo.zoo.transfer import transfer
from tests.conftest import RECIPES

TRUNK = {"backbone": "test_resnet", "out_index": 1}
# Of papers that cut the trunk themselves.
CUT_TRUNK = {"backbone": "resnet18", "backbone_options": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}}


# Of papers that are not built on a trunk.
NETWORKS: dict[str, dict[str, object]] = {
    "metaformer": {
        "metadata": {"place": "sphere"},
        "conv_widths": [8, 8, 16],
        "attention_widths": [16, 24],
        "attention_depths": [1, 1],
        "preprocess": {"size": [64, 64]},
    }
}


def made(paper: str, seed: int, num_classes: int = 3, **arguments: object) -> StagedModule:
    torch.manual_seed(seed)
    trunk = NETWORKS.get(paper, CUT_TRUNK if paper.startswith("bas") else TRUNK)
    return fgvczoo.create(paper, **{"num_classes": num_classes, **trunk, **arguments})


RETRIEVAL = {"dm2": {"backbones": ["test_resnet"], "intervals": [1], "out_index": 1}, "dsml": TRUNK}


@pytest.mark.parametrize("paper", RETRIEVAL)
def test_embeddings_follow_no_classes(paper: str) -> None:
    options = RETRIEVAL[paper]
    trained, model = (fgvczoo.create(paper, num_classes=classes, **options) for classes in (3, 4))
    report = transfer(model, trained)
    assert not report.new and all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), trained.state_dict().values())
    )
    assert len(report.lines(model)) == 1


@pytest.mark.parametrize("paper", sorted({*fgvczoo.list_models()} - {*RETRIEVAL}))
def test_other_classes_take_what_does_not_follow_them(paper: str) -> None:
    trained, model = made(paper, 0), made(paper, 1, num_classes=4)
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = transfer(model, trained)
    for name, tensor in model.state_dict().items():
        source = fresh if name in report.new else trained.state_dict()
        assert torch.equal(tensor, source[name]), name
    assert sorted([*report.loaded, *report.new]) == sorted(fresh)
    trunk = "stem" if paper in NETWORKS else "backbone"
    assert any(trunk in name for name in report.loaded) and not any(trunk in name for name in report.new)
    assert set(report.new.values()) == {"classes"}
    first, second = report.lines(model)
    assert first.startswith(f"loaded: {trunk} (") and second.startswith("new for 4 classes: ")


def test_as_many_other_classes_are_other_classes() -> None:
    trained = made("protopnet", 0, class_names=["a", "b", "c"])
    model = made("protopnet", 1, class_names=["x", "y", "z"])
    before = model.network.head.prototypes.vectors.clone()
    assert "network.head.prototypes.vectors" in transfer(model, trained).new
    assert torch.equal(model.network.head.prototypes.vectors, before)


def test_the_same_classes_take_everything() -> None:
    trained, model = made("protopnet", 0), made("protopnet", 1)
    trained.network.head.keep_(torch.tensor([0, 11, 25]))  # pruned
    report = transfer(model, trained)
    assert not report.new and len(model.network.head.prototypes) == 3
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), trained.state_dict().values()))


def test_another_paper_takes_the_trunk() -> None:
    trained, model = made("linear", 0, num_classes=7), made("st-protopnet", 1)
    report = transfer(model, trained)
    assert all(name.startswith("network.backbone.") for name in report.loaded)
    ours, theirs = model.network.backbone.state_dict(), trained.backbone.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert "not in the weights" in " ".join(report.lines(model))


def test_another_size_of_prototype_is_said() -> None:
    report = transfer(made("protopnet", 1, num_classes=4, prototype_dim=16), made("protopnet", 0))
    assert "shape" in report.new.values() and "classes" in report.new.values()


def test_another_trunk_is_an_error() -> None:
    with pytest.raises(FgvczooError, match=r"another trunk \(test_convnext, of the model test_resnet\)"):
        transfer(made("protopnet", 1), made("protopnet", 0, backbone="test_convnext"))
    with pytest.raises(FgvczooError, match="another trunk"):
        transfer(made("protopnet", 1, out_index=2), made("linear", 0))


def test_the_command(fgvczoo_in, birds: Path, tmp_path: Path) -> None:
    from fgvczoo.data.synthbirds import Size, make

    tiny = RECIPES / "st-protopnet-tiny.yaml"
    arguments = ("fit", "--config", tiny, "--trainer.max_epochs", 1)
    assert fgvczoo_in(*arguments, "--data.root", birds, "--run", "four")[0] == 0
    other = make(tmp_path / "other", Size(pairs=3, train_per_class=2, test_per_class=1), workers=1, progress=False)
    six = (*arguments, "--data", "cub", "--data.root", other)
    status, out, err = fgvczoo_in(*six, "--run", "six", "--weights", "runs/four")
    assert status == 0, err
    assert "starting from runs/four" in out and "loaded: backbone" in out and "new for 6 classes" in out
    model = load("runs/six")
    assert model.num_classes == 6 and len(model.class_names) == 6
    status, _, err = fgvczoo_in(*six, "--run", "third", "--weights", "runs/gone")
    assert status == 2 and err.count("\n") == 1 and not Path("runs/third").exists()
    convnext = ("--model.backbone", "test_convnext", "--run", "fourth")
    status, _, err = fgvczoo_in(*six, *convnext, "--weights", "runs/four")
    assert status == 2 and "another trunk" in err and err.count("\n") == 1


def test_names_of_data_sets(fgvczoo_in, birds: Path) -> None:
    tiny = RECIPES / "st-protopnet-tiny.yaml"
    for wrong in (("--data", "cubb"), ("--data=cubb",)):
        status, _, err = fgvczoo_in("fit", "--config", tiny, *wrong, "--data.root", birds)
        assert status == 2 and "did you mean cub" in err and err.count("\n") == 1
    status, _, err = fgvczoo_in("fit", "--config", tiny, "--data=cub", "--data.root", birds, "--trainer.max_epochs", 1)
    assert status == 0, err


def test_networks_without_a_trunk_are_not_shared() -> None:
    with pytest.raises(FgvczooError, match="they share no trunk; give weights of metaformer"):
        transfer(made("metaformer", 0), made("protopnet", 1))
