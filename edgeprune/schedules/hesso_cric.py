"""HESSO-CRIC: HESSO, with the choice of what goes corrected on the way to zero before it is made (arXiv 2409.09085).

A score at the present weights may be wrong about what happens at zero. The corrective redundancy identification cycle
therefore projects all candidates a quarter, half and three quarters of the way and looks there: a candidate's loss
rise is the mean over the three of -dL/dgate, of L = KL(teacher || model) on the calibration images. That is the path
integral of its gradient, so that the candidates' rises add up to the loss of them all going. In every sub-block the
tenth whose loss rises most are exempted, and those replace them that the criterion ranks next and that were no
candidates before: at most 10 cycles, until no replacement is better than what it replaced. Of all candidates ever,
those with the least rise go. Trials move gates alone; no weight is touched. Then it is HESSO with that choice fixed.
Needs what the criterion needs, and the loss's gradients at the gates. Cost: criterion and allocator once, and up to
33 passes over the images.
Adapted: the paper lets its cycles run within the training, with the optimiser's steps between the trials, mixes five
scores taken there, and finds the loss of projecting a whole layer. For the latency a replacement is of the same
sub-block; one that goes as a whole is not corrected.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from edgeprune import tasks
from edgeprune.gates import plan_of, units_of
from edgeprune.schedules import Planned, Training
from edgeprune.schedules.hesso import Hesso, Unit
from edgeprune.types import SubBlock

NEEDS = ("gradients",)
TRIALS = (0.25, 0.5, 0.75)  # of the way to zero
CYCLES = 10
EXEMPT = 0.1  # of the candidates of a sub-block, in each cycle


def rises(training: Training, candidates: Mapping[SubBlock, list[int]]) -> dict[SubBlock, Tensor]:
    """`[units]` per sub-block: how much each candidate adds to the loss per image on its way to zero."""
    model, gates, values = training.model, training.gates, training.gates.values
    where, trained = next(model.parameters()).device, model.training
    totals = {at: torch.zeros(len(gate)) for at, gate in values.items()}
    model.eval()
    try:
        for trial in TRIALS:
            gates.values = {at: gate.detach().clone() for at, gate in values.items()}
            for at, units in candidates.items():
                gates.values[at][units] *= 1 - trial
            gates.watch()
            count = 0
            for pixels, _ in training.batches():
                with torch.no_grad():
                    wanted = training.teacher(pixels.to(where))
                loss = tasks.divergence(model(pixels.to(where)), wanted, tasks.of(training.teacher))
                for at, slope in zip(gates.values, torch.autograd.grad(loss, list(gates.values.values())), strict=True):
                    totals[at] -= slope.cpu() / len(TRIALS)
                count += len(pixels)
    finally:
        gates.values = values
        model.train(trained)
    return {at: total / count for at, total in totals.items()}


class HessoCric(Hesso):
    def before(self, step: int, steps: int) -> None:
        if step == 0:
            self.fixed: list[Unit] | None = None
        super().before(step, steps)

    def redundant(self) -> list[Unit]:
        if self.fixed is None:
            self.fixed = self.corrected()
        return self.fixed

    def corrected(self) -> list[Unit]:
        """What goes after the cycles, the least loss first; sets the plan."""
        levels = self.training.score()
        plan = units_of(self.training.allocate(levels, self.training.target_ms))
        kept = {at: set(units) for at, units in plan.items()}
        order = {(level.block, level.kind): level.order.tolist() for level in levels}
        waiting = {at: [u for u in own if u in kept[at]] for at, own in order.items()}
        candidates = {at: [u for u in own if u not in kept[at]] for at, own in order.items()}
        counts = {at: len(own) for at, own in candidates.items()}
        rise = {at: torch.full((len(own),), torch.inf) for at, own in order.items()}  # of those never tried
        going: dict[SubBlock, list[int]] = {}
        for cycle in range(1 + CYCLES):
            found = rises(self.training, candidates)
            for at, own in candidates.items():
                rise[at][own] = found[at][own]
            before = going
            going = {at: own.argsort(stable=True)[: counts[at]].tolist() for at, own in rise.items()}
            if cycle and {at: set(own) for at, own in going.items()} == {at: set(own) for at, own in before.items()}:
                break
            for at, own in candidates.items():
                swapped = min(math.ceil(EXEMPT * len(own)), len(waiting[at]))
                worst = {own[i] for i in rise[at][own].argsort(descending=True, stable=True)[:swapped].tolist()}
                candidates[at] = [u for u in own if u not in worst] + waiting[at][:swapped]
                waiting[at] = waiting[at][swapped:]
        self.kept = plan_of({at: set(order[at]) - set(own) for at, own in going.items()})
        units = [(float(rise[at][u]), at, u) for at, own in going.items() for u in own]
        return [(at, u) for _, at, u in sorted(units, key=lambda entry: entry[0])]


def coach(training: Training) -> Planned:
    return HessoCric(training)
