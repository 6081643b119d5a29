"""Mean IoU of seeds against scikit-learn, its edge cases, two processes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix

from fgvczoo.errors import FgvczooError
from fgvczoo.metrics import SeedIoU, seed_labels
from tests.metrics.processes import in_two_processes

CLASSES = 4


def pictures() -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Maps, classes and masks of several sizes; one without a class; ignored pixels."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for number, size in enumerate([(9, 7), (5, 12), (8, 8), (6, 6)]):
        classes = torch.tensor([[0, 2], [1], [], [3, 0]][number], dtype=torch.int64)
        mask = torch.randint(0, CLASSES, size, generator=generator)
        mask[0] = 255
        made.append((torch.rand(len(classes), *size, generator=generator), classes, mask))
    return made


def test_equal_to_a_confusion_matrix() -> None:
    metric = SeedIoU(CLASSES)
    truth, found = [], [[] for _ in metric.thresholds]
    for maps, classes, mask in pictures():
        metric.update(maps, classes, mask)
        known = mask != 255
        truth += mask[known].tolist()
        for place, threshold in enumerate(metric.thresholds):
            found[place] += seed_labels(maps, classes, threshold)[known].tolist()
    expected = []
    for guesses in found:
        matrix = confusion_matrix(truth, guesses, labels=range(CLASSES + 1)).astype(float)
        union = matrix.sum(0) + matrix.sum(1) - np.diag(matrix)
        expected.append(np.mean(np.diag(matrix)[union > 0] / union[union > 0]))
    assert metric.miou_by_threshold().tolist() == pytest.approx(expected)
    values = metric.compute()
    assert float(values["miou"]) == pytest.approx(max(expected))
    assert float(values["threshold"]) == metric.thresholds[int(np.argmax(expected))] and int(values["images"]) == 4
    assert len(metric.thresholds) == 25 and metric.thresholds[0] == 0.2 and metric.thresholds[-1] == 0.44


def test_mistakes_are_told() -> None:
    with pytest.raises(FgvczooError, match="expected"):
        SeedIoU(2).update(torch.zeros(1, 4, 4), torch.tensor([0]), torch.zeros(3, 4))
    with pytest.raises(FgvczooError, match="class 7"):
        SeedIoU(2).update(torch.zeros(1, 1, 1), torch.tensor([0]), torch.tensor([[7]]))


def test_two_processes_are_one(tmp_path: Path) -> None:
    def measure(rows: slice) -> list[float]:
        metric = SeedIoU(CLASSES)
        for each in pictures()[rows]:
            metric.update(*each)
        return [float(value) for value in metric.compute().values()]

    for two in in_two_processes(lambda rank: measure([slice(0, 3), slice(3, 4)][rank]), tmp_path):
        assert two == measure(slice(None))
