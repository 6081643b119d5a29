"""ProtoTree: training, pruning, projection."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

import fgvczoo
from fgvczoo import FgvczooError
from fgvczoo.data.cub import SynthBirdsDataModule
from fgvczoo.models.prototree.tree import Tree
from fgvczoo.tasks.stages import Group, Stage
from tests.prototree.small import NO_NORM, TRAIN, fit, learned, prototree

# -- training ----------------------------------------------------------------------------------------------------------


def test_accumulated_batches_count_like_whole_ones(birds: Path) -> None:
    one, two = (
        fit(
            prototree(**NO_NORM, stages=TRAIN, plan=[{"train": 2}]),
            birds,
            batch_size=batch,
            accumulate_grad_batches=steps,
        )
        for batch, steps in ((8, 1), (4, 2))
    )
    counts = [model.network.head.leaves.counts for model in (one, two)]
    torch.testing.assert_close(counts[0], counts[1], rtol=1e-3, atol=1e-4)
    assert float(counts[0].sum()) > 10


def test_leaves_by_gradients_or_by_passes(birds: Path) -> None:
    stages = {"train": Stage({**TRAIN["train"].groups, "leaves": Group(1e-2)}, "AdamW")}
    model = prototree(stages=stages, plan=[{"train": 1}])
    before = model.network.head.leaves.counts.detach().clone()
    assert 0.5 < float(before.std()) < 2  # they begin at random
    after = fit(model, birds).network.head.leaves.counts
    assert 0 < float((after - before).abs().max().detach()) < 0.1
    with pytest.raises(FgvczooError, match="negative"):
        prototree(stages=stages, plan=[{"train": 1}], leaf_normalization="counts")
    model = fit(prototree(stages=TRAIN, plan=[{"train": 1}], leaf_passes=3, leaf_normalization="counts"), birds)
    torch.testing.assert_close(model.network.head.leaves.counts.sum(0), torch.full((4,), 4.0))  # 16 images, 4 classes


def test_the_gain_of_the_authors_log_mode(birds: Path) -> None:
    frozen = {"train": Stage({"add_on": Group(0.0), "prototypes": Group(0.0)}, "AdamW")}
    model = fit(prototree(stages=frozen, plan=[{"train": 1}], leaf_gain=math.e), birds)
    torch.testing.assert_close(model.network.head.leaves.counts.sum(0), torch.full((4,), 4 * math.e))


def test_the_last_block_is_a_group_of_its_own(birds: Path) -> None:
    stages = {"frozen": Stage({"last_block": Group(1e-2), "add_on": Group(1e-2)}, "AdamW")}
    model = prototree(last_block="layer2.0", stages=stages, plan=[{"frozen": 1}])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fit(model, birds)
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    trunk = {key for key in moved if key.startswith("network.backbone")}
    assert trunk and all(".layer2.0." in key for key in trunk) and "network.head.prototypes.vectors" not in moved
    with pytest.raises(FgvczooError, match=r"layer2\.0"):
        prototree(last_block="layer2.9")


def test_a_class_without_training_images(birds: Path) -> None:
    class Three(SynthBirdsDataModule):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            rows = self.splits["train"]
            for name in ("train", "train_plain", "projection"):
                self.splits[name] = rows[self.reader.labels[rows] != 1]

    data = Three(root=str(birds), size="tiny", preprocess={"size": [48, 48]}, batch_size=4)
    model = prototree(stages=TRAIN, plan=[{"train": 2}, "prune", "project"], pruning_threshold=0.3)
    L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_epochs=-1
    ).fit(model, data)
    counts = model.network.head.leaves.counts
    assert (counts[:, 1] == 0).all() and torch.isfinite(model.forward(torch.rand(2, 3, 48, 48))).all()


# -- pruning and projection --------------------------------------------------------------------------------------------


def test_pruned_models_travel(tmp_path: Path, data: SynthBirdsDataModule) -> None:
    model = learned()
    head = model.network.head
    with torch.no_grad():
        head.leaves.counts[[0, 5, 6]] = 0
    model.project(data)
    sources, vectors = list(model.sources["tree"]), head.prototypes.vectors.clone()
    model.prototype_pictures = {f"tree.{row}": bytes([row]) for row in range(7)}
    before = model(torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0)))
    model.pruning_threshold = 0.26
    model.prune()
    assert head.tree.to_list() == Tree.complete(3).pruned([3, 11, 13]).to_list()
    kept = [Tree.complete(3).branches.index(branch) for branch in head.tree.branches]
    assert torch.equal(head.prototypes.vectors, vectors[kept])
    assert model.sources["tree"] == [sources[row] for row in kept]
    assert list(model.prototype_pictures.values()) == [bytes([row]) for row in kept]
    model.prototype_pictures = {}
    folder = fgvczoo.save_weights(model, tmp_path / "w", provenance={}, licences={})
    again = fgvczoo.load(folder)
    images = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again(images), model(images)) and again.state_values() == model.state_values()
    assert not torch.allclose(again(images), before)


@pytest.mark.parametrize("height", [1, 3])
def test_all_leaves_flat(height: int, capsys: pytest.CaptureFixture[str], data: SynthBirdsDataModule) -> None:
    model = prototree(height=height)
    model.prune()
    assert "all leaves are flat" in capsys.readouterr().out
    assert len(model.network.head.tree) == 1 and model(torch.rand(1, 3, 48, 48)).shape == (1, 4)
    model.project(data)
    assert model.sources["tree"][0] is not None


def test_projection_takes_patches_of_the_classes_below(data: SynthBirdsDataModule) -> None:
    model = learned(seed=1, class_agnostic=False)
    head, labels = model.network.head, model.network.head.leaves.counts.argmax(1).tolist()
    tree = head.tree
    model.project(data)
    for row, source in enumerate(model.sources["tree"]):
        assert source is not None
        below = {labels[place] for place in tree.below(tree.branches[row])}
        index = data.find(source.image)
        assert data.row(index)["label"] in below
        features = head.features(model.network.backbone(data.sample(index)["image"][None]))
        patch = features[0, :, source.cell[0], source.cell[1]]
        torch.testing.assert_close(head.prototypes.vectors[row], patch, atol=1e-5, rtol=1e-4)
    similarity, _ = head.nearest(features)
    assert float(similarity[0, row].detach()) > 0.999  # a prototype that is a patch is at distance 0, not at 0.005


def test_a_node_without_images_keeps_its_prototype(
    data: SynthBirdsDataModule, capsys: pytest.CaptureFixture[str]
) -> None:
    class Only:
        def __getattr__(self, name: str) -> Any:
            return getattr(data, name)

        def loader(self, split: str) -> Any:
            for batch in data.loader(split):
                keep = batch["label"] == 2
                if keep.any():
                    yield {key: value[keep] for key, value in batch.items()}

    model = prototree()
    with torch.no_grad():
        model.network.head.leaves.counts[:, 0] = 1
        model.network.head.leaves.counts[-1, 2] = 5
    before = model.network.head.prototypes.vectors.clone()
    model.project(Only())  # type: ignore[arg-type]
    on_the_way = [branch for branch, _ in model.network.head.tree.path(14)]
    moved = (model.network.head.prototypes.vectors != before).any(dim=1).tolist()
    assert [branch for branch, is_moved in zip(model.network.head.tree.branches, moved) if is_moved] == on_the_way
    assert "their prototypes stay" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("branches", [[0, 1, 8], [1, 1, 1]]),
        ("branches", [[0, 1, 2**62]]),
        ("branches", [[node, node + 1, node + 2] for node in range(100_000)]),
        ("branches", 7),
        ("branches", [[0, 1]]),
        ("branches", [[[], {}, None]]),
        ("branches", None),  # a whole tree, whose tensors are not there
        ("is_pruned", {}),
    ],
)
def test_trees_of_strangers(key: str, value: Any, tmp_path: Path) -> None:
    model = learned()
    model.pruning_threshold = 0.6
    model.prune()
    folder = fgvczoo.save_weights(model, tmp_path / "w", provenance={}, licences={})
    config = json.loads((folder / "config.json").read_text())
    config["state"][key] = value
    (folder / "config.json").write_text(json.dumps(config))
    if key == "is_pruned":
        assert fgvczoo.load(folder).network.head.tree == model.network.head.tree
        return
    with pytest.raises(FgvczooError) as error:
        fgvczoo.load(folder)
    assert str(error.value).isprintable() and len(str(error.value)) < 400
