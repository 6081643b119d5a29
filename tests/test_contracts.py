"""What holds for every recipe and every paper, without new test code for a new one."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

import fgvczoo
from fgvczoo.tasks.base import StagedModule
from fgvczoo.zoo.build import build_model
from fgvczoo.zoo.info import MEASURED
from fgvczoo.zoo.load import load
from fgvczoo.zoo.papers import PAPERS as PAPERS_KNOWN
from fgvczoo.zoo.recipe import list_recipes, read_recipe
from fgvczoo.zoo.registry import DATASETS, MODELS, model_class
from tests.conftest import RECIPES
from tests.zoo.test_export import assert_runs_alone

PAPERS = sorted(MODELS)
RETRIEVAL = {"dm2", "dsml"}
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize("name", list_recipes())
def test_a_recipe_is_whole(name: str) -> None:
    recipe = read_recipe(name)
    card = recipe.card
    assert card.paper in MODELS and card.dataset in DATASETS
    assert recipe.config["model"]["class_path"].startswith(MODELS[card.paper].rpartition(".")[0])
    assert recipe.config["data"]["class_path"] == DATASETS[card.dataset]
    assert card.baseline is None or card.baseline in list_recipes()
    assert all(licence for licence in (card.licences.code, card.licences.weights, card.licences.data))
    with torch.device("meta"):
        model = build_model(recipe)
    assert isinstance(model, StagedModule) and model.paper == card.paper
    assert model.num_classes == card.num_classes


@pytest.mark.parametrize("name", list_recipes())
def test_published_weights_load_offline(name: str) -> None:
    recipe = read_recipe(name)
    if recipe.card.weights is None:
        with pytest.raises(fgvczoo.FgvczooError, match="no weights are published"):
            load(name)
    else:
        model = load(name)
        assert not model.training and model.num_classes == recipe.card.num_classes


def test_what_info_says_was_measured() -> None:
    """The package's copy is what the committed results say."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        from collect import collect  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(BENCHMARKS))
    assert json.loads(MEASURED.read_text()) == collect()


@pytest.mark.parametrize("name", sorted(PAPERS_KNOWN))
def test_a_paper_is_cited_alike(name: str) -> None:
    folder = MODELS[name].split(".")[2]  # its models share a page
    page = (BENCHMARKS.parent / "docs" / "models" / f"{folder.replace('_', '-')}.md").read_text()
    paper = PAPERS_KNOWN[name]
    assert paper.bibtex in page and paper.title in " ".join(page.split())


@pytest.fixture(scope="module", params=PAPERS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, birds: Path) -> Path:
    """The run folder of a paper's tiny recipe."""
    from fgvczoo.cli import main

    run = tmp_path_factory.mktemp("runs") / request.param
    recipe = RECIPES / f"{request.param}-tiny.yaml"
    assert main(["fit", "--config", str(recipe), "--run", str(run), "--data.root", str(birds)]) == 0
    return run


def test_fit_leaves_a_whole_run(trained: Path) -> None:
    assert {"config.yaml", "metrics.csv", "checkpoints", "weights"} <= {path.name for path in trained.iterdir()}
    config = json.loads((trained / "weights" / "config.json").read_text())
    assert config["provenance"]["finished"] and config["provenance"]["dataset"]
    assert str(trained) not in json.dumps(config)  # no path of the machine travels with weights
    assert "train/" in (trained / "metrics.csv").read_text().splitlines()[0]


def test_parameter_groups_partition_the_parameters(trained: Path) -> None:
    model = load(trained)
    grouped = [id(p) for module in model.groups().values() for p in module.parameters()]
    assert sorted(grouped) == sorted({id(p) for p in model.parameters()})


def test_test_reports_accuracy(trained: Path, birds: Path, fgvczoo_in) -> None:
    recipe = RECIPES / f"{trained.name}-tiny.yaml"
    watched = "test/recall_at_1" if trained.name in RETRIEVAL else "test/top1"
    arguments = ("test", "--config", recipe, "--run", trained, "--data.root", birds)
    status, out, _ = fgvczoo_in(*arguments, "--ckpt_path", "last")
    assert status == 0 and watched in out
    again = fgvczoo_in(*arguments, "--weights", trained)
    assert again[0] == 0 and _line(again[1], watched) == _line(out, watched)


def _line(out: str, metric: str) -> str:
    return next(line for line in out.splitlines() if f"{metric} " in line or f"{metric}│" in line.replace(" ", ""))


def test_predict_and_save_and_load(trained: Path, birds: Path, tmp_path: Path) -> None:
    model = load(trained)
    image = next((birds / "CUB_200_2011" / "images").rglob("*.jpg"))
    prediction = model.predict(image)
    assert prediction.source == str(image)
    if trained.name in RETRIEVAL:
        assert len(prediction.vector) == model(torch.zeros(1, 3, *model.preprocess.size)).shape[1]
    else:
        assert prediction.label in model.class_names
        assert abs(sum(prediction.scores) - 1) < 1e-5  # top 5 of 4 classes
    assert json.loads(json.dumps(prediction.to_dict())) == prediction.to_dict()
    folder = fgvczoo.save_weights(model, tmp_path / "w", provenance={}, licences={})
    again = load(folder)
    assert again.predict(image) == prediction
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    assert again.state_values() == model.state_values()


def test_predict_takes_lists_arrays_and_tensors(trained: Path) -> None:
    model = load(trained)
    tensor = torch.rand(3, 40, 60)
    array = (tensor.permute(1, 2, 0) * 255).round().byte().numpy()
    one, two = model.predict([tensor, array])
    assert one == two and model.predict([]) == []
    assert model.predict(array[:, :, :1].repeat(3, axis=2)) == model.predict(array[:, :, 0])


def test_explains_itself(trained: Path, birds: Path, tmp_path: Path, fgvczoo_in) -> None:
    image = next((birds / "CUB_200_2011" / "images").rglob("*.jpg"))
    if trained.name == "linear":
        status, _, err = fgvczoo_in("explain", trained, image)
        assert status == 2 and "no explanation" in err
        return
    data = ["--data_root", birds] if trained.name in RETRIEVAL else []  # what is near is in a gallery
    status, out, err = fgvczoo_in("explain", trained, image, *data, "-o", "why.html")
    assert status == 0 and "why.html" in out, err
    first = fgvczoo_in("explain", trained, *data, "-o", "again.html", image)  # options before the image
    assert first[0] == 0 and Path("again.html").read_text() == Path("why.html").read_text(), first[2]
    status, _, err = fgvczoo_in("explain", trained, "--nothing", "-o", "no.html", image)
    assert status == 2 and "--nothing" in err
    assert "<html" in Path("why.html").read_text()


def test_a_batch_of_one_and_a_constant_image(trained: Path) -> None:
    model = load(trained)
    prediction = model.predict(torch.zeros(3, 8, 8))
    if trained.name in RETRIEVAL:
        assert all(math.isfinite(value) for value in prediction.vector)
    else:
        assert all(0 <= score <= 1 for score in prediction.scores)


@pytest.mark.parametrize("ending", ["onnx", "pt2"])
def test_exports_to_files_that_run_alone(trained: Path, ending: str, fgvczoo_in) -> None:
    if ending == "onnx":
        for package in ("onnxscript", "onnxruntime"):
            pytest.importorskip(package, reason="the extra onnx is not installed")
    file = f"model.{ending}"
    status, out, err = fgvczoo_in("export", trained, "-o", file)
    assert status == 0 and out.strip() == file, err
    model = load(trained)
    assert assert_runs_alone(Path(file).absolute(), model, batch=5)["classes"] == model.class_names


@pytest.mark.parametrize("paper", PAPERS)
def test_two_runs_are_equal_to_the_bit(paper: str, birds: Path, fgvczoo_in, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them is interrupted in the middle of an epoch and resumed."""
    module = model_class(paper)
    training_step = module.training_step

    def press(self, batch, batch_idx):
        if self.trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return training_step(self, batch, batch_idx)

    fit = ("fit", "--config", RECIPES / f"{paper}-tiny.yaml", "--data.root", birds)
    assert fgvczoo_in(*fit, "--run", "whole")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(module, "training_step", press)
        assert fgvczoo_in(*fit, "--run", "broken")[0] == 130
    assert fgvczoo_in(*fit, "--run", "broken", "--ckpt_path", "last")[0] == 0
    one, two = (load(Path("runs") / run).state_dict() for run in ("whole", "broken"))
    assert [key for key in one if not torch.equal(one[key], two[key])] == []


@pytest.mark.parametrize("paper", PAPERS)
def test_trains_in_bfloat16(paper: str, birds: Path, fgvczoo_in) -> None:
    fit = ("fit", "--config", RECIPES / f"{paper}-tiny.yaml", "--data.root", birds, "--run", "half")
    status, _, err = fgvczoo_in(*fit, "--trainer.precision", "bf16-mixed")
    assert status == 0, err
    state = load(Path("runs") / "half").state_dict()
    assert all(bool(values.isfinite().all()) for values in state.values())


def test_the_network_compiles(trained: Path) -> None:
    model = load(trained).eval()
    images = torch.randn(2, 3, *model.preprocess.size, generator=torch.Generator().manual_seed(0))
    torch.compiler.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="aot_eager")(images), model(images))
