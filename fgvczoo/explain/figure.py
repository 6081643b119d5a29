"""Explanations as matplotlib figures."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from fgvczoo.explain.overlay import enlarge, frame, overlay
from fgvczoo.preprocess import read_image

if TYPE_CHECKING:
    from fgvczoo.explain.prototypes import PrototypeExplanation
    from fgvczoo.explain.tree import TreeExplanation

SIDE = 360


def draw(explanation: PrototypeExplanation) -> Figure:
    """Top row: the image and where each shown prototype is found on it; bottom row: the prototypes themselves."""
    shown = explanation.evidence[: explanation.shown]
    height = 2.4 * max(0.4, explanation.image.shape[0] / explanation.image.shape[1]) + 0.7
    figure = Figure(figsize=(2.4 * (len(shown) + 1), 2 * height), layout="constrained")
    axes = figure.subplots(2, len(shown) + 1, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    _picture(axes[0, 0], enlarge(explanation.image, SIDE))
    # Names of classes are no mathematics, though they may hold dollar signs.
    axes[0, 0].set_title(f"{explanation.class_name}\nlogit {explanation.logit:.2f}", fontsize=9, parse_math=False)
    for column, entry in enumerate(shown, start=1):
        assert entry.map is not None
        _picture(axes[0, column], overlay(explanation.image, entry.map, SIDE))
        axes[0, column].set_title(
            f"{entry.similarity:.2f} × {entry.weight:.2f} = {entry.contribution:+.2f}", fontsize=9
        )
        if entry.picture is not None:
            _picture(axes[1, column], read_image(entry.picture))
        title = f"{entry.kind} {entry.prototype}\n{entry.prototype_class}"
        axes[1, column].set_title(title, fontsize=8, parse_math=False)
    rest = explanation.evidence[explanation.shown :]
    text = f"{len(rest)} more prototypes\ncontribute {sum(e.contribution for e in rest):+.2f}"
    axes[1, 0].text(0.5, 0.5, text, ha="center", va="center", fontsize=9)
    return figure


def draw_path(explanation: TreeExplanation) -> Figure:
    """Top row: the image, framed where a prototype is present; bottom row: the prototypes; at the end the leaf."""
    steps, image = explanation.steps, explanation.image
    height = 2.2 * max(0.4, image.shape[0] / image.shape[1]) + 0.5
    figure = Figure(figsize=(2.2 * (len(steps) + 1), 2 * height), layout="constrained")
    axes = figure.subplots(2, len(steps) + 1, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    scale = SIDE / max(image.shape[:2])
    for column, step in enumerate(steps):
        large = enlarge(image, SIDE)
        _picture(axes[0, column], frame(large, np.array(step.box) * scale) if step.present else large)
        axes[0, column].set_title(f"{'present' if step.present else 'absent'}, {step.similarity:.3f}", fontsize=9)
        if step.node.picture is not None:
            _picture(axes[1, column], read_image(step.node.picture))
        axes[1, column].set_title(f"node {step.node.number}", fontsize=8)
    lines = [f"{name}  {probability:.1%}" for name, probability in explanation.leaf.classes]
    # Names of classes are no mathematics, though they may hold dollar signs.
    text = "\n".join([f"leaf {explanation.leaf.number}", *lines])
    axes[0, -1].text(0.5, 0.5, text, ha="center", va="center", fontsize=9, parse_math=False)
    return figure


def _picture(axis: object, image: np.ndarray) -> None:
    axis.imshow(image)  # type: ignore[attr-defined]
