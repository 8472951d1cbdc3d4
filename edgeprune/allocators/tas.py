"""TAS: logits over the widths of every sub-block are trained with sampled widths (Dong and Yang, arXiv 1905.09717).

In each of 60 steps two widths of every sub-block are drawn by Gumbel-softmax probabilities, tau from 10 down to 0.1,
and their masks mixed by those probabilities; with p = softmax(logits) the loss is

    KL(teacher || mixed) + 2 (log E if T > 1.05 R, -log E if T < 0.95 R, else 0)

where E are the milliseconds expected under p, T those of the most probable widths, R the budget's. As published but
for: masks instead of interpolated feature maps (a narrower sub-block's units are among a wider one's, so nothing needs
to be aligned); weights stay as they are; distillation alone, without labels; 60 steps, not 600 epochs. TAS then takes
the most probable widths. To meet the budget exactly, here a knapsack minimises

    sum_i -log P_i(width <= kept_i)

so that what is kept covers, as probably as can be, all that would be drawn; with -log p itself room would stay unused
where wide is less probable. Logits serve budgets within a tenth of the dense cost of theirs. Needs gradients. Cost: 60
forward and backward passes of 8 images.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from edgeprune.allocators import Choose, Task, nearby
from edgeprune.allocators._gated import Gated
from edgeprune.solve import solve
from edgeprune.stitch import Choice
from edgeprune.types import FloatArray

NEEDS = ("gradients",)
STEPS, RATE = 60, 0.3
DRAWN = 2  # widths of a sub-block in a step
HOT, COLD = 10.0, 0.1  # tau at first and at last
WEIGHT, TOLERANCE = 2.0, 0.05  # of the cost's loss


def prepare(task: Task) -> Choose:
    trained = nearby(task, lambda room_ms: probabilities(task, room_ms))

    def choose(room_ms: float) -> Choice:
        if task.cost(task.dense) <= room_ms:
            return task.dense
        return solve([uncovered(p) for p in trained(room_ms)], task.costs, room_ms)

    return choose


def probabilities(task: Task, room_ms: float) -> list[FloatArray]:
    """Of every option of every sub-block, trained for this budget."""
    gated = Gated(task)
    generator = torch.Generator().manual_seed(task.seed)
    logits = [torch.zeros(len(own), requires_grad=True) for own in task.counts]
    optimizer = torch.optim.Adam(logits, RATE)
    costs = [torch.from_numpy(np.asarray(own)).float() for own in task.costs]
    base = task.table.base_ms
    for step in range(STEPS):
        tau = HOT + (COLD - HOT) * step / (STEPS - 1)
        masks = [mixed(own, counts, tau, generator) for own, counts in zip(logits, task.counts, strict=True)]
        expected = sum((own.softmax(-1) @ ms for own, ms in zip(logits, costs, strict=True)), torch.tensor(base))
        likely = base + task.cost([int(own.argmax()) for own in logits])
        loss = gated.divergence(step, masks) + WEIGHT * cost_loss(expected, likely, base + room_ms)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [own.detach().double().softmax(-1).numpy() for own in logits]


def mixed(logits: Tensor, counts: Sequence[int], tau: float, generator: torch.Generator) -> Tensor:
    """The mixture of two drawn widths' masks, `[units that are there]` in the order in which they go."""
    noise = -torch.empty(len(logits)).exponential_(generator=generator).log()
    perturbed = (logits.log_softmax(-1) + noise) / tau
    drawn = torch.multinomial(perturbed.detach().softmax(-1) + 1e-12, min(DRAWN, len(logits)), generator=generator)
    kept = torch.tensor(counts)[drawn]
    masks = torch.arange(counts[-1]) >= counts[-1] - kept[:, None]  # [drawn, units]
    return perturbed[drawn].softmax(-1) @ masks.float()


def cost_loss(expected: Tensor, likely: float, target: float) -> Tensor:
    """Down when the most probable widths are too slow, up when they are too fast, nothing in between."""
    if likely > (1 + TOLERANCE) * target:
        return expected.log()
    if likely < (1 - TOLERANCE) * target:
        return -expected.log()
    return 0 * expected


def uncovered(p: FloatArray) -> FloatArray:
    """-log of how probable it is that no more is drawn than each option keeps."""
    return -np.log(np.maximum(np.cumsum(p), 1e-300))
