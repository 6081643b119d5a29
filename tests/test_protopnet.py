"""ProtoPNet: losses, similarity, projection, pruning, ensembles, analyses, the authors' checkpoints."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch

import fgvczoo
from fgvczoo import FgvczooError
from fgvczoo.data.cub import SynthBirdsDataModule
from fgvczoo.explain.analysis import draw_neighbours, global_analysis, local_analysis
from fgvczoo.models.ensemble import PrototypeEnsemble
from fgvczoo.models.protopnet import ProtoPNet
from fgvczoo.models.protopnet.losses import (
    LossWeights,
    average_separation,
    cluster,
    loss_terms,
    pair_distance,
    separation,
    total_loss,
)
from fgvczoo.models.protopnet.network import Head, add_on_layers, similarity
from fgvczoo.models.protopnet.official import arguments_from_official, state_from_official
from fgvczoo.models.protopnet.pruning import Pruning, kept_prototypes
from fgvczoo.models.st_protopnet import STProtoPNet
from fgvczoo.nn.backbones import Backbone
from fgvczoo.nn.prototypes import NearestImages, Projector, class_identity, windows_at
from fgvczoo.nn.receptive_field import receptive_field

TINY = {"backbone": "test_resnet", "out_index": 2, "preprocess": {"size": [48, 48]}, "prototype_dim": 8}


def protopnet(seed: int = 0, **arguments: Any) -> ProtoPNet:
    torch.manual_seed(seed)
    return ProtoPNet(**{"num_classes": 4, "prototypes_per_class": 3, **TINY, **arguments}).eval()


@pytest.fixture(scope="module")
def data(birds: Path) -> SynthBirdsDataModule:
    return SynthBirdsDataModule(root=str(birds), size="tiny", preprocess={"size": [48, 48]}, eval_batch_size=5)


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (50, 70, 3), dtype=np.uint8)


class Only:
    """A data module whose split holds some classes only."""

    def __init__(self, data: SynthBirdsDataModule, classes: set[int]) -> None:
        self.data, self.classes = data, classes

    def __getattr__(self, name: str) -> Any:
        return getattr(self.data, name)

    def loader(self, split: str) -> Any:
        for batch in self.data.loader(split):
            keep = torch.tensor([int(label) in self.classes for label in batch["label"]])
            if keep.any():
                yield {key: value[keep] for key, value in batch.items()}


# -- similarity and add-on layers -------------------------------------------------------------------------------------


def test_log_similarity_is_the_papers_and_keeps_the_order_of_distances() -> None:
    distance = torch.logspace(-9, 3, 200, dtype=torch.float64)
    torch.testing.assert_close(similarity(distance, "log"), ((distance + 1) / (distance + 1e-4)).log())
    close = torch.tensor([30.0, 30.00001, 30.00002])
    assert (similarity(close, "log").diff() < 0).all()
    assert float(similarity(torch.zeros(1), "log")) == pytest.approx(math.log(1e4), rel=1e-6)
    assert torch.equal(similarity(close, "linear"), -close)


@pytest.mark.parametrize(
    ("channels", "dim", "kind", "widths"),
    [
        (512, 128, "regular", [512, 128, 128]),
        (512, 128, "bottleneck", [512, 256, 256, 128, 128]),
        (2048, 512, "bottleneck", [2048, 1024, 1024, 512, 512]),
        (2208, 128, "bottleneck", [2208, 1104, 1104, 552, 552, 276, 276, 138, 138, 128, 128]),
        (64, 128, "bottleneck", [64, 128, 128]),
    ],
)
def test_add_on_layers_halve_the_channels(channels: int, dim: int, kind: str, widths: list[int]) -> None:
    with torch.device("meta"):
        layers = add_on_layers(channels, dim, kind)  # type: ignore[arg-type]
    convolutions = [layer for layer in layers if isinstance(layer, torch.nn.Conv2d)]
    assert [convolutions[0].in_channels, *(layer.out_channels for layer in convolutions)] == widths
    assert isinstance(layers[-1], torch.nn.Sigmoid)
    assert sum(isinstance(layer, torch.nn.Sigmoid) for layer in layers) == 1


# -- losses -----------------------------------------------------------------------------------------------------------


def test_minima_are_true_where_distances_exceed_the_unit_cube() -> None:
    """The authors' M - max((M - m) mask) gives 4 and no gradient here, for M = 4."""
    distance = torch.tensor([[5.0, 6.0, 1.0, 0.5]], requires_grad=True)
    labels, class_of = torch.tensor([0]), torch.tensor([0, 0, 1, 1])
    loss = cluster(distance, labels, class_of)
    loss.backward()
    assert loss == 5 and distance.grad is not None and distance.grad.tolist() == [[1, 0, 0, 0]]
    assert separation(distance, labels, class_of) == 0.5
    assert average_separation(distance, labels, class_of) == 0.75


def test_one_class_has_no_separation() -> None:
    distance, labels, class_of = torch.rand(3, 2), torch.zeros(3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    assert separation(distance, labels, class_of) == 0 and average_separation(distance, labels, class_of) == 0
    head = Head(6, 1, class_identity(1, 2), 4)
    terms = loss_terms(head, head(torch.rand(3, 6, 5, 5)), labels)
    assert torch.isfinite(total_loss(terms, LossWeights()))


def test_class_agnostic_terms() -> None:
    model = protopnet(class_agnostic=True)
    output = model.network(torch.rand(2, 3, 48, 48))
    terms = loss_terms(model.network.head, output, torch.tensor([0, 3]), class_agnostic=True)
    assert set(terms) == {"cross_entropy", "cluster", "l1"}
    torch.testing.assert_close(terms["cluster"], output.distance.min(dim=1).values.mean())
    torch.testing.assert_close(terms["l1"], model.network.head.last_layer.weight.abs().sum())


def test_pair_distance_is_the_mean_over_all_pairs() -> None:
    vectors = torch.rand(7, 3, 2, 1)
    naive = (vectors.flatten(1)[:, None] - vectors.flatten(1)[None]).square().sum(2).mean()
    torch.testing.assert_close(pair_distance(vectors), naive)
    assert pair_distance(vectors[:1].expand(5, -1, -1, -1)) < 1e-12


def test_a_label_out_of_range_is_an_error() -> None:
    model = protopnet()
    output = model.network(torch.rand(1, 3, 48, 48))
    with pytest.raises(IndexError, match="out of bounds"):
        loss_terms(model.network.head, output, torch.tensor([4]))


# -- projection -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [(1, 1), (2, 3)])
def test_projected_prototypes_are_patches_at_distance_zero(window: tuple[int, int], data: SynthBirdsDataModule) -> None:
    model = protopnet(prototype_window=window)
    model.project(data)
    head = model.network.head
    assert model.prototypes_are_patches and model.source_dataset == data.dataset_name
    for number, source in enumerate(model.sources["part"]):
        assert source is not None
        row = data.find(source.image)
        assert data.row(row)["label"] == int(head.prototypes.class_of[number])
        features = model.network.features(data.sample(row)["image"][None])["part"]
        assert source.grid == (features.shape[2] - window[0] + 1, features.shape[3] - window[1] + 1)
        (y, x), (height, width) = source.cell, window
        patch = features[0, :, y : y + height, x : x + width]
        torch.testing.assert_close(head.prototypes.vectors[number], patch, atol=1e-5, rtol=1e-5)
        # Slope -1e4: rounding between a batch and a single image shows here, and no more than that.
        assert float(head.head(features).evidence[0, number]) == pytest.approx(math.log(1e4), abs=1e-3)


def test_a_class_without_images_keeps_its_prototypes(
    data: SynthBirdsDataModule, capsys: pytest.CaptureFixture[str]
) -> None:
    model = protopnet()
    before = model.network.head.prototypes.vectors.clone()
    model.project(Only(data, {0, 2, 3}))  # type: ignore[arg-type]
    moved = (model.network.head.prototypes.vectors != before).flatten(1).any(dim=1)
    assert moved.tolist() == [True] * 3 + [False] * 3 + [True] * 6
    assert [source is None for source in model.sources["part"]] == (~moved).tolist()
    assert "1 classes have no image" in capsys.readouterr().out
    assert np.isfinite(model.explain(picture()).logit)


def test_class_agnostic_projection_searches_all_classes(data: SynthBirdsDataModule) -> None:
    model = protopnet(class_agnostic=True)
    model.project(Only(data, {1}))  # type: ignore[arg-type]
    assert all(source is not None for source in model.sources["part"])


def test_windows_larger_than_the_map_are_refused() -> None:
    with pytest.raises(FgvczooError, match=r"\(12, 8, 9, 9\).*window is larger"):
        protopnet(prototype_window=(9, 9))(torch.rand(1, 3, 48, 48))


def test_windows_are_cut_at_their_cells() -> None:
    features = torch.arange(2 * 1 * 4 * 5).float().view(2, 1, 4, 5)
    found = windows_at(features, torch.tensor([1, 0]), torch.tensor([5, 2]), (2, 3))  # 3 x 3 places
    assert torch.equal(found, torch.stack([features[1, :, 1:3, 2:5], features[0, :, 0:2, 2:5]]))


def test_equal_cells_tie_to_the_first() -> None:
    head = Head(4, 2, class_identity(2, 1), 3)
    features = torch.full((2, 3, 4, 4), 0.5)
    projector = Projector(head.prototypes.class_of)
    projector.update(features, *head.nearest(features), torch.tensor([0, 1]), torch.tensor([8, 9]))
    assert projector.cell.tolist() == [0, 0] and projector.sample.tolist() == [8, 9]


def test_similarities_stay_exact_under_bfloat16() -> None:
    head = Head(4, 2, class_identity(2, 1), 32)
    features = torch.rand(2, 32, 3, 3)
    head.replace_(features[:, :, :1, :1].clone(), torch.tensor([True, True]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        evidence = head.head(features).evidence
    assert evidence.dtype == torch.float32
    assert evidence.diagonal().tolist() == pytest.approx([math.log(1e4)] * 2, rel=1e-6)


# -- nearest images and pruning ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("patches", [False, True])
@pytest.mark.parametrize("order", ["forward", "backward"])
def test_nearest_images_are_the_sorted_ones(patches: bool, order: str) -> None:
    """Against sorting everything at once; every value comes twice, so ties decide."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.randint(0, 6, (10, 3, 2, 2), generator=generator).float()
    index, labels = torch.arange(10) * 2, torch.arange(10) % 3
    nearest = NearestImages(3, 4)
    rows = index if order == "forward" else index.flip(0)
    for part in rows.split(3):
        batch = maps[part // 2]
        value, cell = batch.flatten(2).max(dim=2)
        found = (batch, None) if patches else (value, cell)
        nearest.update(*found, labels[part // 2], part)
    for prototype in range(3):
        candidates = []
        for image in range(10):
            cells = list(enumerate(maps[image, prototype].flatten().tolist()))
            best = max(cells, key=lambda entry: (entry[1], -entry[0]))
            for cell_, value_ in cells if patches else [best]:
                candidates.append((-value_, image * 2, cell_))
        expected = sorted(candidates)[:4]
        assert nearest.value[prototype].tolist() == [-entry[0] for entry in expected]
        assert nearest.sample[prototype].tolist() == [entry[1] for entry in expected]
        assert nearest.cell[prototype].tolist() == [entry[2] for entry in expected]
        assert nearest.label[prototype].tolist() == [entry[1] // 2 % 3 for entry in expected]


def test_kept_prototypes() -> None:
    class_of = torch.tensor([0, 0, 1, 1])
    nearest = torch.tensor([[0, 0, 1], [0, 1, 1], [0, 0, 1], [1, 0, 0]])
    assert kept_prototypes(nearest, class_of, Pruning(3, 2, keep_one=False)).tolist() == [0]
    assert kept_prototypes(nearest, class_of, Pruning(3, 2)).tolist() == [0, 2]  # the first of equal ones
    assert kept_prototypes(nearest, class_of, Pruning(3, 1)).tolist() == [0, 1, 2, 3]
    with pytest.raises(FgvczooError, match="no prototype has 3"):
        kept_prototypes(nearest, class_of, Pruning(3, 3, keep_one=False))


def test_a_pruned_projected_model_is_saved_and_loaded(
    data: SynthBirdsDataModule, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = protopnet(pruning=Pruning(neighbours=100, threshold=9))  # 16 images, 4 of each class: one a class stays
    model.project(data)
    before, sources = model.state_dict(), model.sources["part"]
    model.prototype_pictures = {f"part.{number}": bytes([number]) for number in range(12)}
    model.prune(data)
    out = capsys.readouterr().out
    assert "only 16 images" in out and "4 of 12 prototypes stay" in out and "4 classes keep one" in out
    head = model.network.head
    assert head.prototypes.class_of.tolist() == [0, 1, 2, 3] and head.last_layer.weight.shape == (4, 4)
    kept = [0, 3, 6, 9]
    assert torch.equal(head.last_layer.weight, before["network.head.last_layer.weight"][:, kept])
    assert model.sources["part"] == [sources[number] for number in kept]
    assert [model.prototype_pictures[f"part.{new}"] for new in range(4)] == [bytes([old]) for old in kept]

    again = fgvczoo.load(fgvczoo.save_weights(model, tmp_path / "w", provenance={}, licences={}))
    assert again.state_values() == model.state_values() == json.loads(json.dumps(model.state_values()))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    assert again.predict(picture()) == model.predict(picture())
    assert again.explain(picture()).to_dict() == model.explain(picture()).to_dict()


# -- what a user may get wrong ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 1}, "at least 2"),
        ({"add_on": "big"}, "regular or bottleneck"),
        ({"activation": "exp"}, "log or linear"),
        ({"prototypes_per_class": 0}, "at least 1"),
        ({"prototype_dim": 0}, "at least 1"),
        ({"prototype_classes": [0, 4]}, "0..3"),
        ({"prototype_classes": []}, "at least 1"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(FgvczooError, match=message):
        protopnet(**arguments)


def test_classes_may_have_different_numbers_of_prototypes() -> None:
    model = protopnet(prototype_classes=[0, 0, 0, 1, 2, 3, 3])
    weight = model.network.head.last_layer.weight
    assert weight.shape == (4, 7) and (weight == 1).sum() == 7 and (weight == -0.5).sum() == 21


def test_a_batch_of_one_a_constant_image_and_a_map_of_one_cell() -> None:
    model = protopnet(preprocess={"size": [8, 8]})
    assert model.network.features(torch.zeros(1, 3, 8, 8))["part"].shape[2:] == (1, 1)
    assert np.isfinite(model.explain(np.zeros((9, 9, 3), np.uint8), top=3).logit)
    assert 0 <= model.predict(torch.zeros(3, 8, 8)).score <= 1


# -- ensembles --------------------------------------------------------------------------------------------------------


def st_protopnet(**arguments: Any) -> STProtoPNet:
    torch.manual_seed(1)
    return STProtoPNet(**{"num_classes": 4, "prototypes_per_class": 2, **TINY, **arguments}).eval()


def test_an_ensemble_sums_logits_and_evidence() -> None:
    one, two = protopnet(), st_protopnet()
    ensemble = PrototypeEnsemble([one, two]).eval()
    images = torch.rand(3, 3, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(ensemble(images), one(images) + two(images))
    why = ensemble.explain(picture())
    assert {entry.kind for entry in why.evidence} == {"0.part", "1.trivial", "1.support"}
    assert sum(entry.contribution for entry in why.evidence) == pytest.approx(why.logit, abs=1e-4)
    assert ensemble.predict(picture()).label == why.predicted


def test_members_have_to_fit_each_other() -> None:
    names = ["a", "b", "c", "d"]
    for other, message in (
        (protopnet(class_names=names[::-1]), "class_names of model 1"),
        (protopnet(class_names=names, preprocess={"size": [64, 64]}), "preprocess of model 1"),
    ):
        with pytest.raises(FgvczooError, match=message):
            PrototypeEnsemble([protopnet(class_names=names), other])
    with pytest.raises(FgvczooError, match="at least one"):
        PrototypeEnsemble([])


def test_only_last_layers_of_an_ensemble_train(data: SynthBirdsDataModule) -> None:
    ensemble = PrototypeEnsemble([protopnet(), st_protopnet()], plan=[{"last_layer": 1}])
    before = {key: value.clone() for key, value in ensemble.state_dict().items()}
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(ensemble, datamodule=data)
    moved = {key for key, value in ensemble.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {
        "network.members.0.head.last_layer.weight",
        "network.members.1.trivial.last_layer.weight",
        "network.members.1.support.last_layer.weight",
    }


# -- analyses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [protopnet, st_protopnet])
def test_local_analysis_is_clamped_and_adds_up(make: Any) -> None:
    model = make()
    analysis = local_analysis(model, picture(), top=5, classes=50)
    prediction = model.predict(picture())
    assert analysis.predicted == prediction.label and len(analysis.sheets) == 4 and not analysis.misconnected
    assert [sheet.class_name for sheet in analysis.sheets] == list(prediction.labels)
    similarities = [row.similarity for row in analysis.most_similar]
    assert len(similarities) == 5 and similarities == sorted(similarities, reverse=True)
    for row in analysis.most_similar:
        assert row.box is not None and 0 <= row.box[0] < row.box[2] <= 70 and 0 <= row.box[1] < row.box[3] <= 50
    why = model.explain(picture())
    own = [e.contribution for e in why.evidence if e.prototype_class == analysis.predicted]
    assert analysis.sheets[0].points == pytest.approx(sum(own), abs=1e-4)
    assert analysis.sheets[0].logit == pytest.approx(why.logit, abs=1e-4)
    assert json.loads(json.dumps(analysis.to_dict())) == analysis.to_dict()


def test_local_analysis_names_prototypes_that_speak_for_another_class() -> None:
    model = protopnet()
    with torch.no_grad():
        model.network.head.last_layer.weight[3, 0] = 2.0
    assert local_analysis(model, picture()).misconnected == (("part", 0),)


def test_global_analysis_finds_the_prototype_itself_first(data: SynthBirdsDataModule) -> None:
    model = protopnet()
    model.project(data)
    found = global_analysis(model, data, k=3)["part"]
    assert len(found) == 12
    for number, source in enumerate(model.sources["part"]):
        neighbours = found[number]
        assert source is not None and source.image in {n.image for n in neighbours if n.similarity > 9.2}
        assert len({n.image for n in neighbours}) == 3
        for neighbour in neighbours:
            row = data.row(neighbour.index)
            assert neighbour.class_name == str(row["label"])  # the model was not given names
            assert 0 <= neighbour.box[0] < neighbour.box[2] <= row["width"]
    some = global_analysis(model, data, k=2, prototypes={"part": [5]})
    assert some == {"part": {5: found[5][:2]}}
    everywhere = global_analysis(model, data, k=100, patches=True, prototypes={"part": [5]})["part"][5]
    assert len(everywhere) == 100 and everywhere[0] == found[5][0]
    assert len(draw_neighbours([found[0], found[5]], data).axes) == 6


# -- the authors' checkpoints -----------------------------------------------------------------------------------------


def official(model: ProtoPNet) -> dict[str, torch.Tensor]:
    names = {"backbone.trunk.": "features.", "head.add_on.": "add_on_layers.", "head.last_layer.": "last_layer."}
    state = {"ones": torch.ones_like(model.network.head.prototypes.vectors)}
    for key, value in model.network.state_dict().items():
        for ours, theirs in names.items():
            if key.startswith(ours):
                state[theirs + key.removeprefix(ours)] = value
    return state | {"prototype_vectors": model.network.head.prototypes.vectors.detach()}


def test_a_checkpoint_of_the_authors_becomes_the_same_network() -> None:
    torch.manual_seed(0)
    model = ProtoPNet(5, backbone="resnet18", prototypes_per_class=2, prototype_dim=16, add_on="bottleneck").eval()
    state = official(model)
    arguments = arguments_from_official(state)
    assert arguments == {
        "num_classes": 5,
        "backbone": "resnet18",
        "prototypes_per_class": 2,
        "prototype_classes": None,
        "prototype_dim": 16,
        "prototype_window": (1, 1),
        "add_on": "bottleneck",
    }
    again = ProtoPNet(**arguments).eval()
    again.network.load_state_dict(state_from_official(state))
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(images), again(images))


@pytest.mark.parametrize("count", [7, 8])
def test_classes_of_a_pruned_checkpoint_are_its_strongest_connections(count: int) -> None:
    torch.manual_seed(0)
    model = ProtoPNet(4, backbone="resnet18", prototypes_per_class=3, prototype_dim=16)
    model.network.head.keep_(torch.tensor([0, 1, 2, 5, 7, 8, 9, 10][:count]))
    with pytest.warns(UserWarning, match="strongest connection"):
        arguments = arguments_from_official(official(model), pruned=True)
    assert arguments["prototype_classes"] == [0, 0, 0, 1, 2, 2, 3, 3][:count]
    again = ProtoPNet(**arguments)
    with pytest.warns(UserWarning, match="strongest connection"):
        again.network.load_state_dict(state_from_official(official(model), pruned=True))


def test_strangers_are_refused() -> None:
    model = ProtoPNet(2, backbone="resnet18", prototypes_per_class=1, prototype_dim=4)
    state = official(model)
    with pytest.raises(FgvczooError, match=r"fc\.weight is no key"):
        state_from_official({**state, "fc.weight": torch.zeros(1)})
    with pytest.raises(FgvczooError, match="no prototype_vectors"):
        arguments_from_official({"last_layer.weight": torch.zeros(2, 2)})
    with pytest.raises(FgvczooError, match="trunk is none of"):
        arguments_from_official({key: value for key, value in state.items() if key != "features.conv1.weight"})


# -- receptive fields -------------------------------------------------------------------------------------------------


def test_a_cell_sees_the_pixels_that_move_it() -> None:
    """Against gradients: with a linear trunk, a cell depends on exactly the pixels of its field."""
    with torch.device("meta"):
        backbone = Backbone("vgg11")
    field = receptive_field(backbone, 64)
    layers = torch.nn.Sequential(
        *(
            torch.nn.Conv2d(1, 1, layer.kernel_size, layer.stride, layer.padding, bias=False)
            if isinstance(layer, torch.nn.Conv2d)
            else torch.nn.AvgPool2d(layer.kernel_size, layer.stride)
            for layer in backbone.trunk.features
            if isinstance(layer, (torch.nn.Conv2d, torch.nn.MaxPool2d))
        )
    ).double()
    for parameter in layers.parameters():
        torch.nn.init.ones_(parameter)
    image = torch.zeros(1, 1, 512, 512, dtype=torch.float64, requires_grad=True)  # large: no field is cut
    wide = receptive_field(backbone, 512)
    layers(image)[0, 0, 8, 7].backward()
    assert image.grad is not None
    rows, columns = torch.nonzero(image.grad[0, 0], as_tuple=True)
    seen = (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
    assert wide.box(8, 7) == seen and wide.cells == 16
    assert field.cells == 2 and field.box(0, 0)[:2] == (0, 0)
    with pytest.raises(FgvczooError, match="2 x 2"):
        field.box(2, 0)


def test_attention_sees_everything() -> None:
    with torch.device("meta"), pytest.raises(FgvczooError, match="attention"):
        receptive_field(Backbone("vit_tiny_patch16_224"), 224)


def test_the_last_layer_as_a_convex_problem(birds: Path, fgvczoo_in) -> None:
    """In place of passes: a lower objective than before, nothing but the connections moved, some of them to 0."""
    from fgvczoo.zoo.load import load
    from tests.conftest import RECIPES

    arguments = ("fit", "--config", RECIPES / "protopnet-tiny.yaml", "--data.root", birds)
    head = '[{"pretrain": 1}, {"joint": 1}, "project"'
    assert fgvczoo_in(*arguments, "--run", "before", "--model.plan", head + "]")[0] == 0
    status, out, err = fgvczoo_in(*arguments, "--run", "after", "--model.plan", head + ', "solve_last_layer"]')
    assert status == 0 and "last layer: objective" in out, err
    before, after = (load(Path("runs") / run).state_dict() for run in ("before", "after"))
    assert [key for key in before if not torch.equal(before[key], after[key])] == ["network.head.last_layer.weight"]
