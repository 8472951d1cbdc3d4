"""What families are rewritten with: attention, packed gates, merged patches, a stem around blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeprune.anatomies._positions import PositionalAttention, WindowAttention
from edgeprune.compat import Attention, Block, GluMlp, LayerScale, Mlp, SwiGLU, VisionTransformer

MLPS = (Mlp, GluMlp, SwiGLU)


def obstacle(blocks: Iterable[Any], odd: Callable[[Any], str]) -> str:
    """The first block that cannot be rewritten, in words: for its family's own reason, its MLP, or a norm inside; or ""."""
    for i, block in enumerate(blocks):
        if found := odd(block) or _odd_mlp(block.mlp) or _inner_norm(block):
            return f"block {i} has {found}"
    return ""


def _odd_mlp(mlp: nn.Module) -> str:
    return "" if type(mlp) in MLPS else type(mlp).__name__


def _inner_norm(block: Any) -> str:
    if isinstance(getattr(block.attn, "norm", nn.Identity()), nn.Identity):
        return ""
    return "a norm inside attention, whose mean and variance couple all heads: none can go alone"


class PatchMerging(nn.Module):
    """Swin's: each 2 x 2 patches of a grid become one, of another width. The parts are timm's."""

    norm: nn.Module
    reduction: nn.Module

    def __init__(self, old: nn.Module, grid: tuple[int, int]) -> None:
        super().__init__()
        self._modules.update(old._modules)
        self.grid = grid

    @property
    def tokens(self) -> int:
        """That leave it."""
        height, width = self.grid
        return -(-height // 2) * -(-width // 2)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, height * width, channels]` -> `[n, tokens, channels of the next stage]`."""
        height, width = self.grid
        x = x.reshape(x.shape[0], height, width, -1)
        if height % 2 or width % 2:
            x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        rows, cols = -(-height // 2), -(-width // 2)
        x = x.reshape(x.shape[0], rows, 2, cols, 2, -1).permute(0, 1, 3, 4, 2, 5).reshape(x.shape[0], rows * cols, -1)
        return self.reduction(self.norm(x))


class MergingBlock(Block):
    """The first block of a stage: patches are merged, then it is a block like the others."""

    merge: PatchMerging

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return super().forward(self.merge(x))


def padded(rope: Tensor, prefix: int) -> Tensor:
    """Sines and cosines `[patches, 2 * head_dim]` for all tokens: the first `prefix` are not rotated."""
    sines, cosines = rope.chunk(2, -1)
    still = torch.zeros(prefix, sines.shape[-1]), torch.ones(prefix, sines.shape[-1])
    return torch.cat([torch.cat([still[0], sines]), torch.cat([still[1], cosines])], -1)


def attention(old: Any, head_dim: int, qkv_bias: bool, **positions: Any) -> Attention:
    """An attention with one `qkv`, around what the old one has of norms and dropout; on meta but for `positions`."""
    with torch.device("meta"):
        sizes = (old.proj.out_features, old.num_heads, head_dim)
        if "order" in positions:
            made: Any = WindowAttention(*sizes, qkv_bias, **positions)
        elif any(value is not None for value in positions.values()):
            made = PositionalAttention(*sizes, qkv_bias, **positions)
        else:
            made = Attention(*sizes, qkv_bias=qkv_bias)
    for name in ("q_norm", "k_norm", "attn_drop", "proj", "proj_drop"):
        if hasattr(old, name):
            setattr(made, name, getattr(old, name))
    return made


def packed(mlp: nn.Module) -> nn.Module:
    """SwiGLU's two first layers as one, which gates itself; another MLP as it is."""
    if not isinstance(mlp, SwiGLU):
        return mlp
    width, inputs = mlp.fc1_g.weight.shape
    with torch.device("meta"):
        made: Any = GluMlp(inputs, 2 * width, bias=(mlp.fc1_g.bias is not None, True), gate_last=False)
    for name in ("act", "drop1", "norm", "fc2", "drop2"):
        setattr(made, name, getattr(mlp, name))
    return made


def block(old: Any, attn: Attention, merge: PatchMerging | None = None) -> Block:
    """timm's Block of an old one's norms and MLP; LayerScale for `gamma_1` and `gamma_2`, on meta."""
    width = old.norm1.weight.shape[0]
    with torch.device("meta"):
        made: Any = Block(width, 1) if merge is None else MergingBlock(width, 1)
        gammas = (getattr(old, "gamma_1", None), getattr(old, "gamma_2", None))
        scales = [nn.Identity() if gamma is None else LayerScale(width, old.init_values) for gamma in gammas]
    made.attn, made.mlp, (made.ls1, made.ls2) = attn, packed(old.mlp), scales
    for name in ("norm1", "norm2", "drop_path1", "drop_path2"):
        setattr(made, name, getattr(old, name))
    if merge is not None:
        made.merge = merge
    return made


def around(model: Any, blocks: Iterable[nn.Module]) -> VisionTransformer:
    """A VisionTransformer of a model's own stem, last norms and classifier, with these blocks between."""
    attn_pool = getattr(model, "attn_pool", None)
    with torch.device("meta"):
        made: Any = VisionTransformer(
            embed_dim=model.patch_embed.proj.out_channels, num_heads=1, depth=0, num_classes=model.num_classes, weight_init="skip",
            in_chans=model.patch_embed.proj.in_channels, global_pool="token" if attn_pool is None else "", class_token=True,
            no_embed_class=getattr(model, "no_embed_class", False), pool_include_prefix=attn_pool is not None,
        )  # fmt: skip
    reg_token = getattr(model, "reg_token", None)
    made.global_pool, made.attn_pool = model.global_pool, attn_pool
    made.cls_token, made.reg_token = getattr(model, "cls_token", None), reg_token
    made.pos_embed = getattr(model, "pos_embed", None)
    made.num_features = getattr(model, "num_features", made.num_features)
    made.num_reg_tokens = 0 if reg_token is None else reg_token.shape[1]
    made.has_class_token, made.num_prefix_tokens = made.cls_token is not None, getattr(model, "num_prefix_tokens", 0)
    made.dynamic_img_size = getattr(model, "dynamic_img_size", False) and made.pos_embed is not None
    for name in ("patch_embed", "norm", "head"):
        setattr(made, name, getattr(model, name))
    for name in ("norm_pre", "pos_drop", "fc_norm", "head_drop"):
        setattr(made, name, getattr(model, name, nn.Identity()))
    for name in ("pretrained_cfg", "default_cfg"):  # only there if timm's registry made the model
        if hasattr(model, name):
            setattr(made, name, getattr(model, name))
    made.blocks = nn.Sequential(*blocks)
    return made


def joined(state: dict[str, Tensor], parts: tuple[str | None, ...], whole: str) -> dict[str, Tensor]:
    """`X.a`, `X.b` as one `X.whole`, row after row; None stands for zeros. Where parts are missing nothing is joined."""
    first = parts[0]
    for name in [name for name in state if name.endswith(f".{first}")]:
        stem = name.removesuffix(str(first))
        own = [part and stem + part for part in parts]
        if all(part is None or part in state for part in own):
            tensors = [torch.zeros_like(state[name]) if part is None else state[part] for part in own]
            state = {key: value for key, value in state.items() if key not in own} | {stem + whole: torch.cat(tensors)}
    return state


def renamed(state: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    """`X.old` as `X.new`."""
    return {
        name.removesuffix(old) + new if name.endswith(f".{old}") else name: tensor for name, tensor in state.items()
    }


def standard_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What BEiT and its descendants name otherwise than VisionTransformer: queries, keys, values, gates, LayerScale."""
    separate = [f"attn.{which}_proj.weight" for which in "qkv"]
    state = joined(state, tuple(separate), "attn.qkv.weight")
    state = joined(state, ("attn.q_bias", None, "attn.v_bias"), "attn.qkv.bias")
    state = joined(state, ("attn.q_proj.bias", "attn.k_proj.bias", "attn.v_proj.bias"), "attn.qkv.bias")
    state = joined(state, ("attn.q_proj.bias", None, "attn.v_proj.bias"), "attn.qkv.bias")
    for scale in "12":
        state = renamed(state, f"gamma_{scale}", f"ls{scale}.gamma")
    return packed_names(state)


def packed_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of `packed`."""
    for kind in ("weight", "bias"):
        state = joined(state, (f"mlp.fc1_g.{kind}", f"mlp.fc1_x.{kind}"), f"mlp.fc1.{kind}")
    return state
