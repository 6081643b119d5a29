"""The Triton kernels of `patch_attention` in Triton's interpreter; `test_patch_attention_triton.py` runs this file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fgvczoo.ops import patch_attention, use_backend
from fgvczoo.ops.patch_attention import NORMALIZATIONS, cpu, kernels, layout, triton
from tests.ops.interpreter import serving_the_cpu
from tests.ops.test_patch_attention import Problem, compare, everything, in_double, problems

normalizations = pytest.mark.parametrize("normalize", NORMALIZATIONS)


@pytest.fixture(autouse=True, scope="module")
def triton_serves_the_cpu() -> Iterator[None]:
    functions = {"forward": triton.forward, "backward": triton.backward}
    with pytest.MonkeyPatch.context() as patch, serving_the_cpu(cpu, functions, kernels):
        patch.setattr(layout, "on_cpu", lambda tensor: False)
        yield


def small_blocks(kernel: str, dtype: torch.dtype, shape: tuple[int, ...]) -> triton.Blocks:
    """So that small problems have several of them."""
    return triton.Blocks(triton.padded(shape[1]) if kernel.startswith("compete") else 16, 16, 16, 4, 2)


@normalizations
@settings(max_examples=60, deadline=None, derandomize=True)
@given(problem=problems(), small=st.booleans())
def test_equals_reference(normalize: str, problem: Problem, small: bool) -> None:
    if problem[0].dtype == torch.float64:
        problem = tuple(tensor if tensor is None else tensor.float() for tensor in problem)  # type: ignore[assignment]
    with pytest.MonkeyPatch.context() as patch:
        if small:
            patch.setattr(triton, "choose", small_blocks)
        found = everything(problem, normalize)
    with use_backend("reference"):
        truth = everything(in_double(problem), normalize)
    compare(found, truth, problem[0].dtype, slack=2)  # it cuts off, where a GPU rounds
    assert found[0].dtype == problem[0].dtype


@normalizations
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_of_the_table(normalize: str, with_bias: bool, dtype: torch.dtype) -> None:
    """With a length that is a multiple of no block; several parts of images."""
    torch.manual_seed(0)
    depth = 24 if normalize == "patches" else 100
    operands = [torch.randn(3, 2, count, depth).to(dtype) for count in (70, 90, 90)]
    problem = (*operands, torch.randn(2, 70, 90) if with_bias else None)
    with use_backend("reference"):
        truth = everything(in_double(problem), normalize)
    compare(everything(problem, normalize), truth, dtype)


@pytest.mark.parametrize("images", [1, 2, 5])
def test_images_take_turns(images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    problem = (*(torch.randn(5, 2, 7, 4) for _ in range(3)), torch.randn(2, 7, 7))
    monkeypatch.setattr(triton, "SLOPES", images * 2 * 7 * 16 * 4)
    with use_backend("reference"):
        truth = everything(in_double(problem), "patches")
    compare(everything(problem, "patches"), truth, torch.float32)


@normalizations
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_in_nan_out(normalize: str, bad: float) -> None:
    torch.manual_seed(0)
    for which in range(4):
        problem = [torch.randn(2, 3, 20, 4) for _ in range(3)] + [torch.randn(3, 20, 20)]
        problem[which][(0,) * problem[which].ndim] = bad
        found = patch_attention(*(tensor.requires_grad_() for tensor in problem), normalize=normalize).detach()
        with use_backend("reference"):
            truth = patch_attention(*(tensor.detach().double() for tensor in problem), normalize=normalize)
        assert torch.equal(found.isnan(), truth.isnan())
        torch.testing.assert_close(found.nan_to_num(), truth.float().nan_to_num(), rtol=1e-4, atol=1e-5)


@normalizations
def test_without_gradients(normalize: str) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 2, 9, 4) for _ in range(3))
    with use_backend("reference"):
        truth = patch_attention(query, key, value, normalize=normalize)
    torch.testing.assert_close(patch_attention(query, key, value, normalize=normalize), truth)
