"""The scores of a model over a data module: by hand, in two processes, and without annotations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fgvczoo.data.cub import SynthBirdsDataModule
from fgvczoo.errors import FgvczooError
from fgvczoo.explain.interpretability import interpretability
from fgvczoo.metrics import (
    HeatmapScores,
    area_under_curve,
    changed_share,
    class_activation,
    deletion_curve,
    heatmap,
    heatmap_iou,
)
from fgvczoo.models.linear import LinearClassifier
from fgvczoo.models.st_protopnet import STProtoPNet
from tests.metrics.processes import in_two_processes

COUNTS = {"images", "constant_maps", "content_heatmap_skipped", "oirr_skipped", "prototypes_left_out"}


def data(birds: Path, **options: object) -> SynthBirdsDataModule:
    given = {"keys": ("mask", "parts"), "cropped": True, "eval_batch_size": 5, "preprocess": {"size": [40, 48]}}
    return SynthBirdsDataModule(str(birds), "tiny", **(given | options))


@pytest.fixture(scope="module")
def model() -> STProtoPNet:
    torch.manual_seed(0)
    return STProtoPNet(4, backbone="test_resnet", out_index=2, prototypes_per_class=2, prototype_dim=8, variant="full")


def test_scores_and_counts(model: STProtoPNet, birds: Path) -> None:
    model.train()
    scores = interpretability(model, data(birds))
    assert model.training
    assert scores.keys() == {"consistency", "stability", "content_heatmap", "oirr", "iou", "deletion_auc"} | COUNTS
    assert scores["images"] == 16 and scores["constant_maps"] == scores["prototypes_left_out"] == 0
    for name, top in {"consistency": 100, "stability": 100, "content_heatmap": 1, "iou": 1, "deletion_auc": 1}.items():
        assert 0 <= scores[name] <= top, name


@torch.no_grad()
@pytest.mark.parametrize("cropped", [False, True])
def test_deletion_and_iou_by_hand(model: STProtoPNet, birds: Path, cropped: bool) -> None:
    """The first test image: both branches' prototypes of its class, at the size of its picture."""
    source = data(birds, cropped=cropped)
    scores = interpretability(model, source, limit=1)
    row = int(source.splits["test"][0])
    image, network = source.sample(row)["image"][None], model.eval().network
    label = torch.tensor([int(source.reader.labels[row])])
    trunk = network.backbone(image)
    trivial, support = (
        class_activation(b.evidence_map(b.features(trunk)), b.prototypes.class_of, label)
        for b in (network.trivial, network.support)
    )
    activation = 0.5 * trivial + 0.5 * support

    def probabilities(images: torch.Tensor) -> torch.Tensor:
        output = network(images)
        return (output.trivial.logits.softmax(1) + output.support.logits.softmax(1)) / 2

    curve = deletion_curve(probabilities, image, heatmap(activation, (40, 48)))
    assert scores["deletion_auc"] == pytest.approx(area_under_curve(curve, changed_share(40, 48)).item())
    mask = torch.from_numpy(source.reader.annotations(row, ("mask",))["mask"]).bool()
    if cropped:
        x0, y0, x1, y1 = source.row(row)["crop"]
        mask = mask[y0:y1, x0:x1]
    assert scores["iou"] == pytest.approx(heatmap_iou(heatmap(activation, tuple(mask.shape)), mask[None]).item())


@torch.no_grad()
def test_masks_show_what_the_network_sees(model: STProtoPNet, birds: Path) -> None:
    """The middle of the picture: as the batch's mask, but for the size."""
    source = data(birds, cropped=False, preprocess={"size": [40, 48], "crop": "center", "crop_fraction": 0.6})
    found = interpretability(model, source)
    coarse = HeatmapScores()
    for row in source.splits["test"].tolist():
        sample = source.sample(row)
        label = torch.tensor([int(source.reader.labels[row])])
        trunk = model.eval().network.backbone(sample["image"][None])
        maps = [
            class_activation(b.evidence_map(b.features(trunk)), b.prototypes.class_of, label)
            for b in (model.network.trivial, model.network.support)
        ]
        coarse.update(torch.stack(maps).mean(0), sample["mask"][None] == 1)
    for name in ("content_heatmap", "oirr", "iou"):
        assert found[name] == pytest.approx(coarse.compute()[name].item(), rel=0.03), name


def test_batches_do_not_matter(model: STProtoPNet, birds: Path) -> None:
    one, other = (interpretability(model, data(birds, eval_batch_size=size)) for size in (3, 16))
    assert one == pytest.approx(other, rel=1e-4)


def test_what_is_not_annotated_is_not_scored(model: STProtoPNet, birds: Path) -> None:
    scores = interpretability(model, data(birds, keys=()), limit=3)
    assert scores.keys() == {"deletion_auc", "images", "constant_maps"} and scores["images"] == 3
    assert "iou" not in interpretability(model, data(birds, keys=("parts",)), limit=3)


def test_limit_leaves_classes_out(model: STProtoPNet, birds: Path) -> None:
    scores = interpretability(model, data(birds), limit=6)  # images of two of four classes
    assert scores["images"] == 6 and scores["prototypes_left_out"] == 8


def test_predicted_class_needs_no_labels(model: STProtoPNet, birds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, loader = data(birds), SynthBirdsDataModule.loader
    predicted = interpretability(model, source, target="predicted")
    monkeypatch.setattr(
        SynthBirdsDataModule,
        "loader",
        lambda *args: [{k: v for k, v in batch.items() if k != "label"} for batch in loader(*args)],
    )
    assert interpretability(model, source, target="predicted") == predicted
    with pytest.raises(FgvczooError, match="target='predicted'"):
        interpretability(model, source)


def test_mistakes_are_named(model: STProtoPNet, birds: Path) -> None:
    with pytest.raises(FgvczooError, match="linear: interpretability"):
        interpretability(LinearClassifier(4, backbone="test_resnet"), data(birds))
    with pytest.raises(FgvczooError, match="limit=0"):
        interpretability(model, data(birds), limit=0)
    with pytest.raises(FgvczooError, match="no split 'tset'"):
        interpretability(model, data(birds), split="tset")
    with pytest.raises(FgvczooError, match="target='best'"):
        interpretability(model, data(birds), target="best")  # type: ignore[arg-type]


@pytest.mark.parametrize("limit", [None, 5])
def test_two_processes_are_one(model: STProtoPNet, birds: Path, tmp_path: Path, limit: int | None) -> None:
    """With a limit all images are of the first process."""
    whole = interpretability(model, data(birds), limit)
    for found in in_two_processes(lambda rank: interpretability(model, data(birds), limit), tmp_path):
        assert found == pytest.approx(whole, rel=1e-4)
