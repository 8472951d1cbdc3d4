"""MaskSparsity: a penalty makes small what was chosen to go, and that alone (Jiang et al., arXiv 2201.06776).

A soft landing between plan and cut. The plan for the target is fixed at the first step. Then the loss has a group
lasso term, strength * sum ||w_u|| over the doomed units u alone, w_u all weights of a unit: what stays is not pulled
down, as it would be by a penalty on everything. Gates stay open until the last step is done; what was doomed is shut
and cut then. Needs what criterion and allocator need, once.
Adapted: the paper penalises the batch-norm scales of the doomed channels; a ViT has none, so it is the norms of their
weights. The strength is .3 / sqrt(doomed units), so that the gradient of the term has norm .3 whatever the model,
with 1 being the norm to which the training clips. What is small then is not zero, so that a little is lost at the
cut.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgeprune.gates import units_of
from edgeprune.schedules import Planned, Training, squares
from edgeprune.types import Plan

NEEDS = ("weights",)
STRENGTH = 0.3  # the norm of the penalty's gradient


class MaskSparsity(Planned):
    def before(self, step: int, steps: int) -> None:
        if step == 0:
            training, gates = self.training, self.training.gates
            self.kept = training.allocate(training.score(), training.target_ms)
            self.doomed = {at: torch.ones(len(gate), dtype=torch.bool) for at, gate in gates.values.items()}
            for at, units in units_of(self.kept).items():
                self.doomed[at][list(units)] = False

    def penalty(self) -> Tensor | None:
        pairs = [(squares(self.training.model, at), doomed) for at, doomed in self.doomed.items()]
        norms = torch.cat([own[doomed.to(own.device)] for own, doomed in pairs]).clamp_min(1e-12).sqrt()
        return STRENGTH * norms.sum() / max(1, len(norms)) ** 0.5

    def after(self, step: int, steps: int) -> None:
        if step == steps - 1:
            self.training.gates.keep(self.kept)

    def plan(self) -> Plan:
        return self.kept


def coach(training: Training) -> Planned:
    return MaskSparsity(training)
