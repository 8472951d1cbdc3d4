"""timm's Eva: EVA, EVA-02, DINOv3, Perception Encoder and other ViTs with rotary position embedding."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from edgeprune.anatomies import _parts
from edgeprune.compat import AttentionRope, Eva, EvaAttention, EvaBlock, VisionTransformer

CLASSES = (Eva,)


def obstacle(model: Any) -> str:
    if model.rope_mixed:
        return "it has rotary frequencies that are learnt for every head (rope_type 'mixed')"
    if model.patch_drop is not None:
        return "it drops patches in training (patch_drop_rate)"
    if getattr(model.rope, "aug_active", False):
        return "it moves coordinates in training (rope_shift_coords, rope_jitter_coords, rope_rescale_coords)"
    return _parts.obstacle(model.blocks, _odd)


def _odd(block: Any) -> str:
    attn = block.attn
    if type(block) is not EvaBlock:
        return f"{type(block).__name__}, where norms come after attention and MLP"
    if type(attn) not in (EvaAttention, AttentionRope):
        return type(attn).__name__
    if attn.gate is not None:
        return "gated attention"
    if getattr(attn, "num_kv_groups", 1) > 1:
        return "grouped-query attention: heads share keys and values"
    return ""


def rewrite(model: Any) -> VisionTransformer:
    rope = None
    if model.rope is not None:
        found = model.rope.get_embed(shape=model.patch_embed.grid_size)  # of the model's own size, where it takes any
        rope = _parts.padded(found.detach(), model.num_prefix_tokens)
    return _parts.around(model, [_block(old, rope) for old in model.blocks])


def _block(old: Any, rope: Tensor | None) -> Any:
    attn = old.attn
    biased = attn.q_bias if isinstance(attn, EvaAttention) and attn.qkv is not None else (attn.qkv or attn.q_proj).bias
    positions = {} if rope is None else {"rope": rope, "rotate_half": attn.rotate_half}
    return _parts.block(old, _parts.attention(attn, attn.head_dim, biased is not None, **positions))


def rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return _parts.standard_names(state)
