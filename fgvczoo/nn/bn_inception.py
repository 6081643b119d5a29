"""BN-Inception (Ioffe & Szegedy, ICML 2015) as its Caffe port has it, for timm's registry, which lacks it.

Tensors have the names of that port (`conv1_7x7_s2.weight`, `inception_3a_1x1_bn.running_var`, ...). Its published
weights want BGR pixels of 0..255 less (104, 117, 128): preprocess {channels: bgr, range: 255, mean: [104, 117, 128],
std: [1, 1, 1]}.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models import register_model
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["BNInception"]

# Block: 1x1; 3x3 reduced, 3x3; double 3x3 reduced, first, second; projection after the pool.
_BLOCKS: dict[str, tuple[int, tuple[int, int], tuple[int, int, int], int]] = {
    "3a": (64, (64, 64), (64, 96, 96), 32),
    "3b": (64, (64, 96), (64, 96, 96), 64),
    "3c": (0, (128, 160), (64, 96, 96), 0),
    "4a": (224, (64, 96), (96, 128, 128), 128),
    "4b": (192, (96, 128), (96, 128, 128), 128),
    "4c": (160, (128, 160), (128, 160, 160), 128),
    "4d": (96, (128, 192), (160, 192, 192), 128),
    "4e": (0, (128, 192), (192, 256, 256), 0),
    "5a": (352, (192, 320), (160, 224, 224), 128),
    "5b": (352, (192, 320), (192, 224, 224), 128),
}
_STAGES = {"3b": 4, "4d": 8}  # last blocks before a stride, and their reductions


class BNInception(nn.Module):
    """The trunk: images (B, 3, h, w) -> features (B, 1024, H, W), about h / 32 by w / 32.

    Every convolution has a bias and is followed by batch norm and ReLU. Blocks 3c and 4e halve the grid and have no 1x1
    branch and no projection.
    """

    def __init__(self, num_classes: int = 0) -> None:
        super().__init__()
        if num_classes:
            raise ValueError("bn_inception is built as a trunk, without classifier")
        self.num_classes, self.num_features = 0, 1024
        self._conv("conv1_7x7_s2", 3, 64, 7, stride=2)
        self._conv("conv2_3x3_reduce", 64, 64, 1)
        self._conv("conv2_3x3", 64, 192, 3)
        channels = 192
        for name, (one, three, double, projection) in _BLOCKS.items():
            prefix, stride = f"inception_{name}", 1 if one else 2
            if one:
                self._conv(f"{prefix}_1x1", channels, one, 1)
            self._conv(f"{prefix}_3x3_reduce", channels, three[0], 1)
            self._conv(f"{prefix}_3x3", three[0], three[1], 3, stride)
            self._conv(f"{prefix}_double_3x3_reduce", channels, double[0], 1)
            self._conv(f"{prefix}_double_3x3_1", double[0], double[1], 3)
            self._conv(f"{prefix}_double_3x3_2", double[1], double[2], 3, stride)
            if projection:
                self._conv(f"{prefix}_pool_proj", channels, projection, 1)
            channels = (one + projection or channels) + three[1] + double[2]
        self.feature_info = [{"num_chs": 1024, "reduction": 32, "module": "inception_5b"}]

    def _conv(self, name: str, inputs: int, outputs: int, size: int, stride: int = 1) -> None:
        self.add_module(name, nn.Conv2d(inputs, outputs, size, stride, padding=size // 2))
        self.add_module(f"{name}_bn", nn.BatchNorm2d(outputs))

    def _apply_conv(self, name: str, x: Tensor) -> Tensor:
        modules = self._modules
        return F.relu(modules[f"{name}_bn"](modules[name](x)))  # type: ignore[misc]

    def _block(self, name: str, x: Tensor) -> Tensor:
        one, _, _, projection = _BLOCKS[name]
        prefix, parts = f"inception_{name}", []
        if one:
            parts.append(self._apply_conv(f"{prefix}_1x1", x))
        parts.append(self._chain(x, f"{prefix}_3x3_reduce", f"{prefix}_3x3"))
        parts.append(self._chain(x, f"{prefix}_double_3x3_reduce", f"{prefix}_double_3x3_1", f"{prefix}_double_3x3_2"))
        if not one:
            # On odd grids the convolutions give one cell more; features are not negative.
            even = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
            parts.append(F.max_pool2d(even, 3, 2, ceil_mode=True))
        else:
            pooled = (
                F.max_pool2d(x, 3, 1, 1) if name == "5b" else F.avg_pool2d(x, 3, 1, 1, True, count_include_pad=True)
            )
            parts.append(self._apply_conv(f"{prefix}_pool_proj", pooled) if projection else pooled)
        return torch.cat(parts, dim=1)

    def _chain(self, x: Tensor, *names: str) -> Tensor:
        for name in names:
            x = self._apply_conv(name, x)
        return x

    def forward_features(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self._apply_conv("conv1_7x7_s2", x), 3, 2, ceil_mode=True)
        x = F.max_pool2d(self._chain(x, "conv2_3x3_reduce", "conv2_3x3"), 3, 2, ceil_mode=True)
        for name in _BLOCKS:
            x = self._block(name, x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_features(x)


@register_model
def bn_inception(pretrained: bool = False, num_classes: int = 0, **_: Any) -> BNInception:
    """For `timm.create_model`; its weights are read from a file (`backbone_weights`)."""
    if pretrained:
        raise ValueError("bn_inception has no weights to download; give a file")
    return BNInception(num_classes)
