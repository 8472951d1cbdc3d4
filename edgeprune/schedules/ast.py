"""AST: masks chosen again and again by the weights while the model is distilled (Huang et al., arXiv 2407.20584).

The allocator says once, at the first step, how many units of each sub-block the target allows, and from then on that
many are open: at each of 12 updates within two thirds of the steps those with the largest squared norm of all
weights. A shut unit's columns of `proj` or `fc2` get the gradient that they would have with an open gate (straight
through), and all its weights decay (SR-STE, arXiv 2102.04010), w -= lambda_t w, with lambda_t rising along a line in
the first half of the steps: what is missed grows until it is chosen, the rest shrinks and stays shut. Needs what
criterion and allocator need, once, and the training's gradients; training is by distillation anyway. Cost: next to
nothing.
Adapted: the paper's masks are 2:4 patterns of single weights, which structured units cannot have; here units are
ranked within their sub-block. Its decay is a term of its optimiser's update, unscaled by its momentum; here it is a
factor after the step. SLoRB, an extra weight per 64 inputs, is left out, as it would cost latency.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from edgeprune import saliency, vit
from edgeprune.schedules import Planned, Training, allocate_open, best, due, over, squares
from edgeprune.types import Plan, SubBlock

NEEDS = ("weights", "gradients")
UPDATES, RAMP = 12, 2 / 3  # masks are chosen so often, in this share of the steps
DECAY = 1.0  # a unit that was shut all the time would end at e^(-DECAY) of its size at the greatest lambda_t
#: What a shut gate lets through while masks may change, of which the straight-through gradient is made. A power of two:
#: dividing by it is exact.
LEAK = 2.0**-10


class Ast(Planned):
    def before(self, step: int, steps: int) -> None:
        training, gates = self.training, self.training.gates
        if step == 0:
            self.kept = allocate_open(training, training.target_ms)
            self.hooks = [self.through(at) for at in gates.values]
        if due(step, steps, UPDATES, RAMP) is not None:
            self.kept = best(self.kept, {at: squares(training.model, at) for at in gates.values})
            gates.keep(self.kept)
            gates.values = {at: gate.clamp_min(LEAK) for at, gate in gates.values.items()}
        if self.hooks and over(step, steps, RAMP):
            self.end()

    def state(self) -> dict[str, Any]:
        return {**super().state(), "hooks": len(self.hooks)}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.hooks = [self.through(at) for at in self.training.gates.values] if state["hooks"] else []

    def through(self, at: SubBlock) -> Any:
        """Let the weights behind a gate have the gradient of an open one."""
        gates = self.training.gates

        def open_up(gradient: Tensor) -> Tensor:
            return gradient / gates.values[at].repeat_interleave(gates.sizes.unit_size(at)).to(gradient)

        return vit.output_layer(gates.model.blocks[at[0]], at[1]).weight.register_hook(open_up)

    def end(self) -> None:
        """The choice is final."""
        for hook in self.hooks:
            hook.remove()
        self.hooks = []
        self.training.gates.keep(self.kept)

    @torch.no_grad()
    def after(self, step: int, steps: int) -> None:
        if not self.hooks:
            return
        rate = DECAY / steps * min(1.0, 2 * step / steps)
        for at, gate in self.training.gates.values.items():
            factors = torch.where(gate == 1, 1.0, 1 - rate)
            *first, last = saliency.group(self.training.model, at)
            for part in first:
                part.view(self.training.gates.sizes.row_groups(at[1]), len(gate), -1).mul_(factors.to(part)[:, None])
            last.view(len(last), len(gate), -1).mul_(factors.to(last)[:, None])
        if step == steps - 1:
            self.end()

    def plan(self) -> Plan:
        return self.kept


def coach(training: Training) -> Planned:
    return Ast(training)
