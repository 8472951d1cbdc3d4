"""PAT: low-rank adapters are trained while one mask over the whole model closes (Liu et al., arXiv 2408.14721).

The weights are frozen and get adapters; beside them and the classifier only the mask is trained, a number m per head
and neuron. At every step

    gate = sigmoid(tau m) + max(.5 - step / steps, 0)        tau = 1 / (1 - log(step) / log(steps))
    loss += 10 |s - t| / t + mean over m > 0 of (m - .5)^2 + mean over m <= 0 of (m + .5)^2

with s what the table says of the units with m >= 0, straight through (the gradient of that step is 1), and t the
target: at first all gates are 1. After 80% of the steps the mask is frozen: units are ranked by m across all
sub-blocks, as many stay as the target allows, the rest is shut, and adapters alone go on. At the end adapters and
gates are folded into the weights. Needs the training's gradients; neither criterion nor allocator is asked.
Adapted: the paper masks the hidden dimension, the same in all layers, behind low-rank transforms that it inserts;
here the residual stream stays as it is, the mask is of heads and neurons under the measured latency, and the adapters
are LoRA's. Its learnt scales and identity loss belong to those transforms and are left out.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from edgeprune import adapters
from edgeprune.schedules import Planned, Training, fold, milliseconds, over, widest
from edgeprune.schedules._learned import Learned
from edgeprune.types import Plan

NEEDS = ("gradients",)
FREEZE = 0.8  # share of the steps after which the mask is frozen
WEIGHT = 10.0  # of the latency
CENTRE = 0.5  # where |m| is drawn to
DISTANCE = 2.0  # that m may go


def gate(m: Tensor, step: int, steps: int) -> Tensor:
    """Gates `[units]` at this step."""
    return torch.sigmoid(sharpness(step, steps) * m) + max(0.5 - step / steps, 0.0)


def sharpness(step: int, steps: int) -> float:
    """tau"""
    return 1 / (1 - math.log(max(1, step)) / math.log(max(2, steps)) + 1e-6)


class Pat(Learned):
    def __init__(self, training: Training) -> None:
        super().__init__(training)
        adapters.attach(training.model, seed=training.seed)

    def before(self, step: int, steps: int) -> None:
        gates = self.training.gates
        if step == 0:
            self.begin(0.0, DISTANCE, steps)
        self.frozen = over(step, steps, FREEZE)
        if not self.frozen:
            gates.values = {at: gate(m, step, steps) for at, m in self.numbers.items()}
        elif not step or not over(step - 1, steps, FREEZE):
            self.kept = widest(self.training, self.numbers)
            gates.keep(self.kept)
            soft = {at: gate(m.detach(), step, steps) for at, m in self.numbers.items()}
            gates.values = {at: soft[at] * own for at, own in gates.values.items()}

    def penalty(self) -> Tensor | None:
        if self.frozen:
            return None
        target = self.training.target_ms
        counts = {at: ((m.detach() >= 0).to(m) + m - m.detach()).sum() for at, m in self.numbers.items()}
        latency = WEIGHT * (milliseconds(self.training.table, counts) - target).abs() / target
        every = torch.cat(list(self.numbers.values()))
        sides = (own for own in (every[every > 0], every[every <= 0]) if len(own))
        return latency + sum((own.abs() - CENTRE).square().mean() for own in sides)

    def after(self, step: int, steps: int) -> None:
        if not self.frozen:
            self.learn()
        if step == steps - 1:
            adapters.merge(self.training.model)
            fold(self.training.gates, self.kept)

    def plan(self) -> Plan:
        return self.kept


def coach(training: Training) -> Planned:
    return Pat(training)
