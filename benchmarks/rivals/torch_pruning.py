"""Torch-Pruning 1.6 (Fang et al., CVPR 2023, arXiv 2301.12900), the library as it is: `pip install 'edgeprune[bench]'`.

`tp-IMPORTANCE-SCOPE-HEADS`: importance l2, taylor, hessian or random; scope uniform (every layer alike), global (one
ranking) or, for narrow heads, isomorphic (one ranking per kind of layer, arXiv 2407.04616); heads go whole, or are
narrowed. The residual width stays, as for every method here. Called as in the library's own timm example, and then
so that it serves the library best: widths in multiples of 8 while that reaches, the attention's temperature kept when
heads narrow, ratios that end before a layer would vanish, as the library then leaves it whole.

The Hessian importance of the library counts the last sample only: `accumulate_grad` looks names up in a dictionary
of tensors. That is left as it is.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from edgeprune.compat import VisionTransformer
from edgeprune.errors import TargetUnavailable
from rivals import ByShare, Task, fits, predict_ms, shape_of

#: Of a global ranking: what a layer cannot give without vanishing, others give in the next step. Whole heads go in
#: one: the library fails on a step in which no head is due.
STEPS = 5
#: Widths are multiples of this; finer only where a latency cannot be reached otherwise. 16 leaves a head of 32
#: dimensions only two widths.
ROUND_TO = (8, 4, 1)
HESSIAN_IMAGES = 16  # the last one decides, see above; more change nothing


class TorchPruning(ByShare):
    def __init__(self, importance: str, scope: str, heads: str) -> None:
        self.importance, self.scope, self.whole = importance, scope, heads == "whole"

    def prepare(self, task: Task) -> None:
        super().prepare(task)
        try:
            import torch_pruning as tp
        except ImportError as error:
            raise TargetUnavailable(
                "Torch-Pruning is not installed; pip install 'edgeprune[bench]', or leave tp-* out of --methods"
            ) from error
        model: Any = copy.deepcopy(task.model)
        kinds = {"l2": "Magnitude", "taylor": "Taylor", "hessian": "Hessian", "random": ""}
        name = f"Group{kinds[self.importance]}Importance" if kinds[self.importance] else "RandomImportance"
        scorer = getattr(tp.importance, name)()
        if self.importance == "taylor":
            for name, parameter in model.named_parameters():
                parameter.grad = task.gradients[name].clone()
        if self.importance == "hessian":
            pixels, labels = task.batches[-1]
            for image, label in zip(pixels[-HESSIAN_IMAGES:], labels[-HESSIAN_IMAGES:], strict=True):
                model.zero_grad()
                F.cross_entropy(model(image[None]), label[None]).backward()
                scorer.accumulate_grad(model)
        self.scored = model, scorer  # copied together: the scorer looks things up by the model's tensors

    def model(self, aim_ms: float, target_ms: float) -> VisionTransformer:
        tried = []
        for self.setting in ROUND_TO:
            tried.append(super().model(aim_ms, target_ms))
            if fits(self.task, tried[-1], aim_ms):
                return tried[-1]
        return min(tried, key=lambda model: predict_ms(self.task, shape_of(model)))

    def at(self, share: float) -> VisionTransformer:
        import torch_pruning as tp

        if share >= 1:
            return copy.deepcopy(self.task.model)
        sizes, ratio = self.task.sizes, 1 - share
        model, scorer = copy.deepcopy(self.scored)
        for parameter, original in zip(model.parameters(), self.scored[0].parameters(), strict=True):
            parameter.grad = None if original.grad is None else original.grad.clone()  # deepcopy leaves them behind
        torch.manual_seed(self.task.seed)  # the random importance draws from the global generator
        fixed = [model.patch_embed.proj, model.head]
        for block in model.blocks:
            fixed += [block.attn.proj, block.mlp.fc2]
        narrowest = 1 - min(self.setting, sizes.only.head_dim) / sizes.only.head_dim
        # Where a layer would lose everything the library leaves it whole: the ratio that is given ends before.
        own = {block.attn.qkv: min(ratio, narrowest) for block in model.blocks} if self.scope == "uniform" else {}
        steps = 1 if self.scope == "uniform" or self.whole else STEPS
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of parameters that no layer wraps: they belong to the residual width
            pruner = tp.pruner.BasePruner(
                model,
                torch.zeros(1, *sizes.image),
                importance=scorer,
                global_pruning=self.scope != "uniform",
                isomorphic=self.scope == "isomorphic",
                pruning_ratio=ratio,
                pruning_ratio_dict=None if self.whole else own,
                iterative_steps=steps,
                head_pruning_ratio=min(ratio, 1 - 1 / sizes.only.heads),
                prune_num_heads=self.whole,
                prune_head_dims=not self.whole,
                num_heads={block.attn.qkv: block.attn.num_heads for block in model.blocks},
                ignored_layers=fixed,
                round_to=self.setting,
                in_channel_groups={},  # its defaults are dictionaries that it then writes to
                out_channel_groups={},
            )
            for _ in range(steps):
                pruner.step()
        for block in model.blocks:
            repair(block.attn, self.whole)
        model.zero_grad(set_to_none=True)
        return model.eval()


@torch.no_grad()
def repair(attn: Any, whole: bool) -> None:
    """timm's attention told of its new sizes; the library knows only the linear layers."""
    inner = attn.proj.in_features
    if inner == attn.attn_dim:
        return
    if whole:
        attn.num_heads = inner // attn.head_dim
    else:
        narrowed = inner // attn.num_heads
        # Attention divides by the root of the width it now has; the weights were trained with the one they had.
        attn.qkv.weight[:inner] *= (narrowed / attn.head_dim) ** 0.5
        if attn.qkv.bias is not None:
            attn.qkv.bias[:inner] *= (narrowed / attn.head_dim) ** 0.5
        attn.head_dim, attn.scale = narrowed, narrowed**-0.5
    attn.attn_dim = inner


VARIANTS = [
    *itertools.product(("l2", "taylor", "hessian", "random"), ("uniform", "global"), ("whole", "narrow")),
    *itertools.product(("l2", "taylor"), ("isomorphic",), ("narrow",)),
]
METHODS = {f"tp-{'-'.join(variant)}": partial(TorchPruning, *variant) for variant in VARIANTS}
