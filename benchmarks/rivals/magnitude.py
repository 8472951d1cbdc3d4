"""Magnitude: units by the norm of their columns in `proj` or `fc2`, the same widths everywhere.

Ranked over all layers at once it collapses (10 % on CIFAR-10 at half the cost), so the uniform form is compared.
"""

from __future__ import annotations

import torch

from rivals import SubBlock, layer
from rivals.random_units import Uniform


class Magnitude(Uniform):
    def score(self, at: SubBlock) -> torch.Tensor:
        columns = layer(self.task.model, at).weight.detach().square().sum(0)
        return columns.reshape(-1, self.task.sizes.unit_size(at)).sum(1)


METHODS = {"magnitude": Magnitude}
