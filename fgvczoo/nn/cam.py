"""Class activation maps of any classifier: CAM (Zhou et al., CVPR 2016) and Grad-CAM (Selvaraju et al., ICCV 2017)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def cam(features: Tensor, weight: Tensor, classes: Tensor) -> Tensor:
    """Features weighted by a class's row of the linear layer behind their mean: (B, F, H, W), (C, F), (B,) ->
    (B, H, W)."""
    return torch.einsum("bfhw,bf->bhw", features, weight[classes])


def grad_cam(
    classifier: Callable[[Tensor], Tensor], layer: nn.Module, images: Tensor, classes: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Grad-CAM at a layer whose output is a feature map: logits (B, C), maps (B, H, W), not negative.

    classifier: images (B, 3, h, w) -> logits (B, C), in eval mode: each image's logits must depend on it alone.
    classes: (B,) whose maps are wanted; None: the predicted ones. Needs gradients; leaves no gradient behind.
    """
    seen: list[Tensor] = []

    def watch(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        # What comes after the layer is all that has to be differentiated.
        leaf = output.detach().requires_grad_()
        seen.append(leaf)
        return leaf

    handle = layer.register_forward_hook(watch)
    try:
        with torch.enable_grad():
            logits = classifier(images)
            classes = logits.argmax(1) if classes is None else classes
            (gradient,) = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), seen[-1])
    finally:
        handle.remove()
    weights = gradient.mean(dim=(2, 3), keepdim=True)
    return logits.detach(), (weights * seen[-1].detach()).sum(1).relu()
