"""Layers in bfloat16 while a model is only looked at, where the hardware multiplies such matrices.

Calibration, search and refit run models thousands of times. Inside `rounded` their sub-blocks compute as training in mixed
precision does (autocast, attention written out where gradients are asked for): of DeiT-S a forward pass then takes .28 and
one with gradients .31 of the time in float32 (AMX; with operands rounded inside of oneDNN it was .65 and .82). All else stays
float32: residual streams, logits, and covariances and what is solved with them, as they are inverted.
A dense model diverges from itself by 1e-5 nats (cifar10, 86.55 %), as much as by rounded operands alone.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from edgeprune.attention import WrittenOut
from edgeprune.latency import device

FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})

_rounded: ContextVar[bool] = ContextVar("rounded", default=False)


@functools.cache  # asked for every plan that is judged
def has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices itself."""
    return bool(device.cpu_flags() & FLAGS)


@contextmanager
def rounded() -> Iterator[None]:
    """A context in which what runs within `layers` may be rounded."""
    before = _rounded.set(has_bfloat16())
    try:
        yield
    finally:
        _rounded.reset(before)


@contextmanager
def layers() -> Iterator[None]:
    """Around layers of a model on the CPU, whose outputs may then be bfloat16: the caller makes them float32 again."""
    if not _rounded.get():
        yield
        return
    with torch.autocast("cpu", torch.bfloat16), WrittenOut() if torch.is_grad_enabled() else nullcontext():
        yield


def wide(x: Tensor) -> Tensor:
    """What layers made bfloat16 in float32; anything else as it is."""
    return x.float() if x.dtype == torch.bfloat16 else x


def exact() -> Any:
    """A context of products as float32 has them, also within `layers`, where statistics are taken."""
    return torch.autocast("cpu", enabled=False)
