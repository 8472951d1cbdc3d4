"""Who tunes, and on what: this process alone, or the processes that `accelerate launch` started, as one group."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgeprune import products
from edgeprune.errors import UsageError
from edgeprune.latency import device


@dataclass
class Group:
    """One process on its own; also what several have in common.

    Parameters are the same in all processes: each computes the gradient of its share of a batch, and the sum
    over processes is what everyone steps by.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    accelerator: Any = None

    def total(self, values: Tensor) -> Tensor:
        """The sum of `values` over all processes, the same in each."""
        if self.accelerator is None:
            return values
        total: Tensor = self.accelerator.reduce(values, "sum")
        return total

    def all(self, here: bool) -> bool:
        """Whether it is so in all processes."""
        return here if self.size == 1 else int(self.total(torch.tensor([float(here)], device=self.device))) == self.size

    def leads(self, here: bool) -> bool:
        """What is so in the first process."""
        if self.size == 1:
            return here
        return bool(self.total(torch.tensor([float(here and not self.rank)], device=self.device)))

    def average_gradients(self, parameters: Iterable[nn.Parameter], count: int, loss: Tensor | None) -> float:
        """Divide the gradients of summed losses by the images of all processes; returns the mean loss.

        `count` images and their summed `loss` are this process's share.
        """
        parameters = list(parameters)
        value = torch.zeros(()) if loss is None else loss.detach()
        facts = torch.stack([value.double().to(self.device), torch.tensor(float(count), device=self.device).double()])
        summed, images = self.total(facts).tolist()
        if self.size > 1:
            flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
            parts = self.total(flat).split([p.numel() for p in parameters])
            for p, part in zip(parameters, parts, strict=True):
                p.grad = part.view_as(p).clone()
        for p in parameters:
            if p.grad is not None:
                p.grad /= max(images, 1.0)
        return float(summed / max(images, 1.0))


def alone() -> Group:
    """This process, on the GPU if there is one."""
    return Group(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def launched() -> Group:
    """The group that `accelerate launch` started this process in. Call it once per process."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedType

    accelerator = Accelerator()
    kind = accelerator.distributed_type
    if kind not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise UsageError(
            f"edgeprune tunes with every process holding the whole model, not under {kind.value}; "
            "choose multi-GPU or multi-CPU in `accelerate config`"
        )
    return Group(accelerator.device, accelerator.process_index, accelerator.num_processes, accelerator)


def loader_workers(where: torch.device) -> int:
    """Processes that decode images: none beside a CPU that trains, as training leaves it no idle core."""
    return 0 if where.type == "cpu" else min(8, device.affinity() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def has_bfloat16(where: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 matrices itself."""
    if where.type == "cuda":
        return torch.cuda.get_device_capability(where) >= (8, 0)
    return products.has_bfloat16()
