"""NViT-style saliency (Yang et al., CVPR 2023, arXiv 2110.04869): (sum of g w)^2 per unit, less what it costs in latency.

A head is its rows of q, k and v and its columns of `proj`; MLP neurons go in the steps of the latency table. Units
go one after another, the lowest score first, over all layers at once; as in NViT the gradients are taken afresh
while the model shrinks. NViT also prunes the residual width and the width of q, k and v, and trains meanwhile;
here heads and neurons go, one-shot. The latency term is a share of the mean saliency rather than NViT's constant,
which belongs to one model and one GPU.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from edgeprune import vit
from edgeprune.compat import VisionTransformer
from rivals import SubBlock, Task, plan_of, predict_ms, sub_blocks

ROUNDS = 12  # how often the gradients are taken afresh between the dense and the empty model
LATENCY = 1.0  # weight of the latency term: mean saliency per mean saving


class NViT:
    def prepare(self, task: Task) -> None:
        """The whole way from the dense model to the smallest: every budget is a stop on it."""
        self.task = task
        kept = {at: list(range(task.sizes.units(at))) for at in sub_blocks(task.sizes)}
        self.stops = [(task.table.dense_ms, copied(kept))]
        fall = (task.table.dense_ms - predict_ms(task, ((0, 0, 0),) * task.sizes.blocks)) / ROUNDS
        for i in range(1, ROUNDS + 1):
            saliency = self.saliency(kept)
            while self.stops[-1][0] > task.table.dense_ms - i * fall and self.remove(kept, saliency):
                self.stops.append((self.predict(kept), copied(kept)))

    def model(self, aim_ms: float, target_ms: float) -> VisionTransformer:
        kept = next((kept for ms, kept in self.stops if ms <= aim_ms), self.stops[-1][1])
        return vit.slice_model(self.task.model, plan_of(kept, self.task.sizes))

    def predict(self, kept: dict[SubBlock, list[int]]) -> float:
        sizes = self.task.sizes
        return predict_ms(
            self.task,
            tuple((len(kept[i, "attn"]), sizes.only.head_dim, len(kept[i, "mlp"])) for i in range(sizes.blocks)),
        )

    def saliency(self, kept: dict[SubBlock, list[int]]) -> dict[SubBlock, dict[int, float]]:
        """(sum of g w)^2 of every unit that is left, mean over the batches."""
        model = vit.slice_model(self.task.model, plan_of(kept, self.task.sizes))
        totals = {at: torch.zeros(len(units)) for at, units in kept.items()}
        for pixels, labels in self.task.batches:
            model.zero_grad()
            F.cross_entropy(model(pixels), labels).backward()
            for at, units in kept.items():
                if units:
                    totals[at] += unit_sums(model.blocks[at[0]], at[1], self.task.sizes.unit_size(at)).square()
        count = len(self.task.batches)
        return {at: dict(zip(units, (totals[at] / count).tolist(), strict=True)) for at, units in kept.items()}

    def remove(self, kept: dict[SubBlock, list[int]], saliency: dict[SubBlock, dict[int, float]]) -> bool:
        """Take the step of lowest score out of `kept`; False when nothing is left."""
        steps = {at: self.step(at, kept[at], saliency[at]) for at in kept if kept[at]}
        if not steps:
            return False
        lost = np.array([sum(saliency[at][u] for u in units) for at, (units, _) in steps.items()])
        saved = np.array([ms for _, ms in steps.values()])
        scores = lost / max(lost.mean(), 1e-300) - LATENCY * saved / saved.mean()
        at = list(steps)[int(scores.argmin())]
        gone = set(steps[at][0])
        kept[at] = [u for u in kept[at] if u not in gone]
        return True

    def step(self, at: SubBlock, units: list[int], saliency: dict[int, float]) -> tuple[list[int], float]:
        """The least salient units that go together, and the milliseconds that saves: one head, or down to the next width."""
        table = self.task.table
        ranked = sorted(units, key=lambda u: saliency[u])
        if at[1] == "attn":
            return ranked[:1], float(table.stages[0].attn_ms[len(units)] - table.stages[0].attn_ms[len(units) - 1])
        i = table.stages[0].mlp_widths.index(len(units))
        return ranked[: len(units) - table.stages[0].mlp_widths[i - 1]], float(
            table.stages[0].mlp_ms[i] - table.stages[0].mlp_ms[i - 1]
        )


def unit_sums(block: torch.nn.Module, kind: str, unit_size: int) -> Tensor:
    """The sum of g w over all weights of each unit `[units]`."""
    if kind == "mlp":
        fc1, fc2 = block.mlp.fc1, block.mlp.fc2
        return (
            (fc1.weight.grad * fc1.weight).sum(1) + fc1.bias.grad * fc1.bias + (fc2.weight.grad * fc2.weight).sum(0)
        ).detach()
    qkv, proj = block.attn.qkv, block.attn.proj
    rows = (qkv.weight.grad * qkv.weight).sum(1)
    if qkv.bias is not None:
        rows = rows + qkv.bias.grad * qkv.bias
    columns = rows.reshape(3, -1).sum(0) + (proj.weight.grad * proj.weight).sum(0)
    return columns.reshape(-1, unit_size).sum(1).detach()


def copied(kept: dict[SubBlock, list[int]]) -> dict[SubBlock, list[int]]:
    return {at: list(units) for at, units in kept.items()}


METHODS = {"nvit": NViT}
