"""The weights format: what is saved is what is loaded, and a damaged or foreign folder is one clear line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import fgvczoo
from fgvczoo.models.st_protopnet import STProtoPNet
from fgvczoo.nn.prototypes import PrototypeSource
from fgvczoo.zoo.config import DamagedWeights
from fgvczoo.zoo.load import load
from fgvczoo.zoo.weights import file_sha256, load_weights, save_weights


def small() -> STProtoPNet:
    torch.manual_seed(0)
    return STProtoPNet(
        num_classes=2,
        class_names=["jay", "wren"],
        preprocess={"size": [40, 32], "mean": [0.5, 0.5, 0.5]},
        backbone="test_resnet",
        out_index=1,
        prototypes_per_class=1,
        prototype_dim=4,
        loss={"closeness": 0.5},  # type: ignore[arg-type]
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = small()
    source = PrototypeSource("7", (0, 1), (5, 4), 0.25, (1.0, 2.0, 3.5, 4.0))
    model.sources = {"trivial": [source, None], "support": [None, source]}
    model.source_dataset, model.prototypes_are_patches = "birds", True
    model.prototype_pictures = {"trivial.0": b"\xff\xd8picture"}
    return save_weights(model, tmp_path / "weights", provenance={"recipe": "x"}, licences={"weights": "Apache-2.0"})


def test_all_of_a_model_travels(folder: Path) -> None:
    model = load(folder)
    assert not model.training
    assert all(torch.equal(a, b) for a, b in zip(small().state_dict().values(), model.state_dict().values()))
    assert model.class_names == ["jay", "wren"] and model.preprocess.size == (40, 32)
    assert model.sources["trivial"][0].cell == (0, 1) and model.sources["trivial"][1] is None
    assert model.source_dataset == "birds" and model.prototypes_are_patches
    assert model.prototype_pictures == {"trivial.0": b"\xff\xd8picture"}
    assert model.loss_weights.closeness == 0.5 and model.provenance == {"recipe": "x"}


def test_saving_again_replaces_and_never_destroys(folder: Path, tmp_path: Path) -> None:
    before = file_sha256(folder / "model.safetensors")
    save_weights(load(folder), folder, provenance={}, licences={})
    assert file_sha256(folder / "model.safetensors") == before
    other = tmp_path / "documents"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    with pytest.raises(fgvczoo.FgvczooError, match="holds no weights"):
        save_weights(small(), other, provenance={}, licences={})
    assert (other / "thesis.txt").read_text() == "years of work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["documents", "weights"]


def edit(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def sign(folder: Path) -> None:
    """Makes config.json vouch for the files as they are."""
    edit(folder, files={file.name: file_sha256(file) for file in folder.glob("*.safetensors")})


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(fgvczoo.FgvczooError) as caught:
        load_weights(folder)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_damaged_folders_are_refused(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    refused(folder, "model.safetensors", "altered or cut")
    sign(folder)  # as if it had been written so
    refused(folder, "model.safetensors", "not a whole")
    (folder / "model.safetensors").unlink()
    refused(folder, "no model.safetensors")
    (folder / "config.json").write_text('{"format": 1')
    refused(folder, "config.json", "not valid JSON")
    (folder / "config.json").unlink()
    refused(folder, "no config.json")


def test_altered_files_do_not_load(folder: Path) -> None:
    digest = file_sha256(folder / "config.json")
    assert load_weights(folder, sha256=digest).num_classes == 2
    for name in ("model.safetensors", "prototypes.safetensors", "config.json"):
        whole = (folder / name).read_bytes()
        content = bytearray(whole)
        content[-3] ^= 1
        (folder / name).write_bytes(content)
        with pytest.raises(DamagedWeights, match=f"{name}.*altered"):
            load_weights(folder, sha256=digest)
        (folder / name).write_bytes(whole)
    (folder / "prototypes.safetensors").unlink()
    with pytest.raises(DamagedWeights, match=r"no prototypes\.safetensors"):
        load_weights(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": 99}, ["format 99", "upgrade"]),
        ({"format": "x"}, ["format"]),
        ({"paper": "st-protopnt"}, ["did you mean st-protopnet"]),
        ({"init": {"num_classes": 2, "os": "system"}}, ["os"]),
        ({"init": {"num_classes": 3, "backbone": "test_resnet"}}, ["class"]),
        ({"init": {"num_classes": 2, "backbone": "test_resnet", "out_index": 1, "prototype_dim": 5}}, ["shape"]),
        ({"init": {"num_classes": 2, "backbone": "test_vit"}}, ["another"]),
        ({"preprocess": {"size": [0, 1]}}, ["preprocess.size"]),
    ],
)
def test_configs_that_do_not_fit_are_refused(folder: Path, changes: dict, words: list[str]) -> None:
    edit(folder, **changes)
    refused(folder, *words)


def test_missing_keys_are_named(folder: Path) -> None:
    for key in ("paper", "init", "classes", "preprocess", "state", "files", "provenance", "licence"):
        config = json.loads((folder / "config.json").read_text())
        broken = folder.with_name(f"without-{key}")
        broken.mkdir()
        config.pop(key)
        (broken / "config.json").write_text(json.dumps(config))
        refused(broken, key)


def test_extra_tensors_are_refused(folder: Path) -> None:
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "more": torch.zeros(1)}, folder / "model.safetensors")
    sign(folder)
    refused(folder, "more", "does not belong")


def test_names_lead_to_weights_or_say_what_to_do(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(fgvczoo.FgvczooError, match="did you mean st-protopnet-cub"):
        load("st-protopnt-cub")
    with pytest.raises(fgvczoo.FgvczooError, match="fgvczoo fit --config st-protopnet-cub"):
        load("st-protopnet-cub")
    with pytest.raises(fgvczoo.FgvczooError, match="they are of st-protopnet"):
        load("linear-synthbirds", weights=folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(fgvczoo.FgvczooError, match="no weights in it"):
        load(tmp_path / "empty")
    assert load("linear-synthbirds", weights=None).num_classes == 20


def test_create_names_the_nearest() -> None:
    with pytest.raises(fgvczoo.FgvczooError, match="did you mean st-protopnet"):
        fgvczoo.create("stprotopnet", num_classes=2)
    with pytest.raises(fgvczoo.FgvczooError, match="did you mean backbone"):
        fgvczoo.create("st-protopnet", num_classes=2, backbon="resnet18")
    with pytest.raises(fgvczoo.FgvczooError, match="did you mean resnet18"):
        fgvczoo.create("st-protopnet", num_classes=2, backbone="resnet_18")
    with pytest.raises(fgvczoo.FgvczooError, match="feature stages"):
        fgvczoo.create("linear", num_classes=2, backbone="test_resnet", out_index=9)
