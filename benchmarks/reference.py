"""Train the benchmark's reference model for a given time; the learning rate follows the clock, so it always ends annealed.

    python benchmarks/reference.py --data-dir DIR --minutes 60 [--weights FILE] [--blocks 8 --width 128] [--out FILE]
    ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 benchmarks/reference.py ...

The second command trains in two processes of one thread, which share every batch. Images are decoded once and
augmented in batches (random crop with reflected borders, flip, and mixup if asked for), in bfloat16 where that is
faster. The calibration images of seed 0 take no part. Writes fp16 safetensors, judged as written, and prints the
accuracy on the test images.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from edgeprune import api, compat, config, data, vit, weightfile
from edgeprune.console import SILENT, Console
from edgeprune.tuning.group import Group, alone, launched
from edgeprune.tuning.precision import Precision

PAD = 4


def main() -> None:
    options = parse()
    group = launched() if "WORLD_SIZE" in os.environ else alone()
    torch.manual_seed(options.seed)
    card = api.with_data(config.load_card("cifar10"), "folder", str(options.data_dir))
    width, blocks = options.width, options.blocks
    sizes = {"embed_dim": width, "depth": blocks, "num_heads": width // 32}
    card = replace(card, kwargs={**card.kwargs, **sizes})
    model = vit.create(card.architecture, card.kwargs, card.num_classes)
    if options.weights:
        weightfile.load(model, weightfile.read(options.weights), str(options.weights))
    transforms = data.transform_config(card, model)
    splits = data.load_splits(card, transforms, 0)
    model.to(group.device)
    mean, std = (torch.tensor(transforms[key], device=group.device).view(1, 3, 1, 1) for key in ("mean", "std"))
    images, labels = pixels(splits.train, group.device)
    tune(model, images, labels, mean, std, group, options)
    if group.rank:
        return
    save_file({k: v.half().cpu().contiguous() for k, v in model.state_dict().items()}, options.out)
    model.cpu()
    weightfile.load(model, weightfile.read(options.out), str(options.out))
    print(f"{options.out}: {accuracy(model, splits.evaluation):.2f} % on {len(splits.evaluation)} test images")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--weights", type=Path, help="to start from")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--mixup", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("cifar10.safetensors"))
    return parser.parse_args()


def pixels(images: data.Images, device: torch.device) -> tuple[Tensor, Tensor]:
    """All images as uint8 `[n, channels, height, width]`, and their labels."""
    from torchvision.transforms.functional import pil_to_tensor

    parts = list(images.with_transform(pil_to_tensor).batches(1000))
    return torch.cat([p for p, _ in parts]).to(device), torch.cat([label for _, label in parts]).to(device)


def augment(images: Tensor) -> Tensor:
    """A random crop of the reflected image and a random flip, for each image of the batch."""
    n, _, height, width = images.shape
    padded = F.pad(images.float(), (PAD,) * 4, mode="reflect")
    rows = torch.randint(0, 2 * PAD + 1, (n, 1), device=images.device) + torch.arange(height, device=images.device)
    cols = torch.randint(0, 2 * PAD + 1, (n, 1), device=images.device) + torch.arange(width, device=images.device)
    cols = torch.where(torch.rand(n, 1, device=images.device) < 0.5, cols, cols.flip(1))
    which = torch.arange(n, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[which, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)


def tune(
    model: compat.VisionTransformer, images: Tensor, labels: Tensor, mean: Tensor, std: Tensor, group: Group, options: argparse.Namespace
) -> None:  # fmt: skip
    parameters = list(model.parameters())
    decay, plain = [p for p in parameters if p.ndim >= 2], [p for p in parameters if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.95))
    console = SILENT if group.rank else Console()
    precision = Precision("training", "auto", len(labels) // options.batch_size, group.device, console)
    limit, began, epoch = 60 * options.minutes, time.monotonic(), 0
    torch.manual_seed(options.seed + group.rank)  # of what is drawn for its own images
    model.train()
    while True:
        order, losses = torch.randperm(len(labels), generator=torch.Generator().manual_seed(options.seed + epoch)), []
        for batch in order.split(options.batch_size):
            done = _first((time.monotonic() - began) / limit, group)
            if done >= 1:
                model.eval()
                return
            for part in optimizer.param_groups:
                part["lr"] = options.learning_rate * min(done / 0.05 + 1e-2, 0.5 * (1 + math.cos(math.pi * done)))
            pick = batch[group.rank :: group.size].to(labels.device)
            x = (augment(images[pick]) / 255 - mean) / std
            targets = F.one_hot(labels[pick], model.num_classes).float()
            if options.mixup:
                share = torch.distributions.Beta(options.mixup, options.mixup).sample().item()
                x, targets = share * x + (1 - share) * x.flip(0), share * targets + (1 - share) * targets.flip(0)
            optimizer.zero_grad(set_to_none=True)
            with precision.run(len(pick)):
                with precision.autocast():
                    logits = model(x)
                loss = F.cross_entropy(logits.float(), targets, label_smoothing=0.1, reduction="sum")
                loss.backward()
            losses.append(group.average_gradients(parameters, len(pick), loss))
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        epoch += 1
        console.say(f"epoch {epoch}, {time.monotonic() - began:.0f} s: loss {sum(losses) / len(losses):.4f}")


def _first(value: float, group: Group) -> float:
    """The first process's value."""
    return float(group.total(torch.tensor(0.0 if group.rank else value, device=group.device)))


@torch.no_grad()
def accuracy(model: compat.VisionTransformer, images: data.Images) -> float:
    right = sum(int((model(x).argmax(-1) == y).sum()) for x, y in images.batches(250))
    return 100 * right / len(images)


if __name__ == "__main__":
    main()
