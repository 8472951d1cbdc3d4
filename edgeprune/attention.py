"""Attention written out, for training where torch's fused kernel is slow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class WrittenOut(TorchFunctionMode):
    """A context in which `scaled_dot_product_attention` is two products and a softmax.

    The backward pass of the fused kernel in bfloat16 on CPUs is what this is for: torch 2.13 takes 8 times as long for
    it as for the products (128 images, 4 heads of 32, 65 tokens, two threads with AMX: 93 ms and 12). The price is
    memory for `[n, heads, tokens, tokens]` per block.
    """

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        called = attention if function is F.scaled_dot_product_attention else function
        return called(*args, **(kwargs or {}))


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """What `scaled_dot_product_attention` computes of `[n, heads, tokens, head_dim]`, for the masks that ViTs use."""
    if is_causal or enable_gqa or (attn_mask is not None and not attn_mask.is_floating_point()):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-2, -1)
    if attn_mask is not None:
        scores = scores + attn_mask
    weights = scores.softmax(-1).to(value.dtype)
    return F.dropout(weights, dropout_p) @ value if dropout_p else weights @ value
