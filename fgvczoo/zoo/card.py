"""The README of a weights folder, which is its page on the Hub: made of config.json alone."""

from __future__ import annotations

from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from fgvczoo.zoo.papers import PAPERS

# The Hub's names of licences. Others are "other", under the words that config.json has for them.
_HUB_LICENCES = {
    "Apache-2.0": "apache-2.0",
    "MIT": "mit",
    "CC BY 4.0": "cc-by-4.0",
    "CC BY-NC 4.0": "cc-by-nc-4.0",
    "CC BY-SA 4.0": "cc-by-sa-4.0",
    "CC0": "cc0-1.0",
}
_PIPELINES = {
    "classification": "image-classification",
    "localization": "object-detection",
    "retrieval": "image-feature-extraction",
}
# Metrics that the Hub is told, by its own word for their kind.
_TOLD = {"test/top1": "accuracy", "test/top5": "accuracy", "test/recall_at_1": "recall"}


def model_card(config: dict[str, Any], repo: str | None = None, licence: str | None = None) -> str:
    """Markdown with the front matter that the Hub reads: what it is, how to use it, results, citation, terms.

    repo: where it will be; None: "FOLDER" stands for it. licence: the Hub's name of the weights' licence, where config
    has none that the Hub knows.
    """
    provenance, card = config["provenance"] or {}, config.get("card") or {}
    paper = PAPERS.get(config["paper"])
    name = provenance.get("recipe") or f"{config['paper']}, from the authors' checkpoint"
    sections = [
        f"---\n{_front_matter(config, name, licence)}\n---",
        f"# {name}",
        card.get("title") or (paper.title if paper else config["paper"]),
        _origin(config, provenance),
        _use(config, repo),
        _results(provenance, card),
        _citation(config["paper"]),
        _terms(config["licence"], licence),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(config: dict[str, Any], name: str, licence: str | None) -> str:
    provenance, card = config["provenance"] or {}, config.get("card") or {}
    terms = str(config["licence"].get("weights", ""))
    known = licence or next((hub for words, hub in _HUB_LICENCES.items() if terms.startswith(words)), "other")
    measured = [
        EvalResult(
            task_type=_PIPELINES[card.get("task", "classification")],
            dataset_type=str(provenance.get("dataset")),
            dataset_name=str(provenance.get("dataset")),
            dataset_split="test",
            metric_type=_TOLD[metric],
            metric_name=metric.removeprefix("test/"),
            metric_value=value,
        )
        for metric, value in (provenance.get("metrics") or {}).items()
        if metric in _TOLD and value is not None
    ]
    data = ModelCardData(
        license=known,
        library_name="fgvczoo",
        pipeline_tag=_PIPELINES.get(card.get("task", "classification")),
        tags=["fine-grained", config["paper"]],
        model_name=name if measured else None,
        eval_results=measured or None,
        license_name=None if known != "other" else "see-below",
        license_link=None if known != "other" else "#terms",
    )
    return str(data.to_yaml())


def _origin(config: dict[str, Any], provenance: dict[str, Any]) -> str:
    if "checkpoint" in provenance:
        return f"Imported from `{provenance['checkpoint']}` (SHA-256 {provenance['sha256']})."
    if "dataset" not in provenance:
        return ""
    text = f"Trained on {provenance['dataset']} ({len(config['classes'])} classes), seed {provenance.get('seed')}, "
    text += f"{provenance.get('epochs')} epochs" + ("." if provenance.get("finished") else " (unfinished).")
    if "missing" in provenance:
        text += f" {provenance['missing']} of {provenance.get('listed')} listed images were not there"
        text += f" (fingerprint of the others: {provenance.get('fingerprint')})."
    if "skipped" in provenance:
        text += f" Unreadable pictures that were skipped: {provenance['skipped']}."
    return text


def _use(config: dict[str, Any], repo: str | None) -> str:
    explain = '\nmodel.explain("bird.jpg").save("why.html")' if config["state"] else ""
    return f"""\
```python
import fgvczoo

model = fgvczoo.load("{repo or "FOLDER"}")
print(model.predict("bird.jpg")){explain}
```"""


def _results(provenance: dict[str, Any], card: dict[str, Any]) -> str:
    measured = {key.removeprefix("test/"): value for key, value in (provenance.get("metrics") or {}).items()}
    published = {entry["metric"]: entry for entry in card.get("published") or [] if entry["value"] is not None}
    if not measured and not published:
        return ""
    lines = [
        f"## Results on {provenance.get('dataset', 'the test images')}",
        "",
        "| metric | here | paper |",
        "|---|---|---|",
    ]
    for metric in dict.fromkeys((*measured, *published)):
        here = "" if measured.get(metric) is None else f"{100 * measured[metric]:.2f}"
        paper = f"{published[metric]['value']:g}" if metric in published else ""
        lines.append(f"| {metric} | {here} | {paper} |")
    for entry in published.values():
        lines += ["", f"Paper: {entry['source']}" + (f"; {entry['note']}." if entry.get("note") else ".")]
    return "\n".join(lines)


def _citation(name: str) -> str:
    paper = PAPERS.get(name)
    return f"## Paper\n\n{paper.line()} ({paper.url})\n\n```bibtex\n{paper.bibtex}\n```" if paper else ""


def _terms(licences: dict[str, Any], licence: str | None) -> str:
    rows = {"code": "the authors' code", "weights": "these weights", "data": "the training data"}
    lines = ["## Terms", "", "| what | licence |", "|---|---|"]
    for key, what in rows.items():
        terms = licence if key == "weights" and licence else licences.get(key)
        lines.append(f"| {what} | {terms or 'not stated'} |")
    return "\n".join(lines)
