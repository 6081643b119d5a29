"""MetaFormer: its network, its training, what metadata does to predictions, and its authors' checkpoints."""

from __future__ import annotations

import copy
import json
import math
import sys
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fgvczoo
from fgvczoo import FgvczooError
from fgvczoo.cli import main
from fgvczoo.models.metaformer.network import MetaFG, Size
from fgvczoo.models.metaformer.official import state_from_official
from fgvczoo.models.metaformer.position import relative_index, resize_table
from fgvczoo.nn.metadata import MetadataShape
from fgvczoo.nn.recompute import norm_activation, rebuilding
from fgvczoo.tasks.mixing import Mixing, partners
from fgvczoo.tasks.stages import Group
from fgvczoo.zoo.load import load
from fgvczoo.zoo.official import import_checkpoint
from tests.conftest import RECIPES
from tests.golden.case import Case

SMALL = Size((8, 8, 16), (1, 2), (16, 24), (1, 1), 2)
GEO = (MetadataShape("date", 4), MetadataShape("place", 3))
TINY = {
    "conv_widths": [8, 8, 16],
    "conv_depths": [1, 2],
    "attention_widths": [16, 24],
    "attention_depths": [1, 1],
    "num_heads": 2,
    "preprocess": {"size": [64, 64]},
}
RECIPE = str(RECIPES / "metaformer-tiny.yaml")


def network(size: tuple[int, int] = (64, 64), metadata: tuple[MetadataShape, ...] = GEO, **options: Any) -> MetaFG:
    torch.manual_seed(0)
    return MetaFG(3, SMALL, size, metadata, **options)


# -- layers that store less --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_norm_and_activation_are_those_of_the_layers(activation: str) -> None:
    norm = nn.BatchNorm2d(5, eps=0.01).double().train()
    nn.init.uniform_(norm.weight)
    nn.init.normal_(norm.bias)
    plain, act = copy.deepcopy(norm), F.relu if activation == "relu" else F.silu
    x = torch.randn(3, 5, 4, 6, dtype=torch.float64).requires_grad_()
    conv = nn.Conv2d(5, 2, 3).double()
    out, rebuild = norm_activation(x, norm, activation)  # type: ignore[arg-type]
    assert rebuild is not None
    torch.testing.assert_close(rebuild(), out.detach())
    with rebuilding(out, rebuild):
        found = conv(out).square().sum()
    ours = torch.autograd.grad(found, [x, norm.weight, norm.bias, *conv.parameters()])
    expected = conv(act(plain(x))).square().sum()
    theirs = torch.autograd.grad(expected, [x, plain.weight, plain.bias, *conv.parameters()])
    torch.testing.assert_close(found, expected)
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(norm.state_dict()[key], value)


def test_frozen_and_single_cells_take_the_plain_layers() -> None:
    norm = nn.BatchNorm2d(3)
    assert norm_activation(torch.randn(2, 3, 1, 1), norm.eval(), "silu")[1] is None
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm_activation(torch.randn(1, 3, 1, 1), norm.train(), "silu")


# -- network -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(32, 32), (64, 96), (96, 32)])
def test_any_multiple_of_32_also_not_square(size: tuple[int, int]) -> None:
    model = network(size).eval()
    images = torch.randn(2, 3, *size)
    output = model.output(images, [torch.randn(2, 4), torch.randn(2, 3)])
    assert output.logits.shape == (2, 3) and output.stages[3].shape[1] == 3 + size[0] * size[1] // 32**2
    assert "index" not in "".join(model.state_dict())
    with pytest.raises(FgvczooError, match=rf"images of 64 x 64, but the tables.* {size[0]} x {size[1]}"):
        model(torch.randn(1, 3, 64, 64))


def test_what_does_not_fit_is_said_before_the_network() -> None:
    with pytest.raises(FgvczooError, match=r"48 x 64.*multiples of 32"):
        network((48, 64))
    model, images = network(), torch.randn(2, 3, 64, 64)
    with pytest.raises(FgvczooError, match="1 groups of metadata; the network has 2"):
        model(images, [torch.randn(2, 4)])
    with pytest.raises(FgvczooError, match="metadata place: 1 vectors of 4 numbers; the network takes 1 of 3"):
        model(images, [torch.randn(2, 4), torch.randn(2, 4)])
    with pytest.raises(FgvczooError, match="width of 18 cannot be split between 4 heads"):
        MetaFG(3, Size((8, 8, 16), (1, 1), (18, 24), (1, 1), 4))


def test_no_metadata_is_a_value() -> None:
    model, images = network().eval(), torch.randn(2, 3, 64, 64)
    zeros = [torch.zeros(2, 4), torch.zeros(2, 3)]
    assert torch.equal(model(images), model(images, zeros))
    assert not torch.allclose(model(images), model(images, [torch.ones(2, 4), zeros[1]]))
    half = model(images, [torch.stack([torch.ones(4), torch.zeros(4)]), zeros[1]])
    torch.testing.assert_close(half[1], model(images)[1])


def test_every_parameter_learns_also_from_masked_metadata() -> None:
    model = network().train()
    model(torch.randn(4, 3, 64, 64)).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_the_bias_is_gathered_anew_when_its_table_changes() -> None:
    model = network().eval()
    attention, index = model.stage_3.blocks[0].attention, model.stage_3.index
    with torch.no_grad():
        first = attention.bias(index)
        assert attention.bias(index) is first
        attention.bias_table += 1
        torch.testing.assert_close(attention.bias(index), first + 1)
    assert attention.bias(index).requires_grad
    with torch.inference_mode():
        made_inside = network().eval()
        assert made_inside(torch.zeros(1, 3, 64, 64)).isfinite().all()


def test_drop_path_is_what_its_draws_say() -> None:
    model = network(drop_path=0.9).train()
    images = torch.randn(4, 3, 64, 64)
    draws = torch.rand(model.branches, 4)
    assert torch.equal(model(images, draws=draws), model(images, draws=draws))
    keep = model._keep(draws, images)
    assert keep is not None and keep[0] is None and len(keep) == model.branches
    last = torch.where(draws[-1] >= 0.9, 1 / (1 - 0.9), 0.0)
    torch.testing.assert_close(keep[-1], last)
    assert model.eval()._keep(None, images) is None


def test_tables_for_another_grid() -> None:
    table = torch.randn(5 * 7 + 1, 2)
    assert resize_table(table, (3, 4), (3, 4)) is table
    exact, official = (resize_table(table, (3, 4), (5, 5), rule) for rule in ("exact", "official"))
    assert exact.shape == official.shape == (82, 2)
    assert torch.equal(exact[-1], table[-1]) and torch.equal(official[0], table[0])
    smooth = torch.cat([torch.linspace(0, 1, 49)[:, None].expand(49, 2), torch.zeros(1, 2)])
    middle = relative_index((7, 7), 0)[0, 0]
    torch.testing.assert_close(resize_table(smooth, (4, 4), (7, 7))[middle], torch.full((2,), 0.5))


def test_bfloat16_runs_and_agrees() -> None:
    model, images = network(metadata=()).train(), torch.randn(4, 3, 64, 64)
    expected = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(images)
    found.float().square().sum().backward()
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.1)


# -- training ----------------------------------------------------------------------------------------------------------


def test_mixed_batches() -> None:
    images = torch.rand(4, 3, 16, 24)
    assert torch.equal(partners(images), images.flip(0))
    cut = Mixing(mixup=0).draw((16, 24), np.random.default_rng(1))
    mixed = cut.images(images)
    own = (mixed == images).all(dim=1).float().mean(dim=(1, 2))
    torch.testing.assert_close(own, torch.full((4,), cut.share))
    torch.testing.assert_close(
        cut.targets(torch.eye(4)), cut.share * torch.eye(4) + (1 - cut.share) * torch.eye(4).flip(0)
    )
    up = Mixing(cutmix=0).draw((16, 24), np.random.default_rng(1))
    torch.testing.assert_close(up.images(images), up.share * images + (1 - up.share) * images.flip(0))
    off = Mixing(probability=0).draw((16, 24), np.random.default_rng(1))
    assert off.images(images) is images
    with pytest.raises(FgvczooError, match="probability=2"):
        Mixing(probability=2)


def test_decay_is_checked() -> None:
    with pytest.raises(FgvczooError, match="decay='none'"):
        Group(1.0, decay="none")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, birds: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "metaformer"
    assert main(["fit", "--config", RECIPE, "--run", str(folder), "--data.root", str(birds)]) == 0
    return folder


def test_rates_follow_the_updates(run: Path) -> None:
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    groups = checkpoint["fgvczoo"]["optimizers"]["train"]["param_groups"]
    share = 1.75 / 2  # the last of 4 updates of the second of 2 epochs
    expected = 1e-3 * (0.01 + 0.5 * 0.99 * (1 + math.cos(math.pi * share)))
    assert {round(group["lr"] / expected, 6) for group in groups} == {1.0}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.05}


def test_both_numbers_are_tested(run: Path, birds: Path, fgvczoo_in) -> None:
    status, _, err = fgvczoo_in("test", "--config", RECIPE, "--run", run, "--data.root", birds, "--ckpt_path", "last")
    assert status == 0, err
    found = json.loads((run / "test.json").read_text())
    assert {"test/top1", "test/without_metadata_top1"} <= set(found)
    model = load(run)
    data = fgvczoo.build_data(RECIPE, root=str(birds))
    (batch,) = list(fgvczoo.build_data(RECIPE, root=str(birds), eval_batch_size=16).loader("test"))
    assert data.num_classes == 4
    with torch.inference_mode():
        for logits, key in ((model(batch["image"]), "without_metadata_top1"), (model.evaluation_logits(batch), "top1")):
            assert float((logits.argmax(1) == batch["label"]).float().mean()) == pytest.approx(found[f"test/{key}"])


def test_data_without_metadata_is_refused(birds: Path, fgvczoo_in) -> None:
    status, _, err = fgvczoo_in("fit", "--config", RECIPE, "--run", "x", "--data.root", birds, "--data.keys", "[]")
    assert status == 2 and "needs 'metadata' in the batch; add it to data.keys" in err


def test_a_place_outside_of_the_world_stops_training_with_its_row(run: Path) -> None:
    model = load(run)
    batch = {
        "index": torch.tensor([4, 9]),
        "metadata": {"place": torch.tensor([[1.0, 2.0], [3.0, 190.0]]), "date": torch.ones(2, 2)},
        "metadata_valid": {"place": torch.tensor([True, True]), "date": torch.tensor([True, True])},
    }
    with pytest.raises(FgvczooError, match=r"^row 9 of the data: longitude 190"):
        model.on_before_batch_transfer(batch, 0)


# -- prediction and explanation ----------------------------------------------------------------------------------------


@pytest.fixture
def image(birds: Path) -> Path:
    return next((birds / "CUB_200_2011" / "images").rglob("*.jpg"))


def test_predictions_with_metadata(run: Path, image: Path) -> None:
    model = load(run)
    known = {"lat": 46.9, "lon": 7.4, "date": "2021-06-05 14:30"}
    alone = model.predict(image)
    assert model.predict(image, metadata={}) == alone == model.predict(image, metadata={"lat": None, "lon": None})
    assert model.predict(image, metadata=known).scores != alone.scores
    both = model.predict([image, image], metadata=[known, None])
    assert both[0].scores == pytest.approx(model.predict(image, metadata=known).scores, abs=1e-6)
    assert both[1].scores == pytest.approx(alone.scores, abs=1e-6)
    with pytest.raises(FgvczooError, match="metadata of 1 images for 2"):
        model.predict([image, image], metadata=[known])
    with pytest.raises(FgvczooError, match="metadata of image 2: longitude 190"):
        model.predict([image, image], metadata=[known, {"lat": 1, "lon": 190}])
    blind = fgvczoo.create("metaformer", num_classes=3, **TINY)
    with pytest.raises(FgvczooError, match="reads no metadata; leave metadata out"):
        blind.predict(image, metadata=known)
    with pytest.raises(FgvczooError, match="nothing of it to explain"):
        blind.explain(image)


def test_metadata_on_the_command_line(run: Path, image: Path, fgvczoo_in) -> None:
    def scores(*options: object) -> list[float]:
        status, _, err = fgvczoo_in("predict", run, image, "-o", "out.json", *options)
        assert status == 0, err
        return json.loads(Path("out.json").read_text())[0]["scores"]

    alone = scores()
    known = scores("--metadata", "lat=46.9,lon=7.4,date=2021-06-05 14:30")
    assert known != alone
    rows = f"file,lat,lon,date,camera\n{image.name},46.9,7.4,2021-06-05 14:30,X\nother.jpg,,,,\n"
    Path("t.csv").write_text(rows)
    assert scores("--metadata", "t.csv") == known
    Path("t.csv").write_text("path,lat,lon\nother.jpg,46.9,7.4\n")
    assert scores("--metadata", "t.csv") == alone
    for given, words in (
        ("lat=46.9,lon=190", "--metadata: longitude 190"),
        ("date=2021-02-30", "no day 30"),
        ("46.9,7.4", "expected NAME=VALUE"),
        ("altitude=3", "reads no 'altitude'"),
        ("none.csv", "cannot be read"),
    ):
        status, _, err = fgvczoo_in("predict", run, image, "--metadata", given)
        assert status == 2 and words in err and len(err.splitlines()) == 1
    Path("t.csv").write_text("path,lat,lon\na.jpg,46.9,7.4\nb.jpg,46.9,190\n")
    status, _, err = fgvczoo_in("predict", run, image, "--metadata", "t.csv")
    assert status == 2 and "t.csv: line 3: longitude 190" in err
    Path("t.csv").write_text("name,where\na.jpg,here\n")
    status, _, err = fgvczoo_in("predict", run, image, "--metadata", "t.csv")
    assert status == 2 and "expected a column path" in err


def test_explains_what_metadata_changed(run: Path, image: Path, tmp_path: Path, fgvczoo_in) -> None:
    model = load(run)
    known = {"lat": 46.9, "lon": 7.4, "date": "2021-06-05 14:30"}
    why = model.explain(image, metadata=known, target=2, top=3)
    assert why.class_name == model.class_names[2] and why.class_name in why.classes and len(why.classes) == 3
    assert list(why.scores) == ["all metadata", "no metadata", "without date", "without place"]
    given = model.predict(image, metadata=known, top=4)
    assert why.probability == pytest.approx(dict(zip(given.labels, given.scores))[why.class_name], abs=1e-5)
    assert why.places.shape == (12, 24) and why.months.shape == (12,) and why.month == 6
    cell = model.predict(image, metadata={**known, "lat": why.latitudes[3], "lon": why.longitudes[20]}, top=4)
    assert why.places[3, 20] == pytest.approx(dict(zip(cell.labels, cell.scores))[why.class_name], abs=1e-5)
    for name in ("why.png", "why.html", "why.json"):
        assert why.save(tmp_path / name).stat().st_size > 1000
    assert model.explain(image).given == {"date": "missing", "place": "missing"}
    status, _, err = fgvczoo_in("explain", run, image, "--metadata", "lat=46.9,lon=7.4", "-o", "why.json")
    assert status == 0 and json.loads(Path("why.json").read_text())["metadata"]["date"] == "missing", err


# -- the authors' checkpoints ------------------------------------------------------------------------------------------


def official_state() -> dict[str, Tensor]:
    """A small network with place and date, 64 pixels, 12 classes, under the authors' keys."""
    case = Case.read(Path(__file__).parent / "golden" / "metaformer" / "train_step_tiny_geo.json")
    indices = {key: torch.zeros(shape, dtype=torch.int64) for key, shape in case.spec["derived_state"].items()}
    return OrderedDict({**case.state, **indices})


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrapper", ["model", "state_dict_ema", None])
def test_files_of_the_authors_training(tmp_path: Path, legacy: bool, wrapper: str | None) -> None:
    """As their code saves them, with a configuration object of a package that need not be here."""
    module = types.ModuleType("yacs_like")
    node = type("CfgNode", (dict,), {"__module__": "yacs_like"})
    module.CfgNode = node  # type: ignore[attr-defined]
    sys.modules["yacs_like"] = module
    content: Any = official_state()
    if wrapper is not None:
        config = node({"DATA": node({"IMG_SIZE": 64})})
        config.__dict__["__immutable__"] = True
        content = {wrapper: content, "optimizer": {"state": {}}, "epoch": 3, "max_accuracy": 92.0, "config": config}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    del sys.modules["yacs_like"]
    model, report = import_checkpoint("metaformer", tmp_path / "a.pth")
    assert model.num_classes == 12 and model.metadata_groups == ("date", "place")
    assert model.preprocess.size == (64, 64) and not report.missing and not report.resized
    assert all("relative_position_index" in key for key in report.dropped) and report.dropped
    expected = state_from_official(official_state())
    assert all(torch.equal(model.network.state_dict()[key], value) for key, value in expected.items())


def test_parts_of_a_checkpoint() -> None:
    state = official_state()
    model, report = import_checkpoint("metaformer", state, keep_metadata=False, keep_head=False, num_classes=5)
    assert model.num_classes == 5 and model.metadata_groups == ()
    assert report.missing == ["classifier.weight", "classifier.bias"]
    assert {"head.weight", "meta_1_head_1.0.weight"} <= set(report.dropped)
    vision = {key: value for key, value in state.items() if not key.startswith("meta_")}
    model, report = import_checkpoint("metaformer", vision, metadata={"place": "sphere"})
    assert model.metadata_groups == ("place",) and all(name.startswith("metadata.") for name in report.missing)
    assert any(line.startswith("missing") for line in report.lines())
    with pytest.raises(FgvczooError, match=r"stage_9.x.weight is no tensor of MetaFG"):
        import_checkpoint("metaformer", {**state, "stage_9.x.weight": torch.zeros(1)})
    with pytest.raises(FgvczooError, match=r"no stage_0.0.weight"):
        import_checkpoint("metaformer", {"head.weight": torch.zeros(2, 2)})
    with pytest.raises(FgvczooError, match="resizing='best'"):
        import_checkpoint("metaformer", state, resizing="best")


@pytest.mark.parametrize("rule", ["official", "exact"])
def test_a_checkpoint_at_another_size(rule: str) -> None:
    state = official_state()
    model, report = import_checkpoint("metaformer", state, image_size=[96, 128], resizing=rule)
    assert model.preprocess.size == (96, 128) and len(report.resized) == 3
    assert not set(report.resized) & set(report.dropped)
    key = "stage_3.0.attn.relative_position_bias_table"
    expected = resize_table(state[key], (4, 4), (6, 8), rule)  # type: ignore[arg-type]
    torch.testing.assert_close(model.network.stage_3.blocks[0].attention.bias_table.data, expected)
    assert math.isfinite(model.predict(torch.rand(3, 96, 128)).score)
    with pytest.raises(FgvczooError, match="give checkpoint_size"):
        import_checkpoint("metaformer", state, checkpoint_size=[96, 64])
