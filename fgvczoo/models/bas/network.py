"""BAS's network: an extractor, a head with one map a class, and a generator of foreground maps.

Zhai, Wu et al., "Background Activation Suppression for Weakly Supervised Object Localization and Semantic
Segmentation", IJCV 2023 (arXiv 2309.12943); the conference form is Wu, Zhai, Cao, CVPR 2022 (arXiv 2112.00580).

B images, C classes; the extractor's features F are (B, F, H, W), class maps (B, C, H/2, W/2). S is the score of the
true class, S_b that of the background.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fgvczoo.models.bas.trunk import SplitTrunk

CLASSES_AT_ONCE = 64  # of which the maps are in memory when they are averaged


@dataclass(frozen=True)
class TrainingOutput:
    """What the losses read. y is the given class of each image.

    scores: s (B, C). guided: s2 (B, C), the scores of the class maps under the foreground map. foreground: M_f
    (B, 1, H, W) of class y, in [0, 1]. score: S = s[y] (B,). background_score: S_b (B,), through the frozen head.
    class_maps: P (B, C, h, w).
    """

    scores: Tensor
    guided: Tensor
    foreground: Tensor
    score: Tensor
    background_score: Tensor
    class_maps: Tensor


class BASNetwork(nn.Module):
    """Args:
    num_classes: C.
    backbone, backbone_options: a timm network that `SplitTrunk` knows.
    hidden: channels of the classification head's two inner convolutions.
    relu_class_maps: the conference form's ReLU on the class maps, so that no score is negative.
    segmentation: the form for seeds of segmentation: another stride, a linear head, no biases, and class maps that
        guidance does not train.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: str = "resnet50",
        backbone_options: dict[str, Any] | None = None,
        hidden: int = 1024,
        relu_class_maps: bool = False,
        segmentation: bool = False,
    ) -> None:
        super().__init__()
        self.trunk = SplitTrunk(backbone, backbone_options, segmentation)
        self.segmentation = segmentation
        self.classifier: nn.Sequential
        if segmentation:
            self.classifier = nn.Sequential(nn.Conv2d(self.trunk.channels, num_classes, 1, bias=False))
        else:
            self.classifier = nn.Sequential(
                nn.Conv2d(self.trunk.channels, hidden, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(hidden, hidden, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(hidden, num_classes, 1),
                *([nn.ReLU()] if relu_class_maps else []),
            )
        self.generator = nn.Conv2d(self.trunk.mid_channels, num_classes, 3, padding=1, bias=not segmentation)
        self._initialize()

    def _initialize(self) -> None:
        """Xavier weights and zero biases; VGG: N(0, 0.02)."""
        vgg = self.trunk.backbone.name.startswith("vgg")
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                if vgg:
                    nn.init.normal_(layer.weight, std=0.02)
                    continue
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    @property
    def head(self) -> nn.Sequential:
        """f2: from features to class maps. It holds the modules of trunk and classifier, which own them."""
        return nn.Sequential(self.trunk.rest, self.classifier)

    def features(self, images: Tensor) -> Tensor:
        """F = f1(I): (B, 3, h, w) -> (B, F, H, W)."""
        return self.trunk.extractor(images)

    def class_maps(self, features: Tensor) -> Tensor:
        """P = f2(F): (B, F, H, W) -> (B, C, H/2, W/2). Their means are the scores."""
        return self.head(features)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) -> scores (B, C)."""
        return self.class_maps(self.features(images)).mean(dim=(2, 3))

    def foreground(self, features: Tensor, classes: Tensor) -> Tensor:
        """The map of one class an image: (B, F, H, W), (B,) -> (B, 1, H, W).

        The generator's convolution with the filters of these classes alone: the values and gradients of all C maps,
        of which the others' are not asked for, at 1/C of their cost.
        """
        batch, channels, height, width = features.shape
        filters = self.generator.weight[classes].reshape(batch, channels, 9)
        # A product for each of the 3 x 3 taps, then their sum, shifted: one matrix product an image.
        taps = filters.flip(2).transpose(1, 2) @ features.flatten(2)
        logits = F.fold(taps, (height, width), 3, padding=1)
        if self.generator.bias is not None:
            logits = logits + self.generator.bias[classes][:, None, None, None]
        return logits.sigmoid()

    def maps_of(self, features: Tensor, classes: Tensor) -> Tensor:
        """The maps of K classes on every image: (B, F, H, W), (K,) -> (B, K, H, W)."""
        bias = None if self.generator.bias is None else self.generator.bias[classes]
        return F.conv2d(features, self.generator.weight[classes], bias, padding=1).sigmoid()

    def fused_map(self, features: Tensor, weights: Tensor) -> Tensor:
        """Weighted mean of the classes' maps: (B, F, H, W), (B, C) -> (B, H, W), without all of them in memory."""
        fused = features.new_zeros(features.shape[0], *features.shape[2:])
        for first in range(0, weights.shape[1], CLASSES_AT_ONCE):
            part = slice(first, first + CLASSES_AT_ONCE)
            bias = None if self.generator.bias is None else self.generator.bias[part]
            maps = F.conv2d(features, self.generator.weight[part], bias, padding=1).sigmoid()
            fused = fused + torch.einsum("bc,bchw->bhw", weights[:, part].to(maps), maps)
        return fused

    def background_maps(self, masked: Tensor) -> Tensor:
        """Class maps of masked features through the frozen head f2': its parameters as they are now, without gradients;
        batch norms use the batch's statistics in train mode and leave the running ones alone."""
        head = self.head
        state = {name: parameter.detach() for name, parameter in head.named_parameters()}
        state |= {name: buffer.clone() for name, buffer in head.named_buffers()}
        return functional_call(head, state, (masked,))

    def training_output(self, images: Tensor, classes: Tensor) -> TrainingOutput:
        """All that the losses read, of images (B, 3, h, w) and one class each (B,)."""
        features = self.features(images)
        class_maps = self.class_maps(features)
        foreground = self.foreground(features, classes)
        background = self.background_maps(features.detach() * (1 - foreground))
        scores, own = class_maps.mean(dim=(2, 3)), classes[:, None]
        guide = class_maps.detach() if self.segmentation else class_maps
        height, width = class_maps.shape[2:]
        pooled = F.adaptive_avg_pool2d(foreground, (height, width))
        return TrainingOutput(
            scores=scores,
            guided=(guide * pooled).mean(dim=(2, 3)),
            foreground=foreground,
            score=scores.gather(1, own)[:, 0],
            background_score=background.mean(dim=(2, 3)).gather(1, own)[:, 0],
            class_maps=class_maps,
        )
