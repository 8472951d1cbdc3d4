"""LAPP: a learned threshold per sub-block decides how much of it goes (Zhai et al., arXiv 2309.14157).

    mask_u = sigmoid((rank_u - threshold_i) / tau)
    loss   = KL(teacher || masked) + 5 ((expected ms - due ms) / dense ms)^2

rank_u, 0 to 1, is a unit's place in the order in which the criterion has units go, so that thresholds of all sub-blocks
are on one scale. Expected are the table's milliseconds at the summed masks; due falls evenly from dense to nothing in
60 steps, so pruning is progressive (the P in its name) and every budget lies on the way of the thresholds, where shares
are rounded to options. Adapted: the paper trains weights and thresholds together from scratch, with labels and FLOPs;
here weights stay as they are and the dense model teaches. Its light bypass around pruned layers is left out: it costs
latency. Masks and constants are not the paper's own (its abstract is what was followed); they were tried on one small
model. Needs gradients, no labels. Cost: 60 forward and backward passes of 8 images.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from edgeprune.allocators import Choose, Task, between, by_ratios
from edgeprune.allocators._gated import Gated
from edgeprune.types import FloatArray

NEEDS = ("gradients",)
STEPS, RATE = 60, 0.1
TAU = 0.1
OPEN = -3 * TAU  # the threshold at first: all masks near 1
WEIGHT = 5.0  # of the latency's square


def prepare(task: Task) -> Choose:
    path = shares(task)
    places = np.linspace(0, 1, len(path))

    def ratios(knob: float) -> FloatArray:
        return np.array([np.interp(knob, places, own) for own in path.T])

    return lambda room_ms: by_ratios(task, ratios, room_ms)


def shares(task: Task) -> FloatArray:
    """`[stops, sub-blocks]`: what is kept of each in the course of training, from all to nothing, never rising."""
    gated = Gated(task)
    thresholds = torch.full((len(task.counts),), OPEN, requires_grad=True)
    optimizer = torch.optim.Adam([thresholds], RATE)
    dense = task.cost(task.dense)
    path = [np.ones(len(task.counts))]
    for step in range(STEPS):
        masks = [mask(own[-1], threshold) for own, threshold in zip(task.counts, thresholds, strict=True)]
        kept = [own.sum() for own in masks]
        path.append(np.array([k.item() / max(1, own[-1]) for k, own in zip(kept, task.counts, strict=True)]))
        due = dense * (1 - (step + 1) / STEPS)
        late = (expected_ms(task, kept) - due) / max(dense, 1e-12)
        loss = gated.divergence(step, masks) + WEIGHT * late.square()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    path.append(np.zeros(len(task.counts)))
    return np.minimum.accumulate(np.array(path))


def mask(units: int, threshold: Tensor) -> Tensor:
    """Of units in the order in which they go, `[units]`."""
    return torch.sigmoid(((torch.arange(units) + 0.5) / max(1, units) - threshold) / TAU)


def expected_ms(task: Task, kept: Sequence[Tensor]) -> Tensor:
    """What the table has for these numbers of units, between its options in proportion."""
    there = (own for own in zip(task.counts, task.costs, kept, strict=True) if len(own[0]) > 1)
    return torch.stack([between(*own) for own in there] or [torch.zeros(())]).sum()
