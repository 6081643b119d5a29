"""A classification network cut in two, as BAS needs it: features at stride 8, then the rest at stride 16.

The edits are those of the paper's four backbones: strides become 1, without dilation, and the classifier goes. Only
strides and paddings change, so ImageNet weights fit.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models.efficientnet import EfficientNet
from timm.models.inception_v3 import InceptionV3
from timm.models.resnet import ResNet
from timm.models.vgg import VGG
from torch import Tensor, nn
from torch.nn import functional as F

from fgvczoo.errors import FgvczooError
from fgvczoo.nn.backbones import Backbone


class SplitTrunk(nn.Module):
    """The two halves of a timm network: `extractor` f1, images (B, 3, h, w) -> (B, `mid_channels`, h/8, w/8), and
    `rest`, the trunk's part of f2, -> (B, `channels`, h/16, w/16).

    name, options: as `Backbone` takes them. Known are timm's VGG, ResNet, MobileNetV1 and Inception-V3 classes.
    segmentation: the ResNet of BAS's seeds: features at stride 16 and no step between the halves.

    Both halves are views: they hold the modules of `backbone`, which owns them.
    """

    def __init__(self, name: str, options: dict[str, Any] | None = None, segmentation: bool = False) -> None:
        super().__init__()
        if name.startswith("mobilenetv1"):
            options = {"act_layer": "relu", **(options or {})}  # timm's has ReLU6
        self.backbone = Backbone(name, options=options)
        trunk = self.backbone.trunk
        self.segmentation = segmentation
        split = next((split for cls, split in _SPLITS if isinstance(trunk, cls)), None)
        if split is None or (segmentation and not isinstance(trunk, ResNet)):
            known = "ResNet" if segmentation else "VGG, ResNet, MobileNetV1, Inception-V3"
            raise FgvczooError(f"backbone={name!r}: BAS has its cut for {known}; give one of these timm networks")
        self._halves = split
        first, second = split(trunk, segmentation, edit=True)
        with torch.no_grad():
            training = self.training
            self.eval()
            try:
                features = nn.Sequential(*first)(torch.zeros(1, 3, 64, 64))
                self.mid_channels = features.shape[1]
                self.channels = nn.Sequential(*second)(features).shape[1]
            finally:
                self.train(training)

    @property
    def extractor(self) -> nn.Sequential:
        return nn.Sequential(*self._halves(self.backbone.trunk, self.segmentation, edit=False)[0])

    @property
    def rest(self) -> nn.Sequential:
        return nn.Sequential(*self._halves(self.backbone.trunk, self.segmentation, edit=False)[1])


Halves = tuple[list[nn.Module], list[nn.Module]]


def _split_vgg(trunk: Any, segmentation: bool, edit: bool) -> Halves:
    """f1 ends with the ReLU before the fourth max-pool; the fifth is dropped."""
    pools = [place for place, layer in enumerate(trunk.features) if isinstance(layer, nn.MaxPool2d)]
    if edit:
        trunk.features = trunk.features[: pools[4]]
    layers = list(trunk.features)
    return layers[: pools[3]], layers[pools[3] :]


def _split_resnet(trunk: Any, segmentation: bool, edit: bool) -> Halves:
    """f1 ends with layer3; a max-pool comes before layer4. Both stages lose their stride."""
    if edit:
        for stage in (trunk.layer4,) if segmentation else (trunk.layer3, trunk.layer4):
            _remove_stride(stage[0])
    first = [trunk.conv1, trunk.bn1, trunk.act1, trunk.maxpool, trunk.layer1, trunk.layer2, trunk.layer3]
    return first, [*([] if segmentation else [nn.MaxPool2d(2)]), trunk.layer4]


def _split_mobilenet(trunk: Any, segmentation: bool, edit: bool) -> Halves:
    """f1 ends with the eleventh of the thirteen depthwise blocks; the last stride of 2 stays."""
    if edit:
        _remove_stride(trunk.blocks[3][0])
        trunk.conv_head = trunk.bn2 = nn.Identity()
    return [trunk.conv_stem, trunk.bn1, *trunk.blocks[:4]], [trunk.blocks[4]]


def _split_inception(trunk: Any, segmentation: bool, edit: bool) -> Halves:
    """f1 ends with Mixed_6e. Paddings make 224 pixels 28 cells, then 14."""
    if edit:
        trunk.Conv2d_1a_3x3.conv.padding = (1, 1)
        trunk.Pool1 = nn.MaxPool2d(3, 2, padding=1, ceil_mode=True)
        trunk.Pool2 = nn.MaxPool2d(3, 2, padding=1, ceil_mode=True)
        trunk.Mixed_6a = _MixedB(trunk.Mixed_6a)
        trunk.Mixed_7a = _MixedD(trunk.Mixed_7a)
    names = [name for name, _ in trunk.named_children()]
    start, end = names.index("Mixed_7a"), names.index("Mixed_7c") + 1
    layers = [getattr(trunk, name) for name in names[:end]]
    return layers[:start], layers[start:]


def _remove_stride(block: nn.Module) -> None:
    for layer in block.modules():
        if isinstance(layer, (nn.Conv2d, nn.AvgPool2d, nn.MaxPool2d)):
            layer.stride = (1, 1) if isinstance(layer, nn.Conv2d) else 1


class _MixedB(nn.Module):
    """Mixed_6a without strides."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.branch3x3, self.branch3x3dbl_1 = block.branch3x3, block.branch3x3dbl_1
        self.branch3x3dbl_2, self.branch3x3dbl_3 = block.branch3x3dbl_2, block.branch3x3dbl_3
        for layer in (self.branch3x3, self.branch3x3dbl_3):
            layer.conv.stride = layer.conv.padding = (1, 1)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=1, padding=1)], 1)


class _MixedD(nn.Module):
    """Mixed_7a with paddings."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = block.branch3x3_1, block.branch3x3_2
        self.branch7x7x3_1, self.branch7x7x3_2 = block.branch7x7x3_1, block.branch7x7x3_2
        self.branch7x7x3_3, self.branch7x7x3_4 = block.branch7x7x3_3, block.branch7x7x3_4
        for layer in (self.branch3x3_2, self.branch7x7x3_4):
            layer.conv.padding = (1, 1)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), wide, F.max_pool2d(x, 3, stride=2, padding=1)], 1)


_SPLITS = (
    (VGG, _split_vgg),
    (ResNet, _split_resnet),
    (EfficientNet, _split_mobilenet),
    (InceptionV3, _split_inception),
)
