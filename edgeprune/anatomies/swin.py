"""Swin: attention within windows, every other time of a shifted grid; patches merge between four stages of other sizes."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from edgeprune.anatomies import _parts
from edgeprune.compat import SwinAttention, SwinTransformer, SwinTransformerBlock, VisionTransformer

CLASSES = (SwinTransformer,)
POOLS = ("avg", "max")


def obstacle(model: Any) -> str:
    if model.global_pool not in POOLS:
        return f"it pools by '{model.global_pool}', not by one of {', '.join(POOLS)} (global_pool)"
    if model.patch_embed.img_size is None:
        return "it has no image size, which its windows follow from (img_size)"
    return _parts.obstacle([block for stage in model.layers for block in stage.blocks], _odd)


def _odd(block: Any) -> str:
    if type(block) is not SwinTransformerBlock:
        return type(block).__name__
    return "" if type(block.attn) is SwinAttention else type(block.attn).__name__


def rewrite(model: Any) -> VisionTransformer:
    blocks, grid = [], model.patch_embed.grid_size
    for i, stage in enumerate(model.layers):
        merge = _parts.PatchMerging(stage.downsample, grid) if i else None
        grid = grid if merge is None else tuple(-(-size // 2) for size in grid)
        blocks += [_block(old, grid, None if j else merge) for j, old in enumerate(stage.blocks)]
    patches = model.patch_embed
    patches.flatten, patches.output_fmt = True, "NCHW"  # tokens in a row, as the others have them
    made: Any = _parts.around(model, blocks)
    made.head, made.head_drop = model.head.fc, model.head.drop
    return made


def _block(old: Any, grid: tuple[int, int], merge: _parts.PatchMerging | None) -> Any:
    attn = old.attn
    mask = old.get_attn_mask() if old.attn_mask is None else old.attn_mask
    positions = {
        "order": places(grid, old.window_size, old.shift_size), "tokens": grid[0] * grid[1], "mask": mask,
        "index": attn.relative_position_index, "distances": len(attn.relative_position_bias_table),
    }  # fmt: skip
    head_dim = attn.proj.in_features // attn.num_heads
    return _parts.block(old, _parts.attention(attn, head_dim, attn.qkv.bias is not None, **positions), merge)


def places(grid: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """Which token is at each place, window after window, once the grid is shifted and then padded to whole windows.

    What is padded has the number of tokens.
    """
    height, width = grid
    tokens = torch.arange(height * width).reshape(grid).roll((-shift[0], -shift[1]), (0, 1))
    tokens = F.pad(tokens, (0, -width % window[1], 0, -height % window[0]), value=height * width)
    rows = tokens.reshape(-1, window[0], tokens.shape[1] // window[1], window[1])
    return rows.transpose(1, 2).flatten()


def rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`layers.STAGE.blocks.BLOCK` as `blocks.NUMBER`, and what merges patches as a part of a stage's first block."""
    found = {
        (int(name[1]), int(name[2])) for key in state if (name := re.match(r"layers\.(\d+)\.blocks\.(\d+)\.", key))
    }
    numbers = {place: i for i, place in enumerate(sorted(found))}

    def renamed(key: str) -> str:
        if name := re.match(r"layers\.(\d+)\.(?:blocks\.(\d+)|downsample)\.(.+)", key):
            block = numbers[int(name[1]), int(name[2] or 0)]
            return f"blocks.{block}.{'' if name[2] else 'merge.'}{name[3]}"
        return key.replace("head.fc.", "head.") if key.startswith("head.fc.") else key

    return {renamed(key): tensor for key, tensor in state.items()}
