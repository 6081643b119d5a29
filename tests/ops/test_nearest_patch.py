"""The fused paths of `nearest_patch` against its reference, and the reference against torch's own functions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fgvczoo.errors import FgvczooError
from fgvczoo.ops import ACTIVATIONS, METRICS, nearest_patch, similarity_map, tiles, use_backend
from fgvczoo.ops.backend import is_fused
from fgvczoo.ops.nearest_patch import cpu
from tests.ops.largest import Largest

metrics = pytest.mark.parametrize("metric", METRICS)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@st.composite
def problems(draw: st.DrawFn, whole: bool) -> tuple[Tensor, Tensor, int]:
    """Feature maps, prototypes and a tile size. Small whole numbers (`whole`) have exact products and sums in every
    type, and many ties; others have none."""
    size = st.integers(1, 9)
    height, width, channels = draw(size), draw(size), draw(st.integers(1, 40))
    shape = [draw(st.sampled_from([1, 2, 3, 7, 70, 130])), channels]
    if draw(st.booleans()):
        shape += [draw(st.integers(1, height)), draw(st.integers(1, width))]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    patches = torch.randn(draw(st.integers(0, 6)), height, width, channels, generator=generator).permute(0, 3, 1, 2)
    prototypes = torch.randn(shape, generator=generator)
    if whole:
        patches, prototypes = patches.round(), prototypes.round()
    if draw(st.booleans()):
        patches = patches.contiguous()
    dtype = draw(st.sampled_from(DTYPES))
    return patches.to(dtype), prototypes.to(dtype), draw(st.sampled_from([1, 500, 2**18]))


def with_gradients(patches: Tensor, prototypes: Tensor, metric: str) -> list[Tensor]:
    patches, prototypes = (t.detach().clone().requires_grad_() for t in (patches, prototypes))
    value, index = nearest_patch(patches, prototypes, metric)
    grad = torch.randint(-2, 3, value.shape, generator=torch.Generator().manual_seed(0)).to(value)
    return [value.detach(), index, *torch.autograd.grad(value, (patches, prototypes), grad)]


def both(patches: Tensor, prototypes: Tensor, metric: str, tile: int) -> tuple[list[Tensor], list[Tensor]]:
    """Value, index, gradients: fused with this tile size, and by the reference."""
    with pytest.MonkeyPatch.context() as patch, use_backend("cpu"):
        patch.setattr(tiles, "TILE", tile)
        patch.setattr(cpu, "ROWS", min(tile, cpu.ROWS))
        fused = with_gradients(patches, prototypes, metric)
    with use_backend("reference"):
        return fused, with_gradients(patches, prototypes, metric)


@pytest.mark.parametrize("metric", ["l2", "dot"])
@settings(max_examples=150, deadline=None, derandomize=True)
@given(problem=problems(whole=True))
def test_cpu_equals_reference_exactly(metric: str, problem: tuple[Tensor, Tensor, int]) -> None:
    fused, truth = both(*problem[:2], metric, problem[2])
    for ours, theirs in zip(fused, truth):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


@metrics
@settings(max_examples=100, deadline=None, derandomize=True)
@given(problem=problems(whole=False))
def test_cpu_equals_reference_rounded(metric: str, problem: tuple[Tensor, Tensor, int]) -> None:
    patches, prototypes, tile = problem
    fused, _ = both(patches, prototypes, metric, tile)
    _, truth = both(patches.double(), prototypes.double(), metric, tile)
    assert torch.equal(fused[1], truth[1])
    tolerance = 1e-11 if patches.dtype == torch.float64 else 1e-4
    torch.testing.assert_close(fused[0].double(), truth[0], rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(fused[2:], truth[2:]):
        assert ours.dtype == patches.dtype
        tolerance = max(tolerance, 4 * torch.finfo(patches.dtype).eps)
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(problem=problems(whole=True))
def test_cpu_without_onednn(problem: tuple[Tensor, Tensor, int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "convolutions_are_fast", lambda: False)
        fused, truth = both(*problem[:2], "l2", problem[2])
    assert all(map(torch.equal, fused, truth))


def by_convolution(patches: Tensor, prototypes: Tensor, metric: str) -> Tensor:
    """The maps by convolutions: a second way to the same numbers, ProtoPNet's own."""
    filters = prototypes if prototypes.ndim == 4 else prototypes[:, :, None, None]
    ones = torch.ones_like(filters)
    product, square = F.conv2d(patches, filters), F.conv2d(patches.square(), ones)
    norm = prototypes.flatten(1).square().sum(1)[:, None, None]
    if metric == "l2":
        return square - 2 * product + norm
    return product / (square.sqrt() * norm.sqrt()) if metric == "cosine" else product


@metrics
@pytest.mark.parametrize("window", [(), (1, 1), (2, 3)])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_definition(metric: str, window: tuple[int, ...], backend: str) -> None:
    torch.manual_seed(0)
    patches, prototypes = torch.randn(3, 11, 5, 6).double(), torch.randn(13, 11, *window).double()
    with use_backend(backend):
        value, index = nearest_patch(patches, prototypes, metric)
    maps = by_convolution(patches, prototypes, metric)
    best = maps.flatten(2).min(2) if metric == "l2" else maps.flatten(2).max(2)
    torch.testing.assert_close(value, best.values)
    assert torch.equal(index, best.indices)
    torch.testing.assert_close(similarity_map(patches, prototypes, metric), maps)


@metrics
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("window", [(), (2, 3)])
def test_the_k_best(metric: str, backend: str, window: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    patches, prototypes = torch.randn(3, 11, 5, 6).double(), torch.randn(13, 11, *window).double()
    maps = similarity_map(patches, prototypes, metric).flatten(2)
    order = maps.sort(dim=2, descending=metric != "l2", stable=True)
    with use_backend(backend):
        value, index = nearest_patch(patches, prototypes, metric, k=4)
        one, place = nearest_patch(patches, prototypes, metric, k=1)
        every, _ = nearest_patch(patches, prototypes, metric, k=maps.shape[2])
        ties = nearest_patch(torch.ones(2, 4, 3, 5), torch.ones(7, 4), metric, k=3)[1]
    torch.testing.assert_close(value, order.values[..., :4])
    assert torch.equal(index, order.indices[..., :4])
    assert one.shape == (3, 13, 1) and torch.equal(place, index[..., :1])
    torch.testing.assert_close(every, order.values)
    assert torch.equal(ties, torch.arange(3).expand_as(ties))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("pair", [("dot", "cosine"), ("cosine", "l2"), ("l2", "dot"), ("dot", "dot")])
@pytest.mark.parametrize("k", [None, 2])
def test_two_metrics_in_one_pass(pair: tuple[str, str], k: int | None, backend: str) -> None:
    torch.manual_seed(0)
    patches, prototypes = (torch.randn(shape).double().requires_grad_() for shape in ((3, 11, 5, 6), (13, 11)))
    with use_backend(backend):
        together = nearest_patch(patches, prototypes, pair, k=k)
        alone = [nearest_patch(patches, prototypes, metric, k=k) for metric in pair]
    weights = torch.rand(together[0].shape).double()
    for number in range(2):
        torch.testing.assert_close(together[0][number], alone[number][0])
        assert torch.equal(together[1][number], alone[number][1])
    found = torch.autograd.grad((together[0] * weights).sum(), (patches, prototypes))
    expected = torch.autograd.grad(sum((a[0] * w).sum() for a, w in zip(alone, weights)), (patches, prototypes))
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("k", [None, 2])
def test_activation(activation: str, k: int | None, backend: str) -> None:
    torch.manual_seed(0)
    patches, prototypes = (torch.rand(shape).double().requires_grad_() for shape in ((3, 11, 5, 6), (13, 11)))
    formula = {"log": lambda d: torch.log((d + 1) / (d + 1e-4)), "exp": lambda d: torch.exp(-torch.sqrt(d + 1e-14))}
    with use_backend(backend):
        value, index, activated = nearest_patch(patches, prototypes, activation=activation, k=k)
        plain, places = nearest_patch(patches, prototypes, k=k)
    assert torch.equal(value, plain) and torch.equal(index, places)
    torch.testing.assert_close(activated, formula[activation](plain))
    weights = torch.rand(value.shape).double()
    for ours, theirs in (
        ((activated,), formula[activation](plain)),
        ((value, activated), plain + formula[activation](plain)),
    ):
        found = torch.autograd.grad([(part * weights).sum() for part in ours], (patches, prototypes), retain_graph=True)
        expected = torch.autograd.grad((theirs * weights).sum(), (patches, prototypes), retain_graph=True)
        for mine, truth in zip(found, expected):
            torch.testing.assert_close(mine, truth)


def test_distance_equals_cdist() -> None:
    torch.manual_seed(0)
    patches, prototypes = torch.rand(2, 128, 14, 14), torch.rand(300, 128)
    distance = torch.cdist(prototypes.double(), patches.double().flatten(2).transpose(1, 2)).square()
    value, index = nearest_patch(patches, prototypes)
    torch.testing.assert_close(value, distance.amin(2).float(), rtol=1e-6, atol=1e-6)
    assert torch.equal(index, distance.argmin(2))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_prototype_that_is_a_patch_is_at_distance_zero(backend: str) -> None:
    torch.manual_seed(0)
    patches = torch.rand(2, 128, 7, 7)
    prototypes = patches.flatten(2)[1].T.clone()
    with use_backend(backend):
        value, index = nearest_patch(patches, prototypes)
    assert torch.equal(value[1], torch.zeros(49)) and torch.equal(index[1], torch.arange(49))
    assert (similarity_map(patches, prototypes)[1].flatten(1).diagonal() == 0).all()


@metrics
@pytest.mark.parametrize("count", [1, 2, 5, 11, 12, 16, 17, 65, 300])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_equal_patches_give_the_first(metric: str, count: int, backend: str) -> None:
    """Also where the numbers round: a constant picture chooses cell 0."""
    torch.manual_seed(0)
    with use_backend(backend):
        for channels, cells in ((105, 74), (33, 126), (278, 149), (3, 1)):
            patches = torch.randn(2, channels, 1, 1).expand(2, channels, cells, 1)
            value, index = nearest_patch(patches, torch.randn(count, channels), metric)
            assert not index.any()
            assert value.isfinite().all()


@metrics
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_nan_in_nan_out(metric: str, bad: float, backend: str) -> None:
    torch.manual_seed(0)
    patches, prototypes = torch.rand(3, 4, 3, 3), torch.rand(5, 4)
    patches[1, 2, 1, 1] = prototypes[3, 0] = bad
    with use_backend(backend):
        value, index = nearest_patch(patches, prototypes, metric)
        clean, places = nearest_patch(patches[[0, 2]], prototypes[[0, 1, 2, 4]], metric)
    broken = torch.zeros(3, 5, dtype=torch.bool)
    broken[1], broken[:, 3] = True, True
    assert torch.equal(value.isnan(), broken) and not index[broken].any()
    torch.testing.assert_close(value[~broken], clean.flatten())
    assert torch.equal(index[~broken], places.flatten())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_zero_vectors_have_cosine_zero(backend: str) -> None:
    with use_backend(backend):
        value, index = nearest_patch(torch.zeros(1, 3, 2, 2), torch.stack([torch.zeros(3), torch.ones(3)]), "cosine")
    assert torch.equal(value, torch.zeros(1, 2)) and not index.any()


@metrics
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_nothing_in_nothing_out(metric: str, backend: str) -> None:
    for images, count in ((0, 5), (2, 0)):
        patches = torch.rand(images, 4, 3, 3, requires_grad=True)
        prototypes = torch.rand(count, 4, requires_grad=True)
        with use_backend(backend):
            value, index = nearest_patch(patches, prototypes, metric)
        assert value.shape == index.shape == (images, count)
        value.sum().backward()
        assert patches.grad is not None and prototypes.grad is not None
        assert not patches.grad.any() and not prototypes.grad.any()


@metrics
@pytest.mark.parametrize("window", [(), (2, 1)])
def test_gradcheck(metric: str, window: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    patches = torch.randn(2, 3, 3, 2).double().requires_grad_()
    prototypes = torch.randn(4, 3, *window).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda *t: nearest_patch(*t, metric)[0], (patches, prototypes))


def test_gradient_passes_at_distance_zero() -> None:
    """2 (p - x) is 0 there without rounding, which the logarithm's slope of -1e4 would magnify."""
    patches = torch.rand(1, 8, 2, 2, requires_grad=True)
    prototypes = patches.detach().flatten(2)[0].T.clone().requires_grad_()
    value = nearest_patch(patches, prototypes)[0]
    torch.log((value + 1) / (value + 1e-4)).sum().backward()
    assert prototypes.grad is not None and not prototypes.grad.any()


@metrics
def test_backward_is_deterministic(metric: str) -> None:
    torch.manual_seed(0)
    patches, prototypes = torch.rand(6, 16, 3, 3), torch.rand(200, 16)
    first = with_gradients(patches, prototypes, metric)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, with_gradients(patches, prototypes, metric)))


@pytest.mark.parametrize(
    "metrics, ranks, activation", [("l2", 1, ""), ("dot", 1, ""), ("l2", 2, "log"), ("dot cosine", 1, "")]
)
@pytest.mark.parametrize("window", [(1, 1), (2, 1)])
def test_opcheck(metrics: str, ranks: int, activation: str, window: tuple[int, int]) -> None:
    torch.manual_seed(0)
    patches, prototypes = torch.randn(2, 3, 3, 2, requires_grad=True), torch.randn(4, 3, *window, requires_grad=True)
    arguments = (patches, prototypes, metrics, ranks, activation, None)
    torch.library.opcheck(torch.ops.fgvczoo.nearest_patch.default, arguments)
    tensors = [t.detach() for t in (patches, prototypes, *torch.ops.fgvczoo.nearest_patch.default(*arguments))]
    grads = [torch.randn(t.shape) for t in (tensors[2], tensors[4])]
    arguments = (*grads, *tensors[:4], metrics, activation, None)
    torch.library.opcheck(torch.ops.fgvczoo.nearest_patch_backward.default, arguments)


class Scores(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.prototypes = nn.Parameter(torch.rand(7, 5))

    def forward(self, patches: Tensor) -> Tensor:
        return torch.stack([nearest_patch(patches, self.prototypes, metric)[0] for metric in METRICS])


def test_compiles_without_a_break() -> None:
    torch.manual_seed(0)
    model, patches = Scores(), torch.rand(3, 5, 4, 4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    gradients = []
    for run in (model, compiled):
        result = run(patches)
        gradients.append(torch.autograd.grad(result.square().sum(), model.prototypes)[0])
    torch.testing.assert_close(compiled(patches), model(patches))
    torch.testing.assert_close(gradients[1], gradients[0])


def test_exports_to_plain_torch() -> None:
    torch.manual_seed(0)
    model, patches = Scores().eval(), torch.rand(3, 5, 4, 4)
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(model, (patches,), dynamic_shapes=({0: batch},))
    assert "fgvczoo" not in str(program.graph)
    more = torch.rand(5, 5, 4, 4)
    torch.testing.assert_close(program.module()(more), model(more))


@metrics
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_autocast_computes_in_float32(metric: str, backend: str) -> None:
    torch.manual_seed(0)
    patches, prototypes = torch.rand(2, 64, 7, 7), torch.rand(30, 64, requires_grad=True)
    with use_backend(backend):
        expected = nearest_patch(patches, prototypes, metric)[0]
        maps = similarity_map(patches, prototypes, metric)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = nearest_patch(patches, prototypes, metric)[0]
            assert torch.equal(similarity_map(patches, prototypes, metric), maps)
            assert nearest_patch(patches.bfloat16(), prototypes, metric)[0].dtype == torch.float32
    assert torch.equal(value, expected)
    value.sum().backward()
    assert prototypes.grad is not None and prototypes.grad.isfinite().all()


@pytest.mark.parametrize("metric", ["l2", "dot"])
def test_memory_does_not_grow_with_the_map(metric: str) -> None:
    patches, prototypes = torch.rand(40, 16, 14, 14), torch.rand(1000, 16, 1, 1)
    with Largest() as largest:
        value, index, activated = cpu.forward(patches, prototypes, [metric], 1, "")
        cpu.backward(torch.ones_like(value), activated, patches, prototypes, value, index, [metric], "")
    assert largest.numel <= tiles.tile() < 40 * 1000 * 196 // 10


def test_blocks_cover_everything_once() -> None:
    for length, size in ((1, 1), (7, 3), (65, 64), (2000, 600), (5, 0), (0, 4)):
        parts = list(tiles.blocks(length, size))
        assert [i for part in parts for i in range(part.start, part.stop)] == list(range(length))
        assert all(part.stop - part.start <= max(1, size) for part in parts)


@pytest.mark.parametrize(
    "patches, prototypes, metric, words",
    [
        ((2, 3, 4), (5, 3), "l2", "expected (B, D, H, W)"),
        ((2, 3, 4, 4), (5, 3, 1), "l2", "expected (B, D, H, W)"),
        ((2, 3, 4, 4), (5, 6), "l2", "channels"),
        ((2, 3, 0, 4), (5, 3), "l2", "empty"),
        ((2, 3, 4, 4), (5, 3, 5, 1), "l2", "larger"),
        ((2, 3, 4, 4), (5, 3), "cosin", "did you mean cosine?"),
    ],
)
def test_mistakes_are_named(patches: tuple[int, ...], prototypes: tuple[int, ...], metric: str, words: str) -> None:
    for function in (nearest_patch, similarity_map):
        with pytest.raises(FgvczooError) as error:
            function(torch.rand(patches), torch.rand(prototypes), metric)
        message = str(error.value)
        assert words in message and str(patches) in message and str(prototypes) in message and "\n" not in message


@pytest.mark.parametrize(
    "options, words",
    [
        ({"k": 17}, "k=17; expected 1 to 16"),
        ({"k": 0}, "k=0"),
        ({"metric": ()}, "one metric or two"),
        ({"metric": ("l2", "dot", "cosine")}, "one metric or two"),
        ({"metric": ("l2", "dott")}, "did you mean dot?"),
        ({"activation": "logg"}, "did you mean log?"),
        ({"activation": "log", "metric": "dot"}, "l2 distances"),
    ],
)
def test_choices_are_checked(options: dict[str, object], words: str) -> None:
    with pytest.raises(FgvczooError) as error:
        nearest_patch(torch.rand(2, 3, 4, 4), torch.rand(5, 3), **options)  # type: ignore[call-overload]
    assert words in str(error.value) and "\n" not in str(error.value)


def test_whole_numbers_are_refused() -> None:
    with pytest.raises(FgvczooError, match="floating-point"):
        nearest_patch(torch.ones(1, 3, 2, 2, dtype=torch.int64), torch.rand(2, 3))


def test_backend_is_restored_and_checked() -> None:
    device = torch.device("cpu")
    with use_backend("reference"):
        assert not is_fused(device)
        with use_backend("cpu"):
            assert is_fused(device)
        assert not is_fused(device)
    assert is_fused(device)
    use_backend("reference")
    assert not is_fused(device)
    use_backend("auto")
    with pytest.raises(FgvczooError, match=r"did you mean cpu\?"):
        use_backend("cpuu")
    with use_backend("cpu"), pytest.raises(FgvczooError, match="meta"):
        nearest_patch(torch.rand(1, 3, 2, 2, device="meta"), torch.rand(2, 3, device="meta"))
    assert nearest_patch(torch.rand(1, 3, 2, 2, device="meta"), torch.rand(2, 3, device="meta"))[0].shape == (1, 2)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("window", [None, (2, 1)])
@pytest.mark.parametrize("count", [1, 3])
def test_a_set_of_prototypes_for_each_image(metric: str, window: tuple[int, int] | None, count: int) -> None:
    """(B, P, D[, h, w]) is image by image what (P, D[, h, w]) is."""
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(4, 5, 3, 6, generator=generator)
    prototypes = torch.randn(4, count, 5, *(window or ()), generator=generator)
    value, index = nearest_patch(patches, prototypes, metric)
    maps = similarity_map(patches, prototypes, metric)
    for image in range(4):
        one, place = nearest_patch(patches[image, None], prototypes[image], metric)
        torch.testing.assert_close(value[image], one[0])
        assert torch.equal(index[image], place[0])
        torch.testing.assert_close(maps[image], similarity_map(patches[image, None], prototypes[image], metric)[0])
    with pytest.raises(FgvczooError, match="one such set for each image"):
        nearest_patch(patches, prototypes[:2], metric)
