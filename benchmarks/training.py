"""Training against the clock, for the models of the benchmark that are trained here: `teacher.py`, `reference.py`.

Images are decoded once and augmented in batches. The learning rate follows the clock, so a training of any length ends
annealed; several processes (`torchrun`) share every batch.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from edgeprune import api, config, data
from edgeprune.console import SILENT, Console
from edgeprune.tuning.group import Group, alone, launched
from edgeprune.tuning.precision import Precision

PAD = 4
CARD = "cifar10"


def setting(folder: Path, seed: int) -> tuple[config.ModelCard, Group]:
    """The card with its data in `folder`, and this process's group; random numbers begin anew."""
    torch.manual_seed(seed)
    keep_memory()
    return api.with_data(
        config.load_card(CARD), "folder", str(folder)
    ), launched() if "WORLD_SIZE" in os.environ else alone()


def keep_memory() -> None:
    """Have glibc keep what is freed: activations come and go every step, and new pages take time."""
    if sys.platform == "linux":
        allocator = ctypes.CDLL(None)
        mmap_threshold, trim_threshold, top_pad = -3, -1, -2  # M_... of malloc.h
        for name, value in ((mmap_threshold, 32 << 20), (trim_threshold, 2**31 - 1), (top_pad, 256 << 20)):
            getattr(allocator, "mallopt", lambda *_: 0)(name, value)  # other libraries have no such call


class Pictures:
    """Training images as uint8 on the device, cropped, flipped and scaled batch by batch."""

    def __init__(self, images: data.Images, transforms: dict[str, Any], device: torch.device) -> None:
        from torchvision.transforms.functional import pil_to_tensor

        parts = list(images.with_transform(pil_to_tensor).batches(1000))
        self.images = torch.cat([p for p, _ in parts]).to(device)
        self.labels = torch.cat([label for _, label in parts]).to(device)
        self.mean, self.std = (torch.tensor(transforms[k], device=device).view(1, 3, 1, 1) for k in ("mean", "std"))

    def take(self, pick: Tensor) -> tuple[Tensor, Tensor]:
        pick = pick.to(self.labels.device)
        return (augment(self.images[pick]) / 255 - self.mean) / self.std, self.labels[pick]


def augment(images: Tensor) -> Tensor:
    """A random crop of the reflected image and a random flip, for each image of the batch."""
    n, _, height, width = images.shape
    padded = F.pad(images.float(), (PAD,) * 4, mode="reflect")
    rows = torch.randint(0, 2 * PAD + 1, (n, 1), device=images.device) + torch.arange(height, device=images.device)
    cols = torch.randint(0, 2 * PAD + 1, (n, 1), device=images.device) + torch.arange(width, device=images.device)
    cols = torch.where(torch.rand(n, 1, device=images.device) < 0.5, cols, cols.flip(1))
    which = torch.arange(n, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[which, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)


def train(
    model: nn.Module, pictures: Pictures, loss: Callable[[Tensor, Tensor, float], Tensor],
    optimizers: list[torch.optim.Optimizer], rate: Callable[[float], float], group: Group, *,
    minutes: float, batch_size: int, seed: int, clip: float | None = None,
) -> None:  # fmt: skip
    """Train `model` in place for so many minutes.

    `loss` gets images, labels and the share of the time that is over, and returns the sum over the images. It runs
    under autocast where that is faster. `rate` makes of that share what learning rates are multiplied by.
    """
    parameters = [p for optimizer in optimizers for part in optimizer.param_groups for p in part["params"]]
    peaks = [[part["lr"] for part in optimizer.param_groups] for optimizer in optimizers]
    count = len(pictures.labels)
    console = SILENT if group.rank else Console()
    precision = Precision("training", "auto", count // batch_size, group.device, console)
    limit, began, epoch = 60 * minutes, time.monotonic(), 0
    torch.manual_seed(seed + group.rank)  # of what is drawn for its own images
    model.train()
    while True:
        order, losses = torch.randperm(count, generator=torch.Generator().manual_seed(seed + epoch)), []
        for batch in order.split(batch_size)[: count // batch_size]:
            done = _first((time.monotonic() - began) / limit, group)
            if done >= 1:
                model.eval()
                return
            for optimizer, own in zip(optimizers, peaks, strict=True):
                for part, peak in zip(optimizer.param_groups, own, strict=True):
                    part["lr"] = peak * rate(done)
                optimizer.zero_grad(set_to_none=True)
            x, labels = pictures.take(batch[group.rank :: group.size])
            with precision.run(len(labels)):
                with precision.autocast():
                    total = loss(x, labels, done)
                total.backward()
            losses.append(group.average_gradients(parameters, len(labels), total))
            if clip:
                torch.nn.utils.clip_grad_norm_(parameters, clip)
            for optimizer in optimizers:
                optimizer.step()
        epoch += 1
        console.say(f"epoch {epoch}, {time.monotonic() - began:.0f} s: loss {sum(losses) / len(losses):.4f}")


def resized(card: config.ModelCard, **sizes: Any) -> config.ModelCard:
    """The card with other sizes of its model."""
    return replace(card, kwargs={**card.kwargs, **sizes})


def save_half(model: nn.Module, path: Path) -> None:
    save_file({k: v.half().cpu().contiguous() for k, v in model.state_dict().items()}, path)


@torch.no_grad()
def accuracy(model: nn.Module, images: data.Images) -> float:
    """In percent."""
    right = sum(int((model(x).argmax(-1) == y).sum()) for x, y in images.batches(250))
    return 100 * right / len(images)


def _first(value: float, group: Group) -> float:
    """The first process's value."""
    return float(group.total(torch.tensor(0.0 if group.rank else value, device=group.device)))
