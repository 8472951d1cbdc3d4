"""PDP: soft masks that are functions of the weights alone; nothing is shut for good (Cho et al., arXiv 2305.11203).

A unit's gate is m = e^(w^2 / tau) / (e^(w^2 / tau) + e^(t^2 / tau)), with w^2 the mean square of its weights, and is
differentiated like any other function of them. t is midway between the smallest unit that is to be kept and the
largest that is not. After a short warm-up the allocator says once how many units of each sub-block are kept at the
target; until two thirds of the steps the numbers go there along a line. Before the last tenth the masks are
multiplied into the weights and become 0 or 1. Needs what criterion and allocator need, once; which units stay is up
to their weights.
Adapted: units for single weights (their sums of squares, which give the same gates as means: t and tau scale along),
ranked within their sub-block, heads and neurons never together. The paper's tau = 1e-4 suits single weights; here it
is a tenth of the standard deviation of w^2 within the sub-block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgeprune.gates import units_of
from edgeprune.schedules import Planned, Training, allocate_open, best, fold, over, squares
from edgeprune.types import Plan

NEEDS = ("weights",)
WARM_UP, RAMP, HARD = 0.1, 2 / 3, 0.9  # shares of the steps: the targets are set, are met, gates are 0 or 1
TAU = 0.1


def mask(worth: Tensor, kept: int) -> Tensor:
    """The gates `[units]` when so many of the units shall stay; `worth` are their w^2."""
    order = worth.detach().sort(descending=True).values
    spread = order.std(correction=0).clamp_min(1e-3 * order.mean()).clamp_min(1e-30)  # also of one unit alone
    smallest = order[kept - 1] if kept else order[0] + spread
    largest = order[kept] if kept < len(order) else (order[-1] - spread).clamp_min(0)
    t = (smallest.sqrt() + largest.sqrt()) / 2
    return torch.sigmoid((worth - t.square()) / (TAU * spread))  # both sides of the fraction by e^(w^2 / tau)


class Pdp(Planned):
    def before(self, step: int, steps: int) -> None:
        training, gates = self.training, self.training.gates
        if not over(step, steps, WARM_UP):
            return
        if not over(step - 1, steps, WARM_UP):
            self.kept = allocate_open(training, training.target_ms)
        elif over(step - 1, steps, HARD):
            return
        progress = min(max((step / steps - WARM_UP) / (RAMP - WARM_UP), 0.0), 1.0)
        worth = {at: squares(training.model, at) for at in gates.values}
        for at, units in units_of(self.kept).items():
            gone = len(worth[at]) - len(units)
            gates.values[at] = mask(worth[at], len(worth[at]) - round(progress * gone))
        if over(step, steps, HARD):
            self.kept = best(self.kept, worth)
            fold(gates, self.kept)

    def plan(self) -> Plan:
        return self.kept


def coach(training: Training) -> Planned:
    return Pdp(training)
