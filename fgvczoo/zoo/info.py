"""What `fgvczoo info` prints."""

from __future__ import annotations

from fgvczoo.zoo.recipe import Recipe


def describe(recipe: Recipe) -> str:
    """A recipe's card as aligned lines."""
    card = recipe.card
    weights = f"{card.weights.source} (sha256 {card.weights.sha256[:12]}...)" if card.weights else "none published"
    rows = [
        ("recipe", recipe.name),
        ("title", card.title),
        ("paper", card.paper),
        ("task", card.task),
        ("data set", f"{card.dataset}, {card.num_classes} classes"),
        ("trunk", str(recipe.config["model"].get("init_args", {}).get("backbone", ""))),
        ("weights", weights),
        ("licence: code", f"{card.licences.code} (the authors')"),
        ("licence: weights", card.licences.weights),
        ("licence: data", card.licences.data),
    ]
    for published in card.published:
        value = "not confirmed" if published.value is None else f"{published.value:g}"
        note = f"; {published.note}" if published.note else ""
        rows.append((f"published {published.metric}", f"{value} ({published.source}{note})"))
    if card.baseline:
        rows.append(("baseline", card.baseline))
    if card.notes:
        rows.append(("notes", " ".join(card.notes.split())))
    rows += [("train", f"fgvczoo fit --config {recipe.name}"), ("evaluate", f"fgvczoo test --config {recipe.name}")]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}".rstrip() for name, value in rows)
