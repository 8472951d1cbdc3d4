"""Train a small convolutional network, which then teaches the benchmark's reference model (and its siblings).

    python benchmarks/teacher.py --data-dir DIR --minutes 14 --out teacher.safetensors

Convolutions learn from few images and few passes what a ViT needs many for; DeiT (Touvron et al., 2021) and locality
guidance (Li et al., ECCV 2022) hand that on. SGD with momentum under a linear rise and fall, as usual for such networks.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import training
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from edgeprune import data, vit

RISE = 0.2  # of the time, in which the learning rate grows


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def convolution(wide_in: int, wide_out: int) -> nn.Sequential:
    layers = nn.Conv2d(wide_in, wide_out, 3, padding=1, bias=False), nn.BatchNorm2d(wide_out), nn.ReLU()
    return nn.Sequential(*layers)


class Convnet(nn.Module):
    """Seven convolutions and a classifier for 32 x 32 pixels; `grid` are features at 8 x 8, one per patch of 4 pixels."""

    def __init__(self, classes: int = 10, widths: tuple[int, int, int, int] = (32, 96, 192, 192)) -> None:
        super().__init__()
        stem, first, second, third = widths
        self.width = second
        self.grid = nn.Sequential(
            convolution(3, stem), nn.MaxPool2d(2), convolution(stem, first), Residual(convolution(first, first)),
            nn.MaxPool2d(2), convolution(first, second), Residual(convolution(second, second)),
        )  # fmt: skip
        self.top = nn.Sequential(nn.MaxPool2d(2), convolution(second, third), Residual(convolution(third, third)))
        self.head = nn.Linear(third, classes)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        return self.answer(x)[0]

    def answer(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `[n, classes]` and features `[n, width, 8, 8]`."""
        grid = self.grid(x.contiguous(memory_format=torch.channels_last))
        return self.head(self.top(grid).amax((2, 3))) / 8, grid


def load(path: Path) -> Convnet:
    """A network that `main` has written, for answers only."""
    network = Convnet()
    network.load_state_dict(load_file(path))
    return network.eval().requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=14.0)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("teacher.safetensors"))
    options = parser.parse_args()
    card, group = training.setting(options.data_dir, options.seed)
    network = Convnet(card.num_classes).to(group.device)
    transforms = data.transform_config(card, vit.create(card.architecture, card.kwargs, card.num_classes))
    splits = data.load_splits(card, transforms, 0)
    pictures = training.Pictures(splits.train, transforms, group.device)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=options.learning_rate, momentum=0.9, nesterov=True, weight_decay=5e-4
    )

    def loss(x: Tensor, labels: Tensor, _: float) -> Tensor:
        return F.cross_entropy(network(x).float(), labels, reduction="sum")

    training.train(
        network, pictures, loss, [optimizer], lambda done: min(done / RISE + 1e-2, (1 - done) / (1 - RISE)), group,
        minutes=options.minutes, batch_size=options.batch_size, seed=options.seed,
    )  # fmt: skip
    if group.rank:
        return
    training.save_half(network, options.out)
    print(
        f"{options.out}: {training.accuracy(load(options.out), splits.evaluation):.2f} % on {len(splits.evaluation)} test images"
    )


if __name__ == "__main__":
    main()
