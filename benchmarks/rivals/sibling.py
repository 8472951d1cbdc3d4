"""The smaller dense sibling: same family, fewer blocks or a smaller width, trained from scratch; nothing is pruned.

It has no one-shot form. It is trained for `--sibling-minutes`: give it what the dense model's training and the
fine-tuning take together, in the trainer that made the dense model (`benchmarks/reference.py`).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from edgeprune import vit, weightfile
from edgeprune.compat import VisionTransformer
from edgeprune.data import transform_config
from edgeprune.errors import UsageError
from edgeprune.tuning.group import alone
from rivals import Task

SHALLOWEST = 0.5  # of the dense depth; heads keep their width, the MLP its ratio


class Sibling:
    trained = True

    def prepare(self, task: Task) -> None:
        sizes, self.task = task.sizes, task
        least = max(1, round(SHALLOWEST * sizes.blocks))
        family = [(b, h) for b in range(least, sizes.blocks + 1) for h in range(1, sizes.only.heads + 1)]
        self.family = sorted(family, key=lambda size: self.share(*size))

    def model(self, aim_ms: float, target_ms: float) -> VisionTransformer:
        """The largest, untrained, whose share of the dense model's multiply-adds is that of the latency asked for."""
        shares = np.array([self.share(*size) for size in self.family])
        blocks, heads = self.family[max(int((shares <= aim_ms / self.task.table.dense_ms + 1e-9).sum()) - 1, 0)]
        torch.manual_seed(self.task.seed)
        return self.make(blocks, heads)

    def make(self, blocks: int, heads: int) -> VisionTransformer:
        sizes, card = self.task.sizes, self.task.request.card
        kwargs = {
            **card.kwargs, "depth": blocks, "num_heads": heads, "embed_dim": heads * sizes.only.head_dim,
            "mlp_ratio": sizes.only.neurons / sizes.only.width,
        }  # fmt: skip
        return vit.create(card.architecture, kwargs, sizes.num_classes)

    def share(self, blocks: int, heads: int) -> float:
        """Of the dense model's multiply-adds."""
        sizes, width = self.task.sizes, heads * self.task.sizes.only.head_dim
        neurons = width * sizes.only.neurons // sizes.only.width
        stage = vit.Stage(blocks, heads, sizes.only.head_dim, neurons, width, sizes.only.tokens)
        small = vit.Anatomy((stage,), sizes.image, sizes.num_classes)
        return vit.macs(small, small.shape) / vit.macs(sizes, sizes.shape)

    def train(self, model: VisionTransformer, minutes: float, teacher: Path | None, weights: Path | None) -> None:
        """In place, from the random weights it has; teacher: the network that taught the dense model, if one did.

        weights: of one that was trained so long already, in processes of its own. Raises UsageError where they do not fit.
        """
        if weights:
            weightfile.load(model, weightfile.read(weights), str(weights))
            return
        import reference  # the trainer of the dense model, beside this package
        import training

        if self.task.request.card.data.name != "folder":
            raise UsageError("a sibling is trained on a folder of images of the model's own size; use the card cifar10")
        torch.manual_seed(self.task.seed)
        transforms = transform_config(self.task.request.card, model)
        pictures = training.Pictures(self.task.splits.train, transforms, torch.device("cpu"))
        reference.learn(model, pictures, teacher, alone(), minutes, self.task.seed)


METHODS = {"sibling": Sibling}
