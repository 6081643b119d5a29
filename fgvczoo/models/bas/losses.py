"""BAS's losses. B images, C classes; equation numbers are those of both papers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fgvczoo.models.bas.network import TrainingOutput

EPS = 1e-8


@dataclass
class LossWeights:
    """Weights of the terms beside those of classification and of background activation, which are 1.

    guidance: alpha. area: beta. saturated: the value, without gradient, that a ratio above 1 is given; only what is
    logged depends on it.
    """

    guidance: float = 0.5
    area: float = 1.5
    saturated: float = 1.0


def activation_ratio(background_score: Tensor, score: Tensor, saturated: float = 1.0) -> Tensor:
    """L_bas of each image (Eq. 3): relu(S_b) / relu(S), S without gradient; (B,), (B,) -> (B,) float32.

    0 where neither is positive. Where S_b is larger than S the value is `saturated`, and there is no gradient.
    """
    above, below = background_score.float().relu(), score.detach().float().relu()
    return torch.where(above > below, saturated, above / (below + EPS))


def area(foreground: Tensor) -> Tensor:
    """L_ac of each image (Eq. 4), the mean of its foreground map: (B, 1, H, W) -> (B,) float32."""
    return foreground.float().mean(dim=(1, 2, 3))


def present_against_absent(scores: Tensor, present: Tensor) -> Tensor:
    """L_mcls (journal, Eq. 9): each present class against the absent ones alone; logits (B, C), bool (B, C) -> scalar.

    Sum over present classes and images of the cross entropy of [its logit, logits of all absent classes], by B. An
    image without a present class adds what pushes its logits down: log(1 + sum of exp).
    """
    absent = torch.logsumexp(scores.masked_fill(present, -torch.inf), dim=1, keepdim=True)
    terms = F.softplus(absent - scores).masked_fill(~present, 0).sum(1)
    return torch.where(present.any(1), terms, F.softplus(absent[:, 0])).sum() / len(scores)


def loss_terms(output: TrainingOutput, classes: Tensor, weights: LossWeights) -> dict[str, Tensor]:
    """The terms of a batch, means over its images: classification (Eq. 7), guidance (Eq. 6), bas (Eq. 3), area (Eq. 4).

    classes: (B,), those that `output` was computed for.
    """
    return {
        "classification": F.cross_entropy(output.scores, classes),
        "guidance": F.cross_entropy(output.guided, classes),
        "bas": activation_ratio(output.background_score, output.score, weights.saturated).mean(),
        "area": area(output.foreground).mean(),
    }


def total_loss(terms: dict[str, Tensor], weights: LossWeights) -> Tensor:
    """classification + alpha guidance + bas + beta area (Eq. 8)."""
    return terms["classification"] + weights.guidance * terms["guidance"] + terms["bas"] + weights.area * terms["area"]
