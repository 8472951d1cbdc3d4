"""timm's VisionTransformer (ViT, DeiT, DINOv2, CLIP, SigLIP, AIMv2): as it is, but for SwiGLU's two first layers, which become one."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from edgeprune.anatomies import _parts
from edgeprune.compat import Attention, Block, VisionTransformer, VisionTransformerDistilled

CLASSES = (VisionTransformer, VisionTransformerDistilled)

#: Why timm's other blocks cannot be sliced, sub-block by sub-block.
OTHERS = {
    "ParallelScalingBlock": "attention and MLP run in parallel and share their first layer",
    "DiffParallelScalingBlock": "attention and MLP run in parallel and share their first layer",
    "ParallelThingsBlock": "several attentions, and several MLPs, run in parallel",
    "ResPostBlock": "norms come after attention and MLP",
}


def obstacle(model: Any) -> str:
    return _parts.obstacle(model.blocks, _odd)


def _odd(block: Any) -> str:
    if type(block) is not Block:
        name = type(block).__name__
        return f"{name}, where {OTHERS[name]}" if name in OTHERS else name
    if type(block.attn) is not Attention:
        return type(block.attn).__name__
    return "" if block.attn.gate is None else "gated attention"


def rewrite(model: Any) -> VisionTransformer:
    for block in model.blocks:
        block.mlp = _parts.packed(block.mlp)
    return model


def rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return _parts.packed_names(state)
