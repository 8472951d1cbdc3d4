"""FLAP (An et al., AAAI 2024, arXiv 2312.11983): fluctuation of the inputs, standardised per layer, with bias compensation.

WIFV_j = Var(x_j) ||W_:j||^2 for input column j of `proj` or `fc2`. A head's score is the mean of its columns'
squared WIFV, a neuron's the WIFV itself; both are z-scored within their layer and ranked over all layers at once
(the paper's AL-AM). What is removed is replaced by its mean: b += W_pruned mu. A unit's weight in the budget is
its cost in the latency table, where the authors' code has a constant for LLaMA.
"""

from __future__ import annotations

import torch

from edgeprune.compat import VisionTransformer
from rivals import ByShare, SubBlock, Task, layer, plan_of, rounded, slice_with_means, sub_blocks


class Flap(ByShare):
    def prepare(self, task: Task) -> None:
        super().prepare(task)
        self.scores = {at: self.score(at) for at in sub_blocks(task.sizes)}
        prices = {
            "attn": task.table.stages[0].attn_ms[-1] / task.sizes.only.heads,
            "mlp": task.table.stages[0].mlp_ms[-1] / task.sizes.only.neurons,
        }
        owners = [at for at in self.scores for _ in range(task.sizes.units(at))]
        order = torch.cat(list(self.scores.values())).argsort(descending=True, stable=True).tolist()
        costs = torch.tensor([prices[owners[i][1]] for i in order], dtype=torch.float64).cumsum(0)
        self.owners, self.shares = [owners[i] for i in order], costs / costs[-1]

    def score(self, at: SubBlock) -> torch.Tensor:
        """z-scores `[units]`."""
        sizes = self.task.sizes
        wifv = self.task.inputs[at].variance * layer(self.task.model, at).weight.detach().double().square().sum(0)
        if at[1] == "attn":
            wifv = wifv.square().reshape(sizes.only.heads, sizes.only.head_dim).mean(1)
        return (wifv - wifv.mean()) / wifv.std()

    def at(self, share: float) -> VisionTransformer:
        counts = dict.fromkeys(self.scores, 0)
        for at in self.owners[: int((self.shares <= share + 1e-12).sum())]:
            counts[at] += 1
        kept = {}
        for at, scores in self.scores.items():
            count = counts[at] if at[1] == "attn" else rounded(self.task, counts[at])
            kept[at] = scores.argsort(descending=True, stable=True)[:count]
        return slice_with_means(self.task, plan_of(kept, self.task.sizes))


METHODS = {"flap": Flap}
