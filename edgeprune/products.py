"""Matrix products of float32 with operands rounded to bfloat16, where the hardware multiplies those faster.

Values stay float32 and so do sums; only what is multiplied loses digits. A dense model diverges by 3e-6 nats from itself
(cifar10; digits 6e-7) when its products are rounded, a thousandth of what plans are told apart by. Covariances stay exact,
as they are inverted.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from edgeprune.latency import device

FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})


@functools.cache  # asked for every plan that is judged
def has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices itself."""
    return bool(device.cpu_flags() & FLAGS)


@contextmanager
def rounded() -> Iterator[None]:
    """A context of rounded products, on a CPU that has them; elsewhere of exact ones."""
    with _precision("bf16" if has_bfloat16() else "ieee"):
        yield


@contextmanager
def exact() -> Iterator[None]:
    """A context of products as float32 has them, also within `rounded`."""
    with _precision("ieee"):
        yield


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
