"""The fused paths of `patch_attention` against its definition in float64, and the definition against torch's own."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fgvczoo.errors import FgvczooError
from fgvczoo.ops import patch_attention, tiles, use_backend
from fgvczoo.ops.patch_attention import NORMALIZATIONS, cpu
from tests.ops.largest import Largest

normalizations = pytest.mark.parametrize("normalize", NORMALIZATIONS)
backends = pytest.mark.parametrize("backend", ["cpu", "reference"])
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
Problem = tuple[Tensor, Tensor, Tensor, Tensor | None]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Queries, keys, values and a bias: sizes, layouts and types that take different ways through the tiles."""
    size = st.integers(1, 9)
    images, heads = draw(st.integers(0, 4)), draw(st.integers(1, 3))
    queries, patches = draw(st.one_of(size, st.integers(10, 40))), draw(st.one_of(size, st.integers(10, 40)))
    depth, width = draw(size), draw(st.one_of(size, st.integers(10, 40)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def operand(count: int, columns: int) -> Tensor:
        if draw(st.booleans()):  # as a linear layer gives them
            return torch.randn(images, count, heads, columns, generator=generator).transpose(1, 2)
        return torch.randn(images, heads, count, 2 * columns, generator=generator)[..., ::2]

    dtype = draw(st.sampled_from(DTYPES))
    operands = [operand(queries, depth), operand(patches, depth), operand(patches, width)]
    query, key, value = (tensor.to(dtype) for tensor in operands)
    bias = None
    shapes = [None, (heads, queries, patches), (queries, patches), (heads, 1, patches), (1, 1)]
    if dtype.itemsize == 2:
        shapes.pop()  # the sum of all slopes, which is 0 but for their rounding
    shape = draw(st.sampled_from(shapes))
    if shape is not None:
        bias = torch.randn(shape, generator=generator)
        if draw(st.booleans()):
            bias = bias.masked_fill(
                torch.rand(shape, generator=generator) < draw(st.sampled_from([0.3, 0.9])), -torch.inf
            )
        bias = bias.to(draw(st.sampled_from([dtype, torch.float32])))
    return query, key, value, bias


def everything(problem: Problem, normalize: str, weights: bool = False) -> list[Tensor]:
    """Results of a call and the gradients of all inputs."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in problem if tensor is not None]
    results = patch_attention(*inputs, normalize=normalize, return_weights=True) if weights else None
    results = results or (patch_attention(*inputs, normalize=normalize),)
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randint(-2, 3, result.shape, generator=generator).to(result) for result in results]
    return [*(result.detach() for result in results), *torch.autograd.grad(results, inputs, grads)]


def in_double(problem: Problem) -> Problem:
    query, key, value, bias = problem
    return query.double(), key.double(), value.double(), None if bias is None else bias.double()


def compare(found: list[Tensor], truth: list[Tensor], dtype: torch.dtype, slack: float = 1) -> None:
    """Rounded once per type: results, and gradients, which pass through rounded weights."""
    rounding = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 8e-3}
    for ours, theirs in zip(found, truth):
        tolerance = slack * max(rounding[dtype], rounding[ours.dtype])
        assert ours.shape == theirs.shape
        scale = max(1.0, float(theirs.abs().amax())) if theirs.numel() else 1.0
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance * scale)


@normalizations
@pytest.mark.parametrize("weights", [False, True])
@settings(max_examples=150, deadline=None, derandomize=True)
@given(problem=problems(), tile=st.sampled_from([1, 100, 2**18]))
def test_cpu_equals_reference(normalize: str, weights: bool, problem: Problem, tile: int) -> None:
    with pytest.MonkeyPatch.context() as patch, use_backend("cpu"):
        patch.setattr(tiles, "TILE", tile)
        found = everything(problem, normalize, weights)
    with use_backend("reference"):
        truth = everything(in_double(problem), normalize, weights)
    compare(found, truth, problem[0].dtype)
    assert found[0].dtype == problem[0].dtype
    given_ = [tensor for tensor in problem if tensor is not None]
    assert [gradient.dtype for gradient in found[-len(given_) :]] == [tensor.dtype for tensor in given_]
    if weights:
        assert found[1].dtype == (torch.float64 if problem[0].dtype == torch.float64 else torch.float32)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(problem=problems())
def test_patches_are_torchs_attention(problem: Problem) -> None:
    query, key, value, bias = in_double(problem)
    if bias is None or query.numel():
        expected = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        torch.testing.assert_close(patch_attention(query, key, value, bias), expected)


@backends
def test_queries_are_slot_attention(backend: str) -> None:
    """Algorithm 1 of Slot Attention, line by line, one image at a time; with its epsilon, which is inside the mean."""
    torch.manual_seed(0)
    slots, inputs, values = torch.randn(3, 4, 6).double(), torch.randn(3, 9, 6).double(), torch.randn(3, 9, 5).double()
    slots[:, 3] = -100 * inputs.mean(1)  # wins next to nothing
    with use_backend(backend):
        found = patch_attention(slots, inputs, values, normalize="queries", scale=0.5)
        _, weights = patch_attention(slots, inputs, values, normalize="queries", scale=0.5, return_weights=True)
    for image in range(3):
        attention = (inputs[image] @ slots[image].T * 0.5).softmax(dim=1) + 1e-8  # (inputs, slots)
        attention = attention / attention.sum(0)
        torch.testing.assert_close(found[image], attention.T @ values[image])
        torch.testing.assert_close(weights[image], attention.T)


@normalizations
@pytest.mark.parametrize("weights", [False, True])
def test_gradcheck(normalize: str, weights: bool) -> None:
    torch.manual_seed(0)
    shapes = ((2, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 2), (2, 3, 5))
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(
        lambda *tensors: patch_attention(*tensors, normalize=normalize, return_weights=weights), inputs
    )


@normalizations
@backends
def test_one_head_and_one_for_all(normalize: str, backend: str) -> None:
    """(B, N, d) is one head; one image's operand, as learned queries or concepts are, serves all; gradients add up."""
    torch.manual_seed(0)
    query = torch.randn(1, 5, 6, requires_grad=True)
    key, value, bias = torch.randn(4, 9, 6), torch.randn(1, 9, 3), torch.randn(5, 9)
    with use_backend(backend):
        found = patch_attention(query, key, value, bias, normalize=normalize)
        full = [tensor.expand(4, -1, -1)[:, None].detach().clone() for tensor in (query, key, value)]
        expected = patch_attention(full[0].requires_grad_(), *full[1:], bias, normalize=normalize)
    torch.testing.assert_close(found, expected[:, 0])
    grad = torch.randn(4, 5, 3)
    (ours,) = torch.autograd.grad(found, query, grad)
    (theirs,) = torch.autograd.grad(expected, full[0], grad[:, None])
    torch.testing.assert_close(ours, theirs.sum((0, 1))[None])


@backends
@pytest.mark.parametrize("weights", [False, True])
def test_queries_kept_from_all_patches(backend: str, weights: bool) -> None:
    """A row of -inf: output, weights and gradients of that query are 0; the others do not notice."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, 5, 4) for _ in range(3))
    bias = torch.randn(3, 5, 5)
    bias[1, 2], bias[2, 3, 4] = -torch.inf, -torch.inf
    with use_backend(backend):
        found = everything((query, key, value, bias), "patches", weights)
    assert all(tensor.isfinite().all() for tensor in found)
    for tensor in (*found[:-3], found[-4]):
        assert not tensor[:, 1, 2].any()
    assert not found[-1][1, 2].any() and found[-1][2, 3, 4] == 0 and found[-1][0].all()


@backends
@pytest.mark.parametrize("weights", [False, True])
def test_patches_kept_from_all_queries(backend: str, weights: bool) -> None:
    """Where queries compete: such a patch counts as epsilon for each; a query without patches takes the mean of all."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 1, 5, 4) for _ in range(3))
    bias = torch.zeros(5, 5)
    bias[:, 3], bias[2] = -torch.inf, -torch.inf
    with use_backend(backend):
        found = everything((query, key, value, bias), "queries", weights)
    assert all(tensor.isfinite().all() for tensor in found)
    torch.testing.assert_close(found[0][:, 0, 2], value[:, 0].mean(1))
    if weights:
        assert (found[1][:, 0, [0, 1, 3, 4], 3] < 1e-7).all()


@normalizations
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("count", [5, 40])
def test_nan_in_nan_out(normalize: str, bad: float, count: int) -> None:
    """What is not finite comes out as it does of the formula, short rows and long ones."""
    torch.manual_seed(0)
    for which in range(4):
        problem = [torch.randn(2, 3, count, 4) for _ in range(3)] + [torch.randn(3, count, count)]
        problem[which][(0,) * problem[which].ndim] = bad
        with use_backend("cpu"):
            found = patch_attention(*problem, normalize=normalize)
        with use_backend("reference"):
            truth = patch_attention(*in_double(tuple(problem)), normalize=normalize)
        assert truth.isnan().any() or bad != torch.nan
        assert torch.equal(found.isnan(), truth.isnan())
        torch.testing.assert_close(found.nan_to_num(), truth.float().nan_to_num(), rtol=1e-4, atol=1e-5)


@normalizations
@backends
def test_no_images(normalize: str, backend: str) -> None:
    inputs = [torch.rand(shape, requires_grad=True) for shape in ((0, 2, 3, 4), (0, 2, 5, 4), (0, 2, 5, 6), (2, 3, 5))]
    with use_backend(backend):
        output = patch_attention(*inputs, normalize=normalize)
    assert output.shape == (0, 2, 3, 6)
    output.sum().backward()
    assert all(tensor.grad is not None and not tensor.grad.any() for tensor in inputs)


@normalizations
def test_backward_is_deterministic(normalize: str) -> None:
    torch.manual_seed(0)
    problem = tuple(torch.randn(shape) for shape in ((6, 4, 70, 8), (6, 4, 90, 8), (6, 4, 90, 8), (4, 70, 90)))
    first = everything(problem, normalize)
    for _ in range(3):
        assert all(map(torch.equal, first, everything(problem, normalize)))


@normalizations
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("depth", [2, 6])  # shares made again, and kept
def test_opcheck(normalize: str, with_bias: bool, train: bool, depth: int) -> None:
    torch.manual_seed(0)
    shapes = ((2, 3, 5, depth), (2, 3, 7, depth), (2, 3, 7, 2), (3, 5, 7))
    query, key, value, bias = (torch.randn(shape, requires_grad=train) for shape in shapes)
    arguments = (query, key, value, bias if with_bias else None, 0.5, normalize, train)
    torch.library.opcheck(torch.ops.fgvczoo.patch_attention.default, arguments)
    tensors = [t if t is None else t.detach() for t in arguments[:4]]
    results = torch.ops.fgvczoo.patch_attention.default(*tensors, 0.5, normalize, True)
    arguments = (torch.randn(results[0].shape), *tensors, *results, 0.5, normalize, with_bias)
    torch.library.opcheck(torch.ops.fgvczoo.patch_attention_backward.default, arguments)


class Block(nn.Module):
    """A relative attention block and a step of slot attention."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.table = nn.Parameter(torch.randn(2, 50))
        self.register_buffer("index", torch.randint(50, (9, 9)))
        self.slots = nn.Parameter(torch.randn(1, 3, 8))

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = self.qkv(tokens).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        seen = patch_attention(query, key, value, self.table[:, self.index]).transpose(1, 2).flatten(2)
        return patch_attention(self.slots, seen, seen, normalize="queries")


def test_compiles_without_a_break() -> None:
    torch.manual_seed(0)
    model, tokens = Block(), torch.rand(3, 9, 8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    gradients = [torch.autograd.grad(run(tokens).square().sum(), list(model.parameters())) for run in (model, compiled)]
    torch.testing.assert_close(compiled(tokens), model(tokens))
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs)


def test_exports_to_plain_torch() -> None:
    torch.manual_seed(0)
    model, tokens = Block().eval(), torch.rand(3, 9, 8)
    program = torch.export.export(model, (tokens,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    assert "fgvczoo" not in str(program.graph)
    more = torch.rand(5, 9, 8)
    torch.testing.assert_close(program.module()(more), model(more))


@normalizations
@backends
def test_autocast_casts_to_its_type(normalize: str, backend: str) -> None:
    """As torch's attention; the bias keeps its own type, and so does its gradient."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, 5, 4) for _ in range(3))
    bias = torch.randn(3, 5, 5, requires_grad=True)
    with use_backend(backend), torch.autocast("cpu", dtype=torch.bfloat16):
        output = patch_attention(query, key.bfloat16(), value, bias, normalize=normalize)
        _, weights = patch_attention(query, key, value, bias, normalize=normalize, return_weights=True)
        assert patch_attention(query.double(), key.double(), value.double()).dtype == torch.float64
    assert output.dtype == torch.bfloat16 and weights.dtype == torch.float32
    output.sum().backward()
    assert bias.grad is not None and bias.grad.dtype == torch.float32
    truth = patch_attention(*(t.bfloat16().double() for t in (query, key, value)), bias.double(), normalize=normalize)
    torch.testing.assert_close(output.double(), truth, rtol=2e-2, atol=2e-2)


def test_memory_does_not_grow_with_the_scores() -> None:
    query, key, value = (torch.rand(40, 4, 196, 16) for _ in range(3))
    bias = torch.rand(4, 196, 196)
    with Largest() as largest:
        results = cpu.forward(query, key, value, bias, 0.25, "patches", True)
        cpu.backward(results[0], query, key, value, bias, *results, 0.25, "patches", True)
    assert largest.numel <= 4 * tiles.tile() < 40 * 4 * 196**2 // 5


def test_other_devices_take_torchs_attention_without_a_warning() -> None:
    query = torch.rand(2, 3, 5, 4, device="meta", requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for normalize in NORMALIZATIONS:
            assert patch_attention(query, query, query, normalize=normalize).shape == (2, 3, 5, 4)
    with use_backend("cpu"), pytest.raises(FgvczooError, match="meta"):
        patch_attention(query, query, query)


@pytest.mark.parametrize(
    "shapes, options, words",
    [
        (((2, 5, 4), (2, 3, 5, 4), (2, 3, 5, 4)), {}, "expected (B, h, N, d) each"),
        (((5, 4), (5, 4), (5, 4)), {}, "expected (B, h, N, d) each"),
        (((2, 3, 5, 4), (2, 2, 5, 4), (2, 2, 5, 4)), {}, "heads"),
        (((2, 3, 5, 4), (2, 3, 5, 6), (2, 3, 5, 6)), {}, "last dimension"),
        (((2, 3, 5, 4), (2, 3, 5, 4), (2, 3, 6, 4)), {}, "number of patches"),
        (((2, 3, 5, 4), (3, 3, 5, 4), (3, 3, 5, 4)), {}, "number of images"),
        (((2, 3, 5, 4), (2, 3, 0, 4), (2, 3, 0, 4)), {}, "only the number of images may be 0"),
        (
            ((2, 3, 5, 4),) * 3,
            {"bias": torch.rand(3, 5, 6)},
            "bias (3, 5, 6) does not broadcast to (h, Nq, Nk) = (3, 5, 5)",
        ),
        (((2, 3, 5, 4),) * 3, {"bias": torch.rand(2, 3, 5, 5)}, "does not broadcast"),
        (((2, 5, 4),) * 3, {"bias": torch.rand(3, 5, 5)}, "does not broadcast to (h, Nq, Nk) = (1, 5, 5)"),
        (((2, 5, 4),) * 3, {"bias": torch.ones(5, 5, dtype=torch.bool)}, "floating-point bias, got torch.bool"),
        (((2, 5, 4),) * 3, {"normalize": "query"}, "did you mean queries?"),
    ],
)
def test_mistakes_are_named(shapes: tuple[tuple[int, ...], ...], options: dict[str, Any], words: str) -> None:
    with pytest.raises(FgvczooError) as error:
        patch_attention(*(torch.rand(shape) for shape in shapes), **options)
    message = str(error.value)
    assert words in message and all(str(shape) in message for shape in shapes) and "\n" not in message


def test_mixed_and_whole_types_are_refused() -> None:
    query = torch.rand(2, 5, 4)
    with pytest.raises(FgvczooError, match=r"one floating-point type, got torch\.bfloat16, torch\.float32"):
        patch_attention(query, query.bfloat16(), query)
    with pytest.raises(FgvczooError, match=r"one floating-point type, got torch\.int64"):
        patch_attention(query.long(), query.long(), query.long())
    with (
        torch.autocast("cpu"),
        pytest.raises(FgvczooError, match=r"one floating-point type, got torch\.bfloat16, torch\.int64"),
    ):
        patch_attention(query.long(), query, query)
