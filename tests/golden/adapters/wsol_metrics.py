"""Cases of the evaluation protocol of weakly supervised localisation, through `fgvczoo.metrics`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fgvczoo.metrics.localization import (
    BoxLocalization,
    peak_iou,
    pixel_average_precision,
    pixel_histograms,
    sweep,
)
from fgvczoo.metrics.localization_boxes import box_iou, map_boxes, prepare_maps, truth_boxes
from tests.golden.case import Case

PERCENT = 100


def run(case: Case) -> dict[str, Any]:
    """Chooses by what the case configures and gives."""
    if "mask_logits" in case.inputs:
        return pixels(case)
    if "iou_thresholds" in case.config:
        return rates(case)
    if "cam_logits" in case.inputs:
        return boxes(case)
    return ious(case)


def prepared_maps(case: Case) -> Tensor:
    """The case's maps at the evaluated size."""
    config = case.config
    logits = case.inputs["cam_logits"][:, 0]
    stride = logits.shape[-1] // config["cam_size"]
    cam = torch.exp(config["exp_gain"] * logits[:, ::stride, ::stride].double()).float()
    return prepare_maps(cam, (config["map_size"],) * 2, "wsol")


def ious(case: Case) -> dict[str, Any]:
    """IoU of given boxes, and boxes on the evaluated picture."""
    data = {key: case.outputs[key] for key in ("boxes_a", "boxes_b", "image_sizes") if key in case.outputs}
    one, other = data["boxes_a"].numpy(), data["boxes_b"].numpy()
    width, height = case.config["resize_to"]
    moved = [
        truth_boxes(box[None], (h, w), (height, width), "wsol")
        for box, (w, h) in zip(one, data["image_sizes"].tolist())
    ]
    return data | {
        "iou": torch.from_numpy(box_iou(one, other)),
        "resized_a": torch.from_numpy(np.concatenate(moved)),
    }


def boxes(case: Case) -> dict[str, Any]:
    """Boxes of maps at several thresholds; the special maps are those of every such case."""
    maps = prepared_maps(case)
    side = case.config["map_size"]
    ring, lines, zeros, ones = torch.zeros(4, side, side, dtype=torch.float64)
    ring[side // 8 : side // 2, side // 8 : side // 2] = 0.8
    ring[side // 4 : side // 3, side // 4 : side // 3] = 0
    ring[side - side // 8 : side - side // 8 + 6, side // 2 : side - 3] = 1
    lines[3, 2 : side - 2] = 1
    lines[side // 2 : side // 2 + 9, 5:14] = 0.9
    ones += 1
    thresholds = case.config["thresholds"]
    found = [map_boxes(heat, thresholds, "wsol") for heat in (*maps, ring, lines, zeros, ones)]
    places = range(len(thresholds))
    every = [[sorted(one.all_at(place).tolist()) for place in places] for one in found]
    return {
        **{f"map_{number}": heat for number, heat in enumerate(maps)},
        "single": torch.tensor([[one.at(place).tolist() for place in places] for one in found]),
        "num_contours": torch.tensor([[len(at) for at in one] for one in every]),
        "multi": every,
    }


def rates(case: Case) -> dict[str, Any]:
    """MaxBoxAcc and its second version, with the counts behind them."""
    config, sizes = case.config, case.outputs["image_sizes"]
    maps = prepared_maps(case)
    side = (config["map_size"],) * 2
    truth = [
        truth_boxes(np.array(own), (height, width), side, "wsol")
        for own, (width, height) in zip(case.outputs["gt_boxes"], sizes.long().tolist())
    ]
    levels = [percent / PERCENT for percent in config["iou_thresholds"]]
    metric = BoxLocalization("wsol", sweep(config["threshold_interval"]), iou_levels=levels)
    metric.update(maps, truth)
    values = metric.compute()
    single = PERCENT * metric.correct.amax(1) / metric.counted.double()
    multi = torch.stack([PERCENT * values[f"max_box_acc_v2_{percent}"] for percent in config["iou_thresholds"]])
    return {
        "image_sizes": sizes,
        "gt_boxes": case.outputs["gt_boxes"],
        "correct_single": metric.correct,
        "correct_multi": metric.correct_any,
        "max_box_acc_single": single,
        "max_box_acc_multi": multi,
        "MaxBoxAcc": PERCENT * values["max_box_acc"],
        "MaxBoxAccV2": PERCENT * values["max_box_acc_v2"],
    }


def pixels(case: Case) -> dict[str, Any]:
    """PxAP, peak IoU and their histograms."""
    config = case.config
    maps = prepared_maps(case)
    logits = case.inputs["mask_logits"]
    enlarge = config["map_size"] // logits.shape[-1]
    masks = torch.zeros(maps.shape, dtype=torch.int64)
    for number, heat in enumerate(maps):
        instances = logits[number, : 1 + number % logits.shape[1]]
        own = (instances + heat[enlarge // 2 :: enlarge, enlarge // 2 :: enlarge] > config["mask_threshold"]).any(0)
        ignored = case.inputs["ignore_logits"][number, 0] > config["ignore_threshold"]
        mask = torch.where(own, 1, torch.where(ignored, 255, 0))
        masks[number] = mask.repeat_interleave(enlarge, 0).repeat_interleave(enlarge, 1)
    interval = config["threshold_interval"]
    true, false = pixel_histograms(maps, masks, interval)
    counts = [(masks == value).sum((1, 2)) for value in (1, 0, 255)]
    return {
        "PxAP": PERCENT * pixel_average_precision(true, false),
        "peak_IoU": PERCENT * peak_iou(true, false, interval)[0],
        "pixels_fg_bg_ignored": torch.stack(counts, dim=1),
        "true_hist": true,
        "false_hist": false,
    }
