"""ZipLM (Kurtic et al., NeurIPS 2023, arXiv 2302.04089) one-shot, as published.

Structured OBS with H = X X^T / n, not centred, damped by 1e-2 of its mean diagonal; biases stay as they are. Error of
a level: ||(W' - W) X||^2 / ||W X||^2, 1 for a removed sub-block. Levels are chosen by a dynamic programme over the
latency table; its error terms are multiplied by coefficients that SPDY's search (arXiv 2201.13096) finds: random
draws, then a local search, each candidate scored by the calibration loss of the stitched model.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from edgeprune import obs, solve, vit
from edgeprune.compat import VisionTransformer
from edgeprune.errors import Infeasible
from rivals import SubBlock, Task, layer, plan_of, sub_blocks, units_of

DAMPING = 1e-2
RANDOM, LOCAL = 50, 50  # candidates; the paper has about 1,000, each of which costs a forward pass over the images
IMAGES = 256  # that score a candidate
REDRAWN = 0.1  # share of the coefficients that a step of the local search draws again


class ZipLM:
    def prepare(self, task: Task) -> None:
        self.task = task
        self.hessians, self.orders, self.priors = {}, {}, {}
        for at in sub_blocks(task.sizes):
            second = task.inputs[at].second
            self.hessians[at] = h = second + DAMPING * second.diagonal().mean() * torch.eye(len(second)).double()
            weight = layer(task.model, at).weight.detach().double()
            self.orders[at], errors = obs.removal_order(weight, h, task.sizes.unit_size(at))
            self.priors[at] = np.append(np.array(errors[:-1]) / float(((weight @ h) * weight).sum()), 1.0)
        self.coefficients: dict[float, np.ndarray] = {}
        self.weights: dict[tuple[SubBlock, int], Tensor] = {}

    def model(self, aim_ms: float, target_ms: float) -> VisionTransformer:
        if target_ms not in self.coefficients:
            self.coefficients[target_ms] = self.search(target_ms)
        return self.stitch(self.choose(self.coefficients[target_ms], aim_ms))

    def grid(self, at: SubBlock) -> tuple[int, ...]:
        """How many units may be kept, ascending."""
        return tuple(range(self.task.sizes.only.heads + 1)) if at[1] == "attn" else self.task.table.stages[0].mlp_widths

    def choose(self, coefficients: np.ndarray, budget_ms: float) -> tuple[int, ...]:
        """How many units every sub-block keeps: the dynamic programme."""
        table, grids = self.task.table, [self.grid(at) for at in self.priors]
        errors = [
            c * np.array([self.priors[at][self.task.sizes.units(at) - kept] for kept in grid])
            for c, at, grid in zip(coefficients, self.priors, grids, strict=True)
        ]
        costs = [
            np.asarray(table.stages[0].attn_ms if at[1] == "attn" else table.stages[0].mlp_ms) for at in self.priors
        ]
        try:
            picked = solve.solve(errors, costs, budget_ms - table.base_ms)
        except Infeasible:
            picked = (0,) * len(grids)
        return tuple(grid[i] for grid, i in zip(grids, picked, strict=True))

    def search(self, budget_ms: float) -> np.ndarray:
        """SPDY: the coefficients `[sub-blocks]` whose plan has the least calibration loss."""
        rng = np.random.default_rng(self.task.seed)
        seen: dict[tuple[int, ...], float] = {}

        def loss(coefficients: np.ndarray) -> float:
            chosen = self.choose(coefficients, budget_ms)
            if chosen not in seen:
                seen[chosen] = self.task.loss(self.stitch(chosen), IMAGES)
            return seen[chosen]

        best = np.ones(len(self.priors))
        least = loss(best)
        for step in range(RANDOM + LOCAL):
            trial = rng.random(len(best))
            if step >= RANDOM:
                redrawn = rng.permutation(len(best)) < max(1, round(REDRAWN * len(best)))
                trial = np.where(redrawn, trial, best)
            found = loss(trial)
            if found < least:
                best, least = trial, found
        return best

    @torch.no_grad()
    def stitch(self, chosen: tuple[int, ...]) -> VisionTransformer:
        """The model that keeps so many units in every sub-block, with the weights OBS leaves them."""
        counts = dict(zip(self.priors, chosen, strict=True))
        plan = plan_of({at: order[len(order) - counts[at] :] for at, order in self.orders.items()}, self.task.sizes)
        model = vit.slice_model(self.task.model, plan)
        for at, count in counts.items():
            if 0 < count < self.task.sizes.units(at):
                if (at, count) not in self.weights:
                    self.weights[at, count] = self.survivors(at, units_of(plan, at))
                layer(model, at).weight.copy_(self.weights[at, count])
        return model

    def survivors(self, at: SubBlock, units: tuple[int, ...]) -> Tensor:
        """Least squares on the kept columns: what the updates of OBS end in."""
        kept, h = vit.columns(units, self.task.sizes.unit_size(at)), self.hessians[at]
        weight = layer(self.task.model, at).weight.detach().double()
        return torch.linalg.solve(h[kept][:, kept], h[kept] @ weight.T).T.float()


METHODS = {"ziplm": ZipLM}
