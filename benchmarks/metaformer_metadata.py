"""What place and date are worth on SynthBirds: `python benchmarks/metaformer_metadata.py [--runs DIR]`.

Over the runs that `python benchmarks/reproduce.py metaformer-synthbirds --seeds 3` left: top-1 on the test images with
metadata, with the metadata of another test image (a fixed permutation), without place, without date, with all of it
missing, and of the baseline that never saw any; by what place and date can tell of a sibling pair: allopatric siblings
live in two regions, allochronic ones in two seasons, sympatric ones share both. "pair" is the choice between the two
siblings alone. Writes results/metaformer-metadata.json and .md.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from pathlib import Path
from typing import Any

import torch
from report import RESULTS, write
from torch import Tensor

from fgvczoo.data.synthbirds.genotypes import PAIR_TYPES
from fgvczoo.zoo.build import data_from_provenance
from fgvczoo.zoo.load import load

RECIPE, BASELINE = "metaformer-synthbirds", "metaformer-vision-synthbirds"
SEEDS = 3
CASES = ("with metadata", "shuffled", "without place", "without date", "all missing", "baseline")


@torch.inference_mode()
def scores(run: Path, cases: tuple[str, ...]) -> tuple[dict[str, Tensor], Tensor, Path]:
    """Logits (N, C) of the test images in each case, labels (N,), and where the data lie."""
    model = load(run)
    data = data_from_provenance(model, eval_batch_size=100, num_workers=0)
    batches = list(data.loader("test"))
    images = torch.cat([batch["image"] for batch in batches])
    labels = torch.cat([batch["label"] for batch in batches])
    if cases == ("baseline",):
        found = {"baseline": [model(part) for part in images.split(100)]}
        return {case: torch.cat(parts) for case, parts in found.items()}, labels, data.reader.folder.parent
    date, place = (torch.cat(parts) for parts in zip(*(model.vectors(batch) for batch in batches)))
    other = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    given = {
        "with metadata": (date, place),
        "shuffled": (date[other], place[other]),
        "without place": (date, 0 * place),
        "without date": (0 * date, place),
        "all missing": (0 * date, 0 * place),
    }
    found = {
        case: [model(*parts) for parts in zip(images.split(100), zip(*(group.split(100) for group in groups)))]
        for case, groups in given.items()
    }
    return {case: torch.cat(parts) for case, parts in found.items()}, labels, data.reader.folder.parent


def shares(logits: Tensor, labels: Tensor, types: list[str]) -> dict[str, float]:
    """Top-1, and the choice within the pair, over all images and by the type of their pair."""
    right = logits.argmax(1) == labels
    siblings = torch.stack([labels, labels ^ 1], dim=1)  # classes 2 p and 2 p + 1 are pair p
    within = logits.gather(1, siblings).argmax(1) == 0
    kinds = [types[label // 2] for label in labels.tolist()]
    result = {}
    for kind in ("all", *PAIR_TYPES):
        rows = torch.tensor([kind in ("all", each) for each in kinds])
        result[kind] = float(right[rows].float().mean())
        result[f"{kind}, pair"] = float(within[rows].float().mean())
    return result


def pair_types(root: Path) -> list[str]:
    """By the number of the pair."""
    file = next(root.rglob("sibling_pairs.csv"))
    with file.open(encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle))
    return [row["pair_type"] for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/reproduce"))
    options = parser.parse_args()
    seeds: list[dict[str, Any]] = []
    for seed in range(SEEDS):
        found, labels, root = scores(options.runs / f"{RECIPE}-seed{seed}", CASES)
        baseline, again, _ = scores(options.runs / f"{BASELINE}-seed{seed}", ("baseline",))
        assert torch.equal(labels, again)
        types = pair_types(root)
        seeds.append({case: shares(logits, labels, types) for case, logits in (found | baseline).items()})
    lines = [
        "# What place and date are worth",
        "",
        (
            f"Percent on the {len(labels)} test images of SynthBirds small, mean ± standard deviation over {SEEDS} "
            'seeds; "pair": the choice between the two siblings alone. 8 % of the images have no place and date, 12 % '
            "a place anywhere. `python benchmarks/metaformer_metadata.py` writes this file, over the runs of "
            "`python benchmarks/reproduce.py metaformer-synthbirds --seeds 3`."
        ),
        "",
    ]
    columns = list(seeds[0]["baseline"])
    lines += [f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for case in CASES:
        cells = []
        for column in columns:
            values = [100 * seed[case][column] for seed in seeds]
            cells.append(f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}")
        lines.append(f"| {case} | {' | '.join(cells)} |")
    result = {"torch": torch.__version__, "seeds": seeds}
    write(RESULTS, "metaformer-metadata", result, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
