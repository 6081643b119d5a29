"""Times the steps of part-prototype training against the authors' formulation: `python benchmarks/steps.py`.

- closeness: ST-ProtoPNet's closeness loss, forward and backward, 200 classes, 5 prototypes of 64 channels each. The
  authors build the products of all pairs as one (C, K, D, C, K) array; here it is one matrix product.
- training step: ST-ProtoPNet behind its trunk (features of 80 images, 512 x 7 x 7, given): add-on layers,
  similarities, all losses, backward. The authors compute both branches' terms in every step, here the branch's whose
  turn it is. (Batches of other kinds of step differ only in the trunk, which is the same.)
- projection: 2000 prototypes (200 classes) over 1000 images, feature maps given (128 x 7 x 7). The authors compute
  whole similarity maps of a batch, copy them to numpy and loop over the prototypes.
- last layer: the network of protopnet-synthbirds, 600 images. The authors make 20 passes of Adam at 1e-4 over the
  images, through the frozen trunk; here one pass stores the similarities, and a proximal method runs on them until it
  reaches the authors' objective. (Given stored similarities, 20 passes of Adam over them would be cheap too.)

Every way runs in a fresh process with one thread: one warm-up, median of 5 runs, growth of the resident set. Writes
results/steps.json and .md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from ops import cropped_authors
from report import RESULTS, one_thread, two_ways, write
from timing import in_fresh_process, timed_with_result
from torch import Tensor
from torch.nn import functional as F

from fgvczoo.models.protopnet.network import Head as ProtoPNetHead
from fgvczoo.models.st_protopnet.losses import LossWeights, branch_loss, branch_terms, closeness
from fgvczoo.models.st_protopnet.network import Branch
from fgvczoo.nn.last_layer import objective, solve_last_layer
from fgvczoo.nn.prototypes import Projector, own_class
from fgvczoo.zoo.build import build_model

RUNS = 5
Step = Callable[[], Any]


def unit_prototypes(classes: int, per_class: int, dim: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return F.normalize(torch.randn(classes * per_class, dim, generator=generator), dim=1)


def pairs_authors(vectors: Tensor, classes: int) -> Tensor:
    """Products between the prototypes of all ordered pairs of different classes: (C (C - 1), K K)."""
    grouped = vectors.view(classes, -1, vectors.shape[1])  # (C, K, D)
    products = grouped[..., None, None] * grouped.permute(2, 0, 1)[None, None]  # (C, K, D, C, K)
    return products.sum(2).permute(0, 2, 1, 3).flatten(2)[~torch.eye(classes, dtype=torch.bool)]


def closeness_authors(vectors: Tensor, classes: int) -> Tensor:
    return -pairs_authors(vectors, classes).amin(1).mean()


def discrimination_authors(vectors: Tensor, classes: int) -> Tensor:
    return pairs_authors(vectors, classes).amax(1).mean()


def closeness_step(way: str) -> Step:
    vectors = unit_prototypes(200, 5, 64).requires_grad_()
    loss = closeness_authors if way == "authors" else closeness

    def step() -> float:
        vectors.grad = None
        value = loss(vectors, 200)
        value.backward()
        return float(value.detach())

    return step


def training_step_inputs() -> tuple[Tensor, Tensor, dict[str, Branch]]:
    torch.manual_seed(0)
    trunk = torch.rand(80, 512, 7, 7)
    branches = {name: Branch(512, 200, 5, 64, "cropped", upsample=False) for name in ("trivial", "support")}
    return trunk, torch.arange(80) * 2 % 200, branches


def training_step_authors() -> Step:
    """All terms of both branches, each by the authors' formulation, then the loss of the branch whose turn it is."""
    trunk, labels, branches = training_step_inputs()
    identity = F.one_hot(branches["trivial"].prototypes.class_of, 200).float()  # (P, C)

    def terms(name: str, branch: Branch) -> Tensor:
        features, vectors = branch.add_on(trunk), branch.prototypes.vectors
        evidence, cosine = cropped_authors(features, vectors[:, :, None, None])
        own = identity[:, labels].T
        grouped = vectors.view(200, 5, 64)
        orthogonality = (grouped @ grouped.transpose(1, 2) - torch.eye(5)).abs().sum()
        pairs = (closeness_authors if name == "support" else discrimination_authors)(vectors, 200)
        l1 = (branch.last_layer.weight * (1 - identity.T)).abs().sum()
        separation = 0.08 if name == "trivial" else 0.48
        return (
            F.cross_entropy(evidence @ branch.last_layer.weight.T, labels)
            - 0.8 * (cosine * own).amax(1).mean()
            + separation * (cosine * (1 - own)).amax(1).mean()
            + 1e-3 * orthogonality
            + 1e-4 * l1
            + pairs
        )

    def step() -> float:
        losses = [terms(name, branch) for name, branch in branches.items()]
        losses[0].backward()
        return float(losses[0].detach())

    return step


def training_step_ours() -> Step:
    trunk, labels, branches = training_step_inputs()

    def step() -> float:
        branch = branches["trivial"]
        loss = branch_loss("trivial", branch_terms("trivial", branch, branch(trunk), labels), LossWeights())
        loss.backward()
        return float(loss.detach())

    return step


IMAGES, CLASSES, PER_CLASS, BATCH = 1000, 200, 10, 75


def projection_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    features = torch.rand(IMAGES, 128, 7, 7, generator=generator)
    labels = torch.arange(IMAGES) % CLASSES
    return features, labels, torch.rand(CLASSES * PER_CLASS, 128, generator=generator), torch.arange(IMAGES)


def projection_authors() -> Step:
    """Squared distances by two convolutions, then a loop over the prototypes of every batch."""
    features, labels, vectors, index = projection_inputs()
    kernels = vectors[:, :, None, None]

    def step() -> list[tuple[int, int]]:
        smallest = np.full(len(vectors), np.inf)
        found = [(-1, -1)] * len(vectors)
        patches = np.zeros(vectors.shape, np.float32)
        for rows, batch in zip(index.split(BATCH), features.split(BATCH)):
            with torch.no_grad():
                square = F.conv2d(batch**2, torch.ones_like(kernels))
                norm = (vectors**2).sum(1).view(-1, 1, 1)
                distances = F.relu(square - 2 * F.conv2d(batch, kernels) + norm).numpy()
            maps = batch.numpy()
            images_of = {c: [i for i, label in enumerate(labels[rows].tolist()) if label == c] for c in range(CLASSES)}
            for prototype in range(len(vectors)):
                images = images_of[prototype // PER_CLASS]
                if not images:
                    continue
                own = distances[images, prototype]
                best = own.min()
                if best < smallest[prototype]:
                    image, row, column = np.unravel_index(own.argmin(), own.shape)
                    smallest[prototype] = best
                    found[prototype] = (int(rows[images[image]]), int(row * own.shape[2] + column))
                    patches[prototype] = maps[images[image], :, row, column]
        return found

    return step


def projection_ours() -> Step:
    features, labels, vectors, index = projection_inputs()
    head = ProtoPNetHead(128, CLASSES, torch.arange(len(vectors)) // PER_CLASS, 128)

    @torch.no_grad()
    def step() -> list[tuple[int, int]]:
        head.prototypes.vectors.copy_(vectors[:, :, None, None])
        projector = Projector(head.prototypes.class_of)
        for rows, batch in zip(index.split(BATCH), features.split(BATCH)):
            value, cell, which = head.nearest_own(batch, labels[rows])
            projector.update(batch, value, cell, labels[rows], rows, which)
        return list(zip(projector.sample.tolist(), projector.cell.tolist()))

    return step


def last_layer_inputs() -> tuple[Any, Tensor, Tensor, Tensor]:
    """The network of the SynthBirds recipe with projected-like prototypes, and images that its classes shape."""
    torch.manual_seed(0)
    network = build_model("protopnet-synthbirds").network.eval().requires_grad_(False)
    labels = torch.arange(600) % 20
    patterns = torch.randn(20, 3, 80, 80)
    images = patterns[labels] + torch.randn(600, 3, 80, 80)
    penalised = ~own_class(torch.arange(20), network.head.prototypes.class_of)
    return network, images, labels, penalised


def last_layer_authors() -> Step:
    network, images, labels, penalised = last_layer_inputs()
    start = network.head.last_layer.weight.clone()

    def step() -> float:
        weight = start.clone().requires_grad_()
        optimizer = torch.optim.Adam([weight], lr=1e-4)
        generator = torch.Generator().manual_seed(3)
        for _ in range(20):
            for rows in torch.randperm(len(labels), generator=generator).split(80):
                evidence = network(images[rows]).evidence
                optimizer.zero_grad()
                objective(weight, evidence, labels[rows], penalised, 1e-4).backward()
                optimizer.step()
        evidence = torch.cat([network(part).evidence for part in images.split(80)])
        return float(objective(weight.detach(), evidence, labels, penalised, 1e-4))

    return step


def last_layer_ours(target: float) -> Step:
    network, images, labels, penalised = last_layer_inputs()

    def step() -> float:
        evidence = torch.cat([network(part).evidence for part in images.split(80)])
        weight = network.head.last_layer.weight
        return solve_last_layer(evidence, labels, weight, penalised, target=target).objective

    return step


def measure(step_name: str, way: str, argument: Any) -> dict[str, Any]:
    """For a fresh process."""
    torch.set_num_threads(1)
    makers: dict[tuple[str, str], Callable[[], Step]] = {
        ("closeness", "authors"): lambda: closeness_step("authors"),
        ("closeness", "ours"): lambda: closeness_step("ours"),
        ("training step", "authors"): training_step_authors,
        ("training step", "ours"): training_step_ours,
        ("projection", "authors"): projection_authors,
        ("projection", "ours"): projection_ours,
        ("last layer", "authors"): last_layer_authors,
        ("last layer", "ours"): lambda: last_layer_ours(argument),
    }
    step = makers[step_name, way]()
    return timed_with_result(step, RUNS)


def main() -> None:
    rows: dict[str, dict[str, Any]] = {}
    for name in ("closeness", "training step", "projection", "last layer"):
        rows[name] = {}
        argument = None
        for way in ("authors", "ours"):
            rows[name][way] = in_fresh_process(measure, name, way, argument)
            argument = rows[name][way]["result"]
        authors, ours = (rows[name][way].pop("result") for way in ("authors", "ours"))
        if name == "projection":
            assert authors == ours, "projection: the two ways disagree"
        elif name in ("closeness", "training step"):
            assert abs(authors - ours) < 1e-4 * max(1, abs(authors)), f"{name}: the two ways disagree"
        elif name == "last layer":
            assert ours <= authors, "last layer: the authors' objective was not reached"
    lines = [
        "# Steps of part-prototype training",
        "",
        f"{one_thread()}; median (best) of {RUNS} runs. `python benchmarks/steps.py` writes this file.",
        "",
        "| step | authors' formulation, ms | here, ms | ratio | extra memory, MiB | ratio |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [two_ways(name, row["authors"], row["ours"], (1, 0)) for name, row in rows.items()]
    write(RESULTS, "steps", {"torch": torch.__version__, "rows": rows}, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
