"""Matrix products of float32 with operands rounded to bfloat16, where the hardware multiplies those faster.

Usually oneDNN rounds the operands of every product by itself; values and sums stay float32. It rounds nothing on x86 without
AMX (Zen 4: float32 107 GFLOP/s, asked to round 112, of bfloat16 277); there linear layers alone are rounded, and what comes
out of them, which makes a forward pass of DeiT-S 1.5 times as fast. A dense model diverges from itself by
3e-6 nats with AMX and by 9e-6 by hand (cifar10). Covariances stay exact, as they are inverted.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from edgeprune.latency import device

VECTORS, MATRICES = "avx512_bf16", "amx_bf16"
FLAGS = frozenset({VECTORS, MATRICES, "bf16"})


@functools.cache  # asked for every plan that is judged
def has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices itself."""
    return bool(device.cpu_flags() & FLAGS)


@functools.cache
def by_hand() -> bool:
    """Whether they must be rounded here, as oneDNN does so on x86 only with AMX."""
    flags = device.cpu_flags()
    return VECTORS in flags and MATRICES not in flags


@contextmanager
def rounded() -> Iterator[None]:
    """A context of rounded products, on a CPU that has them; elsewhere of exact ones."""
    if has_bfloat16() and by_hand():
        with _precision("ieee"), _Linears():
            yield
    else:
        with _precision("bf16" if has_bfloat16() else "ieee"):
            yield


@contextmanager
def exact() -> Iterator[None]:
    """A context of products as float32 has them, also within `rounded`, but for linear layers that are rounded by hand."""
    with _precision("ieee"):
        yield


class _Linears(TorchFunctionMode):
    """A context in which linear layers of float32 multiply in bfloat16; other products are exact."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and args[0].dtype == torch.float32:
            return _linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x.bfloat16(), weight.bfloat16(), None if bias is None else bias.bfloat16()).float()


@contextmanager
def _precision(name: str) -> Iterator[None]:
    matmul: Any = getattr(torch.backends.mkldnn, "matmul", None)
    if matmul is None:  # before torch 2.9 oneDNN rounds nothing
        yield
        return
    before = matmul.fp32_precision
    matmul.fp32_precision = name
    try:
        yield
    finally:
        matmul.fp32_precision = before
