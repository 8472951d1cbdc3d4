"""What families are rewritten with: an attention that knows where its tokens are, packed gates, a stem around blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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


class PositionalAttention(Attention):
    """timm's Attention, but where tokens are matters: queries and keys are rotated, scores get a bias per head.

    rope: `[tokens, 2 * head_dim]`, sines and cosines, None for no rotation; `rotate_half` is their layout. index:
    `[tokens, tokens]`, the row of the table `[distances, heads]` that is added to a score, None for no bias.
    """

    rope: Tensor | None
    turn: Tensor | None
    relative_position_index: Tensor | None
    relative_position_bias_table: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int,
        qkv_bias: bool,
        *,
        rope: Tensor | None = None,
        rotate_half: bool = False,
        index: Tensor | None = None,
        distances: int = 0,
    ) -> None:
        super().__init__(dim, num_heads, head_dim, qkv_bias=qkv_bias)
        self.register_buffer("rope", rope, persistent=False)  # both follow from the architecture
        self.register_buffer("relative_position_index", index, persistent=False)
        self.register_buffer("turn", None if rope is None else quarter_turn(head_dim, rotate_half), persistent=False)
        table = None if index is None else nn.Parameter(torch.empty(distances, num_heads))
        self.register_parameter("relative_position_bias_table", table)

    def reset_parameters(self) -> None:
        """No bias, which is what timm begins with; the layers within have their own."""
        if self.relative_position_bias_table is not None:
            nn.init.zeros_(self.relative_position_bias_table)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        split = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, self.head_dim)
        queries, keys, values = split.permute(2, 0, 3, 1, 4).unbind(0)
        queries, keys = self.q_norm(queries), self.k_norm(keys)
        if self.rope is not None:
            queries, keys = self.rotated(queries), self.rotated(keys)
        dropout = self.attn_drop.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(
            queries, keys, values.to(queries), attn_mask=self.bias(), dropout_p=dropout
        )
        # a copy: which memory layout the attention returns differs between the exporter's steps where there is a bias
        return self.proj_drop(self.proj(mixed.transpose(1, 2).clone(memory_format=torch.contiguous_format).flatten(2)))

    def rotated(self, x: Tensor) -> Tensor:
        """Queries or keys `[n, heads, tokens, head_dim]`, each pair of channels turned by an angle of its own."""
        sines, cosines = cast(Tensor, self.rope).chunk(2, -1)
        return x * cosines + (x @ cast(Tensor, self.turn)) * sines

    def bias(self) -> Tensor | None:
        """What is added to the scores, `[1, heads, tokens, tokens]`."""
        if self.relative_position_index is None:
            return None
        tokens = len(self.relative_position_index)
        rows = cast(Tensor, self.relative_position_bias_table)[self.relative_position_index.flatten()]
        return rows.view(tokens, tokens, -1).permute(2, 0, 1)[None]

    def keep_heads(self, heads: tuple[int, ...]) -> None:
        """Slice what there is per head, besides `qkv` and `proj`."""
        if self.relative_position_bias_table is not None:
            self.relative_position_bias_table = nn.Parameter(self.relative_position_bias_table[:, list(heads)].detach())

    def write_heads(self, heads: tuple[int, ...], small: PositionalAttention) -> None:
        """The reverse: take what a sliced attention has for these heads."""
        if self.relative_position_bias_table is not None:
            self.relative_position_bias_table[:, list(heads)] = cast(Tensor, small.relative_position_bias_table)


class WindowAttention(PositionalAttention):
    """Attention among the tokens of each window of a grid that may be shifted beforehand, with a bias per head (Swin).

    order: `[places]`, the token at each place once windows lie one after the other; where the grid is no multiple of the
    window, `tokens` stands for padding, of zeros. mask: `[windows, window, window]`, added to the scores, so that tokens
    which only the shift made neighbours do not attend to each other; None where nothing is shifted.
    """

    order: Tensor
    back: Tensor
    mask: Tensor | None

    def __init__(
        self, dim: int, num_heads: int, head_dim: int, qkv_bias: bool, *, order: Tensor, tokens: int,
        mask: Tensor | None, index: Tensor, distances: int,
    ) -> None:  # fmt: skip
        super().__init__(dim, num_heads, head_dim, qkv_bias, index=index, distances=distances)
        self.window, self.padded = len(index), len(order) > tokens
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("back", order.argsort(stable=True)[:tokens], persistent=False)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if self.padded:
            x = F.pad(x, (0, 0, 0, 1))
        windows = len(self.order) // self.window
        split = self.qkv(x[:, self.order]).reshape(len(x), windows, self.window, 3, self.num_heads, self.head_dim)
        # windows count as heads, so that the product of all has the four dimensions that runtimes know
        queries, keys, values = split.permute(3, 0, 1, 4, 2, 5).flatten(2, 3).unbind(0)
        dropout = self.attn_drop.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=self.bias(), dropout_p=dropout)
        mixed = mixed.clone(memory_format=torch.contiguous_format).unflatten(1, (windows, self.num_heads))  # see above
        mixed = mixed.transpose(2, 3).reshape(len(x), len(self.order), -1)
        return self.proj_drop(self.proj(mixed[:, self.back]))

    def bias(self) -> Tensor:
        """What is added to the scores, `[1, windows * heads, window, window]`."""
        shared = cast(Tensor, super().bias())
        windows = len(self.order) // self.window
        own = shared.expand(windows, -1, -1, -1) if self.mask is None else shared + self.mask[:, None]
        return own.flatten(0, 1)[None]


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
        x = x.reshape(len(x), height, width, -1)
        if height % 2 or width % 2:
            x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        rows, cols = -(-height // 2), -(-width // 2)
        x = x.reshape(len(x), rows, 2, cols, 2, -1).permute(0, 1, 3, 4, 2, 5).reshape(len(x), rows * cols, -1)
        return self.reduction(self.norm(x))


class MergingBlock(Block):
    """The first block of a stage: patches are merged, then it is a block like the others."""

    merge: PatchMerging

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return super().forward(self.merge(x))


def quarter_turn(head_dim: int, half: bool) -> Tensor:
    """What turns every pair of channels by 90 degrees, `[head_dim, head_dim]`; `half`: pairs are half a head apart.

    A matrix, since slices with strides, as timm has them, are slow: EVA-02 tiny took 27.8 instead of 36.1 ms in
    OpenVINO and 30.5 instead of 32.5 ms in ONNX Runtime (medians of 30 runs, one thread of an AMD EPYC).
    """
    channels = torch.arange(head_dim, device="cpu").reshape((2, -1) if half else (-1, 2))
    first, second = channels.unbind(0 if half else 1)
    turn = torch.zeros(head_dim, head_dim, device="cpu")
    turn[second, first], turn[first, second] = -1, 1
    return turn


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
