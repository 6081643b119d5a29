"""MetaFG, the network of MetaFormer (Diao et al., arXiv 2203.02751): convolutions, then transformers with metadata.

B images, C classes, D channels of a stage, h x w cells of its grid, E extra tokens (the class token and those of the
metadata), N = E + h w tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fgvczoo.errors import FgvczooError
from fgvczoo.models.metaformer.position import grid_of, relative_index
from fgvczoo.nn.metadata import MetadataShape
from fgvczoo.nn.recompute import norm_activation, rebuilding
from fgvczoo.ops import patch_attention

EXPANSION = 4  # of MBConv, from its input's channels, and of the transformer's MLP


@dataclass(frozen=True)
class Size:
    """Channels of the stem and stages 1, 2; blocks of stages 1, 2; channels and blocks of stages 3, 4; heads."""

    conv_widths: tuple[int, int, int]
    conv_depths: tuple[int, int]
    attention_widths: tuple[int, int]
    attention_depths: tuple[int, int]
    num_heads: int = 8


SIZES = {
    "metafg_0": Size((64, 96, 192), (2, 3), (384, 768), (5, 2)),
    "metafg_1": Size((64, 96, 192), (2, 6), (384, 768), (14, 2)),
    "metafg_2": Size((128, 128, 256), (2, 6), (512, 1024), (14, 2)),
}


class Output(NamedTuple):
    """What the network computes.

    logits (B, C); features (B, D4), which the classifier reads; stages: maps (B, D, h, w) after stages 1 and 2, tokens
    (B, N, D) after stages 3 and 4, extra tokens first, the class token the first of them.
    """

    logits: Tensor
    features: Tensor
    stages: tuple[Tensor, Tensor, Tensor, Tensor]


class Stem(nn.Module):
    """Three 3 x 3 convolutions, the first of stride 2, each with norm and ReLU; then max-pooling of stride 2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = (3, 3 * (width // 4), width, width)
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=2 if a == 3 else 1, padding=1, bias=False) for a, b in pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for b in widths[1:])

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D, H / 4, W / 4)."""
        x, rebuild = images, None
        for conv, norm in zip(self.convs, self.norms):
            assert isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm)
            with rebuilding(x, rebuild):
                x = conv(x)
            x, rebuild = norm_activation(x, norm, "relu")
        with rebuilding(x, rebuild):
            return F.max_pool2d(x, 3, stride=2, padding=1)


class MBConv(nn.Module):
    """Inverted bottleneck with squeeze-and-excitation (as EfficientNet has it). The residual, and with it drop path, is
    there only where shapes allow it."""

    def __init__(self, channels: int, out_channels: int, stride: int = 1, expansion: int = EXPANSION) -> None:
        super().__init__()
        inner, squeezed = expansion * channels, max(1, channels // 4)
        self.expand = nn.Conv2d(channels, inner, 1, bias=False)
        self.norm_1 = nn.BatchNorm2d(inner, eps=0.01)
        self.depthwise = nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False)
        self.norm_2 = nn.BatchNorm2d(inner, eps=0.01)
        self.squeeze = nn.Conv2d(inner, squeezed, 1)
        self.excite = nn.Conv2d(squeezed, inner, 1)
        self.project = nn.Conv2d(inner, out_channels, 1, bias=False)
        self.norm_3 = nn.BatchNorm2d(out_channels, eps=0.01)
        self.residual = stride == 1 and channels == out_channels

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """(B, D, h, w) -> (B, D', h / stride, w / stride). keep: (B,) factors of drop path, 0 or 1 / (1 - rate)."""
        inner, rebuild = norm_activation(self.expand(x), self.norm_1, "silu")
        inner = self.depthwise(inner)
        inner, rebuild = norm_activation(inner, self.norm_2, "silu")
        gate = self.excite(F.silu(self.squeeze(inner.mean(dim=(2, 3), keepdim=True)))).sigmoid()
        gated, kept, fixed = inner * gate, inner.detach(), gate.detach()
        with rebuilding(gated, rebuild and (lambda: kept * fixed)):
            branch = self.norm_3(self.project(gated))
        return x + dropped(branch, keep) if self.residual else branch


class PatchEmbedding(nn.Module):
    """Overlapping patches: a 3 x 3 convolution of stride 2, its cells as tokens, a norm."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(channels, width, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(width)

    def forward(self, maps: Tensor) -> Tensor:
        """(B, D, 2 h, 2 w) -> (B, h w, D'), row by row."""
        return self.norm(self.project(maps).flatten(2).transpose(1, 2))


class RelativeAttention(nn.Module):
    """Self-attention whose scores have a learned bias by the offset of two cells; all pairs with an extra token share
    row 0 of its table, which is also that of the offset (-(h - 1), -(w - 1)), as in the published weights."""

    def __init__(self, width: int, num_heads: int, grid: tuple[int, int]) -> None:
        super().__init__()
        if width % num_heads:
            raise FgvczooError(f"a width of {width} cannot be split between {num_heads} heads; give a multiple")
        self.num_heads = num_heads
        self.bias_table = nn.Parameter(torch.empty((2 * grid[0] - 1) * (2 * grid[1] - 1) + 1, num_heads))
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width)
        self._gathered: tuple[tuple[object, ...], Tensor] | None = None

    def bias(self, index: Tensor) -> Tensor:
        """(heads, N, N): the table's rows by `index` (N, N). Gathered once a forward; without gradients, once until
        the table changes."""
        table = self.bias_table
        # A table of inference mode does not say when it changes.
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or table.is_meta or table.is_inference():
            return self._gather(index)
        state = (table._version, table.data_ptr(), table.dtype, index.data_ptr(), index.shape)
        if self._gathered is None or self._gathered[0] != state:
            self._gathered = state, self._gather(index)
        return self._gathered[1]

    def _gather(self, index: Tensor) -> Tensor:
        return self.bias_table.t()[:, index]

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        """(B, N, D), index (N, N) -> (B, N, D)."""
        batch, tokens, width = x.shape
        query, key, value = self.qkv(x).view(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        found = patch_attention(query, key, value, self.bias(index))
        return self.project(found.transpose(1, 2).reshape(batch, tokens, width))


class TransformerBlock(nn.Module):
    """Relative attention and an MLP, each behind a norm and beside a residual."""

    def __init__(self, width: int, num_heads: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(width)
        self.attention = RelativeAttention(width, num_heads, grid)
        self.norm_2 = nn.LayerNorm(width)
        self.expand = nn.Linear(width, EXPANSION * width)
        self.contract = nn.Linear(EXPANSION * width, width)

    def forward(self, x: Tensor, index: Tensor, keep: Sequence[Tensor | None] = (None, None)) -> Tensor:
        """(B, N, D) -> (B, N, D). keep: factors (B,) of drop path for both branches."""
        x = x + dropped(self.attention(self.norm_1(x), index), keep[0])
        inner = self.expand(self.norm_2(x))
        active, fixed = F.gelu(inner), inner.detach()
        with rebuilding(active, None if torch.compiler.is_compiling() else lambda: F.gelu(fixed)):
            branch = self.contract(active)
        return x + dropped(branch, keep[1])


class TransformerStage(nn.Module):
    """Patches of the maps before it, a class token and metadata tokens, through transformer blocks."""

    def __init__(
        self, channels: int, width: int, depth: int, num_heads: int, grid: tuple[int, int], metadata_tokens: int
    ) -> None:
        super().__init__()
        self.grid = grid
        self.embedding = PatchEmbedding(channels, width)
        self.class_token = nn.Parameter(torch.empty(width))
        self.blocks = nn.ModuleList(TransformerBlock(width, num_heads, grid) for _ in range(depth))
        # One for all blocks; it follows from the grid, so it is not saved.
        self.index: Tensor
        self.register_buffer("index", relative_index(grid, 1 + metadata_tokens), persistent=False)

    def forward(self, maps: Tensor, metadata: Sequence[Tensor], keep: Sequence[Tensor | None]) -> Tensor:
        """(B, D, 2 h, 2 w) and metadata tokens (B, t, D') each -> (B, N, D'). keep: (B,) of each branch in order."""
        patches = self.embedding(maps)
        x = torch.cat([self.class_token.expand(maps.shape[0], 1, -1), *metadata, patches], dim=1)
        for number, block in enumerate(self.blocks):
            x = block(x, self.index, keep[2 * number : 2 * number + 2])
        return x

    def maps(self, tokens: Tensor) -> Tensor:
        """The patches of (B, N, D) as maps (B, D, h, w)."""
        cells = self.grid[0] * self.grid[1]
        return tokens[:, -cells:].transpose(1, 2).unflatten(2, self.grid)


class MetadataEmbedder(nn.Module):
    """Vectors of a metadata group to tokens: three non-linear layers with one residual (the paper's "non-linear
    embedding")."""

    def __init__(self, group: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(group if n == 0 else width, width) for n in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))

    def forward(self, vectors: Tensor) -> Tensor:
        """(B, k) or (B, t, k) -> (B, t, D), t = 1 without a token axis. Zeros, too, make tokens: the absence of
        metadata is a value."""
        x = vectors if vectors.ndim == 3 else vectors[:, None]
        u, v, w = self.layers
        first = self.norms[0](F.relu(u(x)))
        second = self.norms[1](F.relu(v(first)))
        return first + self.norms[2](F.relu(w(second)))


class Aggregation(nn.Module):
    """Both class tokens as one vector: the first through an MLP to the width of the second, then a weighted sum."""

    def __init__(self, widths: tuple[int, int]) -> None:
        super().__init__()
        first, second = widths
        self.norm_1, self.norm_2 = nn.LayerNorm(first), nn.LayerNorm(second)
        self.expand, self.contract = nn.Linear(first, first), nn.Linear(first, second)
        self.norm_mlp = nn.LayerNorm(second)
        self.sum = nn.Conv1d(2, 1, 1)
        self.norm = nn.LayerNorm(second)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """(B, D3) and (B, D4) -> (B, D4)."""
        raised = self.norm_mlp(self.contract(F.gelu(self.expand(self.norm_1(first)))))
        return self.norm(self.sum(torch.stack([raised, self.norm_2(second)], dim=1)).squeeze(1))


class LastClassToken(nn.Module):
    """The class token of the last stage alone (the option only_last_cls)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_2 = nn.LayerNorm(width)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """(B, D3) and (B, D4) -> (B, D4)."""
        return self.norm_2(second)


class MetaFG(nn.Module):
    """The whole network.

    Args:
        num_classes: C.
        size: channels, blocks, heads.
        image_size: height and width, multiples of 32.
        metadata: shapes of the groups, in the order of their tokens; none: vision only.
        drop_path: the rate of the last block; it rises from 0 over all blocks of stages 1 to 4.
        only_last_cls: features are the class token of stage 4 alone.
    """

    def __init__(
        self,
        num_classes: int,
        size: Size,
        image_size: tuple[int, int] = (224, 224),
        metadata: Sequence[MetadataShape] = (),
        drop_path: float = 0.1,
        only_last_cls: bool = False,
    ) -> None:
        super().__init__()
        if image_size[0] % 32 or image_size[1] % 32 or min(image_size) < 32:
            raise FgvczooError(
                f"image size {image_size[0]} x {image_size[1]}: MetaFG takes heights and widths that are multiples of"
                " 32; give preprocess.size accordingly"
            )
        if not 0 <= drop_path < 1:
            raise FgvczooError(f"drop_path={drop_path}; expected a rate in [0, 1)")
        self.image_size, self.metadata_shapes = tuple(image_size), tuple(metadata)
        c0, c1, c2 = size.conv_widths
        d3, d4 = size.attention_widths
        tokens = sum(shape.tokens for shape in metadata)
        self.stem = Stem(c0)
        self.stage_1 = nn.ModuleList(MBConv(c0 if n == 0 else c1, c1) for n in range(size.conv_depths[0]))
        self.stage_2 = nn.ModuleList(
            MBConv(c1, c2, stride=2) if n == 0 else MBConv(c2, c2) for n in range(size.conv_depths[1])
        )
        self.metadata = nn.ModuleList(
            nn.ModuleList(MetadataEmbedder(shape.width, width) for width in (d3, d4)) for shape in metadata
        )
        depths, heads = size.attention_depths, size.num_heads
        self.stage_3 = TransformerStage(c2, d3, depths[0], heads, grid_of(image_size, 3), tokens)
        self.stage_4 = TransformerStage(d3, d4, depths[1], heads, grid_of(image_size, 4), tokens)
        self.aggregation = LastClassToken(d4) if only_last_cls else Aggregation((d3, d4))
        self.classifier = nn.Linear(d4, num_classes)
        self._drop_rates = torch.linspace(0, drop_path, len(self._blocks()), device="cpu").tolist()
        self._initialise()
        # Convolutions run in this order on CPUs and GPUs alike: no maps are copied from one order to the other.
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor, metadata: Sequence[Tensor] | None = None, draws: Tensor | None = None) -> Tensor:
        """Logits (B, C); arguments as `output`."""
        return self.output(images, metadata, draws).logits

    def output(self, images: Tensor, metadata: Sequence[Tensor] | None = None, draws: Tensor | None = None) -> Output:
        """images: (B, 3, H, W). metadata: (B, k) or (B, t, k) of each group; None: zeros, which is what missing
        metadata is. draws: (`branches`, B) uniform in [0, 1), on the CPU, which drop path of blocks in train mode rests
        on; None: drawn."""
        keep = self._keep(draws, images)
        first, second = self.convolutions(images, keep)
        return self.fuse(first, second, metadata, keep)

    def convolutions(self, images: Tensor, keep: Sequence[Tensor | None] | None = None) -> tuple[Tensor, Tensor]:
        """Maps (B, D, h, w) after stages 1 and 2, which read no metadata."""
        if tuple(images.shape[2:]) != self.image_size:
            raise FgvczooError(
                f"images of {images.shape[2]} x {images.shape[3]}, but the tables of relative positions are for"
                f" {self.image_size[0]} x {self.image_size[1]}; resize the images, or the tables (from_official's"
                " image_size)"
            )
        factors = iter(keep) if keep is not None else None
        x, maps = self.stem(images), []
        for stage in (self.stage_1, self.stage_2):
            for block in stage:
                x = block(x, next(factors) if factors is not None and block.residual else None)
            maps.append(x)
        return maps[0], maps[1]

    def fuse(
        self,
        first: Tensor,
        second: Tensor,
        metadata: Sequence[Tensor] | None = None,
        keep: Sequence[Tensor | None] | None = None,
    ) -> Output:
        """From the maps of `convolutions` on."""
        vectors = self._vectors(metadata, second)
        count = 2 * (len(self.stage_3.blocks) + len(self.stage_4.blocks))
        factors = [None] * count if keep is None else list(keep)[-count:]
        split = 2 * len(self.stage_3.blocks)
        third = self.stage_3(second, self._tokens(vectors, 0), factors[:split])
        fourth = self.stage_4(self.stage_3.maps(third), self._tokens(vectors, 1), factors[split:])
        features = self.aggregation(third[:, 0], fourth[:, 0])
        return Output(self.classifier(features), features, (first, second, third, fourth))

    @property
    def branches(self) -> int:
        """How many residual branches drop path may leave out."""
        return sum(_branches(block) for block in self._blocks())

    def _blocks(self) -> list[nn.Module]:
        """Of stages 1 to 4."""
        return [*self.stage_1, *self.stage_2, *self.stage_3.blocks, *self.stage_4.blocks]

    def _tokens(self, vectors: Sequence[Tensor], stage: int) -> list[Tensor]:
        """Each group as tokens of stage 3 (0) or 4 (1)."""
        embedders = [both[stage] for both in self.metadata if isinstance(both, nn.ModuleList)]
        return [embedder(group) for embedder, group in zip(embedders, vectors)]

    def _vectors(self, metadata: Sequence[Tensor] | None, like: Tensor) -> list[Tensor]:
        shapes = self.metadata_shapes
        if metadata is None:
            return [like.new_zeros(like.shape[0], shape.tokens, shape.width) for shape in shapes]
        if len(metadata) != len(shapes):
            raise FgvczooError(f"{len(metadata)} groups of metadata; the network has {len(shapes)}")
        for group, shape in zip(metadata, shapes):
            tokens = group.shape[1] if group.ndim == 3 else 1
            if group.ndim not in (2, 3) or (tokens, group.shape[-1]) != (shape.tokens, shape.width):
                raise FgvczooError(
                    f"metadata {shape.name}: {tokens} vectors of {group.shape[-1]} numbers; the network takes"
                    f" {shape.tokens} of {shape.width}"
                )
        return [group.to(like.dtype) for group in metadata]

    def _keep(self, draws: Tensor | None, images: Tensor) -> Sequence[Tensor | None] | None:
        """For every branch (B,): 0 where its draw lies below its rate, else 1 / (1 - rate); None where it always stays,
        as in blocks in eval mode."""
        if draws is None:
            if not self.training or not any(self._drop_rates):
                return None
            draws = torch.rand(self.branches, len(images))
        keep: list[Tensor | None] = []
        for block, rate in zip(self._blocks(), self._drop_rates):
            for _ in range(_branches(block)):
                stays = (draws[len(keep)] >= rate) / (1 - rate)
                keep.append(stays.to(images.device, images.dtype) if rate and block.training else None)
        return keep

    def _initialise(self) -> None:
        """From scratch, as the authors' code does it: linear layers, class tokens and tables truncated normal of 0.02,
        convolutions normal by their fan-out (not divided by groups, so depthwise ones start small)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
            elif isinstance(module, RelativeAttention):
                nn.init.trunc_normal_(module.bias_table, std=0.02)
            elif isinstance(module, TransformerStage):
                nn.init.trunc_normal_(module.class_token, std=0.02)
            elif isinstance(module, PatchEmbedding):
                assert module.project.bias is not None
                nn.init.zeros_(module.project.bias)


def _branches(block: nn.Module) -> int:
    """How many of a block's branches drop path may leave out."""
    return int(block.residual) if isinstance(block, MBConv) else 2


def dropped(branch: Tensor, keep: Tensor | None) -> Tensor:
    """A residual branch (B, ...) times its samples' factors (B,); see `MBConv.forward`."""
    return branch if keep is None else branch * keep.view(-1, *[1] * (branch.ndim - 1))
