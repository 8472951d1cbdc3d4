"""Matrix products of float32 with operands rounded to bfloat16, where the hardware multiplies those faster.

With AMX, oneDNN rounds the operands of every product by itself, and values and sums stay float32. It does not where
bfloat16 is multiplied by vector instructions alone (AMD since Zen 4, Arm); there linear layers alone are rounded, what
comes out of them too, which makes DeiT-S 1.5 times as fast on a Zen 4. A dense model diverges by 3e-6 nats from itself with AMX
and by 6e-6 without (cifar10), a thousandth of what plans are told apart by. Covariances stay exact, as they are inverted.
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

AMX = "amx_bf16"
FLAGS = frozenset({"avx512_bf16", AMX, "bf16"})


@functools.cache  # asked for every plan that is judged
def has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices itself."""
    return bool(device.cpu_flags() & FLAGS)


@functools.cache
def has_amx() -> bool:
    """Whether it has matrix units for them, for which oneDNN rounds operands itself."""
    return AMX in device.cpu_flags()


@contextmanager
def rounded() -> Iterator[None]:
    """A context of rounded products, on a CPU that has them; elsewhere of exact ones."""
    if not has_bfloat16():
        with exact():
            yield
    elif has_amx():
        with _precision("bf16"):
            yield
    else:
        with _Linears():
            yield


@contextmanager
def exact() -> Iterator[None]:
    """A context of products as float32 has them, also within `rounded`, but for linear layers without AMX."""
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
    if matmul is None:  # before torch 2.9 all products are exact
        yield
        return
    before = matmul.fp32_precision
    matmul.fp32_precision = name
    try:
        yield
    finally:
        matmul.fp32_precision = before
