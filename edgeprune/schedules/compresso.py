"""Compresso: random L0 gates learn which units are worth their latency (Guo et al., arXiv 2310.05015).

Every unit has a hard-concrete gate (arXiv 1712.01312), drawn anew at every step with u uniform in (0, 1), beta = 2/3:

    z = clip(1.2 sigmoid((log u - log(1 - u) + log alpha) / beta) - .1, 0, 1)
    p = P(z > 0) = sigmoid(log alpha - beta log(.1 / 1.1))
    loss += lambda1 (s - t) + lambda2 (s - t)^2

s is what the table says of the expected numbers sum p of open gates per sub-block, t the latency that is due, both as
shares of the dense latency. log alpha descends; the multipliers ascend, so that the constraint holds in the end.
lambda2 begins at 100, or s would swing about t for as long as a short training lasts. t falls along a line to the
target within half of the steps. Before the last tenth, units are ranked by log alpha across all sub-blocks and as
many stay as the target allows; the means of the gates, clip(1.2 sigmoid(log alpha) - .1, 0, 1), are multiplied into
the weights. Needs the training's gradients; neither criterion nor allocator is asked. Costs nothing beside training.
Adapted: latency for the share of parameters. Left out: LoRA (all weights are trained), gates of the hidden dimension
(the residual stream is never pruned) and the prompts, which only language models have. The table is read at the
expected numbers, not averaged over the numbers that may be drawn.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from edgeprune.schedules import Planned, Training, fold, milliseconds, over, widest
from edgeprune.schedules._learned import Learned
from edgeprune.types import Plan, SubBlock

NEEDS = ("gradients",)
BETA, LOW, HIGH = 2 / 3, -0.1, 1.1  # the temperature, and what the concrete distribution is stretched to
OPEN = 3.0  # log alpha at first: one gate in a hundred is shut
DISTANCE = 24.0  # that log alpha may go: several times from open to shut and back
SQUARE, ASCENT = 100.0, 50.0  # lambda2 at first; what the multipliers gain in all steps together per share too late
RAMP, HARD = 0.5, 0.9  # shares of the steps


def sample(log_alpha: Tensor, generator: torch.Generator) -> Tensor:
    """Gates `[units]`, drawn."""
    u = torch.rand(log_alpha.shape, generator=generator).clamp(1e-6, 1 - 1e-6)
    return ((HIGH - LOW) * torch.sigmoid((u.logit() + log_alpha) / BETA) + LOW).clamp(0, 1)


def mean(log_alpha: Tensor) -> Tensor:
    """The gates that go into the weights."""
    return ((HIGH - LOW) * torch.sigmoid(log_alpha) + LOW).clamp(0, 1)


def probability(log_alpha: Tensor) -> Tensor:
    """That a gate is not 0."""
    return torch.sigmoid(log_alpha - BETA * math.log(-LOW / HIGH))


class Compresso(Learned):
    def before(self, step: int, steps: int) -> None:
        training, gates = self.training, self.training.gates
        if step == 0:
            self.begin(OPEN, DISTANCE, steps)
            self.generator = torch.Generator().manual_seed(training.seed)
            self.first, self.second = 0.0, SQUARE
        self.done = over(step, steps, HARD)
        if not self.done:
            dense, progress = training.table.dense_ms, min(1.0, step / (RAMP * steps))
            self.due = (dense + (training.target_ms - dense) * progress) / dense
            gates.values = {at: sample(own, self.generator) for at, own in self.numbers.items()}
        elif not step or not over(step - 1, steps, HARD):
            gates.values = {at: mean(own.detach()) for at, own in self.numbers.items()}
            self.kept = widest(training, self.numbers)
            fold(gates, self.kept)

    def expected(self) -> Tensor:
        """The table's latency as a share of the dense one."""
        units: dict[SubBlock, Tensor] = {at: probability(own).sum() for at, own in self.numbers.items()}
        return milliseconds(self.training.table, units) / self.training.table.dense_ms

    def penalty(self) -> Tensor | None:
        if self.done:
            return None
        late = self.expected() - self.due
        return self.first * late + self.second * late.square()

    def after(self, step: int, steps: int) -> None:
        if not self.done:
            self.learn()
            late = float(self.expected().detach()) - self.due
            self.first += ASCENT / steps * late
            self.second += ASCENT / steps * late**2

    def plan(self) -> Plan:
        return self.kept


def coach(training: Training) -> Planned:
    return Compresso(training)
