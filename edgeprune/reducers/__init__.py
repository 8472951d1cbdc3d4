"""Which patch tokens go on after a block's attention. One file per reducer; the file name is its name.

A reducer is a module with one function, `reduce(seen, patches) -> Reduction`: what it makes of one stream `[n, tokens, c]`,
`[n, prefix + patches, c]`, it makes of any other, so that the dense model's stream can be compared. Prefix tokens (class,
distillation, registers) come first and always stay. Everything has a static shape: it is exported as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from edgeprune import modules

#: `[n, tokens, c]` -> `[n, kept, c]`, the same tokens for every stream.
Reduction = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Seen:
    """What a reducer may look at: the attention of one block, and the residual stream after it."""

    stream: Tensor  # [n, tokens, width]
    queries: Tensor  # [n, heads, tokens, head_dim], scaled: their products with keys go into the softmax as they are
    keys: Tensor  # [n, heads, tokens, head_dim]
    prefix: int

    def attention(self) -> Tensor:
        """`[n, heads, tokens, tokens]`; rows sum to 1."""
        return (self.queries @ self.keys.transpose(-2, -1)).softmax(-1)


class Reducer(Protocol):
    __name__: str
    __doc__: str | None

    def reduce(self, seen: Seen, patches: int) -> Reduction: ...


def names() -> list[str]:
    return modules.names("reducer")


def get(name: str) -> Reducer:
    """The reducer module; UsageError with "did you mean" for an unknown name."""
    return cast(Reducer, modules.get("reducer", name))


def importance(seen: Seen) -> Tensor:
    """How much attention each patch receives `[n, patches]`, mean over heads: from the prefix tokens, which need but
    their own rows, or from all tokens where there are none.
    """
    if seen.prefix:
        rows = (seen.queries[:, :, : seen.prefix] @ seen.keys.transpose(-2, -1)).softmax(-1)
    else:
        rows = seen.attention()
    return rows.mean((1, 2))[:, seen.prefix :]


def keep(chosen: Tensor, prefix: int) -> Reduction:
    """The prefix tokens and the chosen patches `[n, patches]`, counted from the first patch."""

    def apply(stream: Tensor) -> Tensor:
        index = (chosen + prefix)[:, :, None].expand(-1, -1, stream.shape[-1])
        return torch.cat([stream[:, :prefix], stream.gather(1, index)], 1)

    return apply
