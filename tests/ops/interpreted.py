"""The Triton kernels of `nearest_patch` in Triton's interpreter, on the CPU; `test_triton.py` runs this file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fgvczoo.ops import nearest_patch, use_backend
from fgvczoo.ops.nearest_patch import cpu, kernels, triton
from tests.ops.interpreter import serving_the_cpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CALLS = [
    ("l2", {}),
    ("l2", {"activation": "log"}),
    ("l2", {"activation": "exp", "k": 2}),
    ("cosine", {}),
    ("dot", {"k": 3}),
    (("dot", "cosine"), {}),
    (("l2", "dot"), {"k": 2}),
]


@pytest.fixture(autouse=True, scope="module")
def triton_serves_the_cpu() -> Iterator[None]:
    functions = {name: lambda *args, name=name: getattr(triton, name)(*args, None) for name in ("forward", "backward")}
    with serving_the_cpu(cpu, functions, kernels):
        yield


@st.composite
def problems(draw: st.DrawFn, whole: bool) -> tuple[Tensor, Tensor]:
    """Feature maps of at least three places, and prototypes: sizes and layouts that take different ways through the
    kernels. `whole`: small whole numbers, exact in every type, which tie often."""
    height, width = draw(st.integers(1, 10)), draw(st.integers(1, 10))
    window = draw(st.sampled_from([(), (), (1, 1), (2, 3), (3, 1)]))
    rows, columns = window or (1, 1)
    height, width = height + rows, width + columns + 1
    channels = draw(st.sampled_from([1, 7, 16, 33, 70] if whole else [7, 33, 70]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    patches = torch.randn(draw(st.integers(0, 3)), height, width, channels, generator=generator).permute(0, 3, 1, 2)
    prototypes = torch.randn(draw(st.sampled_from([1, 2, 9, 9, 66])), channels, *window, generator=generator)
    if whole:
        patches, prototypes = patches.round(), prototypes.round()
    layout = draw(st.sampled_from(["channels last", "contiguous", "slice"]))
    if layout == "contiguous":
        patches = patches.contiguous()
    elif layout == "slice":
        patches = patches.repeat_interleave(2, dim=3)[..., ::2]
    dtype = draw(st.sampled_from(DTYPES))
    return patches.to(dtype), prototypes.to(dtype)


def everything(patches: Tensor, prototypes: Tensor, call: tuple[object, dict[str, object]]) -> list[Tensor]:
    """All results of a call, and the gradients of both inputs."""
    patches, prototypes = (t.detach().clone().requires_grad_() for t in (patches, prototypes))
    results = nearest_patch(patches, prototypes, call[0], **call[1])  # type: ignore[call-overload]
    values = [results[0], *results[2:]]
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randint(-2, 3, value.shape, generator=generator).to(value) for value in values]
    return [*(r.detach() for r in results), *torch.autograd.grad(values, (patches, prototypes), grads)]


@pytest.mark.parametrize("metric", ["l2", "dot"])
@settings(max_examples=30)
@given(problem=problems(whole=True), k=st.sampled_from([None, 2]))
def test_equals_reference_exactly(metric: str, problem: tuple[Tensor, Tensor], k: int | None) -> None:
    fused = everything(*problem, (metric, {"k": k}))
    with use_backend("reference"):
        truth = everything(*problem, (metric, {"k": k}))
    for ours, theirs in zip(fused, truth):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("call", CALLS, ids=str)
@settings(max_examples=8)
@given(problem=problems(whole=False))
def test_equals_reference_rounded(call: tuple[object, dict[str, object]], problem: tuple[Tensor, Tensor]) -> None:
    patches, prototypes = problem
    fused = everything(patches, prototypes, call)
    with use_backend("reference"):
        truth = everything(patches.double(), prototypes.double(), call)
    assert torch.equal(fused[1], truth[1])
    for ours, theirs in zip(fused, truth):
        tolerance = max(2e-4, 4 * torch.finfo(ours.dtype).eps if ours.is_floating_point() else 0)
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "precision, half, error", [("high", None, 2e-5), ("medium", None, 1e-6), ("highest", torch.bfloat16, 1e-6)]
)
@pytest.mark.parametrize("channels", [20, 200])
def test_precisions(precision: str, half: torch.dtype | None, error: float, channels: int) -> None:
    """Inputs that the multiplied type holds exactly; for "high" any, as two parts hold 16 bits of float32's 24."""
    torch.manual_seed(0)
    patches, prototypes = torch.randn(2, channels, 5, 5), torch.randn(9, channels, 1, 1)
    if precision != "high":
        patches, prototypes = patches.bfloat16().float(), prototypes.bfloat16().float()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        value, index, _ = triton.forward(patches, prototypes, ["l2"], 1, "", half)
    finally:
        torch.set_float32_matmul_precision(before)
    with use_backend("reference"):
        truth, places = nearest_patch(patches.double(), prototypes[..., 0, 0].double())
    assert torch.equal(index[:, 0], places)
    assert ((value[:, 0] - truth).abs() <= error * 2 * channels).all()


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_distance_zero(precision: str) -> None:
    """A prototype that is a patch: distance 0, and no gradient, though the logarithm's slope is -1e4."""
    torch.manual_seed(0)
    patches = torch.rand(1, 48, 5, 5, requires_grad=True)
    prototypes = patches.detach().flatten(2)[0].T.clone().requires_grad_()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        value, index, log = nearest_patch(patches, prototypes, activation="log")
        log.sum().backward()
    finally:
        torch.set_float32_matmul_precision(before)
    assert not value.any() and torch.equal(index[0], torch.arange(25))
    assert patches.grad is not None and not patches.grad.any()
    assert prototypes.grad is not None and not prototypes.grad.any()


@pytest.mark.parametrize("metric", ["l2", "cosine", "dot"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_in_nan_out(metric: str, bad: float) -> None:
    torch.manual_seed(0)
    patches, prototypes = torch.rand(3, 4, 3, 3), torch.rand(5, 4)
    clean, places = nearest_patch(patches, prototypes, metric)
    patches[1, 2, 1, 1] = prototypes[3, 0] = bad
    value, index = nearest_patch(patches, prototypes, metric)
    broken = torch.zeros(3, 5, dtype=torch.bool)
    broken[1], broken[:, 3] = True, True
    assert torch.equal(value.isnan(), broken) and not index[broken].any()
    assert torch.equal(value[~broken], clean[~broken]) and torch.equal(index[~broken], places[~broken])


def test_zero_vectors_have_cosine_zero_and_a_finite_gradient() -> None:
    patches = torch.zeros(1, 3, 2, 2, requires_grad=True)
    prototypes = torch.stack([torch.zeros(3), torch.ones(3)]).requires_grad_()
    value, index = nearest_patch(patches, prototypes, "cosine")
    assert not value.any() and not index.any()
    value.sum().backward()
    assert patches.grad is not None and patches.grad.isfinite().all()
    assert prototypes.grad is not None and prototypes.grad.isfinite().all()


def test_gradients_have_the_layout_of_the_patches() -> None:
    patches = torch.rand(2, 5, 3, 4)
    for layout in (torch.contiguous_format, torch.channels_last):
        given_ = patches.contiguous(memory_format=layout)
        arguments = (given_, torch.rand(6, 5, 1, 1), ["l2"], 1, "", None)
        value, index, activated = triton.forward(*arguments)
        gradient, _ = triton.backward(value, activated, *arguments[:2], value, index, ["l2"], "", None)
        assert gradient.is_contiguous(memory_format=torch.channels_last)  # as of every CPU tensor
