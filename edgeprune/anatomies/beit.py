"""BEiT and BEiTv2: relative position bias per block or shared, biases of queries and values apart."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from edgeprune.anatomies import _parts
from edgeprune.compat import Beit, VisionTransformer

CLASSES = (Beit,)
SHARED = "rel_pos_bias.relative_position_bias_table"


def obstacle(model: Any) -> str:
    return _parts.obstacle(model.blocks, lambda block: "")


def rewrite(model: Any) -> VisionTransformer:
    return _parts.around(model, [_block(old, model.rel_pos_bias) for old in model.blocks])


def _block(old: Any, shared: Any) -> Any:
    attn = old.attn
    index, table = (
        (owner.relative_position_index, owner.relative_position_bias_table)
        if (owner := attn if attn.relative_position_bias_table is not None else shared) is not None
        else (None, None)
    )
    head_dim = attn.proj.in_features // attn.num_heads
    positions = {} if table is None else {"index": index, "distances": len(table)}
    return _parts.block(old, _parts.attention(attn, head_dim, attn.q_bias is not None, **positions))


def rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A shared table becomes every block's own: added to the one it has."""
    state = _parts.standard_names(state)
    if SHARED not in state:
        return state
    shared = state.pop(SHARED)
    for block in sorted({found[0] for name in state if (found := re.match(r"blocks\.\d+\.", name))}):
        name = f"{block}attn.relative_position_bias_table"
        state[name] = shared + state.get(name, torch.zeros_like(shared))
    return state
