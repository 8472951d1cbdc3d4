"""Attention that depends on where tokens are: rotated, with a bias by distance, within windows."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeprune.compat import Attention


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
        split = self.qkv(x[:, self.order]).reshape(x.shape[0], windows, self.window, 3, self.num_heads, self.head_dim)
        # windows count as heads, so that the product of all has the four dimensions that runtimes know
        queries, keys, values = split.permute(3, 0, 1, 4, 2, 5).flatten(2, 3).unbind(0)
        dropout = self.attn_drop.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=self.bias(), dropout_p=dropout)
        mixed = mixed.clone(memory_format=torch.contiguous_format).unflatten(1, (windows, self.num_heads))  # see above
        mixed = mixed.transpose(2, 3).reshape(x.shape[0], len(self.order), -1)
        return self.proj_drop(self.proj(mixed[:, self.back]))

    def bias(self) -> Tensor:
        """What is added to the scores, `[1, windows * heads, window, window]`."""
        shared = cast(Tensor, super().bias())
        windows = len(self.order) // self.window
        own = shared.expand(windows, -1, -1, -1) if self.mask is None else shared + self.mask[:, None]
        return own.flatten(0, 1)[None]


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
