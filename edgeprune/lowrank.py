"""Finer attention: heads of fewer dimensions, by the ranks of what a head computes.

Of a head, only two products matter: queries times keys, a bilinear form of the inputs, and values times `proj`, a linear
map. Each is replaced by the closest one of a lower rank for the inputs that the model has: the singular value
decomposition of the product between whitening factors, in closed form (Eckart and Young; as in SVD-LLM, arXiv
2403.07378, with the bilinear form for queries and keys). What comes out is an attention whose heads have `rank`
dimensions instead of `head_dim`, plain in every other respect.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgeprune import obs, vit
from edgeprune.compat import VisionTransformer
from edgeprune.obs import Moments
from edgeprune.types import Plan

SHARES = (0.25, 0.5, 0.75)  # of a head's dimensions that are offered
STEP = 8  # ranks are multiples of this
DAMPING = 1e-4  # of the mean diagonal

#: (mean, covariance) of vectors.
MeanCovariance = tuple[Tensor, Tensor]


def ranks(head_dim: int) -> tuple[int, ...]:
    """The ranks that heads of so many dimensions may have, ascending, that number last."""
    lower = {max(STEP, STEP * round(share * head_dim / STEP)) for share in SHARES}
    return (*sorted(rank for rank in lower if rank < head_dim), head_dim)


def mark(model: VisionTransformer, plan: Plan) -> VisionTransformer:
    """Give the attentions of a sliced model the plan's ranks, in place, with weights that mean nothing; returns the model."""
    for block, keep in zip(model.blocks, plan.blocks, strict=True):
        if keep.rank is not None:
            _resize(vit.sub_block(block, "attn"), keep.rank)
    return model


def _resize(attn: Any, rank: int) -> None:
    """Cut the first dimensions out of every head, in place."""
    heads, dims = attn.num_heads, attn.head_dim
    first = vit.columns(tuple(range(heads)), dims).view(heads, dims)[:, :rank].flatten()
    rows = (torch.arange(3)[:, None] * heads * dims + first).flatten()
    attn.qkv, attn.proj = vit.linear(attn.qkv, rows=rows), vit.linear(attn.proj, cols=first)
    attn.head_dim, attn.attn_dim, attn.scale = rank, heads * rank, rank**-0.5


@contextlib.contextmanager
def watched(model: VisionTransformer) -> Iterator[dict[int, Moments]]:
    """Moments, by block, of what every attention reads while the model runs in this context; none where ranks stay."""
    found: dict[int, Moments] = {}
    hooks = []
    for i, block in enumerate(model.blocks if vit.anatomy(model).bilinear else ()):
        found[i] = Moments()

        def watch(_: nn.Module, x: tuple[Tensor, ...], own: Moments = found[i]) -> None:
            own.add(x[0])

        hooks.append(vit.first_layer(vit.sub_block(block, "attn"), "attn").register_forward_pre_hook(watch))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def reduce(attn: Any, rank: int, read: MeanCovariance, mixed: MeanCovariance) -> None:
    """Make an attention's heads `rank` dimensions wide, in place.

    read: of its inputs `[width]`; mixed: of the inputs of its `proj`, `[heads * head_dim]`, of these heads alone.
    """
    heads, dims = attn.num_heads, attn.head_dim
    width = attn.qkv.in_features
    weights = attn.qkv.weight.double().view(3, heads, dims, width)
    biases = None if attn.qkv.bias is None else attn.qkv.bias.double().view(3, heads, dims)
    factor = _factor(read, bias=biases is not None)
    inverse = torch.linalg.inv(factor)
    out, mean = attn.proj.weight.double().view(-1, heads, dims), mixed[0].double().view(heads, dims)
    new, ends, shift = [], [], torch.zeros(len(out), dtype=torch.float64)
    for h in range(heads):
        affine = weights[:, h] if biases is None else torch.cat([weights[:, h], biases[:, h, :, None]], -1)
        queries, keys = _bilinear(affine[0] * attn.scale, affine[1], factor, inverse, rank)
        own = slice(h * dims, (h + 1) * dims)
        onto, end = _linear(out[:, h], mixed[1][own, own].double(), rank)
        new.append(torch.stack([queries * rank**0.5, keys, onto @ affine[2]]))  # scores are divided by the root
        ends.append(end)
        shift += out[:, h] @ mean[h] - end @ (onto @ mean[h])
    joined = torch.stack(new, 1)  # [3, heads, rank, width (+ 1)]
    _resize(attn, rank)
    attn.qkv.weight.copy_(joined[..., :width].reshape(-1, width))
    if biases is not None:
        attn.qkv.bias.copy_(joined[..., width].flatten())
    attn.proj.weight.copy_(torch.cat(ends, 1))
    attn.proj.bias.add_(shift)


def of_heads(moments: MeanCovariance, heads: Sequence[int], head_dim: int) -> MeanCovariance:
    """Of the moments of the inputs of a dense `proj`, those of these heads."""
    kept = vit.columns(tuple(heads), head_dim)
    return moments[0][kept], moments[1][kept][:, kept]


def _factor(read: MeanCovariance, *, bias: bool) -> Tensor:
    """L of the second moments L L^T of the inputs, float64; with a bias, of the inputs with a 1 at their end."""
    mean, covariance = read[0].double(), read[1].double()
    if not bias:
        return torch.linalg.cholesky(obs.damped(covariance + torch.outer(mean, mean), DAMPING))
    factor = torch.linalg.cholesky(obs.damped(covariance, DAMPING))
    width = len(mean)
    whole = torch.zeros(width + 1, width + 1, dtype=torch.float64)
    whole[:width, :width], whole[:width, width], whole[width, width] = factor, mean, 1.0
    return whole  # no triangle, but whole @ whole.T is what it shall be


def _bilinear(queries: Tensor, keys: Tensor, factor: Tensor, inverse: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Two matrices `[rank, inputs]` whose product is closest to that of `queries` and `keys` `[dims, inputs]`."""
    left, small_left = torch.linalg.qr((queries @ factor).T)
    right, small_right = torch.linalg.qr((keys @ factor).T)
    u, s, v = torch.linalg.svd(small_left @ small_right.T)
    root = s[:rank].sqrt()
    return (left @ u[:, :rank] * root).T @ inverse, (right @ v[:rank].T * root).T @ inverse


def _linear(weight: Tensor, covariance: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`[rank, dims]` and `[outputs, rank]` whose product is closest to `weight` for inputs of this covariance.

    What is between them varies as much as the inputs do, dimension by dimension: ranges of int8 stay right.
    """
    factor = torch.linalg.cholesky(obs.damped(covariance, DAMPING))
    u, s, v = torch.linalg.svd(weight @ factor, full_matrices=False)
    spread = factor.square().sum(1).mean().sqrt()  # of an input, root mean square over the dimensions
    return spread * v[:rank] @ torch.linalg.inv(factor), u[:, :rank] * s[:rank] / spread
