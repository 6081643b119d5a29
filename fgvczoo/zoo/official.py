"""The authors' own checkpoints as our modules."""

from __future__ import annotations

import html
import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fgvczoo.checkpoints import Checkpoint, read_checkpoint
from fgvczoo.errors import FgvczooError, FgvczooWarning
from fgvczoo.tasks.base import StagedModule
from fgvczoo.zoo.build import create
from fgvczoo.zoo.papers import PAPERS
from fgvczoo.zoo.registry import MODELS, model_class
from fgvczoo.zoo.weights import file_sha256, load_tensors, save_weights


@dataclass(frozen=True)
class ImportReport:
    """What became of a checkpoint.

    loaded: tensors of the module that have the checkpoint's values. dropped: keys of the checkpoint that the module has
    no use for. inferred: constructor arguments that the checkpoint implies. untouched: tensors of the module outside of
    the authors' network, which `forward` does not read. notes: doubts. resized: keys of the checkpoint whose tensors
    were made to fit another image size. missing: tensors of the network that the checkpoint does not hold and that are
    drawn: a part that was asked for anew, as a whole.
    """

    loaded: int
    dropped: list[str]
    inferred: dict[str, Any]
    untouched: list[str]
    notes: list[str]
    resized: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """For people."""
        inferred = ", ".join(f"{key}={_short(value)}" for key, value in self.inferred.items() if value is not None)
        rows = [("loaded", f"{self.loaded} tensors"), ("inferred", inferred), ("dropped", ", ".join(self.dropped))]
        rows += [("resized", ", ".join(self.resized)), ("missing", ", ".join(self.missing))]
        rows += [("untouched", ", ".join(self.untouched)), *(("note", note) for note in self.notes)]
        return [f"{name:9}  {text}" for name, text in rows if text]

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(chr(10).join(self.lines()))}</pre>"


def from_official(paper: str, checkpoint: str | Path | Mapping[str, Tensor], **config: Any) -> StagedModule:
    """A checkpoint that a paper's authors, or users of their code, saved -> our module, in eval mode.

    paper: its name in the registry. checkpoint: a file, of which nothing is executed (see
    `fgvczoo.checkpoints.read_checkpoint`), or a state dict. config: constructor arguments, instead of what the
    checkpoint implies and beside it (class_names, preprocess, ...).

    Raises `FgvczooError` for a paper without published checkpoints, a file that cannot be read, and tensors that do not
    fit. Doubts are warnings.
    """
    model, report = import_checkpoint(paper, checkpoint, **config)
    for note in report.notes:
        warnings.warn(note, FgvczooWarning, stacklevel=2)
    return model


def import_checkpoint(
    paper: str, checkpoint: str | Path | Mapping[str, Tensor], **config: Any
) -> tuple[StagedModule, ImportReport]:
    """As `from_official`, with a report of what was loaded, dropped and inferred."""
    official = official_module(paper)
    if isinstance(checkpoint, Mapping):
        name, source = "the given state dict", Checkpoint(dict(checkpoint))
    else:
        name, source = str(checkpoint), read_checkpoint(checkpoint)
    state = source.tensors
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise FgvczooError(f"{name}: {key} is no tensor but {type(value).__name__}; give a state dict")
    if hasattr(official, "model_of") and (found := official.model_of(state)) != paper:
        raise FgvczooError(f"{name} is a checkpoint of {found}, not of {paper}; import it under that name")
    known = inspect.signature(official.state_from_official).parameters
    options = {key: config.pop(key) for key in [*config] if key in known}
    try:
        said: dict[str, Any] = {}
        if hasattr(official, "options_from_module"):
            found, said = official.options_from_module(source.modules)
            options = found | options
        with warnings.catch_warnings(record=True) as doubts:
            warnings.simplefilter("always")
            renamed = official.state_from_official(state, **options)
            inferred = official.arguments_from_official(state, **options) | said
    except FgvczooError as error:
        raise FgvczooError(f"{name}: {error}") from None
    notes = list(dict.fromkeys(str(doubt.message) for doubt in doubts))
    if _use_attributes(paper, source.attributes, renamed, inferred):
        notes = []
    # What the checkpoint does not hold (a head for pretraining) is drawn, but always the same.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = create(paper, **inferred | config)
    network = model.get_submodule("network")
    resized = official.resized(state, **options) if hasattr(official, "resized") else []
    places = {tensor.data_ptr() for tensor in renamed.values()} | {state[key].data_ptr() for key in resized}
    missing = _new_parts(network, renamed, getattr(official, "OPTIONAL_PARTS", ()))
    load_tensors(network, renamed | missing, name)
    outside = [key for key in model.state_dict() if not key.startswith("network.")]
    report = ImportReport(
        loaded=len(renamed),
        dropped=[key for key, tensor in state.items() if tensor.numel() and tensor.data_ptr() not in places],
        inferred={key: value for key, value in inferred.items() if key not in config},
        untouched=outside,
        notes=notes,
        resized=resized,
        missing=list(missing),
    )
    model.provenance = {
        "source": "the authors' checkpoint",
        "terms": PAPERS[paper].licence,
        "checkpoint": None if isinstance(checkpoint, Mapping) else Path(checkpoint).name,
        "sha256": None if isinstance(checkpoint, Mapping) else file_sha256(checkpoint),
        "notes": notes,
    }
    return model.eval(), report


def official_module(paper: str) -> ModuleType:
    """`models/PAPER/official.py`: `state_from_official` renames the tensors of a state dict to those of our network,
    `arguments_from_official` infers constructor arguments from them; where it has OPTIONAL_PARTS, those of our network
    may be wanted without being in the checkpoint; `resized` says which tensors are made to fit an image size; where
    there is `options_from_module`, it takes options of both, and further arguments, from what a whole module says
    beside its tensors; where one folder has several models, `model_of` says which one a state dict is of.

    Raises `FgvczooError` for an unknown paper and for one that has no such module.
    """
    cls = model_class(paper)
    package = MODELS[paper].rpartition(".")[0]
    if find_spec(f"{package}.official") is None:
        known = [name for name, path in MODELS.items() if find_spec(f"{path.rpartition('.')[0]}.official")]
        raise FgvczooError(f"{cls.paper}: its authors published no checkpoints; known are those of {', '.join(known)}")
    return import_module(f"{package}.official")


def save_imported(model: StagedModule, paper: str, folder: str | Path) -> Path:
    """Writes a model of `import_checkpoint` in the weights format, with the terms of the authors' checkpoint."""
    terms = PAPERS[paper].licence or "no licence stated"
    licences = {
        "code": f"{terms} (the authors'; fgvczoo's own code is Apache-2.0)",
        "weights": f"{terms}: taken from the authors' checkpoint, under its terms",
        "data": "see the data set that the authors trained on",
        "redistributable": PAPERS[paper].redistributable,
    }
    return save_weights(model, folder, provenance=model.provenance or {}, licences=licences)


def _new_parts(network: nn.Module, renamed: Mapping[str, Tensor], parts: Sequence[str]) -> dict[str, Tensor]:
    """The network's own tensors of those parts, given by the beginning of their names, that the checkpoint has nothing
    of."""
    absent = [part for part in parts if not any(key.startswith(part) for key in renamed)]
    return {key: value for key, value in network.state_dict().items() if key.startswith(tuple(absent))}


def _use_attributes(
    paper: str, attributes: dict[str, Any], renamed: dict[str, Tensor], inferred: dict[str, Any]
) -> bool:
    """Puts what a whole module says beside its tensors into `renamed` and `inferred`; whether that settles the classes
    of the prototypes."""
    size, activation = attributes.get("img_size"), attributes.get("prototype_activation_function")
    accepted = inspect.signature(model_class(paper)).parameters
    if type(size) is int and 0 < size <= 4096:
        inferred["preprocess"] = {"size": [size, size]}
    if isinstance(activation, str) and "activation" in accepted:
        inferred["activation"] = activation
    identity, key = attributes.get("prototype_class_identity"), "head.prototypes.class_of"
    if not isinstance(identity, Tensor) or key not in renamed:
        return False
    if identity.shape != (len(renamed[key]), inferred["num_classes"]):
        return False
    classes = identity.argmax(dim=1)
    if not torch.equal(classes, renamed[key]) or inferred["prototype_classes"] is not None:
        inferred |= {"prototype_classes": classes.tolist(), "prototypes_per_class": 1}
        renamed[key] = classes
    return True


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
