"""The authors' checkpoints: metafg_{0,1,2}_{1k,21k}_{224,384} and metafg_{0,1,2}_inat21_384.

Those of ImageNet are vision only; those of iNaturalist 2021 read date and place and have 10,000 classes. Index buffers
and `point_coord`, which follow from the configuration, are left out.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fgvczoo.errors import FgvczooError, FgvczooWarning
from fgvczoo.models.metaformer.network import SIZES, Size
from fgvczoo.models.metaformer.position import Grid, Resizing, grid_of, resize_table

_PARTS = {
    "stage_0.0": "stem.convs.0",
    "stage_0.1": "stem.norms.0",
    "stage_0.3": "stem.convs.1",
    "stage_0.4": "stem.norms.1",
    "stage_0.6": "stem.convs.2",
    "bn1": "stem.norms.2",
    "norm_1": "aggregation.norm_1",
    "cl_1_fc.0.fc1": "aggregation.expand",
    "cl_1_fc.0.fc2": "aggregation.contract",
    "cl_1_fc.1": "aggregation.norm_mlp",
    "norm_2": "aggregation.norm_2",
    "aggregate": "aggregation.sum",
    "norm": "aggregation.norm",
    "head": "classifier",
}
_MBCONV = {
    "_expand_conv": "expand",
    "_bn0": "norm_1",
    "_depthwise_conv": "depthwise",
    "_bn1": "norm_2",
    "_se_reduce": "squeeze",
    "_se_expand": "excite",
    "_project_conv": "project",
    "_bn2": "norm_3",
}
_TRANSFORMER = {
    "patch_embed.proj": "embedding.project",
    "patch_embed.norm": "embedding.norm",
    "norm1": "blocks.{}.norm_1",
    "attn": "blocks.{}.attention",
    "attn.qkv": "blocks.{}.attention.qkv",
    "attn.proj": "blocks.{}.attention.project",
    "norm2": "blocks.{}.norm_2",
    "mlp.fc1": "blocks.{}.expand",
    "mlp.fc2": "blocks.{}.contract",
}
_EMBEDDER = {"0": "layers.0", "2": "norms.0", "3.w1": "layers.1", "3.norm_fn1": "norms.1", "3.w2": "layers.2"}
_EMBEDDER |= {"3.norm_fn2": "norms.2"}
_META = re.compile(r"meta_(\d+)_head_([12])\.(.+)\.(weight|bias)")
_TABLE = re.compile(r"stage_([34])\.(\d+)\.attn\.relative_position_bias_table")
_UNUSED = re.compile(r"stage_[34]\.\d+\.attn\.relative_position_index|point_coord")
# What the authors' three kinds of metadata are, by the lengths of their groups.
_GROUPS: dict[tuple[int, ...], dict[str, Any]] = {
    (): {},
    (4, 3): {"date": "month-hour", "place": "sphere"},
    (312,): {"attributes": 312},
    (768,): {"text": [32, 768]},
}

ImageSize = int | list[int] | tuple[int, int]  # a side, or height and width

# Of the network: a model may have them though the checkpoint does not.
OPTIONAL_PARTS = ("classifier.", "metadata.")


def state_from_official(
    state: Mapping[str, Tensor],
    *,
    keep_metadata: bool = True,
    keep_head: bool = True,
    image_size: ImageSize | None = None,
    checkpoint_size: ImageSize | None = None,
    resizing: Resizing = "official",
) -> dict[str, Tensor]:
    """The authors' state dict with the keys of our network.

    keep_metadata: with the embedders of metadata; without them a model of iNaturalist 2021 is vision only.
    keep_head: with the classifier; without it a new one is drawn.
    image_size: for which the tables of relative positions are resized; None: as they are.
    checkpoint_size: that they are for; None: a square, as all published ones are.
    resizing: see `position.resize_table`; the published fine-tunings began from "official".

    Raises `FgvczooError` for a key that MetaFG does not have.
    """
    if resizing not in ("official", "exact"):
        raise FgvczooError(f"resizing={resizing!r}; expected official or exact")
    renamed = {}
    for key, tensor in state.items():
        if _UNUSED.fullmatch(key) or (key.startswith("meta_") and not keep_metadata):
            continue
        if key.startswith("head.") and not keep_head:
            continue
        if found := _TABLE.fullmatch(key):
            old = _grid(tensor, int(found[1]), checkpoint_size)
            new = grid_of(_pair(image_size), int(found[1])) if image_size is not None else old
            tensor = resize_table(tensor, old, new, resizing)
        renamed[official_name(key)] = tensor.flatten() if key.startswith("cls_token_") else tensor
    return renamed


def arguments_from_official(
    state: Mapping[str, Tensor],
    *,
    keep_metadata: bool = True,
    keep_head: bool = True,
    image_size: ImageSize | None = None,
    checkpoint_size: ImageSize | None = None,
    resizing: Resizing = "official",
) -> dict[str, Any]:
    """The constructor's arguments that the tensors imply; arguments as `state_from_official`."""
    for key in ("stage_0.0.weight", "cls_token_1", "cls_token_2"):
        if key not in state:
            raise FgvczooError(f"no {key} in it; expected a checkpoint of MetaFormer (MetaFG)")
    tables = {(int(m[1]), int(m[2])): state[key] for key in state if (m := _TABLE.fullmatch(key))}
    size = Size(
        conv_widths=(
            state["stage_0.6.weight"].shape[0],
            state["stage_1.0._project_conv.weight"].shape[0],
            state["stage_2.0._project_conv.weight"].shape[0],
        ),
        conv_depths=(_depth(state, 1), _depth(state, 2)),
        attention_widths=(state["cls_token_1"].numel(), state["cls_token_2"].numel()),
        attention_depths=(_depth(state, 3), _depth(state, 4)),
        num_heads=tables[3, 0].shape[1],
    )
    given = checkpoint_size if image_size is None else image_size
    height, width = _pair(given if given is not None else 16 * _grid(tables[3, 0], 3, None)[0])
    arguments: dict[str, Any] = {
        **_network(size),
        "metadata": _metadata(state) if keep_metadata else {},
        "only_last_cls": "norm.weight" not in state,
        "preprocess": {
            "size": [height, width],
            "crop": "center",
            "crop_fraction": height / (256 * height // 224),  # the authors' short side is rounded down
            "interpolation": "bicubic",
        },
    }
    if keep_head and "head.weight" in state:
        arguments["num_classes"] = len(state["head.weight"])
    return arguments


def resized(
    state: Mapping[str, Tensor],
    *,
    image_size: ImageSize | None = None,
    checkpoint_size: ImageSize | None = None,
    **_: Any,
) -> list[str]:
    """Keys of the tables that `state_from_official` resizes; it is given the same arguments."""
    if image_size is None:
        return []
    tables = [(key, int(found[1])) for key in state if (found := _TABLE.fullmatch(key))]
    new = _pair(image_size)
    return [key for key, stage in tables if _grid(state[key], stage, checkpoint_size) != grid_of(new, stage)]


def official_name(key: str) -> str:
    """Our name of an entry of the authors' state dict. Raises `FgvczooError` for one that MetaFG does not have."""
    if key in ("cls_token_1", "cls_token_2"):
        return f"stage_{int(key[-1]) + 2}.class_token"
    part, _, leaf = key.rpartition(".")
    if part in _PARTS:
        return f"{_PARTS[part]}.{leaf}"
    if (found := _META.fullmatch(key)) and found[3] in _EMBEDDER:
        return f"metadata.{int(found[1]) - 1}.{int(found[2]) - 1}.{_EMBEDDER[found[3]]}.{found[4]}"
    if found := re.fullmatch(r"stage_([1234])\.(\d+)\.(.+)", part):
        stage, block, inner = int(found[1]), found[2], found[3]
        if stage <= 2 and inner in _MBCONV:
            return f"stage_{stage}.{block}.{_MBCONV[inner]}.{leaf}"
        if stage >= 3 and inner in _TRANSFORMER and (block == "0" or not inner.startswith("patch_embed")):
            leaf = "bias_table" if leaf == "relative_position_bias_table" else leaf
            return f"stage_{stage}.{_TRANSFORMER[inner].format(block)}.{leaf}"
    raise FgvczooError(f"{key} is no tensor of MetaFG; expected a checkpoint of MetaFormer")


def _network(size: Size) -> dict[str, Any]:
    """The name of a size, or its numbers where it has none."""
    for name, known in SIZES.items():
        if size == known:
            return {"network": name}
    return {
        "conv_widths": list(size.conv_widths),
        "conv_depths": list(size.conv_depths),
        "attention_widths": list(size.attention_widths),
        "attention_depths": list(size.attention_depths),
        "num_heads": size.num_heads,
    }


def _depth(state: Mapping[str, Tensor], stage: int) -> int:
    return 1 + max(int(key.split(".")[1]) for key in state if key.startswith(f"stage_{stage}."))


def _metadata(state: Mapping[str, Tensor]) -> dict[str, Any]:
    widths: list[int] = []
    while (key := f"meta_{len(widths) + 1}_head_1.0.weight") in state:
        widths.append(state[key].shape[1])
    if tuple(widths) in _GROUPS:
        if widths == [768]:
            warnings.warn(
                "the tensors do not say how many vectors of text there were; taken as 32, give metadata for another"
                " number",
                FgvczooWarning,
                stacklevel=2,
            )
        return dict(_GROUPS[tuple(widths)])
    warnings.warn(
        f"metadata groups of {', '.join(map(str, widths))} numbers are none of the paper's; called group_1, ...",
        FgvczooWarning,
        stacklevel=2,
    )
    return {f"group_{number}": width for number, width in enumerate(widths, 1)}


def _grid(table: Tensor, stage: int, image_size: ImageSize | None) -> Grid:
    """The grid that a table is for: a square unless the image size says otherwise."""
    if image_size is None:
        side = (math.isqrt(len(table) - 1) + 1) // 2
        grid = (side, side)
    else:
        grid = grid_of(_pair(image_size), stage)
    if (2 * grid[0] - 1) * (2 * grid[1] - 1) + 1 != len(table):
        raise FgvczooError(
            f"a table of {len(table)} relative positions in stage {stage} is not that of a grid of {grid[0]} x"
            f" {grid[1]}; give checkpoint_size, the height and width that the checkpoint was trained at"
        )
    return grid


def _pair(size: ImageSize) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    height, width = size
    return height, width
