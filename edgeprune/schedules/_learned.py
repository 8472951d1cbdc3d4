"""What schedules share whose gates are functions of one trained number per unit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from edgeprune.schedules import Planned
from edgeprune.types import SubBlock


class Learned(Planned):
    """Trains `numbers[block, kind]` `[units]` by an Adam of its own.

    Adam moves a number by about its rate in every step. Gates must get from open to shut within the steps there are,
    so the rate is a distance divided by the steps, not the weights' learning rate.
    """

    def begin(self, value: float, distance: float, steps: int) -> None:
        """All numbers at this value, to go that far in all steps together."""
        units = self.training.gates.sizes.units
        self.numbers: dict[SubBlock, Tensor] = {
            at: torch.full((units(at),), value, requires_grad=True) for at in self.training.gates.values
        }
        self.optimizer = torch.optim.Adam(self.numbers.values(), lr=distance / steps)

    def state(self) -> dict[str, Any]:
        return {**super().state(), "optimizer": self.optimizer.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.optimizer = torch.optim.Adam(self.numbers.values())
        self.optimizer.load_state_dict(state["optimizer"])

    def learn(self) -> None:
        """A step by the gradients of the last loss; a sum over the batch or a mean is the same to Adam."""
        self.optimizer.step()
        self.optimizer.zero_grad()
