"""P3B: a sub-block keeps as much as it now helps, and what was shut may come back (Glandorf et al., arXiv 2506.23675).

At 12 updates between .1 and .9 of the steps, the allocator `p3b` finds each sub-block's benefit from linear probes on
the model as it then is, and its keep ratios kappa for the measured latency. p goes from 0 to 1 until half of the
steps; of the n units of a sub-block k are due, and the unit of rank r, 0 to n - 1 from below, has the gate m:

    b = .2 new benefit + .8 b        k = n (1 - (1 - kappa) p)
    m = sigmoid(log 9 (r - (n - k) + .5) / (n tau))

They are ranked by Taylor scores, the sum of (m dL/dm)^2 over the steps since the last update. tau is .1 until half of
the steps and then falls to 0: what is just below the line still gets gradients, and a sub-block whose benefit grows
takes units back. Before the last tenth, min(1, s importance) of each sub-block is kept with the largest s within the
target, and gates are multiplied into the weights. Needs activations, labels and the training's gradients; criterion
and chosen allocator are not asked. Cost: 12 times the probes, which look at all calibration images.
Adapted: latency for parameters (a dense sub-block's, where the paper divides by what is left of it); heads and
neurons are all there is to mask; benefits are smoothed before they are scaled, not after; the paper updates some
three times per epoch, and its probes train along with the model.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from edgeprune.allocators import p3b
from edgeprune.schedules import Planned, Training, due, fold, over, widest
from edgeprune.types import FloatArray, Plan, SubBlock

NEEDS = ("activations", "gradients", "labels")
UPDATES = 12
START, RAMP, HARD = 0.1, 0.5, 0.9  # shares of the steps: units go, ratios are reached, gates are 0 or 1
SMOOTH = 0.2  # weight of the new benefits
TAU = 0.1


def ranks(score: Tensor) -> Tensor:
    """`[units]`, 0 for the lowest."""
    return score.argsort(stable=True).argsort()


def mask(score: Tensor, kept: float, tau: float) -> Tensor:
    """Gates `[units]` for about so many units, those with the largest scores; 0 or 1 for tau = 0."""
    above = ranks(score) - (len(score) - kept) + 0.5
    return torch.sigmoid(math.log(9) * above / (len(score) * max(tau, 1e-6)))


class P3b(Planned):
    def before(self, step: int, steps: int) -> None:
        gates, table = self.training.gates, self.training.table
        start, end = math.floor(START * steps), math.floor(HARD * steps)
        if step == 0:
            self.benefits: FloatArray | None = None
            self.ms = np.array([table.by_block[block].of(kind)[1][-1] for block, kind in gates.values])
            self.watch({at: torch.ones(len(gate)) for at, gate in gates.values.items()})
        if step >= start and due(step - start, end - start, UPDATES) is not None:
            found, old = self.probe(), self.benefits
            self.benefits = found if old is None else SMOOTH * found + (1 - SMOOTH) * old
            self.watch(self.masks(step / steps))
        self.done = over(step, steps, HARD)
        if self.done and (not step or not over(step - 1, steps, HARD)):
            self.kept = self.widest()
            fold(gates, self.kept)

    def probe(self) -> FloatArray:
        """Benefits of the sub-blocks as they now are."""
        console = self.training.console if self.benefits is None else None
        return p3b.benefits(self.training.gates.folded(), self.training.labelled(), self.training.seed, console)

    def masks(self, way: float) -> dict[SubBlock, Tensor]:
        """By what was learnt since the last ones, at this share of the steps."""
        assert self.benefits is not None
        ratios = p3b.keep_ratios(self.benefits, self.ms, self.training.target_ms - self.training.table.base_ms)
        progress = min(max((way - START) / (RAMP - START), 0.0), 1.0)
        tau = TAU * min((HARD - way) / (HARD - RAMP), 1.0)
        due = 1 - (1 - ratios) * progress
        return {at: mask(own, share * len(own), tau) for (at, own), share in zip(self.scores.items(), due, strict=True)}

    def widest(self) -> Plan:
        """Of rank r from above, 1 to n, a unit is kept once s importance n >= r: what it takes is its worth."""
        assert self.benefits is not None
        importance = p3b.importance(self.benefits, self.ms).tolist()
        pairs = zip(self.scores.items(), importance, strict=True)
        return widest(self.training, {at: own * len(score) / (len(score) - ranks(score)) for (at, score), own in pairs})

    def watch(self, values: dict[SubBlock, Tensor]) -> None:
        """Set these gates, and begin to score them."""
        self.training.gates.values = values
        self.training.gates.watch()
        self.scores = {at: torch.zeros(len(gate)) for at, gate in values.items()}

    def after(self, step: int, steps: int) -> None:
        gates = self.training.gates
        for at, gate in () if self.done else gates.values.items():
            self.scores[at] += (gate.detach() * gates.gradient(at)).square()
            gate.grad = None

    def plan(self) -> Plan:
        return self.kept


def coach(training: Training) -> Planned:
    return P3b(training)
