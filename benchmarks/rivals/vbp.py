"""VBP, variance-based pruning (ICCV 2025, arXiv 2507.12988): MLP neurons of least variance after GELU, mean folded.

b2 += W2_pruned mu. Attention stays as it is, so high speed-ups are out of its reach: then the row says so.
"""

from __future__ import annotations

import torch

from edgeprune.compat import VisionTransformer
from rivals import ByShare, Task, plan_of, rounded, slice_with_means


class Vbp(ByShare):
    def prepare(self, task: Task) -> None:
        super().prepare(task)
        self.variances = torch.stack([task.inputs[i, "mlp"].variance for i in range(task.sizes.blocks)])

    def at(self, share: float) -> VisionTransformer:
        sizes = self.task.sizes
        count = round(share * self.variances.numel())
        ranked = self.variances.flatten().argsort(descending=True, stable=True)[:count]
        counts = torch.bincount(ranked // sizes.only.neurons, minlength=sizes.blocks).tolist()
        kept = {(i, "attn"): range(sizes.only.heads) for i in range(sizes.blocks)}
        for i, variances in enumerate(self.variances):
            kept[i, "mlp"] = variances.argsort(descending=True, stable=True)[: rounded(self.task, counts[i])].tolist()
        return slice_with_means(self.task, plan_of(kept, sizes))


METHODS = {"vbp": Vbp}
