"""HESSO: what shall go is moved to zero step by step, so that its cut loses nothing (Chen et al., arXiv 2409.09085).

After a warm-up, in each of 6 periods the allocator plans for the target with the criterion's present scores, and of
what the plan does without and is still there the lowest share is doomed: an equal part of the rest for every period
left. Within a period of T steps the columns of `proj` or `fc2` of a doomed unit are multiplied by (T - t - 1) / (T -
t) after step t: they go to zero along a line, exactly, while they are trained and the others learn to do without
them. From then on they stay zero. The last third of the steps has the final plan. Needs what the criterion needs.
Cost: 6 times criterion and allocator. The paper's own score is the criterion `hesso`.
Adapted: the paper moves all weights of a unit; its columns of the last layer are enough for it to be gone. It counts
units until a share of all is reached; here the measured latency of the plan says which must go.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch

from edgeprune.gates import units_of
from edgeprune.schedules import Planned, Training, scale_columns
from edgeprune.types import Levels, Plan, SubBlock

NEEDS = ()
WARM_UP, END = 0.1, 2 / 3  # shares of the steps
PERIODS = 6

#: A unit and its sub-block.
Unit = tuple[SubBlock, int]


def periods(steps: int) -> list[range]:
    """The steps of every period, of which each has at least one."""
    start = math.floor(WARM_UP * steps)
    end = max(start + 1, math.floor(END * steps))
    edges = np.linspace(start, end, 1 + min(PERIODS, end - start)).astype(int).tolist()
    return [range(a, b) for a, b in itertools.pairwise(edges)]


def without(levels: list[Levels], plan: Plan) -> list[Unit]:
    """The units that are not in the plan, the least valuable first."""
    kept = units_of(plan)
    found = []
    for level in levels:
        at = level.block, level.kind
        stay = set(kept[at])
        found += [(cost, at, int(u)) for cost, u in zip(np.diff(level.errors), level.order) if u not in stay]
    return [(at, unit) for _, at, unit in sorted(found, key=lambda entry: entry[0])]


class Hesso(Planned):
    def redundant(self) -> list[Unit]:
        """All that must go for the target, the least valuable first; sets the plan."""
        levels = self.training.score()
        self.kept = self.training.allocate(levels, self.training.target_ms)
        return without(levels, self.kept)

    def before(self, step: int, steps: int) -> None:
        if step == 0:
            self.periods = periods(steps)
            self.alive = {at: torch.ones(len(gate)) for at, gate in self.training.gates.values.items()}
        for number, period in enumerate(self.periods):
            if step == period.start:
                there = {at: own.tolist() for at, own in self.alive.items()}
                left = [(at, unit) for at, unit in self.redundant() if there[at][unit]]
                self.doomed = {at: torch.zeros(len(own), dtype=torch.bool) for at, own in self.alive.items()}
                for at, unit in left[: math.ceil(len(left) / (len(self.periods) - number))]:
                    self.doomed[at][unit] = True

    def after(self, step: int, steps: int) -> None:
        gates, factors = self.training.gates, self.alive
        if period := next((own for own in self.periods if step in own), None):
            share = (period.stop - step - 1) / (period.stop - step)
            factors = {at: torch.where(self.doomed[at], share * own, own) for at, own in self.alive.items()}
        scale_columns(gates, factors)  # also what is zero already: the optimizer's momentum still moves it
        if period and step == period.stop - 1:
            gates.values = self.alive = factors
            if period == self.periods[-1]:
                gates.keep(self.kept)

    def plan(self) -> Plan:
        return self.kept


def coach(training: Training) -> Planned:
    return Hesso(training)
