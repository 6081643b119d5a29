"""Authors' checkpoints, from random networks in their layout, become our modules with the same numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fgvczoo
from fgvczoo import FgvczooError, create, from_official, list_models
from fgvczoo.tasks.base import StagedModule
from fgvczoo.zoo.load import load
from fgvczoo.zoo.official import import_checkpoint, official_module
from fgvczoo.zoo.papers import PAPERS
from tests.golden.case import Case

GOLDEN = Path(__file__).parents[1] / "golden"

NAMES = {
    "protopnet": {"backbone.trunk.": "features.", "head.add_on.": "add_on_layers.", "head.last_layer.": "last_layer."},
    "st-protopnet": {
        "backbone.trunk.": "features.",
        **{f"{b}.add_on.": f"add_on_layers_{b}." for b in ("trivial", "support")},
        **{f"{b}.last_layer.": f"last_layer_{b}." for b in ("trivial", "support")},
    },
}
SIZES = {"num_classes": 3, "backbone": "resnet18", "prototypes_per_class": 2, "prototype_dim": 8}


def ours(paper: str, **arguments: Any) -> StagedModule:
    torch.manual_seed(5)
    return create(paper, **SIZES | arguments).eval()


def theirs(model: StagedModule) -> dict[str, Tensor]:
    """The state dict of the authors' network that computes the same."""
    state = {}
    for key, value in model.network.state_dict().items():
        if key.endswith("prototypes.vectors"):
            branch = key.split(".")[0]
            vectors = value if value.ndim == 4 else value[:, :, None, None]
            state["prototype_vectors" if branch == "head" else f"prototype_vectors_{branch}"] = vectors
            state["ones"] = torch.ones_like(vectors)
        elif not key.endswith("class_of"):
            prefix = next(prefix for prefix in NAMES[model.paper] if key.startswith(prefix))
            state[NAMES[model.paper][prefix] + key.removeprefix(prefix)] = value
    return state


class PPNet(nn.Module):
    """A whole module as authors save it: inner modules that hold the state, plain attributes, class identity."""

    def __init__(self, state: dict[str, Tensor], **attributes: Any) -> None:
        super().__init__()
        for key, value in state.items():
            *path, last = key.split(".")
            module: nn.Module = self
            for name in path:
                if name not in module._modules:
                    module.add_module(name, nn.Module())
                module = module.get_submodule(name)
            module.register_buffer(last, value)
        self.__dict__ |= attributes


def same(one: StagedModule, other: StagedModule) -> bool:
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return torch.equal(one(images), other(images))


@pytest.mark.parametrize("paper", sorted(NAMES))
def test_a_state_dict(paper: str) -> None:
    model = ours(paper)
    found, report = import_checkpoint(paper, theirs(model))
    assert same(found, model) and not found.training
    assert report.dropped == ["ones"] and report.loaded == len(model.network.state_dict())
    assert report.inferred.items() >= SIZES.items() and report.untouched == [
        "pretrain_head.weight",
        "pretrain_head.bias",
    ]
    assert same(from_official(paper, theirs(model), class_names=["a", "b", "c"]), model)
    again = import_checkpoint(paper, theirs(model))[0].state_dict()
    assert all(torch.equal(value, again[key]) for key, value in found.state_dict().items())


@pytest.mark.parametrize("paper", sorted(NAMES))
@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_the_command(paper: str, kind: str, tmp_path: Path, fgvczoo_in) -> None:
    model = ours(paper)
    path = tmp_path / "100push0.8.pth"
    torch.save(theirs(model), path, _use_new_zipfile_serialization=kind == "zip")
    status, out, err = fgvczoo_in("import", paper, path, "-o", "imported", "--class_names", "[a, b, c]")
    assert status == 0, err
    assert "ones" in out and "resnet18" in out and "imported" in out
    again = load("imported")
    assert same(again, model) and again.class_names == ["a", "b", "c"]
    config = json.loads(Path("imported/config.json").read_text())
    terms = PAPERS[paper].licence
    assert terms in config["licence"]["weights"] and "the authors' checkpoint" in config["licence"]["weights"]
    assert config["provenance"]["checkpoint"] == path.name and str(tmp_path) not in json.dumps(config)
    assert terms in Path("imported/README.md").read_text()


def test_what_a_whole_module_says_beside_its_tensors(tmp_path: Path) -> None:
    classes = [0, 2, 2, 1, 0]  # of a pruned model: unequal shares, and no order
    model = ours("protopnet", prototypes_per_class=1, prototype_classes=classes, activation="linear")
    identity = nn.functional.one_hot(torch.tensor(classes), 3).float()
    attributes = {"img_size": 64, "prototype_activation_function": "linear", "prototype_class_identity": identity}
    torch.save(PPNet(theirs(model), **attributes), tmp_path / "net.pth")
    found, report = import_checkpoint("protopnet", tmp_path / "net.pth")
    assert same(found, model) and not report.notes
    assert found.network.head.prototypes.class_of.tolist() == classes
    assert found.preprocess.size == (64, 64)
    with pytest.warns(UserWarning, match="strongest connection"):
        from_official("protopnet", theirs(model), activation="linear")


@pytest.mark.parametrize("kind", ["zip", "legacy"])
@pytest.mark.parametrize(
    "name",
    [
        "protopnet/forward_resnet18_bottleneck_linear",
        "protopnet/forward_vgg19_224_paper",
        "st-protopnet/cropped_forward_vgg11",
        "st-protopnet/full_forward_resnet50_bbn",
    ],
)
def test_the_numbers_of_the_authors(name: str, kind: str, tmp_path: Path) -> None:
    """Golden cases, saved as the papers' authors save: a whole module, or a state dict."""
    case = Case.read(GOLDEN / f"{name}.json")
    if case.paper == "protopnet":
        saved: Any = PPNet(case.state, prototype_activation_function=case.config.get("activation", "log"))
    else:
        saved = case.state
    torch.save(saved, tmp_path / "net.pth", _use_new_zipfile_serialization=kind == "zip")
    del saved
    model = from_official(case.paper, tmp_path / "net.pth")
    with torch.no_grad():
        found = model(case.inputs["image"])
    truth = case.outputs
    expected = truth["logits"] if "logits" in truth else truth["logits_trivial"] + truth["logits_support"]
    torch.testing.assert_close(found, expected, **case.tolerance("logits"))


def test_mistakes_are_one_line(tmp_path: Path, fgvczoo_in) -> None:
    state = theirs(ours("protopnet"))
    torch.save(state, tmp_path / "good.pth")

    def fails(*words: str, paper: str = "protopnet", checkpoint: Any = state, **config: Any) -> None:
        with pytest.raises(FgvczooError) as error:
            from_official(paper, checkpoint, **config)
        assert "\n" not in str(error.value)
        for word in words:
            assert word in str(error.value), error.value

    fails("protopnt", "did you mean protopnet", paper="protopnt")
    fails("linear", "no checkpoints", paper="linear")
    fails("gone.pth", checkpoint=tmp_path / "gone.pth")
    fails("prototype_vectors", checkpoint={key: v for key, v in state.items() if key != "prototype_vectors"})
    fails("features.conv1.weight", checkpoint=state | {"features.conv1.weight": 3})
    fails("extra.weight", checkpoint=state | {"extra.weight": torch.zeros(1)})
    fails("last_layer.weight", "(3, 6)", checkpoint=state, num_classes=6, prototypes_per_class=1)
    fails("trunk", checkpoint={key: v for key, v in state.items() if key != "features.bn1.running_mean"})
    fails("prototype_dims", "did you mean prototype_dim", prototype_dims=3)
    for arguments, word in (
        (("import", "protopnet", "good.pth"), "-o"),
        (("import", "protopnet", "good.pth", "-o", "d", "backbone", "x"), "'backbone'"),
        (("import", "protopnet", "good.pth", "-o", "d", "--backbone"), "needs a value"),
        (("import", "protopnet", "good.pth", "-o", "d", "--backbone", "[x"), "YAML"),
        (("import", "protopnet", "good.pth", "-o", "d", "--bakcbone", "x"), "did you mean backbone"),
        (("info", "linear-synthbirds", "--more"), "--more"),
    ):
        status, _, err = fgvczoo_in(*arguments)
        assert status == 2 and len(err.strip().splitlines()) == 1 and word in err, err
    assert not Path("d").exists()


def test_every_paper_with_checkpoints_has_their_terms() -> None:
    assert "from_official" in fgvczoo.__all__
    for paper in list_models():
        try:
            official_module(paper)
        except FgvczooError:
            assert paper not in PAPERS or PAPERS[paper].licence is None
        else:
            assert paper in PAPERS
