"""Two gloo processes inside a test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes


def in_two_processes(work: Callable[[int], Any], folder: Path) -> list[Any]:
    """`work(rank)` in two processes that know each other; what each returns."""
    start_processes(_process, (work, folder), nprocs=2, start_method="fork")
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def _process(rank: int, work: Callable[[int], Any], folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    torch.save(work(rank), folder / f"{rank}.pt")
    dist.destroy_process_group()
