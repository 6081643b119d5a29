"""Explanations as one HTML file that needs nothing else; and the sections of prototype explanations in it."""

from __future__ import annotations

import base64
import html
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from fgvczoo.errors import FgvczooError
from fgvczoo.explain.overlay import encode_jpeg, enlarge, overlay
from fgvczoo.files import atomic_path, write_text
from fgvczoo.nn.prototypes import PrototypeSource

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fgvczoo.explain.prototypes import Evidence, PrototypeExplanation

SIDE = 360
_IMAGE_ENDINGS = (".png", ".pdf", ".svg")

_STYLE = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")


class Explained(ABC):
    """What a page shows: an explanation of one image, or of a model."""

    frame_height: ClassVar[int] = 50  # in a notebook, in em

    @property
    @abstractmethod
    def title(self) -> str:
        """The page's title, where it shows nothing else."""

    @property
    def head(self) -> str:
        """HTML for the page's head: style and script; equal ones stand there once."""
        return ""

    @property
    def closing(self) -> str:
        """HTML for the page's end; equal ones stand there once."""
        return ""

    @abstractmethod
    def section(self, name: str) -> str:
        """HTML; name: what the image is called."""

    @abstractmethod
    def figure(self) -> Figure:
        """As a matplotlib figure."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """JSON values, without pictures."""

    def save(self, path: str | Path) -> Path:
        """Writes the page (.html, self-contained), the figure (.png, .pdf, .svg) or the values (.json)."""
        return write([self], path)

    def _repr_html_(self) -> str:
        """In a notebook: the page, in a frame of its own, which keeps its style to itself."""
        page = html.escape(render([self], [""]))
        return f'<iframe srcdoc="{page}" style="width:100%;height:{self.frame_height}em;border:0"></iframe>'


def write(explanations: Sequence[Explained], path: str | Path, names: Sequence[str] | None = None) -> Path:
    """Writes explanations by the file's ending: .html (all of them), .json (all), .png, .pdf, .svg (one).

    names: what the images are called. Raises `FgvczooError` for another ending, or several explanations in one figure.
    """
    path = Path(path)
    titles = list(names) if names is not None else [""] * len(explanations)
    if path.suffix in (".html", ".htm"):
        write_text(path, render(explanations, titles))
    elif path.suffix == ".json":
        values = [{"image": name, **e.to_dict()} for name, e in zip(titles, explanations)]
        write_text(path, json.dumps(values if len(values) != 1 else values[0], indent=1) + "\n")
    elif path.suffix in _IMAGE_ENDINGS:
        if len(explanations) != 1:
            raise FgvczooError(f"{path}: a figure holds one explanation, got {len(explanations)}; write a .html page")
        with atomic_path(path) as temporary:
            explanations[0].figure().savefig(temporary, dpi=150)
    else:
        raise FgvczooError(f"{path}: expected a name ending in .html, .json, {', '.join(_IMAGE_ENDINGS)}")
    return path


def render(explanations: Sequence[Explained], names: Sequence[str]) -> str:
    """The page. Everything that comes from files or class names is escaped."""
    parts = [e.section(name) for e, name in zip(explanations, names)]
    sections = "\n".join([*parts, *dict.fromkeys(e.closing for e in explanations)])
    head = "".join(dict.fromkeys(e.head for e in explanations))
    title = html.escape(explanations[0].title) if len(explanations) == 1 else "Explanations"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style>{head}</head><body><main>\n{sections}\n</main></body></html>\n"
    )


def prototype_section(e: PrototypeExplanation, name: str) -> str:
    """Why one image gets its class: the prototypes that add most, and the whole sum."""
    shown, rest = e.evidence[: e.shown], e.evidence[e.shown :]
    asked = "" if e.class_name == e.predicted else f" (the model predicts {html.escape(e.predicted)})"
    patches = where_from(e.dataset, e.prototypes_are_patches)
    cards = "\n".join(_card(e, entry) for entry in shown)
    file = f'<p class="soft">{html.escape(name)}</p>' if name else ""
    return f"""<section>
<div class="head">{image_tag(enlarge(e.image, SIDE), "the image")}
<div><h1>Why {html.escape(e.class_name)}?</h1>{file}
<p>Probability {e.probability:.1%}{asked}.</p>
<p>The score of this class (its logit, {e.logit:.2f}) is a sum over {len(e.evidence)} prototypes. Each one is looked
for on the whole image; what it adds is its similarity to the best place it finds, times its weight for this class.</p>
<p class="soft">{patches} A warm region is where the similarity is high; the map is coarser than the picture.</p>
</div></div>
<h2>The {len(shown)} prototypes that add most</h2>
<ul class="cards">
{cards}
</ul>
<h2>The whole sum</h2>
{_sum(shown, rest, e.logit)}
{_against(e)}
</section>"""


def _card(e: PrototypeExplanation, entry: Evidence) -> str:
    assert entry.map is not None
    found = image_tag(overlay(e.image, entry.map, SIDE), "where it is found on the image")
    prototype = prototype_picture(entry.picture, entry.source, e.dataset)
    product = f"{entry.similarity:.2f} × {entry.weight:.2f}"
    return f"""<li class="card"><div class="pair">
<figure>{found}<figcaption>this place …</figcaption></figure>
<figure>{prototype}<figcaption>… looks like that one</figcaption></figure></div>
<p class="what">{html.escape(entry.prototype_class)}</p>
<p class="sum">{product} = <span class="{_sign(entry.contribution)}">{entry.contribution:+.2f}</span>
<span class="soft">{html.escape(entry.kind)} prototype {entry.prototype}</span></p></li>"""


def where_from(dataset: str | None, are_patches: bool) -> str:
    """What a model's prototypes are, in a sentence."""
    if are_patches:
        return "Each prototype is a patch of a training image; the frame shows it."
    if dataset:
        return "Training went on after the prototypes were set to training patches: the pictures show where from."
    return "The prototypes of this model have not been set to training patches yet."


def prototype_picture(picture: bytes | None, source: PrototypeSource | None, dataset: str | None) -> str:
    """The training image that a prototype comes from, or in words where that is and how to see it."""
    if picture is not None:
        return f'<img src="{data_uri(picture)}" alt="the prototype">'
    if source is None:
        return '<div class="none">not a training patch</div>'
    box = ", ".join(f"{v:.0f}" for v in source.box)
    where = html.escape(f"{dataset}: image {source.image}, box {box}")
    return f'<div class="none">{where}. Its picture may not be passed on: give the data set\'s root to see it.</div>'


def _sum(shown: Sequence[Evidence], rest: Sequence[Evidence], logit: float) -> str:
    rows = [(_name(entry), entry.contribution) for entry in shown]
    for values, what in (
        ([r.contribution for r in rest if r.contribution >= 0], "others that speak for it"),
        ([r.contribution for r in rest if r.contribution < 0], "others that speak against it"),
    ):
        if values:
            rows.append((f"{len(values)} {what}", sum(values)))
    return _table(rows, "logit", logit)


def _against(e: PrototypeExplanation) -> str:
    """What separates the class from the next best one: most of a logit is common to both."""
    if e.rival is None:
        return ""
    ordered = sorted(e.evidence, key=lambda entry: -abs(entry.advantage))
    rows = [(_name(entry), entry.advantage) for entry in ordered[: e.shown]]
    rest = ordered[e.shown :]
    rows.append((f"{len(rest)} others", sum(entry.advantage for entry in rest)))
    return (
        f"<h2>Rather than {html.escape(e.rival)}</h2>"
        f"<p>The next best class has a logit of {e.rival_logit:.2f}. Most prototypes count alike for both; these make "
        f"the difference (similarity times the difference of the two weights).</p>"
        + _table(rows, "lead", e.logit - e.rival_logit)
    )


def _name(entry: Evidence) -> str:
    return f"{entry.kind} {entry.prototype}, {entry.prototype_class}"


def _table(rows: Sequence[tuple[str, float]], total_name: str, total: float) -> str:
    # The collected rows at the end may dwarf the single prototypes: their bars are cut, not the others shrunk.
    single = [abs(value) for name, value in rows if not name[0].isdigit()]
    largest = max(single, default=0.0) or 1.0
    lines = []
    for name, value in rows:
        bar = f'<span class="{_sign(value)}" style="width:{min(abs(value) / largest, 1):.1%}"></span>'
        number = f'<td class="{_sign(value)}">{value:+.3f}</td>'
        lines.append(f'<tr><td>{html.escape(name)}</td>{number}<td class="bar">{bar}</td></tr>')
    return f"<table>{''.join(lines)}<tr class='total'><td>{total_name}</td><td>{total:+.3f}</td><td></td></tr></table>"


def _sign(value: float) -> str:
    return "up" if value >= 0 else "down"


def image_tag(image: object, alt: str) -> str:
    """A picture, RGB uint8 (h, w, 3), inside of the page."""
    return f'<img src="{data_uri(encode_jpeg(image))}" alt="{alt}">'  # type: ignore[arg-type]


def data_uri(content: bytes) -> str:
    """JPEG bytes as an address."""
    return "data:image/jpeg;base64," + base64.b64encode(content).decode()
