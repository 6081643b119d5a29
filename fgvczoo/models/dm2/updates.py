"""Temporal diversity: members of a cohort that update their parameters at different frequencies.

The paper says "different frequencies of parameter update" and, as far as could be read, nothing more; how a slower
member treats the gradients in between is our choice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fgvczoo.errors import FgvczooError

MODES = ("accumulate_mean", "accumulate_sum", "skip", "ema")


class GradientAccumulator:
    """Decides after each backward pass which gradients the optimiser sees.

    intervals: member i updates after every `intervals[i]`-th step. mode: with the mean of the gradients since its last
    update ("accumulate_mean"), their sum ("accumulate_sum"), or the last one alone ("skip"). Between updates its
    parameters have no gradient, so that no optimiser touches them, not even with weight decay.
    """

    def __init__(self, intervals: Sequence[int], mode: str = "accumulate_mean") -> None:
        if mode not in MODES:
            raise FgvczooError(f"update_mode={mode!r}; expected {', '.join(MODES)}")
        if not intervals or min(intervals) < 1:
            raise FgvczooError(f"intervals={list(intervals)}; expected whole numbers of at least 1, one a member")
        if min(intervals) > 1:
            raise FgvczooError(f"intervals={list(intervals)}: all are above 1; the fastest member updates at each step")
        self.intervals, self.mode = tuple(intervals), mode
        self.sums: list[dict[int, Tensor]] = [{} for _ in intervals]  # by the parameter's number within the member

    @torch.no_grad()
    def apply(self, step: int, members: Sequence[Sequence[torch.nn.Parameter]]) -> None:
        """Step `step`, from 1, of K members' parameters, whose gradients it replaces."""
        for interval, parameters, sums in zip(self.intervals, members, self.sums):
            if interval == 1:
                continue
            due = step % interval == 0
            for number, parameter in enumerate(parameters):
                if self.mode != "skip":
                    if parameter.grad is not None:
                        before = sums.get(number)
                        sums[number] = parameter.grad.clone() if before is None else before + parameter.grad
                    if due and number in sums:
                        total = sums.pop(number)
                        if self.mode == "accumulate_mean":
                            total /= interval
                        parameter.grad = total
                if not due:
                    parameter.grad = None

    def state(self) -> list[dict[int, Tensor]]:
        """What a resumed run needs: the sums of unfinished intervals."""
        return [{number: total.clone() for number, total in sums.items()} for sums in self.sums]

    def restore(self, state: Sequence[dict[int, Tensor]], device: torch.device) -> None:
        """The inverse of `state`."""
        self.sums = [{int(number): total.to(device) for number, total in sums.items()} for sums in state]


@torch.no_grad()
def follow(member: torch.nn.Module, leader: torch.nn.Module, decay: float) -> None:
    """Mode "ema": the member's parameters become decay * their own + (1 - decay) * the leader's; its buffers (running
    statistics) the leader's."""
    for own, other in zip(member.parameters(), leader.parameters()):
        own.lerp_(other, 1 - decay)
    for mine, buffer in zip(member.buffers(), leader.buffers()):
        mine.copy_(buffer)
