"""Whole modules that a pickle describes: the state dict and the plain values of each, by its path."""

from __future__ import annotations

from typing import Any

import torch

from fgvczoo.checkpoints.description import Box, Dict, View
from fgvczoo.checkpoints.plain import MAX_ENTRIES, plain_items
from fgvczoo.checkpoints.refused import Refused

MAX_KEY = 512
TOO_MANY = "it has too many tensors, or too long names"


def table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def unwrapped(module: Box) -> Box:
    """The module inside of DataParallel and its like."""
    for _ in range(4):
        inside = table(table(module.state).get("_modules"))
        if set(inside) != {"module"} or not isinstance(inside["module"], Box):
            break
        module = inside["module"]
    return module


def module_state(root: Box) -> tuple[dict[str, Any], dict[Box, str]]:
    """The state dict of a module, as `torch.nn.Module.state_dict` has it, and the path of it and of each inner module.
    A file can nest one module in itself."""
    state: dict[str, Any] = {}
    paths: dict[Box, str] = {}
    todo, steps = [("", root)], 0
    while todo:
        prefix, module = todo.pop()
        paths.setdefault(module, prefix.removesuffix("."))
        attributes = table(module.state)
        passing = attributes.get("_non_persistent_buffers_set")
        passing = passing if isinstance(passing, (list, tuple)) and len(passing) < 100 else ()
        inner = []
        for kind in ("_parameters", "_buffers", "_modules"):
            for name, value in table(attributes.get(kind)).items():
                steps += 1
                if steps > MAX_ENTRIES or len(prefix) + len(name) > MAX_KEY:
                    raise Refused(TOO_MANY)
                if isinstance(value, Box) and kind == "_modules":
                    inner.append((f"{prefix}{name}.", value))
                elif value is not None and not (kind == "_buffers" and name in passing):
                    state[prefix + name] = value
        todo += reversed(inner)
    return state, paths


# What every module has of its own.
_OF_ALL_MODULES = vars(torch.nn.Module()).keys()


def module_values(paths: dict[Box, str]) -> dict[str, dict[str, Any]]:
    """See `Checkpoint.modules`."""
    found, entries = {}, 0
    for module, path in paths.items():
        values = {key: item for key, item in table(module.state).items() if key not in _OF_ALL_MODULES}
        by_module = {
            key: {paths[box]: item for box, item in values.pop(key).by_object if box in paths}
            for key in [*values]
            if isinstance(values[key], Dict) and values[key].by_object
        }
        views = {key for key, item in values.items() if isinstance(item, View)}
        plain = plain_items({key: item for key, item in (values | by_module).items() if key not in views})
        entries += sum(len(item) if isinstance(item, (list, dict)) else 1 for item in plain.values())
        if entries > MAX_ENTRIES:
            raise Refused(TOO_MANY)
        found[path] = plain
    return found
