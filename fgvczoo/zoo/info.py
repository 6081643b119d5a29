"""What `fgvczoo info` prints. Reads text files alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fgvczoo.zoo.papers import PAPERS
from fgvczoo.zoo.recipe import Recipe, recipe_folder

# What benchmarks measured, by recipe; `benchmarks/collect.py` writes it.
MEASURED = recipe_folder() / "measured.json"


def measured(recipe: str) -> dict[str, Any]:
    """Parameters, metrics and peak memory of a recipe of the package; empty for others."""
    found: dict[str, Any] = json.loads(MEASURED.read_text(encoding="utf-8")).get(recipe, {})
    return found


def describe(recipe: Recipe) -> str:
    """A recipe's card, and what was measured of it, as aligned lines."""
    card, ours = recipe.card, measured(recipe.name)
    weights = "none published"
    if card.weights is not None:
        place = "in the package" if card.weights.source == "package" else f"on the Hub: {card.weights.source}"
        weights = f"{place} (sha256 {card.weights.sha256[:12]}...)"
    rows = [
        ("recipe", recipe.name),
        ("title", card.title),
        *_paper(card.paper),
        ("task", card.task),
        ("data set", f"{card.dataset}, {card.num_classes} classes"),
    ]
    arguments = recipe.config["model"].get("init_args", {})
    if trunk := arguments.get("backbone") or arguments.get("network") or arguments.get("backbones"):
        rows.append(("trunk", trunk if isinstance(trunk, str) else ", ".join(trunk)))
    if ours:
        rows.append(("parameters", f"{ours['parameters'] / 1e6:.1f} million"))
    rows += [("weights", weights), *_licences(vars(card.licences))]
    for published in card.published:
        value = "not confirmed" if published.value is None else f"{published.value:g}"
        note = f"; {published.note}" if published.note else ""
        rows.append((f"published {published.metric}", f"{value} ({published.source}{note})"))
    for metric, entry in ours.get("metrics", {}).items():
        value = f"{100 * entry['mean']:.1f} ± {100 * entry['std']:.1f}"
        rows.append((f"measured {metric}", f"{value} ({entry['seeds']} seeds)"))
    for peak in ours.get("memory", []):
        rows.append(("peak memory", _memory(peak)))
    if card.baseline:
        rows.append(("baseline", card.baseline))
    if card.notes:
        rows.append(("notes", " ".join(card.notes.split())))
    rows += [("train", f"fgvczoo fit --config {recipe.name}"), ("evaluate", f"fgvczoo test --config {recipe.name}")]
    return _aligned(rows)


def describe_weights(folder: Path, config: dict[str, Any]) -> str:
    """What a weights folder says of itself, as aligned lines."""
    provenance = config["provenance"] or {}
    rows = [("weights", str(folder)), *_paper(config["paper"])]
    if title := (config.get("card") or {}).get("title"):
        rows.append(("title", title))
    told = ("recipe", "dataset", "seed", "epochs", "finished", "checkpoint")
    rows += [(key, str(provenance[key])) for key in told if key in provenance]
    if "missing" in provenance:
        missing, listed, fingerprint = (provenance.get(key) for key in ("missing", "listed", "fingerprint"))
        rows.append(("missing", f"{missing} of {listed} listed images; fingerprint of the others {fingerprint}"))
    if "skipped" in provenance:
        rows.append(("skipped", f"{provenance['skipped']} unreadable pictures"))
    names = config["classes"]
    rows.append(("classes", f"{len(names)}: {', '.join(names[:5])}" + (", ..." if len(names) > 5 else "")))
    rows += [(name, f"{(folder / name).stat().st_size / 1e6:.1f} MB") for name in config["files"]]
    for metric, value in (provenance.get("metrics") or {}).items():
        rows.append((metric, f"{value:.4f}" if isinstance(value, int | float) else "undefined"))
    return _aligned(rows + _licences(config["licence"]))


def _paper(name: str) -> list[tuple[str, str]]:
    paper = PAPERS.get(name)
    return [("model", name)] + ([("paper", f"{paper.line()}; {paper.url}")] if paper else [])


def _licences(licences: dict[str, Any]) -> list[tuple[str, str]]:
    what = {"code": "authors' code", "weights": "weights", "data": "data"}
    return [(f"licence: {words}", str(licences.get(key) or "not stated")) for key, words in what.items()]


def _memory(peak: dict[str, Any]) -> str:
    sizes = {key: f"{peak[key] / 2**20:,.0f} MiB" for key in ("train_bytes", "predict_1_bytes", "predict_32_bytes")}
    return (
        f"training {sizes['train_bytes']} (batch {peak['train_batch']}), predicting {sizes['predict_1_bytes']} (1) and "
        f"{sizes['predict_32_bytes']} (32); {peak['device']}, torch {peak['torch']}"
    )


def _aligned(rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}".rstrip() for name, value in rows)
