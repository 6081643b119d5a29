"""BAS: what its training rests on, its maps, its checkpoints, its evaluation; and the localisation task."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import fgvczoo
from fgvczoo.data.voc import CLASSES as CLASSES_OF_VOC
from fgvczoo.errors import FgvczooError, FgvczooWarning
from fgvczoo.explain.localization import classifier_maps
from fgvczoo.models.bas.losses import LossWeights, activation_ratio, loss_terms, present_against_absent
from fgvczoo.models.bas.network import BASNetwork
from fgvczoo.models.bas.official import arguments_from_official, state_from_official
from fgvczoo.models.bas.seeds import Seeds, seeds_of
from fgvczoo.models.bas.trunk import SplitTrunk
from fgvczoo.nn.cam import cam, grad_cam
from fgvczoo.preprocess import read_mask
from fgvczoo.tasks.localization import LocalizedPrediction, on_picture
from fgvczoo.tasks.stages import Group, Stage, build_optimizer
from tests.conftest import RECIPES
from tests.data.voc.make import make_voc

SMALL = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}
CLASSES = 5


def network(seed: int = 0, **options: Any) -> BASNetwork:
    torch.manual_seed(seed)
    return BASNetwork(CLASSES, "resnet18", SMALL, hidden=16, **options)


def batch(seed: int = 0, side: int = 48) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(3, 3, side, side, generator=generator)
    return images, torch.randint(0, CLASSES, (3,), generator=generator)


@pytest.mark.parametrize("name", ["vgg11", "resnet18", "resnet50", "mobilenetv1_100", "inception_v3"])
def test_a_trunk_is_cut_at_strides_8_and_16(name: str) -> None:
    with torch.device("meta"):
        trunk = SplitTrunk(name)
    images = torch.zeros(1, 3, 224, 224, device="meta")
    features = trunk.eval().extractor(images)
    assert features.shape == (1, trunk.mid_channels, 28, 28)
    assert trunk.rest(features).shape == (1, trunk.channels, 14, 14)
    owned = [id(p) for p in trunk.parameters()]
    halves = [id(p) for half in (trunk.extractor, trunk.rest) for p in half.parameters()]
    assert Counter(owned) == Counter(halves)  # nothing is trained that no half has


def test_other_networks_are_refused() -> None:
    with pytest.raises(FgvczooError, match="VGG, ResNet, MobileNetV1, Inception-V3"):
        SplitTrunk("test_vit")


@given(seed=st.integers(0, 1000), side=st.sampled_from([32, 40, 56]))
def test_one_map_is_the_one_of_all(seed: int, side: int) -> None:
    """Values, and gradients of features and filters, of the convolution with all classes' filters."""
    model, (images, classes) = network(seed).eval(), batch(seed, side)
    features = model.features(images).detach().requires_grad_()
    upstream = torch.randn(3, 1, *features.shape[2:], generator=torch.Generator().manual_seed(seed))
    own = model.foreground(features, classes)
    every = model.generator(features).sigmoid()[torch.arange(3), classes][:, None]
    torch.testing.assert_close(own, every, rtol=1e-5, atol=1e-6)
    wanted = [features, model.generator.weight, model.generator.bias]
    grads = [torch.autograd.grad((maps * upstream).sum(), wanted) for maps in (own, every)]
    for ours, theirs in zip(*grads):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_fused_maps_are_the_mean_of_the_chosen() -> None:
    torch.manual_seed(0)
    model = BASNetwork(70, "resnet18", SMALL, hidden=16).eval()  # more classes than are in memory at once
    features = model.features(batch()[0])
    chosen = torch.rand(3, 70).topk(9).indices
    weights = torch.zeros(3, 70).scatter(1, chosen, 1 / 9)
    every = model.generator(features).sigmoid()
    expected = torch.stack([maps[rows].mean(0) for maps, rows in zip(every, chosen)])
    torch.testing.assert_close(model.fused_map(features, weights), expected)


def test_the_background_branch_is_frozen() -> None:
    """Its loss reaches the generator and the extractor through the map alone; the head and its statistics stay."""
    model, (images, classes) = network().train(), batch()
    model.class_maps(model.features(images))
    before = {name: value.clone() for name, value in model.named_buffers()}
    features = model.features(images)
    after_features = {name: value.clone() for name, value in model.named_buffers()}
    foreground = model.foreground(features, classes)
    background = model.background_maps(features.detach() * (1 - foreground))
    assert all(torch.equal(value, after_features[name]) for name, value in model.named_buffers())
    assert any(not torch.equal(value, before[name]) for name, value in after_features.items())
    background.mean(dim=(2, 3)).gather(1, classes[:, None]).sum().backward()
    assert all(p.grad is None for p in model.head.parameters())
    assert model.generator.weight.grad is not None and model.generator.weight.grad.any()
    assert any(p.grad is not None and p.grad.any() for p in model.trunk.extractor.parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_ratio_in_its_four_cases() -> None:
    score = torch.tensor([2.0, 1.0, -1.0, -1.0], requires_grad=True)
    background = torch.tensor([1.0, 3.0, -2.0, 0.5], requires_grad=True)
    ratio = activation_ratio(background, score, saturated=1.0)
    assert ratio.tolist() == [0.5, 1.0, 0.0, 1.0]
    ratio.sum().backward()
    assert background.grad is not None and background.grad.tolist() == [0.5, 0, 0, 0] and score.grad is None


def test_present_classes_compete_with_absent_ones_alone() -> None:
    scores = torch.tensor([[1.0, 2.0, 0.5, -1.0], [0.3, -0.2, 0.1, 2.0]])
    present = torch.tensor([[True, True, False, False], [False, False, False, False]])
    terms = [F.cross_entropy(torch.stack([scores[0, c], *scores[0, 2:]])[None], torch.tensor([0])) for c in (0, 1)]
    nothing = F.cross_entropy(torch.cat([torch.zeros(1), scores[1]])[None], torch.tensor([0]))
    assert float(present_against_absent(scores, present)) == pytest.approx(float(sum(terms) + nothing) / 2)


def test_a_step_is_finite_where_no_score_is_positive() -> None:
    model, (images, classes) = network(relu_class_maps=True).train(), batch()
    nn.init.constant_(model.classifier[4].bias, -100.0)
    output = model.training_output(torch.zeros_like(images), classes)
    terms = loss_terms(output, classes, LossWeights())
    assert float(terms["bas"].detach()) == 0 and all(term.isfinite() for term in terms.values())


def test_biases_have_their_own_rate() -> None:
    layer = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    groups = build_optimizer(Stage({"a": Group(1.0, 0.1, bias_lr=2.0)}, "SGD"), {"a": layer}).param_groups
    assert [(g["lr"], len(g["params"]), g["weight_decay"]) for g in groups] == [(1.0, 2, 0.1), (2.0, 2, 0.1)]
    frozen = build_optimizer(Stage({"a": Group(1.0, bias_lr=0.0)}, "SGD"), {"a": layer}).param_groups
    assert [len(g["params"]) for g in frozen] == [2]
    same = build_optimizer(Stage({"a": Group(1.0, bias_lr=1.0)}, "SGD"), {"a": layer}).param_groups
    assert sum(len(g["params"]) for g in same) == 4


def official_state(model: BASNetwork) -> dict[str, Tensor]:
    """Our ResNet's tensors under the authors' keys."""
    state = {}
    for key, value in model.state_dict().items():
        key = key.removeprefix("trunk.backbone.trunk.").replace("generator.", "classifier_loc.0.")
        state[
            f"module.{'classifier_cls.' + key.removeprefix('classifier.') if key.startswith('classifier.') else key}"
        ] = value
    return state


def test_from_official(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = BASNetwork(3, "resnet50", hidden=8)
    state = official_state(source)
    state["module.classifier_cls_copy.0.weight"] = torch.zeros(1)
    torch.save({"model": state, "best_thr": 0.2, "epoch": 7}, tmp_path / "official.pth")
    with pytest.warns(FgvczooWarning, match="variant=conference"):
        model: Any = fgvczoo.from_official("bas", state, top_k=2)
    assert model.network.classifier[-1].__class__ is nn.Conv2d and model.top_k == 2
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(images)[0], source.eval()(images))
    conference: Any = fgvczoo.from_official("bas", tmp_path / "official.pth", variant="conference")
    assert isinstance(conference.network.classifier[-1], nn.ReLU)
    with pytest.raises(FgvczooError, match="variant='old'"):
        fgvczoo.from_official("bas", state, variant="old")
    with pytest.raises(FgvczooError, match="not of bas-segmentation; import it under that name"):
        fgvczoo.from_official("bas-segmentation", state)
    with pytest.raises(FgvczooError, match="BAS-Extension"):
        fgvczoo.from_official("bas", {"a.weight": torch.zeros(2)})


def test_a_segmentation_checkpoint_and_that_it_is_not_passed_on(tmp_path: Path, fgvczoo_in: Any) -> None:
    torch.manual_seed(0)
    source = BASNetwork(20, "resnet50", segmentation=True)
    torch.save(official_state(source), tmp_path / "official.pth")
    model: Any = fgvczoo.from_official("bas-segmentation", tmp_path / "official.pth")
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(images)[0], source.eval()(images))
    with pytest.raises(FgvczooError, match="is a checkpoint of bas-segmentation, not of bas"):
        fgvczoo.from_official("bas", tmp_path / "official.pth")
    assert fgvczoo_in("import", "bas-segmentation", tmp_path / "official.pth", "-o", "imported")[0] == 0
    status, _, err = fgvczoo_in("push", "imported", "someone/bas")
    assert status == 2 and "may not be passed on" in err


def test_official_keys_of_vgg_and_mobilenet() -> None:
    for name, marks in (
        ("vgg16", {"conv1_1.weight": "features.0.weight", "conv5_3.bias": "features.28.bias"}),
        (
            "mobilenetv1_100",
            {"model.0.0.weight": "conv_stem.weight", "model.13.4.running_var": "blocks.4.1.bn2.running_var"},
        ),
    ):
        head = {"classifier_loc.0.weight": torch.zeros(4, 2, 3, 3), "classifier_loc.0.bias": torch.zeros(4)}
        state = {key: torch.zeros(1) for key in marks} | head
        assert arguments_from_official(state, variant="journal")["backbone"] == name
        renamed = state_from_official(state)
        assert {f"trunk.backbone.trunk.{key}" for key in marks.values()} <= set(renamed)
    with pytest.raises(FgvczooError, match="MobileNetV1"):
        state_from_official({"model.14.0.weight": torch.zeros(1)})


def test_top_k_of_more_classes_than_there_are() -> None:
    with pytest.warns(FgvczooWarning, match="all of them"):
        model: Any = fgvczoo.create("bas", num_classes=2, backbone="resnet18", backbone_options=SMALL, top_k=3)
    assert model.top_k == 2
    with pytest.raises(FgvczooError, match="top_k=0"):
        fgvczoo.create("bas", num_classes=2, backbone="resnet18", backbone_options=SMALL, top_k=0)


# -- the task ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, birds: Path) -> Path:
    """A run of the tiny recipe, evaluated as the paper does: centre crops, ten of them for the classes."""
    from fgvczoo.cli import main

    run = tmp_path_factory.mktemp("runs") / "bas"
    options = ["--data.preprocess", '{"size": [48, 48], "crop": "squash-center"}', "--model.ten_crop", "true"]
    common = ["--config", str(RECIPES / "bas-tiny.yaml"), "--run", str(run), "--data.root", str(birds), *options]
    assert main(["fit", *common]) == 0
    assert main(["test", *common, "--ckpt_path", "last"]) == 0
    return run


def test_test_measures_all_of_it(trained: Path) -> None:
    values = json.loads((trained / "test.json").read_text())
    wanted = {"top1", "gt_known_loc", "top1_loc", "top5_loc", "mean_iou", "max_box_acc", "max_box_acc_v2"}
    wanted |= {"max_box_acc_v2_30", "max_box_acc_v2_50", "max_box_acc_v2_70", "pxap", "peak_iou"}
    assert {f"test/{name}" for name in wanted} == set(values)
    assert all(0 <= value <= 1 for value in values.values())
    assert values["test/top1_loc"] <= values["test/gt_known_loc"] <= values["test/max_box_acc_v2_30"]


def test_predictions_lie_on_the_picture(trained: Path) -> None:
    model: Any = fgvczoo.load(trained)
    picture = (np.random.default_rng(0).random((60, 90, 3)) * 255).astype(np.uint8)
    found = model.predict(picture)
    assert isinstance(found, LocalizedPrediction) and found.size == (60, 90)
    assert found.map is not None and found.map.shape == (60, 90) and 0 <= found.map.min() <= found.map.max() <= 1
    x0, y0, x1, y1 = found.box
    assert 0 <= x0 < x1 <= 90 and 0 <= y0 < y1 <= 60
    assert not found.map[:3].any() and not found.map[:, :5].any()  # what the centre crop leaves out
    assert "map" not in found.to_dict() and json.dumps(found.to_dict())
    constant = model.predict(np.full((40, 40, 3), 128, np.uint8))
    assert all(np.isfinite(constant.box))


def test_files_of_boxes_and_maps(trained: Path, birds: Path, tmp_path: Path, fgvczoo_in: Any) -> None:
    images = sorted((birds / "CUB_200_2011" / "images").rglob("*.jpg"))[:2]
    status, _, err = fgvczoo_in("predict", trained, *images, "-o", "b.coco.json", "--maps", "maps")
    assert status == 0, err
    coco = json.loads(Path("b.coco.json").read_text())
    assert [entry["file_name"] for entry in coco["images"]] == [str(path) for path in images]
    for image, note in zip(coco["images"], coco["annotations"]):
        x, y, w, h = note["bbox"]
        assert note["image_id"] == image["id"] and x >= 0 and x + w <= image["width"] and y + h <= image["height"]
        heat = np.load(Path("maps") / f"{Path(image['file_name']).name}.npy")
        assert heat.shape == (image["height"], image["width"]) and heat.dtype == np.float32
    assert {note["category_id"] for note in coco["annotations"]} == {entry["id"] for entry in coco["categories"]}
    status, _, err = fgvczoo_in("predict", trained, images[0], images[0], "--maps", "twice")
    assert status == 2 and "one name" in err


def test_explanation_compares_with_the_truth(trained: Path, birds: Path, fgvczoo_in: Any) -> None:
    image = next((birds / "CUB_200_2011" / "images").rglob("*.jpg"))
    status, _, err = fgvczoo_in("explain", trained, image, "--data_root", birds, "-o", "where.json", "--top", "2")
    assert status == 0, err
    values = json.loads(Path("where.json").read_text())
    assert len(values["truth"]) == 1 and 0 <= values["iou"] <= 1 and len(values["classes"]) == 2
    assert fgvczoo_in("explain", trained, image, "--data_root", birds, "-o", "where.png")[0] == 0
    alone = fgvczoo.load(trained).explain(image)
    assert alone.iou is None and "<svg" not in alone.section("") and alone.title.startswith("Where is")


def test_a_map_is_laid_where_the_network_looked() -> None:
    from fgvczoo.preprocess import Preprocess

    heat = np.ones((8, 8), np.float32)
    assert on_picture(heat, Preprocess(size=(8, 8)), (20, 30)).all()
    middle = on_picture(heat, Preprocess(size=(8, 8), crop="squash-center", crop_fraction=0.5), (20, 40))
    assert middle[5:15, 10:30].all() and middle.sum() == 10 * 20


def test_ten_crops_need_their_preprocessing() -> None:
    with pytest.raises(FgvczooError, match="squash-center"):
        fgvczoo.create("cam", num_classes=2, backbone="test_resnet", ten_crop=True)


def test_grad_cam_of_a_linear_head_is_cam() -> None:
    model: Any = fgvczoo.create("linear", num_classes=3, backbone="test_resnet", out_index=2).eval()
    images, classes = torch.randn(2, 3, 48, 48), torch.tensor([2, 0])
    logits, maps = classifier_maps(model, images, classes)
    features = model.backbone(images).detach()
    expected = cam(features, model.head.weight.detach(), classes).relu()
    cells = features.shape[2] * features.shape[3]
    torch.testing.assert_close(maps * cells, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits, model(images).detach())
    assert all(p.grad is None for p in model.parameters())
    predicted = grad_cam(model, model.backbone, images)[1]
    torch.testing.assert_close(predicted, classifier_maps(model, images, logits.argmax(1))[1])


# -- seeds of segmentation ---------------------------------------------------------------------------------------


def test_seeds_have_the_pictures_size_and_a_maximum_of_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = BASNetwork(4, "resnet18", SMALL, segmentation=True).eval()
    picture = (np.random.default_rng(0).random((70, 50, 3)) * 255).astype(np.uint8)
    for with_cam in (False, True):
        seeds = seeds_of(model, picture, torch.tensor([2, 0]), scales=(1.0, 0.5), with_cam=with_cam)
        assert seeds.maps.shape == (2, 70, 50) and seeds.coarse.shape == (2, 18, 13)
        assert ((seeds.coarse.amax(dim=(1, 2)) - 1).abs() < 1e-4).all() and 0.9 < float(seeds.maps.max()) <= 1
    mirrored = seeds_of(model, np.ascontiguousarray(picture[:, ::-1]), torch.tensor([2, 0]), scales=(1.0,))
    plain = seeds_of(model, picture, torch.tensor([2, 0]), scales=(1.0,))
    torch.testing.assert_close(mirrored.coarse, plain.coarse.flip(2), rtol=1e-3, atol=1e-4)
    nothing = seeds_of(model, picture, torch.zeros(0, dtype=torch.int64))
    assert nothing.maps.shape == (0, 70, 50) and not nothing.labels(0.3).any()


def test_seeds_as_files(tmp_path: Path) -> None:
    maps = torch.tensor([[[0.9, 0.1], [0.2, 0.5]], [[0.1, 0.1], [0.6, 0.5]]])
    seeds = Seeds(torch.tensor([4, 19]), maps, maps[:, :1, :1])
    assert seeds.labels(0.3).tolist() == [[5, 0], [20, 5]]  # of equal maps the first
    seeds.save(tmp_path / "a.npz")
    stored = np.load(tmp_path / "a.npz")
    assert stored["classes"].tolist() == [4, 19] and np.array_equal(stored["maps"], maps.numpy())
    seeds.save(tmp_path / "a.png", threshold=0.3)
    assert read_mask(tmp_path / "a.png").tolist() == [[5, 0], [20, 5]]


def test_seeds_are_trained_and_measured_on_several_classes_a_picture(tmp_path: Path, fgvczoo_in: Any) -> None:
    make_voc(tmp_path / "voc", train=6, test=2)
    recipe = (RECIPES / "bas-segmentation-tiny.yaml").read_text()
    recipe = recipe.replace("cub.SynthBirdsDataModule", "voc.VOCDataModule").replace("    size: tiny\n", "")
    recipe = recipe.replace("[mask]", "[labels, mask]").replace("dataset: synthbirds", "dataset: voc")
    recipe = recipe.replace("num_classes: 4", "num_classes: 20")
    Path("voc.yaml").write_text(recipe)
    common = ("--config", "voc.yaml", "--run", "run", "--data.root", tmp_path / "voc", "--model.scales", "[1.0]")
    status, _, err = fgvczoo_in("fit", *common)
    assert status == 0, err
    status, out, err = fgvczoo_in("test", *common, "--ckpt_path", "last")
    assert status == 0 and "test/seed_miou" in out, err
    model: Any = fgvczoo.load(Path("runs") / "run")
    picture = next((tmp_path / "voc").rglob("*.jpg"))
    found = model.seeds(picture, ["dog", 0])
    assert found.classes.tolist() == [CLASSES_OF_VOC.index("dog"), 0] and len(found.maps) == 2
