"""Trunks: their grids, and the weights that are loaded into them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fgvczoo import FgvczooError
from fgvczoo.nn.backbones import Backbone, load_pretrained, split_trunk


@pytest.mark.parametrize(
    ("name", "out_index", "final_pool", "shape"),
    [
        ("test_resnet", None, True, (4, 4)),
        ("test_resnet", 2, True, (16, 16)),
        ("vgg11", None, True, (4, 4)),
        ("vgg11", None, False, (8, 8)),
        ("test_convnext", None, True, (4, 4)),
        ("densenet121", None, True, (4, 4)),
    ],
)
def test_grids_and_channels(name: str, out_index: int | None, final_pool: bool, shape: tuple[int, int]) -> None:
    backbone = Backbone(name, out_index=out_index, final_pool=final_pool).eval()
    with torch.no_grad():
        features = backbone(torch.zeros(1, 3, 128, 128))
    assert features.shape == (1, backbone.channels, *shape)


def test_transformers_give_maps() -> None:
    backbone = Backbone("test_vit").eval()
    assert backbone(torch.zeros(1, 3, 160, 160)).shape == (1, backbone.channels, 10, 10)


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_weights_from_a_file(tmp_path: Path, ending: str) -> None:
    torch.manual_seed(0)
    given, empty = Backbone("test_resnet"), Backbone("test_resnet")
    file = tmp_path / f"trunk.{ending}"
    save_file(given.trunk.state_dict(), file) if ending == "safetensors" else torch.save(given.trunk.state_dict(), file)
    load_pretrained(empty, str(file))
    assert all(torch.equal(a, b) for a, b in zip(given.state_dict().values(), empty.state_dict().values()))
    with pytest.raises(FgvczooError, match=r"not of test_vit|has shape"):
        load_pretrained(Backbone("test_vit"), str(file))


def test_bbn_blocks_in_sequence(tmp_path: Path) -> None:
    options = {"layers": [1, 1, 1, 4], "channels": [8, 8, 8, 8]}
    torch.manual_seed(0)
    given = Backbone("resnet50", options=options)
    blocks = {"layer4.2.": "cb_block.", "layer4.3.": "rb_block."}
    state = {"module.classifier.weight": torch.zeros(1)}
    for key, tensor in given.trunk.state_dict().items():
        for ours, theirs in blocks.items():
            key = key.replace(ours, theirs)
        state[f"module.backbone.{key}"] = tensor
    torch.save({"state_dict": state}, tmp_path / "bbn.pth")
    empty = Backbone("resnet50", options=options)
    load_pretrained(empty, str(tmp_path / "bbn.pth"))
    assert all(torch.equal(a, b) for a, b in zip(given.state_dict().values(), empty.state_dict().values()))


def test_mistakes_are_named(tmp_path: Path) -> None:
    for name, message in (("resnet_18", "did you mean resnet18"),):
        with pytest.raises(FgvczooError, match=message):
            Backbone(name)
    with pytest.raises(FgvczooError, match="only VGG"):
        Backbone("test_resnet", final_pool=False)
    with pytest.raises(FgvczooError, match="no such file"):
        load_pretrained(Backbone("test_resnet"), str(tmp_path / "gone.pth"))
    with pytest.raises(FgvczooError, match="no such weights"):
        load_pretrained(Backbone("test_resnet"), "tv_in2k")


@pytest.mark.parametrize(
    ("name", "block"), [("test_resnet", "layer4.0"), ("test_vit", "blocks.5"), ("vgg11", "features")]
)
def test_a_trunk_in_two_parts_has_every_parameter_once(name: str, block: str) -> None:
    """Also those that lie beside the modules, as a transformer's class token."""
    backbone = Backbone(name)
    rest, last = split_trunk(backbone, block)
    parts = [id(parameter) for part in (rest, last) for parameter in part.parameters()]
    assert sorted(parts) == sorted(id(parameter) for parameter in backbone.parameters())
    assert last is backbone.trunk.get_submodule(block)
    with pytest.raises(FgvczooError, match="no such module"):
        split_trunk(backbone, "layer9")
