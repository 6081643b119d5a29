"""The convex last layer against scipy's solver, and what it must never do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from fgvczoo.nn.last_layer import objective, solve_last_layer
from fgvczoo.nn.prototypes import ClassConnection, own_class


def problem(images: int = 60, classes: int = 4, per_class: int = 3, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    class_of = torch.arange(classes).repeat_interleave(per_class)
    labels = torch.randint(0, classes, (images,), generator=generator)
    similarity = torch.rand(images, len(class_of), generator=generator, dtype=torch.float64) * 3
    similarity += own_class(labels, class_of) * torch.rand(images, 1, generator=generator, dtype=torch.float64)
    weight = ClassConnection(classes, class_of).weight.detach().double()
    return similarity, labels, weight, ~own_class(torch.arange(classes), class_of)


@pytest.mark.parametrize("l1", [0.0, 1e-3, 1e-2])
def test_equals_scipy(l1: float) -> None:
    """Judge: L-BFGS-B with the penalised weights split into their positive and negative parts."""
    similarity, labels, weight, penalised = problem()
    found = solve_last_layer(similarity, labels, weight, penalised, l1=l1, tolerance=1e-12, max_iterations=50_000)

    def value_and_gradient(flat: np.ndarray) -> tuple[float, np.ndarray]:
        parts = torch.tensor(flat).reshape(2, *weight.shape).requires_grad_()
        difference = parts[0] - parts[1]
        loss = torch.nn.functional.cross_entropy(similarity @ difference.T, labels)
        loss = loss + l1 * (parts.sum(0) * penalised).sum()
        (gradient,) = torch.autograd.grad(loss, parts)
        return float(loss.detach()), gradient.numpy().ravel()

    start = torch.stack([weight.clamp_min(0), (-weight).clamp_min(0)]).numpy().ravel()
    options = {"maxiter": 20_000, "maxfun": 50_000, "ftol": 1e-15, "gtol": 1e-9}
    bounds = [(0, None)] * len(start)
    best = minimize(value_and_gradient, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    assert found.objective == pytest.approx(best.fun, rel=1e-4)


def test_gives_exact_zeros_and_only_where_penalised() -> None:
    similarity, labels, weight, penalised = problem()
    found = solve_last_layer(similarity, labels, weight, penalised, l1=3e-2, tolerance=1e-10)
    assert (found.weight[penalised] == 0).float().mean() > 0.3
    assert (found.weight[~penalised] != 0).all()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e2])
def test_never_ends_above_its_start(scale: float) -> None:
    similarity, labels, weight, penalised = problem()
    similarity = similarity * scale
    before = float(objective(weight, similarity, labels, penalised, 1e-4))
    found = solve_last_layer(similarity, labels, weight, penalised, max_iterations=50)
    assert found.objective <= before and torch.isfinite(found.weight).all()


def test_stops_at_its_target() -> None:
    similarity, labels, weight, penalised = problem()
    full = solve_last_layer(similarity, labels, weight, penalised)
    begin = float(objective(weight, similarity, labels, penalised, 1e-4))
    half = solve_last_layer(similarity, labels, weight, penalised, target=(begin + full.objective) / 2)
    assert half.iterations < full.iterations and half.objective <= (begin + full.objective) / 2


def test_one_image_and_constant_similarities() -> None:
    similarity, labels, weight, penalised = problem(images=1)
    assert torch.isfinite(solve_last_layer(similarity, labels, weight, penalised).weight).all()
    assert torch.isfinite(solve_last_layer(torch.zeros_like(similarity), labels, weight, penalised).weight).all()
