"""LRP: how relevant a unit's output is to the prediction (Pruning by Explaining, Yeom et al., arXiv 1912.08881).

Layer-wise relevance propagation hands the logit of the predicted class down from layer to layer, each input of a layer
getting the share that it has in the output, R_i = sum_j x_i W_ji / (sum_k x_k W_jk + b_j) R_j. With x the columns of
a unit in the input of `proj` or `fc2`, and E the mean over at most 256 calibration images,

    error(level) = sum over the removed units of E| sum over tokens and columns of R |.

In a Transformer (Ali et al., arXiv 2202.07304) attention weights and the standard deviations of LayerNorm count as
constants, as do the gates of SwiGLU, and GELU hands on what it gets. Everything is then linear in its input, and R = x dz/dx in a model where
those factors are detached: exactly the rule above, in one backward pass. What is relevant stays the same from layer to
layer but for what biases take. Needs activations and gradients, no labels.

Adapted: the paper's z+ rule, for ReLU networks, is replaced by the signed rule (LRP-0), as GELU and residual streams
have both signs; hence sizes, taken once an image is summed over. The paper explains the labelled class, this the
predicted. Left out: AttnLRP (arXiv 2402.05602), which lets relevance through softmax to queries and keys, and its gamma
rule; a model pooled by another attention than its blocks' is explained as if that were differentiable (gradient x input).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from edgeprune import saliency, vit
from edgeprune.compat import VisionTransformer
from edgeprune.criteria import SCORED, Evidence
from edgeprune.errors import UsageError
from edgeprune.types import Levels

NEEDS = ("activations", "gradients", "classes")


def score(evidence: Evidence) -> list[Levels]:
    totals = {at: torch.zeros(evidence.sizes.units(at)).double() for at in evidence.moments}
    images = 0
    with (
        evidence.console.progress("relevance", min(SCORED, evidence.images), "images") as advance,
        detached(evidence.model),
    ):
        for pixels, _ in saliency.first(evidence):
            found = saliency.features(evidence.model, pixels, evidence.moments, predicted)
            for at, (x, g) in found.items():
                relevance = (x * g).double().sum(1)  # [n, inputs]
                totals[at] += relevance.unflatten(1, (len(totals[at]), -1)).sum(2).abs().sum(0)
            images += len(pixels)
            advance(len(pixels), "")
    return saliency.levels(evidence, {at: total / images for at, total in totals.items()})


def predicted(logits: Tensor) -> Tensor:
    """The logits of the predicted classes, added up over images."""
    return logits.max(1).values.sum()


@contextmanager
def detached(model: VisionTransformer) -> Iterator[None]:
    """Gradients that take attention weights, standard deviations and the factors of activations for constants.

    What the model computes is unchanged.
    """
    norms = {name: module for name, module in model.named_modules() if _normalises(name)}
    for name, module in norms.items():
        if not isinstance(module, (nn.LayerNorm, nn.Identity)):
            raise UsageError(f"criterion 'lrp' knows LayerNorm alone, and '{name}' is a {type(module).__name__}")
    hooks = [module.register_forward_hook(_centred) for module in norms.values() if isinstance(module, nn.LayerNorm)]
    sizes = vit.anatomy(model)
    block: Any
    for block in model.blocks:
        hooks.append(block.attn.qkv.register_forward_hook(_values_only))
        hooks.append(block.mlp.act.register_forward_hook(_constant if sizes.gated else _handed_on))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _normalises(name: str) -> bool:
    """Whether relevance passes a normaliser of this name; it does not pass those of queries and keys."""
    own = name.split(".")[-1]
    return "norm" in own and own not in ("q_norm", "k_norm")


def _values_only(_: object, inputs: object, qkv: Tensor) -> Tensor:
    """Queries and keys, and so the attention weights, are constants."""
    q, k, v = qkv.chunk(3, dim=-1)
    return torch.cat([q.detach(), k.detach(), v], dim=-1)


def _constant(_: object, inputs: object, y: Tensor) -> Tensor:
    """What gates is a constant, as attention weights are: all relevance goes to what is gated."""
    return y.detach()


def _handed_on(_: object, inputs: tuple[Tensor], y: Tensor) -> Tensor:
    """y = x (y / x) with y / x constant, and 0 for 0 / 0."""
    (x,) = inputs
    return _same(y, x * (y / x).nan_to_num().detach())


def _centred(norm: Any, inputs: tuple[Tensor], y: Tensor) -> Tensor:
    """The standard deviation is a constant, the mean is not."""
    (x,) = inputs
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt().detach()
    scaled = scaled if norm.weight is None else scaled * norm.weight
    return _same(y, scaled if norm.bias is None else scaled + norm.bias)


def _same(y: Tensor, like: Tensor) -> Tensor:
    """The value of one, the gradient of the other."""
    return y.detach() + (like - like.detach())
