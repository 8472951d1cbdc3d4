"""Random: random units, the same widths everywhere. The control that every criterion must beat."""

from __future__ import annotations

import torch

from edgeprune import vit
from edgeprune.compat import VisionTransformer
from rivals import ByShare, SubBlock, Task, plan_of, rounded, sub_blocks


class Uniform(ByShare):
    """Every block keeps the same share of its heads and neurons, the units of highest score."""

    scores: dict[SubBlock, torch.Tensor]  # [units]

    def score(self, at: SubBlock) -> torch.Tensor:
        raise NotImplementedError

    def prepare(self, task: Task) -> None:
        super().prepare(task)
        self.scores = {at: self.score(at) for at in sub_blocks(task.sizes)}

    def at(self, share: float) -> VisionTransformer:
        sizes = self.task.sizes
        step = self.task.request.target.neuron_step
        heads = spread(max(round(share * sizes.only.heads * sizes.blocks), sizes.blocks), sizes.blocks)
        steps = spread(max(round(share * sizes.only.neurons * sizes.blocks / step), sizes.blocks), sizes.blocks)
        counts = {(i, "attn"): heads[i] for i in range(sizes.blocks)}
        counts |= {(i, "mlp"): rounded(self.task, steps[i] * step) for i in range(sizes.blocks)}
        kept = {at: self.scores[at].argsort(descending=True, stable=True)[: counts[at]] for at in self.scores}
        return vit.slice_model(self.task.model, plan_of(kept, sizes))


class Random(Uniform):
    def prepare(self, task: Task) -> None:
        self.generator = torch.Generator().manual_seed(task.seed)
        super().prepare(task)

    def score(self, at: SubBlock) -> torch.Tensor:
        return torch.rand(self.task.sizes.units(at), generator=self.generator)


def spread(total: int, blocks: int) -> list[int]:
    """`total` shared out evenly; what is left goes to the first blocks, so that any latency can be hit."""
    return [total // blocks + (i < total % blocks) for i in range(blocks)]


METHODS = {"random": Random}
