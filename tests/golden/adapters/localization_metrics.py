"""Cases of maps, boxes and their metrics, through `fgvczoo.metrics`; what the adapters of several papers share."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fgvczoo.metrics.localization import BoxLocalization, class_ranks
from fgvczoo.metrics.localization_boxes import box_iou, map_boxes, prepare_maps
from tests.golden.case import Case

PERCENT = 100


def bas_boxes(case: Case) -> dict[str, Tensor]:
    """BAS: maps at 28 x 28 to boxes and rates at several thresholds."""
    config = case.config
    logits = case.inputs["map_logits"][:, 0].double()
    maps = torch.sigmoid(config["map_logit_gain"] * (logits - config["map_logit_shift"])).float()
    if (constant := config.get("constant_map")) is not None:
        maps[constant["image"]] = constant["value"]
    prepared = prepare_maps(maps, (config["crop_size"],) * 2, "bas")
    truth = case.outputs["gt_boxes"].numpy()[:, None]
    thresholds = config["thresholds"]
    found = [map_boxes(heat, thresholds, "bas") for heat in prepared]
    places = range(len(thresholds))
    boxes = np.array([[boxes.at(place) for boxes in found] for place in places])
    iou = np.array([[box_iou(box[None], own)[0, 0] for box, own in zip(row, truth)] for row in boxes])
    counts = [
        [len(b.all_at(place)) if (heat > thresholds[place]).any() else 0 for b, heat in zip(found, prepared)]
        for place in places
    ]
    metric = BoxLocalization("bas", thresholds)
    metric.update(prepared, list(truth), case.inputs["label"], case.inputs["scores"])
    rates, best = metric.rates_by_threshold(), metric.compute()
    names = {"gt_known_loc": "gt_known_loc", "top1_loc": "top1_loc", "top5_loc": "top5_loc"}
    names |= {f"iou>=0.{n}": f"loc_{n}0" for n in (3, 5, 7)}
    ranks = class_ranks(case.inputs["scores"], case.inputs["label"])
    return {
        "gt_boxes": case.outputs["gt_boxes"],
        "normalised_map_0": prepared[0],
        "boxes": torch.from_numpy(boxes),
        "num_components": torch.tensor(counts),
        "iou": torch.from_numpy(iou),
        "metrics": PERCENT * torch.stack([rates[names[column]] for column in config["metric_columns"]], dim=1),
        "cls_top1": PERCENT * (ranks < 1).double().mean(),
        "cls_top5": PERCENT * (ranks < 5).double().mean(),
        "best": torch.stack([best[key] * (1 if key == "threshold" else PERCENT) for key in config["best_columns"]]),
    }
