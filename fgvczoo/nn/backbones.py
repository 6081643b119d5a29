"""Trunks by timm name that give one feature map, and the loading of their pretrained weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from fgvczoo.checkpoints import read_tensors
from fgvczoo.errors import FgvczooError, did_you_mean
from fgvczoo.nn import bn_inception as _registered  # noqa: F401 - enters the trunks that timm lacks

# Networks that have torchvision's keys and numbers in timm, too: the trunks of ProtoPNet's and ProtoTree's code.
TORCHVISION = (
    *("vgg11", "vgg13", "vgg16", "vgg19", "vgg11_bn", "vgg13_bn", "vgg16_bn", "vgg19_bn"),
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("densenet121", "densenet161", "densenet169", "densenet201"),
)

# Arguments of timm's constructor that read files.
_NOT_OPTIONS = ("checkpoint_path", "cache_dir")


class Backbone(nn.Module):
    """A timm network without pooling and head: images (B, 3, h, w) -> features (B, `channels`, H, W).

    name: a timm architecture, without weights tag ("resnet34").
    out_index: which of timm's feature stages to give; later stages are not built. None: the last, exactly as
        `forward_features` of the full network gives it.
    final_pool: False drops the last max-pool of a VGG, which doubles the grid.
    options: further arguments of the timm constructor.

    Always built without pretrained weights: `load_pretrained` is a step of its own, taken at the start of a fresh fit.
    """

    trunk: Any  # timm's networks share methods, but no base class that declares them

    def __init__(
        self,
        name: str,
        *,
        out_index: int | None = None,
        final_pool: bool = True,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not timm.is_model(name.split(".")[0]):
            raise FgvczooError(f"backbone={name!r} is not a timm model{did_you_mean(name, timm.list_models())}")
        for key in options or {}:
            if key in _NOT_OPTIONS or key.startswith("pretrained"):
                raise FgvczooError(f"backbone_options of {name}: {key} is none; backbone_weights names what to load")
        self.name = name
        self.out_index = out_index
        try:
            self.trunk = timm.create_model(name, pretrained=False, num_classes=0, **(options or {}))
        except FgvczooError:
            raise
        except Exception as error:  # whatever a network's constructor does with wrong values
            raise FgvczooError(f"backbone_options of {name}: {error or type(error).__name__}") from None
        stages = self.trunk.feature_info
        if out_index is not None:
            if not -len(stages) <= out_index < len(stages):
                raise FgvczooError(f"out_index={out_index}: {name} has feature stages 0..{len(stages) - 1}")
            self.trunk.prune_intermediate_layers([out_index], prune_norm=True, prune_head=True)
        for head in ("pre_logits", "head", "fc", "classifier"):
            if hasattr(self.trunk, head):
                setattr(self.trunk, head, nn.Identity())
        if not final_pool:
            self._drop_final_pool()
        self.channels = int(stages[-1 if out_index is None else out_index]["num_chs"])

    def _drop_final_pool(self) -> None:
        layers = getattr(self.trunk, "features", None)
        if not (isinstance(layers, nn.Sequential) and isinstance(layers[-1], nn.MaxPool2d)):
            raise FgvczooError(f"final_pool=False: {self.name} does not end in a max-pool; only VGG does")
        self.trunk.features = layers[:-1]

    def forward(self, images: Tensor) -> Tensor:
        if self.out_index is None:
            features = self.trunk.forward_features(images)
            if features.ndim == 4:
                return features
        indices = 1 if self.out_index is None else [self.out_index]
        return self.trunk.forward_intermediates(images, indices=indices, intermediates_only=True)[-1]


def split_trunk(backbone: Backbone, name: str) -> tuple[nn.ModuleList, nn.Module]:
    """All parts of a trunk but the inner module `name` ("layer4.2"), and that module: together they hold every
    parameter once. Raises `FgvczooError` where the trunk has no such module."""
    modules = dict(backbone.trunk.named_modules())
    if not name or name not in modules:
        raise FgvczooError(f"last_block={name!r}: {backbone.name} has no such module{did_you_mean(name, modules)}")
    rest: list[nn.Module] = []
    inside = backbone.trunk
    for step in name.split("."):
        if own := list(inside.parameters(recurse=False)):
            rest.append(nn.ParameterList(own))
        rest += [child for key, child in inside.named_children() if key != step]
        inside = inside.get_submodule(step)
    return nn.ModuleList(rest), inside


def recognise_backbone(state: Mapping[str, Tensor], candidates: Sequence[tuple[str, dict[str, Any] | None]]) -> int:
    """Which trunk a state dict with timm's keys is of, by names and shapes of its tensors: an index into `candidates`,
    each a timm name and further arguments of its constructor. Raises `FgvczooError` when it is none of them."""
    given = {key: tuple(value.shape) for key, value in state.items() if not key.endswith("num_batches_tracked")}
    for number, (name, options) in enumerate(candidates):
        with torch.device("meta"):
            wanted = Backbone(name, options=options).trunk.state_dict()
        shapes = {key: tuple(value.shape) for key, value in wanted.items() if not key.endswith("num_batches_tracked")}
        if shapes == given:
            return number
    names = ", ".join(name for name, _ in candidates)
    raise FgvczooError(f"the checkpoint's trunk is none of {names}")


def load_pretrained(backbone: Backbone, source: str) -> None:
    """Loads weights into the trunk, in place.

    source: a file (.safetensors, .pth, .pt; tensors only, nothing in it is executed) with timm's keys or those of BBN's
    iNaturalist ResNet-50 (for backbone_options {layers: [3, 4, 6, 4]}), or a timm weights tag ("tv_in1k"), which is
    downloaded.

    Raises `FgvczooError` when the file or the tag does not exist, cannot be fetched, or has other shapes.
    """
    path = Path(source)
    if path.suffix in (".safetensors", ".pth", ".pt"):
        if not path.is_file():
            raise FgvczooError(f"backbone_weights={source}: no such file; give a weights file or a timm tag")
        state = _from_bbn(read_tensors(path))
    else:
        known = [tag for tag in _tags(backbone.name) if tag]
        if source not in known:
            raise FgvczooError(
                f"backbone_weights={source!r}: timm has no such weights for {backbone.name}"
                f"{did_you_mean(source, known) or '; known: ' + ', '.join(known)}"
            )
        try:
            state = timm.create_model(f"{backbone.name}.{source}", pretrained=True).state_dict()
        except Exception as error:
            raise FgvczooError(
                f"backbone_weights={source!r} of {backbone.name} cannot be downloaded ({type(error).__name__}); go "
                "online once, or give a weights file, or null to start from random weights"
            ) from error
    wanted = backbone.trunk.state_dict()
    missing = [key for key in wanted if key not in state and not key.endswith("num_batches_tracked")]
    if missing:
        raise FgvczooError(f"backbone_weights={source}: not of {backbone.name}: no {missing[0]} in it")
    wrong = [key for key in wanted if key in state and state[key].shape != wanted[key].shape]
    if wrong:
        given, expected = tuple(state[wrong[0]].shape), tuple(wanted[wrong[0]].shape)
        raise FgvczooError(f"backbone_weights={source}: {wrong[0]} has shape {given}, {backbone.name} needs {expected}")
    backbone.trunk.load_state_dict({key: state[key] for key in wanted if key in state}, strict=False)


def _tags(name: str) -> list[str]:
    return [full.partition(".")[2] for full in timm.list_models(f"{name}.*", pretrained=True)]


# BBN's two parallel last blocks, which later papers put in sequence as a third and fourth block of the last stage.
_BBN_BLOCKS = {"cb_block": "layer4.2", "rb_block": "layer4.3"}


def _from_bbn(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The iNaturalist-2017 ResNet-50 of BBN with timm's keys, for layers [3, 4, 6, 4]; other states as they are."""
    prefix = "backbone."
    if not any(key.startswith(f"{prefix}cb_block") for key in state):
        return state
    renamed = {}
    for key, tensor in state.items():
        if key.startswith(prefix):
            first, _, rest = key.removeprefix(prefix).partition(".")
            renamed[f"{_BBN_BLOCKS.get(first, first)}.{rest}"] = tensor
    return renamed
