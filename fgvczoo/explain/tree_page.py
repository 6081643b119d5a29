"""What a page shows of a decision tree: the path of an image, and the whole tree as a drawing that zooms and folds."""

from __future__ import annotations

import hashlib
import html
import json
from pathlib import Path

import numpy as np

from fgvczoo.explain.overlay import enlarge, frame, tint
from fgvczoo.explain.page import data_uri, image_tag, prototype_picture, where_from
from fgvczoo.explain.tree import Step, TreeExplanation, TreeNode, WholeTree

SIDE = 240
_FOLDER = Path(__file__).parent
# Style and script of every page with a tree; the script reads numbers from data attributes and nothing else.
HEAD = "".join(
    f"<{tag}>{(_FOLDER / name).read_text(encoding='utf-8')}</{tag}>"
    for tag, name in (("style", "tree.css"), ("script", "tree.js"))
)

# Of the drawing, in its own units: what a depth takes, the size of a branch and of a leaf, and the gap between nodes.
_STEP, _WIDTH, _BRANCH, _LEAF, _GAP = 230, 150, 78, 34, 8
_PICTURE = 64
_LONGEST = 24


def path_section(e: TreeExplanation, name: str) -> str:
    """The questions that lead to a leaf, one card each, and the leaf."""
    file = f'<p class="soft">{html.escape(name)}</p>' if name else ""
    by_routing = "" if e.class_name == e.predicted else f" (the model predicts {html.escape(e.predicted)})"
    leads = (
        "From the root, every answer that is likelier than its opposite leads here"
        if e.followed
        else "These answers lead to the leaf that speaks most for this class, though some opposites are likelier"
    )
    steps = "\n".join(_step(e, step) for step in e.steps)
    numbers = " ".join(str(number) for number in [*(step.node.number for step in e.steps), e.leaf.number])
    return f"""<section>
<div class="head">{image_tag(enlarge(e.image, 360), "the image")}
<div><h1>Why {html.escape(e.class_name)}?</h1>{file}
<p>Probability {e.probability:.1%}{by_routing}.</p>
<p>{leads}: {len(e.steps)} of {_branches(e.tree)} questions. Each asks whether a patch of the image looks like a
prototype; it counts as present where their similarity is above 0.5.</p>
<p class="soft">{where_from(e.tree.dataset, e.tree.prototypes_are_patches)} The image reaches this leaf with a
probability of {e.reach:.1%}.</p>
<button class="show" data-path="{numbers}" data-tree="{_name(e.tree)}">Show the path in the tree</button>
</div></div>
<h2>The path</h2>
<ol class="steps">
{steps}
<li class="card leaf"><p class="answer">Leaf {e.leaf.number}</p>{_classes(e.leaf)}</li>
</ol>
</section>"""


def tree_section(tree: WholeTree) -> str:
    """What the drawing shows."""
    deepest = max(node.depth for node in tree.nodes.values())
    named = len({node.classes[0][0] for node in tree.nodes.values() if node.left is None})
    return f"""<section><h1>A tree of {_branches(tree)} prototypes</h1>
<p>It asks at most {deepest} questions and ends in one of {_branches(tree) + 1} leaves, which are most likely of {named}
different classes. Each question: does a patch of the image look like this prototype? Above 0.5 of similarity it is
present, and the line turns down; else up.</p>
<p class="soft">{where_from(tree.dataset, tree.prototypes_are_patches)}</p></section>"""


def drawing(tree: WholeTree) -> str:
    """The tree from left to right, its lines turning up where a prototype is absent and down where it is present.

    Complete without the script, which zooms, moves and folds it.
    """
    places: dict[int, tuple[float, float]] = {}
    bottom = 0.0

    def place(number: int, depth: int) -> float:
        nonlocal bottom
        node = tree.nodes[number]
        if node.left is None or node.right is None:
            y = bottom + _LEAF / 2
            bottom += _LEAF + _GAP
        else:
            y = (place(node.left, depth + 1) + place(node.right, depth + 1)) / 2
        places[number] = depth * _STEP, y
        return y

    place(next(iter(tree.nodes)), 0)
    edges = [
        _edge(node.number, child, kind, places)
        for node in tree.nodes.values()
        for child, kind in ((node.left, "absent"), (node.right, "present"))
        if child is not None
    ]
    nodes = [_node(node, places[node.number]) for node in tree.nodes.values()]
    width = max(x for x, _ in places.values()) + _STEP
    buttons = "".join(
        f'<button data-do="{action}">{text}</button>'
        for action, text in (("fit", "Whole tree"), ("in", "+"), ("out", "−"), ("open", "Unfold all"), ("fold", "Fold"))
    )
    return f"""<section><h2>The whole tree</h2>
<p class="soft">Up: the prototype is absent. Down, in green: it is present. Click a node to fold or unfold what follows;
drag to move, wheel to zoom.</p>
<div class="tree" data-tree="{_name(tree)}"><div class="tools">{buttons}</div>
<svg xmlns="http://www.w3.org/2000/svg" viewBox="-20 -20 {width + 40} {bottom + 40:.0f}" data-step="{_STEP}"
 data-width="{_WIDTH}" role="img" aria-label="the tree">
{"".join(edges)}
{"".join(nodes)}
</svg></div></section>"""


def _edge(above: int, below: int, kind: str, places: dict[int, tuple[float, float]]) -> str:
    (x, y), (u, v) = places[above], places[below]
    x, middle = x + _WIDTH, (x + _WIDTH + u) / 2
    curve = f"M{x:g},{y:g}C{middle:g},{y:g} {middle:g},{v:g} {u:g},{v:g}"
    return f'<path class="{kind}" data-from="{above}" data-to="{below}" d="{curve}"/>'


def _node(node: TreeNode, place: tuple[float, float]) -> str:
    where = f'transform="translate({place[0]:g},{place[1]:g})" data-node="{node.number}"'
    if node.left is None:
        return f'<g class="end" {where} data-height="{_LEAF}">{_leaf(node)}</g>'
    pictures = [picture for picture in (node.patch, node.picture) if picture is not None]
    shown = "".join(
        f'<image href="{data_uri(picture)}" x="{6 + number * (_PICTURE + 6)}" y="{-_BRANCH / 2 + 12:g}" '
        f'width="{_PICTURE}" height="{_PICTURE}"/>'
        for number, picture in enumerate(pictures)
    )
    if not pictures:
        words = f"image {node.source.image}" if node.source is not None else "no training patch"
        shown = f'<text class="small" x="8" y="4">{html.escape(_short(words))}</text>'
    title = f"node {node.number}" + (f", image {node.source.image}" if node.source is not None else "")
    return (
        f'<g class="branch" tabindex="0" {where} data-left="{node.left}" data-right="{node.right}" '
        f'data-height="{_BRANCH}"><title>{html.escape(title)}</title>'
        f'<rect class="box" y="{-_BRANCH / 2:g}" width="{_WIDTH}" height="{_BRANCH}" rx="6"/>'
        f'<text class="small" x="6" y="{-_BRANCH / 2 + 10:g}">{node.number}</text>{shown}</g>'
    )


def _leaf(node: TreeNode) -> str:
    (name, probability), *_ = node.classes
    title = "\n".join(f"{each} {share:.1%}" for each, share in node.classes)
    return (
        f"<title>leaf {node.number}\n{html.escape(title)}</title>"
        f'<rect class="box" y="{-_LEAF / 2:g}" width="{_WIDTH + 50}" height="{_LEAF}" rx="6"/>'
        f'<rect class="share" x="2" y="{_LEAF / 2 - 5:g}" width="{(_WIDTH + 46) * probability:.1f}" height="3"/>'
        f'<text x="6" y="3">{html.escape(_short(name))} {probability:.0%}</text>'
    )


def _step(e: TreeExplanation, step: Step) -> str:
    large = enlarge(e.image, SIDE)
    if step.present:
        large = frame(large, np.array(step.box) * (SIDE / max(e.image.shape[:2])))
    heat = image_tag(tint(e.image, step.map, SIDE), "heat map")
    answer, sign = ("Present", "up") if step.present else ("Absent", "down")
    prototype = prototype_picture(step.node.picture, step.node.source, e.tree.dataset)
    return f"""<li class="card"><div class="pair">
<figure>{prototype}<figcaption>does it have this …</figcaption></figure>
<figure>{image_tag(large, "the image")}<figcaption>… anywhere?</figcaption></figure></div>
<p class="answer"><span class="{sign}">{answer}</span>, similarity {step.similarity:.4f}
<span class="soft">node {step.node.number}</span></p>
<details><summary>similarity on the image</summary>{heat}</details></li>"""


def _classes(leaf: TreeNode) -> str:
    rows = "".join(
        f'<tr><td>{html.escape(name)}<span class="bar" style="width:{share:.1%}"></span></td><td>{share:.1%}</td></tr>'
        for name, share in leaf.classes
    )
    return f"<table>{rows}</table>"


def _name(tree: WholeTree) -> str:
    """By which buttons find their tree on a page of several."""
    return hashlib.sha256(json.dumps(tree.to_dict()).encode()).hexdigest()[:12]


def _branches(tree: WholeTree) -> int:
    return sum(node.left is not None for node in tree.nodes.values())


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"
