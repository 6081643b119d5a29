"""The README of a weights folder."""

from __future__ import annotations

from typing import Any

from fgvczoo.zoo.recipe import Card


def model_card(recipe: str, card: Card | None, provenance: dict[str, Any]) -> str:
    """Markdown with the front matter that the Hub reads: what it is, where from, how to use it, under what terms."""
    title = card.title if card else recipe
    lines = [
        "---",
        "library_name: fgvczoo",
        "pipeline_tag: image-classification",
        "---",
        f"# {recipe}",
        "",
        title,
        "",
        "```python",
        "import fgvczoo",
        "",
        'model = fgvczoo.load("FOLDER")',
        'print(model.predict("bird.jpg"))',
        'model.explain("bird.jpg").save("why.html")',
        "```",
        "",
        f"Trained on {provenance['dataset']}, seed {provenance['seed']}, {provenance['epochs']} epochs"
        + ("." if provenance["finished"] else " (unfinished)."),
        "",
    ]
    if card:
        lines += [
            "| what | licence |",
            "|---|---|",
            f"| the authors' code | {card.licences.code} |",
            f"| these weights | {card.licences.weights} |",
            f"| the training data | {card.licences.data} |",
            "",
        ]
    return "\n".join(lines)
