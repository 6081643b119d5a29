"""Trained models as files that run where fgvczoo is not installed."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.export.passes import move_to_device_pass

from fgvczoo import __version__
from fgvczoo.errors import FgvczooError
from fgvczoo.files import atomic_path
from fgvczoo.ops import use_backend
from fgvczoo.tasks.base import StagedModule

# The metadata's name: a property of the model in .onnx, a file inside .pt2.
METADATA = "fgvczoo.json"


def export(model: StagedModule, path: str | Path, batch: int | None = None) -> Path:
    """Writes what `forward` computes in eval mode: images (B, 3, h, w), preprocessed, float32 -> logits (B, C) or
    embeddings (B, D); of localisation models also the maps (B, H, W) of the predicted classes.

    path: .onnx (for onnxruntime and others; input "image", outputs the model's `output_names`: "logits" and "map",
    "embedding") or .pt2 (for `torch.export.load`). h and w are those of the model's preprocessing. batch: images at
    once; None: any number.

    Class names, preprocessing and provenance travel in the file as JSON: in .onnx under the metadata key
    "fgvczoo.json", in .pt2 as an extra file of that name. The file appears whole or not at all; the model stays as it
    was.

    Raises `FgvczooError` for another ending, a batch below 1, and where the packages that write .onnx are missing.
    """
    path = Path(path)
    if path.suffix not in _WRITERS:
        raise FgvczooError(f"{path}: an export ends in {' or '.join(_WRITERS)}")
    if batch is not None and batch < 1:
        raise FgvczooError(f"batch={batch}; expected at least 1, or None for any number")
    if path.suffix == ".onnx" and (missing := [name for name in ("onnx", "onnxscript") if find_spec(name) is None]):
        raise FgvczooError(f"{path}: writing .onnx needs {' and '.join(missing)}; pip install 'fgvczoo[onnx]'")
    metadata = {
        "fgvczoo": __version__,
        "paper": model.paper,
        "classes": model.class_names,
        "preprocess": model.preprocess.to_dict(),
        "provenance": model.provenance,
    }
    program = _trace(model, batch)
    with atomic_path(path) as temporary:
        _WRITERS[path.suffix](program, temporary, json.dumps(metadata), model.output_names)
    return path


def _trace(model: StagedModule, batch: int | None) -> ExportedProgram:
    """The program of `forward`, of plain torch operators, on the CPU."""
    # Two images: a batch of one would be traced as a constant.
    images = torch.zeros(batch or 2, 3, *model.preprocess.size, device=model.device)
    shapes = ({0: Dim("batch", min=1)},) if batch is None else None
    with _evaluating(model), use_backend("reference"), torch.no_grad(), _quiet():
        program = torch.export.export(model, (images,), dynamic_shapes=shapes)
        for module in program.graph_module.modules():
            for node in getattr(getattr(module, "graph", None), "nodes", ()):
                node.meta.pop("stack_trace", None)  # the folders of this machine, which would travel with the file
        return program if model.device.type == "cpu" else move_to_device_pass(program, "cpu")


def _write_pt2(program: ExportedProgram, path: Path, metadata: str, outputs: Sequence[str]) -> None:
    content = io.BytesIO()  # given a path, it would name a folder in the file after the temporary name
    torch.export.save(program, content, extra_files={METADATA: metadata})
    path.write_bytes(content.getbuffer())


def _write_onnx(program: ExportedProgram, path: Path, metadata: str, outputs: Sequence[str]) -> None:
    shapes = ({0: "batch"},) if program.range_constraints else None  # the name that the dimension gets
    with _quiet():
        written = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            input_names=["image"],
            output_names=list(outputs),
            dynamic_shapes=shapes,
        )
    assert written is not None
    written.model.metadata_props[METADATA] = metadata
    written.save(path, external_data=False)


_WRITERS: dict[str, Callable[[ExportedProgram, Path, str, Sequence[str]], None]] = {
    ".onnx": _write_onnx,
    ".pt2": _write_pt2,
}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode; afterwards each part is in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' remarks on their own workings."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
