"""What allocators share that are trained: the model under soft masks, and how far it then is from its teacher."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from edgeprune import tasks
from edgeprune.allocators import Task
from edgeprune.gates import Gates

IMAGES = 8  # of a step


class Gated:
    """A copy of the model whose weights stay as they are, under masks that may be trained."""

    def __init__(self, task: Task) -> None:
        self.model = copy.deepcopy(task.model).eval().requires_grad_(False)
        self.gates = Gates(self.model)
        self.teacher = task.teacher
        self.orders = {
            (level.block, level.kind): torch.as_tensor(
                level.order[len(level.order) - own[-1] :].tolist(), dtype=torch.long
            )
            for level, own in zip(task.levels, task.counts, strict=True)
        }
        self.batches = task.found.batches
        self.portions = [(i, start) for i, part in enumerate(self.batches) for start in range(0, len(part), IMAGES)]

    def divergence(self, step: int, masks: Sequence[Tensor]) -> Tensor:
        """Mean KL(teacher || masked) in nats on the images of this step.

        masks: per sub-block, of the units that are still there, in the order in which they go.
        """
        batch, start = self.portions[step % len(self.portions)]
        pixels = self.batches[batch][start : start + IMAGES]
        for (at, order), mask in zip(self.orders.items(), masks, strict=True):
            self.gates.values[at] = torch.zeros_like(self.gates.values[at]).scatter(0, order, mask)
        with torch.no_grad():
            wanted = self.teacher(pixels)
        return tasks.divergence(self.model(pixels), wanted, tasks.of(self.teacher)) / len(pixels)
