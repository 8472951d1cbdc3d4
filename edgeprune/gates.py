"""Gates: a factor on every head and neuron of a dense-shaped model while it is trained.

A gate stands before the last layer of its sub-block, so that a gate of 0 is the unit removed: with all gates 0 or 1
the model is the sliced one, but what is shut still gets gradients, through its gate, and can come back.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from edgeprune import vit
from edgeprune.compat import VisionTransformer
from edgeprune.types import BlockPlan, Plan, SubBlock, SubBlockKind


class Gates:
    """The gates of a model, `values[block, kind]` `[units]`, open at first; `remove` takes them off again."""

    def __init__(self, model: VisionTransformer) -> None:
        self.model, self.sizes = model, vit.anatomy(model)
        self.values: dict[SubBlock, Tensor] = {
            (i, kind): torch.ones(self.sizes.units((i, kind))) for i in range(self.sizes.blocks) for kind in vit.KINDS
        }
        self._hooks = [
            vit.output_layer(model.blocks[i], kind).register_forward_pre_hook(self._gate(i, kind))
            for i, kind in self.values
        ]

    def _gate(self, block: int, kind: SubBlockKind) -> Any:
        def apply(_: object, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            gate = self.values[block, kind].repeat_interleave(self.sizes.unit_size((block, kind)))
            return (inputs[0] * gate.to(inputs[0]), *inputs[1:])

        return apply

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def keep(self, plan: Plan) -> None:
        """Open what the plan keeps, shut the rest."""
        for (i, kind), units in units_of(plan).items():
            gate = torch.zeros(self.sizes.units((i, kind)))
            gate[list(units)] = 1.0
            self.values[i, kind] = gate

    def watch(self) -> None:
        """Let the present values collect gradients in `grad`, so that shut units tell whether they are missed."""
        self.values = {at: gate.detach().requires_grad_() for at, gate in self.values.items()}

    def gradient(self, at: SubBlock) -> Tensor:
        """What the loss would change by per unit of gate, `[units]`; zeros where nothing was collected."""
        found = self.values[at].grad
        return torch.zeros(self.sizes.units(at)) if found is None else found.detach().cpu()

    @torch.no_grad()
    def folded(self) -> VisionTransformer:
        """A copy of the model without gates whose last layers have them multiplied in."""
        own = copy.deepcopy(self.model)
        for (i, kind), gate in self.values.items():
            layer = vit.output_layer(own.blocks[i], kind)
            layer._forward_pre_hooks.clear()
            layer.weight.mul_(gate.detach().repeat_interleave(self.sizes.unit_size((i, kind))).to(layer.weight))
        return own.eval().cpu()  # where calibration images are


def units_of(plan: Plan) -> Mapping[SubBlock, tuple[int, ...]]:
    """The units that a plan keeps in every sub-block."""
    kinds = ((i, kind, block) for i, block in enumerate(plan.blocks) for kind in vit.KINDS)
    return {(i, kind): block.heads if kind == "attn" else block.neurons for i, kind, block in kinds}


def plan_of(kept: Mapping[SubBlock, Any]) -> Plan:
    """From the units kept in every sub-block, in any order."""
    blocks = 1 + max(i for i, _ in kept)
    rows = [[tuple(sorted(int(u) for u in kept[i, kind])) for kind in vit.KINDS] for i in range(blocks)]
    return Plan(tuple(BlockPlan(heads, neurons) for heads, neurons in rows))
