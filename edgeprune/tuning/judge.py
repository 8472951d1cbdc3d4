"""How good a tuned model is along the way: its divergence from the teacher on images that take no part in tuning."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from edgeprune import tasks
from edgeprune.compat import VisionTransformer
from edgeprune.data import Images
from edgeprune.tuning.group import Group

CHECK_IMAGES = 256

State = dict[str, Tensor]


def divide(images: Images) -> tuple[Images, Images]:
    """(check, train): a tenth of the training images, at most `CHECK_IMAGES`, judges the tuning and takes no part in it.

    The calibration images cannot: the survivors were re-fitted on them.
    """
    count = min(CHECK_IMAGES, max(1, len(images) // 10))
    return images.take(count), images.drop(count)


class Judge:
    """Mean KL(teacher || student) of what they say, in nats (`tasks.divergence`), on fixed images that are shared out over
    the processes; the teacher is asked once. Calls are counted in float32.
    """

    def __init__(self, teacher: VisionTransformer, check: Images, batch_size: int, group: Group) -> None:
        self.group, self.task = group, tasks.of(teacher)
        own = check.with_transform(check.transform)
        own.indices = check.indices[group.rank :: group.size]
        self.batches: list[tuple[Tensor, Tensor]] = []
        with torch.no_grad():
            for pixels, _ in own.batches(batch_size):
                pixels = pixels.to(group.device)
                self.batches.append((pixels, teacher(pixels)))

    @torch.no_grad()
    def __call__(self, student: VisionTransformer) -> float:
        training = student.training
        student.eval()
        facts = torch.zeros(2, dtype=torch.float64, device=self.group.device)
        for pixels, wanted in self.batches:
            facts += torch.stack(
                [tasks.divergence(student(pixels).float(), wanted, self.task).double(), facts.new_tensor(len(pixels))]
            )
        student.train(training)
        total, count = self.group.total(facts).tolist()
        return total / max(count, 1.0)


class Average:
    """A moving average of a model's weights; its horizon grows with the steps until `decay` bounds it."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self.state = copy.deepcopy(model.state_dict())

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        for name, value in model.state_dict().items():
            self.state[name].lerp_(value, 1 - decay)


@contextmanager
def wearing(model: nn.Module, state: State) -> Iterator[None]:
    """The model with other weights, for as long as the context lasts."""
    own = copy.deepcopy(model.state_dict())
    model.load_state_dict(state)
    try:
        yield
    finally:
        model.load_state_dict(own)


def number_or_inf(value: float) -> float:
    """The value, or infinity for one that is no number: the worst there is, in every comparison."""
    return math.inf if math.isnan(value) else value


class Best:
    """The best weights met so far; at first those that the model starts with."""

    def __init__(self, model: VisionTransformer, judge: Judge) -> None:
        self.judge = judge
        self.state: State = copy.deepcopy(model.state_dict())
        self.value = judge(model)
        self.stale = 0  # checks since the last improvement

    def check(self, model: VisionTransformer, average: Average | None, *, last: bool) -> float:
        """Judge the moving average, the model itself at the end or where there is none; returns the best divergence.

        Before the rate has come down, the average is the better of the two: judging both would double the cost.
        """
        found: list[tuple[float, State]] = []
        if average is not None:
            with wearing(model, average.state):
                found.append((self.judge(model), average.state))
        if average is None or last:
            found.append((self.judge(model), model.state_dict()))
        value, state = min(found, key=lambda one: number_or_inf(one[0]))
        self.offer(value, state)
        return value

    def offer(self, value: float, state: State) -> None:
        """Keep the weights if they are better than the best."""
        self.stale += 1
        if value < self.value:
            self.value, self.state, self.stale = value, copy.deepcopy(state), 0
