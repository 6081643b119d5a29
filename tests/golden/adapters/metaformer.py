"""MetaFormer's cases through `fgvczoo.models.metaformer` and `fgvczoo.nn.metadata`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fgvczoo.models.metaformer.losses import soft_cross_entropy, soft_targets
from fgvczoo.models.metaformer.network import SIZES, MBConv, MetaFG, RelativeAttention, Size
from fgvczoo.models.metaformer.official import arguments_from_official, official_name, state_from_official
from fgvczoo.models.metaformer.position import grid_of, relative_index, resize_table
from fgvczoo.nn.metadata import (
    MetadataEncoder,
    MetadataMasking,
    MetadataShape,
    month_alone,
    month_and_hour,
    parse_official_date,
)
from fgvczoo.tasks.mixing import Mix
from fgvczoo.tasks.stages import Group, Stage, build_optimizer
from tests.golden.case import Case

_VIEWS = {
    "first": lambda x: x.flatten()[:64],
    "mean": lambda x: x.double().mean(),
    "std": lambda x: x.double().std(correction=0),
    "norm": lambda x: x.double().norm(),
    "shape_of": lambda x: torch.tensor(x.shape),
}


def run(case: Case) -> dict[str, Any]:
    """Chooses by what the case configures and gives."""
    config = case.config
    if "latlon" in config or "dates" in config:
        return encoding(case)
    if "at_updates" in config or "batch_sizes" in config:
        return schedules(case)
    if "blocks" in config:
        return mbconv(case)
    if "old_img_size" in config:
        return resized(case)
    if "grid" in config:
        return attention(case)
    return train_step(case) if "lam" in config else full(case)


def encoding(case: Case) -> dict[str, Any]:
    encoder = MetadataEncoder({"place": "sphere"}, zero_is_missing=True)
    nan = math.nan
    result = {}
    if "latlon" in case.config:
        places = torch.tensor([[nan if v is None else v for v in pair] for pair in case.config["latlon"]])
        (result["spatial"],) = encoder.encode({"place": places})
    for name, encode, hour in (
        ("temporal_with_hour", month_and_hour, True),
        ("temporal_miss_hour", month_alone, False),
    ):
        if "dates" in case.config:
            dates = [parse_official_date(text, with_hour=hour)[:2] for text in case.config["dates"]]
            result[name] = encode(torch.tensor(dates))
    return result


def schedules(case: Case) -> dict[str, Any]:
    config = case.config
    masking = MetadataMasking(config.get("mask_type", "linear"), config["mask_prob"])
    counts = [[masking.count(b, e / config["epochs"]) for e in config["at_epochs"]] for b in config["batch_sizes"]]
    batch = config["batch_per_gpu"] * config["world_size"] * config["accumulation_steps"]
    stage = Stage(
        {"all": Group(config["lr"])},
        schedule="cosine-updates",
        warmup=config["warmup_epochs"],
        warmup_from=config["warmup_lr"] / config["lr"],
        minimum=config["min_lr"] / config["lr"],
        base_batch=512,
    )
    rate, steps = config["lr"] * stage.batch_factor(batch), config["steps_per_epoch"]
    factors = [stage.factor(update / steps, config["epochs"]) for update in config["at_updates"]]
    return {
        "masked_samples": torch.tensor(counts),
        "scaled": torch.tensor([rate, rate * stage.warmup_from, rate * stage.minimum]),
        "lr_initial": torch.tensor(rate * stage.factor(0, config["epochs"]), dtype=torch.float64),
        "lr_at_updates_x1e6": torch.tensor([1e6 * rate * factor for factor in factors]),
    }


def mbconv(case: Case) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, channels, out_channels, stride in case.config["blocks"]:
        block = MBConv(channels, out_channels, stride, case.config.get("expand_ratio", 4))
        prefix = f"{name}."
        state = {key.removeprefix(prefix): value for key, value in case.state.items() if key.startswith(prefix)}
        block.load_state_dict(_renamed(state, "stage_1.0."))
        with torch.no_grad():
            result[f"eval.{name}"] = block.eval()(case.inputs["x"])
        x = case.inputs["x"].clone().requires_grad_()
        out = block.train()(x)
        out.square().mean().backward()
        result |= {
            f"train.{name}": out,
            f"train.{name}.grad_x_norm": _norm([x]),
            f"train.{name}.grad_param_norm": _norm(block.parameters()),
            f"train.{name}.bn1_running_var_after": block.norm_2.running_var,
            f"train.{name}.bn1_running_mean_after": block.norm_2.running_mean,
        }
    return result


def resized(case: Case) -> dict[str, Any]:
    sizes = [(size, size) if isinstance(size, int) else tuple(size) for size in _sizes(case)]
    result = {}
    for key, table in case.inputs.items():
        old, new = (grid_of(size, int(key.split("__")[0][-1])) for size in sizes)
        result[key.replace("__", ".")] = resize_table(table, old, new, "official")
    return result


def _sizes(case: Case) -> list[Any]:
    return [case.config["old_img_size"], case.config["new_img_size"]]


def attention(case: Case) -> dict[str, Any]:
    config = case.config
    index = relative_index(tuple(config["grid"]), config["extra_token_num"])
    layer = RelativeAttention(config["dim"], config["num_heads"], tuple(config["grid"])).eval()
    layer.load_state_dict(_renamed(case.state, "stage_3.0.attn."))
    x = case.inputs["x"].clone().requires_grad_()
    y = layer(x, index)
    y.square().sum().backward()
    gradient = layer.bias_table.grad
    assert gradient is not None
    return {
        "y": y,
        "index": index,
        "bias": layer.bias(index),
        "grad_x_norm": _norm([x]),
        "grad_table": gradient,
        "grad_table_first_row": gradient[0],
        "grad_table_last_row": gradient[-1],
        "grad_param_norm": _norm(layer.parameters()),
    }


def build(case: Case, drop_path: float = 0.0) -> MetaFG:
    """The network of the case's tensors; what its configuration says has to agree."""
    config, state = case.config, case.state
    size = config["img_size"]
    arguments = arguments_from_official(state, checkpoint_size=size)
    shapes = [MetadataShape(f"group {k}", k, 1) for k in config.get("meta_dims") or []]
    if len(shapes) == 1:  # its vectors are the tokens beside the class token
        shapes = [shapes[0]._replace(tokens=config["extra_token_num"] - 1)]
    if arguments["num_classes"] != config["num_classes"] or 1 + sum(s.tokens for s in shapes) != config.get(
        "extra_token_num", 1
    ):
        raise ValueError("the weights and the case's configuration disagree")
    network = MetaFG(
        arguments["num_classes"],
        _size(arguments),
        tuple(arguments["preprocess"]["size"]),
        shapes,
        drop_path=drop_path,
        only_last_cls=arguments["only_last_cls"],
    )
    network.load_state_dict(state_from_official(state, checkpoint_size=size))
    return network


def _size(arguments: dict[str, Any]) -> Size:
    if "network" in arguments:
        return SIZES[arguments["network"]]
    names = ("conv_widths", "conv_depths", "attention_widths", "attention_depths")
    return Size(*(tuple(arguments[name]) for name in names), arguments["num_heads"])


def _groups(case: Case) -> list[Tensor] | None:
    meta, widths = case.inputs.get("meta"), case.config.get("meta_dims") or []
    return None if meta is None else list(meta.split(widths, dim=-1))


def full(case: Case) -> dict[str, Any]:
    network, image, groups = build(case).eval(), case.inputs["image"], _groups(case)
    stem: dict[str, Tensor] = {}
    network.stem.register_forward_hook(lambda module, args, out: stem.update(stem=out))
    with torch.no_grad():
        output = network.output(image, groups)
        result: dict[str, Any] = {
            "logits": output.logits,
            "features": output.features,
            "stage_3_class_token": output.stages[2][:, 0],
            "stage_4_class_token": output.stages[3][:, 0],
        }
        large = dict(stem) | {f"stage_{n}": stage for n, stage in enumerate(output.stages, 1)}
        if groups is not None:
            result["logits_meta_zero"] = network(image)
            for number, (embedders, group) in enumerate(zip(network.metadata, groups), 1):
                for stage, embedder in zip((3, 4), embedders):
                    tokens = embedder(group)
                    large[f"meta_{number}_token_stage_{stage}"] = tokens if group.ndim == 3 else tokens[:, 0]
        result["logits_scaled_image"] = network(case.config["image_scale"] * image, groups)
        result["logits_train_mode"] = network.train()(image, groups)
    views = {f"{name}.{view}": take(value) for name, value in large.items() for view, take in _VIEWS.items()}
    return result | large | views


def train_step(case: Case) -> dict[str, Any]:
    config, labels = case.config, case.inputs["label"]
    network = build(case).train()
    network.zero_grad()
    mix = Mix(config["lam"], None)
    image = mix.images(case.inputs["image"])
    target = mix.targets(soft_targets(labels, config["num_classes"], config["smoothing"]))
    logits = network(image, _groups(case))
    loss = soft_cross_entropy(logits, target)
    loss.backward()
    named = dict(network.named_parameters())
    ours = {key: named[name] for key in case.state if (name := official_name(key)) in named}
    result: dict[str, Any] = {"loss": loss, "logits": logits, "target": target}
    for name in case.outputs:
        if name.startswith("grad_norm."):
            prefix = name.removeprefix("grad_norm.")
            result[name] = _norm(p for key, p in ours.items() if f"{key}.".startswith(f"{prefix}."))
    result["grad_norm_total"] = _norm(ours.values())
    last = network.stem.norms[-1]
    result |= {"bn1_running_mean_after": last.running_mean, "bn1_running_var_after": last.running_var}
    nn.utils.clip_grad_norm_(network.parameters(), 5.0)
    result["grad_norm_total_after_clip_5"] = _norm(ours.values())
    stage = Stage({"all": Group(1.0, weight_decay=0.05, decay="matrices")}, optimizer="AdamW")
    groups = build_optimizer(stage, {"all": network}).param_groups
    free = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    bits = [int(id(p) in free) for p in ours.values()]
    sizes = [p.numel() for p in ours.values()]
    return result | {
        "no_decay_bits": torch.tensor(bits),
        "num_params_no_decay": torch.tensor(sum(n for n, bit in zip(sizes, bits) if bit)),
        "num_params_decay": torch.tensor(sum(n for n, bit in zip(sizes, bits) if not bit)),
    }


def _renamed(state: dict[str, Tensor], inside: str) -> dict[str, Tensor]:
    """A part's tensors under our names of it. inside: where the part sits in the authors' network."""
    depth = 2 if inside.startswith("stage_1") else 4
    return {official_name(inside + key).split(".", depth)[-1]: value for key, value in state.items()}


def _norm(parameters: Any) -> Tensor:
    gradients = [p.grad.double().flatten() for p in parameters if p.grad is not None]
    return torch.cat(gradients).norm()
