"""MetaFormer's training step against a plain transcription of the paper: `python benchmarks/metaformer.py`.

MetaFG_0 with place and date, images of 224 pixels, batch of 8, float32, no drop path: forward, loss, backward, one
step of AdamW. The plain way has the same weights and every layer as the formulas say it: attention scores, the
gathered bias and their softmax as arrays, norm and activation one after the other. Three times in turn each way runs
in a fresh process: one warm-up, 3 steps, and the peak of the resident set over that of the built network. The losses
of the warm-up must agree. Writes results/metaformer-step.json and .md.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from report import RESULTS, processor, write
from timing import CPU, in_fresh_process
from torch import Tensor, nn
from torch.nn import functional as F

from fgvczoo.models.metaformer.losses import soft_cross_entropy, soft_targets
from fgvczoo.models.metaformer.network import SIZES, MBConv, MetaFG, TransformerStage
from fgvczoo.nn.metadata import MetadataShape

ROUNDS, RUNS, CLASSES = 3, 3, 200
METADATA = (MetadataShape("date", 4), MetadataShape("place", 3))


def plain_logits(network: MetaFG, images: Tensor, metadata: list[Tensor]) -> Tensor:
    x = images
    for conv, norm in zip(network.stem.convs, network.stem.norms):
        x = F.relu(norm(conv(x)))
    x = F.max_pool2d(x, 3, stride=2, padding=1)
    for block in (*network.stage_1, *network.stage_2):
        x = plain_mbconv(block, x)
    tokens = [[embedder(group) for embedder, group in zip(both, metadata)] for both in zip(*network.metadata)]
    third = plain_stage(network.stage_3, x, tokens[0])
    fourth = plain_stage(network.stage_4, network.stage_3.maps(third), tokens[1])
    return network.classifier(network.aggregation(third[:, 0], fourth[:, 0]))


def plain_mbconv(block: MBConv, x: Tensor) -> Tensor:
    inner = F.silu(block.norm_1(block.expand(x)))
    inner = F.silu(block.norm_2(block.depthwise(inner)))
    gate = torch.sigmoid(block.excite(F.silu(block.squeeze(F.adaptive_avg_pool2d(inner, 1)))))
    out = block.norm_3(block.project(gate * inner))
    return x + out if block.residual else out


def plain_stage(stage: TransformerStage, maps: Tensor, metadata: list[Tensor]) -> Tensor:
    x = torch.cat([stage.class_token.expand(len(maps), 1, -1), *metadata, stage.embedding(maps)], dim=1)
    for block in stage.blocks:
        layer, (batch, count, width) = block.attention, x.shape
        qkv = layer.qkv(block.norm_1(x)).reshape(batch, count, 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv[0] * qkv.shape[-1] ** -0.5, qkv[1], qkv[2]
        bias = layer.bias_table[stage.index.flatten()].view(count, count, -1).permute(2, 0, 1).contiguous()
        attention = (query @ key.transpose(-2, -1) + bias[None]).softmax(dim=-1)
        x = x + layer.project((attention @ value).transpose(1, 2).reshape(batch, count, width))
        x = x + block.contract(F.gelu(block.expand(block.norm_2(x))))
    return x


def measure(way: str, threads: int, side: int, batch: int) -> dict[str, Any]:
    """For a fresh process."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    network: nn.Module = MetaFG(CLASSES, SIZES["metafg_0"], (side, side), METADATA, drop_path=0.0).train()
    if way == "plain":
        network.to(memory_format=torch.contiguous_format)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 3, side, side, generator=generator)
    metadata = [torch.randn(batch, shape.width, generator=generator) for shape in METADATA]
    targets = soft_targets(torch.arange(batch), CLASSES)
    device = CPU()
    device.reset_memory()

    def step() -> float:
        optimizer.zero_grad()
        logits = plain_logits(network, images, metadata) if way == "plain" else network(images, metadata)
        loss = soft_cross_entropy(logits, targets)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    first = step()
    times = [device.seconds(step) for _ in range(RUNS)]
    return {"loss": first, "times": times, "memory": device.extra_memory()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    rounds = []
    for _ in range(ROUNDS):
        for way in ("plain", "ours"):
            found = in_fresh_process(measure, way, options.threads, options.side, options.batch)
            rounds.append((way, found))
    rows = {}
    for way in ("plain", "ours"):
        own = [found for each, found in rounds if each == way]
        times = [seconds for found in own for seconds in found["times"]]
        memory = statistics.median(found["memory"] for found in own)
        rows[way] = {"loss": own[0]["loss"], "seconds": statistics.median(times), "best": min(times), "memory": memory}
    plain, ours = rows["plain"], rows["ours"]
    assert abs(plain["loss"] - ours["loss"]) < 1e-4, f"the two ways disagree: {plain['loss']}, {ours['loss']}"
    lines = [
        "# MetaFormer's training step",
        "",
        (
            f"MetaFG_0 with place and date, {options.side} pixels, batch of {options.batch}, float32, AdamW; "
            f"{processor()}, {options.threads} thread(s); torch {torch.__version__}; median (best) of "
            f"{ROUNDS * RUNS} steps. `python benchmarks/metaformer.py` writes this file."
        ),
        "",
        "| way | step, s | peak memory, MiB |",
        "| --- | --- | --- |",
    ]
    for way, row in rows.items():
        lines.append(f"| {way} | {row['seconds']:.2f} ({row['best']:.2f}) | {row['memory'] / 2**20:.0f} |")
    lines.append(
        f"| ours / plain | {ours['seconds'] / plain['seconds']:.2f} | {ours['memory'] / plain['memory']:.2f} |"
    )
    result = {"torch": torch.__version__, "processor": processor(), **vars(options), "rows": rows}
    write(RESULTS, "metaformer-step", result, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
