"""GraNet: units go step by step, and at every step some that are missed most come back (Liu et al., arXiv 2106.10404).

At every update the criterion's lowest go until the latency is target + (dense - target)(1 - t)^3. Then, in every
sub-block, the lowest share r = .5 (1 + cos(pi t)) / 2 of what is kept goes as well, and as many units come back:
those of all that are shut there with the largest |sum of dL/dgate| over the steps since the last update. A shut gate
collects that gradient at no cost, so that regrowth is free. Each sub-block keeps its width and with it the budget. At
the last update r is 0: the last third of the steps has the final plan, as a swap costs recovery. Needs what the
criterion needs, and the training's gradients. Cost: 12 times criterion and allocator.
Adapted: units for single weights; the paper regrows anywhere in the network, starts what comes back at zero, and
looks at one batch's gradient. A unit at zero in both its layers would get none, so it comes back with the weights it
left with.
"""

from __future__ import annotations

import math

import torch

from edgeprune.gates import plan_of, units_of
from edgeprune.schedules import Planned, Training, due
from edgeprune.types import Plan

NEEDS = ("gradients",)
UPDATES = 12
RAMP = 2 / 3  # of the steps; the rest is for the final plan
REGROWN = 0.5  # of what is kept, at first


class GraNet(Planned):
    def before(self, step: int, steps: int) -> None:
        progress = due(step, steps, UPDATES, RAMP)
        if progress is None:
            return
        training, gates = self.training, self.training.gates
        levels = training.score()
        self.kept = training.allocate(levels, training.cubic_ms(progress))
        if step:  # before the first step nothing has been missed
            regrown, kept = REGROWN * (1 + math.cos(math.pi * progress)) / 2, {}
            for level in levels:
                at = level.block, level.kind
                count = len(units_of(self.kept)[at])
                swapped = int(regrown * count)
                missed = gates.gradient(at).abs()
                missed[list(stay := level.kept(count - swapped))] = -torch.inf
                kept[at] = [*stay, *missed.argsort(descending=True, stable=True)[:swapped].tolist()]
            self.kept = plan_of(kept)
        gates.keep(self.kept)
        if progress < 1:
            gates.watch()

    def plan(self) -> Plan:
        return self.kept


def coach(training: Training) -> Planned:
    return GraNet(training)
