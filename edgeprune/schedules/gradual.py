"""Gradual: units go step by step while the model is trained, along a cubic ramp (Zhu and Gupta, arXiv 1710.01878).

At every update the criterion scores the model as it is, and the allocator plans for the latency that is due:
target + (dense - target)(1 - t)^3. What is shut stays shut. The last third of the steps has the final plan. Needs what
the criterion needs. Cost: 12 times criterion and allocator.
"""

from __future__ import annotations

from edgeprune.schedules import Planned, Training, due
from edgeprune.types import Plan

NEEDS = ()
UPDATES = 12
RAMP = 2 / 3  # of the steps; the rest is for the final plan


class Gradual(Planned):
    kept: Plan

    def before(self, step: int, steps: int) -> None:
        progress = due(step, steps, UPDATES, RAMP)
        if progress is not None:
            levels, bounds = self.training.score(), (self.kept.shape,) if step else ()
            self.kept = self.training.allocate(levels, self.training.cubic_ms(progress), *bounds)
            self.training.gates.keep(self.kept)

    def plan(self) -> Plan:
        return self.kept


def coach(training: Training) -> Planned:
    return Gradual(training)
