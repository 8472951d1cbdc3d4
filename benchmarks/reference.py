"""Train the benchmark's reference model, or a sibling of it, for a given time; it always ends annealed.

    python benchmarks/reference.py --data-dir DIR --minutes 60 [--teacher FILE] [--weights FILE] [--blocks 8 --width 128]
    ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 benchmarks/reference.py ...

The second command trains in two processes of one thread. Matrices of the blocks are stepped by Muon, the rest by AdamW.
With a `--teacher` (`teacher.py`) the loss is that of the labels, the divergence from the teacher's answers, and how far
patches in the middle of the model are from predicting the teacher's features at the same place (locality guidance, Li
et al., ECCV 2022), the last of which fades out. The calibration images of seed 0 take no part. Writes fp16 safetensors,
judged as written, and prints the accuracy on the test images.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import teacher
import torch
import training
from torch import Tensor, nn
from torch.nn import functional as F

from edgeprune import compat, data, vit, weightfile
from edgeprune.tuning.group import Group

BATCH = 128
LEARNING_RATE = 1.5e-3  # of matrices; two thirds of it for the rest
WARM_UP = 0.03  # of the time
GUIDED = 5 / 8  # of the blocks are below what the teacher's features are predicted from
SHARES = {"labels": 0.3, "answers": 0.7, "grid": 1.0}  # of the loss, with a teacher


def main() -> None:
    options = parse()
    card, group = training.setting(options.data_dir, options.seed)
    width, blocks = options.width, options.blocks
    card = training.resized(card, embed_dim=width, depth=blocks, num_heads=width // 32)
    model = vit.create(card.architecture, card.kwargs, card.num_classes)
    if options.weights:
        weightfile.load(model, weightfile.read(options.weights), str(options.weights))
    transforms = data.transform_config(card, model)
    splits = data.load_splits(card, transforms, 0)
    pictures = training.Pictures(splits.train, transforms, group.device)
    learn(
        model, pictures, options.teacher, group, options.minutes, options.seed, options.learning_rate,
        options.batch_size,
    )  # fmt: skip
    if group.rank:
        return
    training.save_half(model, options.out)
    weightfile.load(model, weightfile.read(options.out), str(options.out))
    print(f"{options.out}: {training.accuracy(model, splits.evaluation):.2f} % on {len(splits.evaluation)} test images")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--teacher", type=Path, help="a network by teacher.py")
    parser.add_argument("--weights", type=Path, help="to start from")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE)
    parser.add_argument("--batch-size", type=int, default=BATCH)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("cifar10.safetensors"))
    return parser.parse_args()


def learn(
    model: compat.VisionTransformer, pictures: training.Pictures, teacher_file: Path | None, group: Group,
    minutes: float, seed: int, learning_rate: float = LEARNING_RATE, batch_size: int = BATCH,
) -> None:  # fmt: skip
    """Train `model` in place; it ends on the CPU, in eval mode."""
    lesson = Lesson(model, teacher_file).to(group.device)
    training.train(
        lesson, pictures, lesson, optimizers(lesson, learning_rate),
        lambda done: min(done / WARM_UP + 1e-2, 0.5 * (1 + math.cos(math.pi * done))), group,
        minutes=minutes, batch_size=batch_size, seed=seed, clip=1.0,
    )  # fmt: skip
    model.cpu().eval()


class Lesson(nn.Module):
    """A model, who teaches it, and what it has to learn."""

    def __init__(self, model: compat.VisionTransformer, path: Path | None) -> None:
        super().__init__()
        self.model = model
        self.teacher = teacher.load(path) if path else None
        self.below = round(GUIDED * len(model.blocks))
        self.guide = nn.Linear(model.embed_dim, self.teacher.width) if self.teacher else None

    def train(self, mode: bool = True) -> Lesson:
        self.model.train(mode)  # the teacher never trains
        return self

    def forward(self, x: Tensor, labels: Tensor, done: float) -> Tensor:
        """The loss, summed over the images, when the share `done` of the training is over."""
        model = self.model
        tokens = model._pos_embed(model.patch_embed(x))
        middle = model.blocks[: self.below](tokens)
        logits = model.forward_head(model.norm(model.blocks[self.below :](middle))).float()
        told = F.cross_entropy(logits, labels, label_smoothing=0.1, reduction="sum")
        if self.teacher is None:
            return told
        with torch.no_grad():
            answers, grid = self.teacher.answer(x)
        asked = F.cross_entropy(logits, answers.float().softmax(-1), reduction="sum")
        assert self.guide is not None
        seen = F.normalize(self.guide(middle[:, model.num_prefix_tokens :]).float(), dim=-1)
        there = F.normalize(grid.float().flatten(2).transpose(1, 2), dim=-1)
        apart = (1 - (seen * there).sum(-1)).mean(1).sum()
        return SHARES["labels"] * told + SHARES["answers"] * asked + (1 - done) * SHARES["grid"] * apart


def optimizers(lesson: Lesson, rate: float) -> list[torch.optim.Optimizer]:
    matrices = [p for p in lesson.model.blocks.parameters() if p.ndim == 2]
    inner = {id(p) for p in matrices}
    others = [p for p in lesson.parameters() if p.requires_grad and id(p) not in inner]
    decay, plain = [p for p in others if p.ndim >= 2], [p for p in others if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=rate * 2 / 3, betas=(0.9, 0.95)),
    ]


if __name__ == "__main__":
    main()
