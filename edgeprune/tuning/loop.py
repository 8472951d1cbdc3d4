"""The training loop: phases under a warm-up and a cosine, judged along the way."""

from __future__ import annotations

import copy
import itertools
import math
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgeprune.anatomies import PositionalAttention
from edgeprune.compat import VisionTransformer
from edgeprune.config import Recipe
from edgeprune.console import SILENT, Console
from edgeprune.data import Images, train_transform
from edgeprune.errors import UsageError
from edgeprune.tuning import checkpoint as saved
from edgeprune.tuning import loss as losses
from edgeprune.tuning import optimizers
from edgeprune.tuning.checkpoint import Checkpoint
from edgeprune.tuning.coach import Coach
from edgeprune.tuning.frozen import freeze, thaw
from edgeprune.tuning.group import Group, alone, loader_workers
from edgeprune.tuning.judge import Average, Best, Judge, number_or_inf
from edgeprune.tuning.lessons import Lesson, Lessons
from edgeprune.tuning.precision import Precision
from edgeprune.types import to_json

#: Times the recipe's learning rate. Trials may ask for more than their ends, but do not know: at a sixth of its latency a
#: ViT's best trial was 9 times (.544 nats to .559 at 3 times), and after 1,200 steps it had .308 nats to .283.
SEARCH_RATES = (0.3, 1.0, 3.0)
SEARCH_SHARE = 0.2  # of a phase's steps, for all rates together
#: Per rate. With 13 steps the trials of a ViT at a fifth of its latency said nothing (divergences of .356, .358 and .360
#: nats, the lowest rate chosen, 2 points lost at the end); with 26 steps .356, .338 and .322.
SEARCH_STEPS = (20, 40)
SEARCH_MARGIN = 0.02  # by which another rate has to beat the recipe's: below that it is noise
#: The best rate of a short run is far below that of a long one: measured about steps ** (2 / 3), for two pruned
#: CIFAR-10 ViTs over 5, 15 and 150 steps. Trials are scaled down by it, or they would always favour low rates.
HORIZON = 2 / 3
MAX_NORM = 1.0  # of the gradient


@dataclass
class History:
    """What a tuning did, step by step."""

    precision: str = ""  # of training
    teacher_precision: str = ""
    learning_rates: list[float] = field(default_factory=list)  # one per phase
    losses: list[float] = field(default_factory=list)  # mean over the batch, one per step
    checks: list[tuple[int, float]] = field(default_factory=list)  # (steps taken, divergence in nats)

    @staticmethod
    def of(document: Mapping[str, Any]) -> History:
        """The history that was written as JSON."""
        return History(**{**document, "checks": [(step, value) for step, value in document["checks"]]})


class Diverged(Exception):
    """The loss stopped being a number; the message says when."""


def fit(
    student: VisionTransformer,
    train: Images,
    recipe: Recipe,
    config: dict[str, object],
    *,
    teacher: VisionTransformer | None = None,
    check: Images | None = None,
    seed: int = 0,
    console: Console = SILENT,
    group: Group | None = None,
    coach: Coach | None = None,
    checkpoint: Checkpoint | None = None,
    lesson_bytes: int | None = None,
) -> History:
    """Tune `student` in place on `train`, phase after phase of the recipe; leaves it in eval mode, on the CPU.

    With a teacher and `check` images, which must not be among `train`, the model ends with the weights that
    diverged least from the teacher on them: the last, an average, earlier ones, or those it came with.
    `config` is timm's data config. `group` is this process unless `accelerate launch` started several.
    `coach` sees every step and may add to the loss; it is meant for one process, one phase, and for no `check`.
    `checkpoint`: where the state is kept from time to time, and gone on from when there is one; all processes of a
    group must see its folder.
    `lesson_bytes`: how much of images and answers may be kept to be used again, None = `lessons.CACHE_BYTES`.
    With `check` images a loss that stops being a number ends the phase, and the best weights stay; without them
    UsageError is raised, as it is when the recipe does not fit.
    """
    group = group or alone()
    own_size = student.patch_embed.img_size
    sizes: tuple[int | None, ...] = recipe.sizes or (None,) * len(recipe.epochs)
    if teacher is not None and recipe.sizes:
        raise UsageError("the recipe has 'sizes', but a teacher only sees the model's own image size; leave them out")
    if recipe.sizes and any(isinstance(module, PositionalAttention) for module in student.modules()):
        raise UsageError(
            "the recipe has 'sizes', but attention of this model depends on where its tokens are, at its own image size; leave them out"
        )
    if len(sizes) != len(recipe.epochs):
        raise UsageError(
            f"the recipe has {len(recipe.epochs)} 'epochs' but {len(sizes)} 'sizes'; give one of each per phase"
        )
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    history = History()
    resumed = checkpoint.load() if checkpoint is not None else None
    if not group.all(resumed is not None):
        resumed = None  # one of several processes could not read it
    if resumed is not None:
        history = History.of(resumed[0]["history"])
        train.corrupt.update(resumed[0]["corrupt"])
        console.say(f"going on from the checkpoint after {len(history.losses)} steps")
    try:
        student.to(group.device)
        if teacher is not None:
            teacher.to(group.device)
        judge = Judge(teacher, check, recipe.batch_size, group) if teacher is not None and check is not None else None
        for number, (size, epochs) in enumerate(zip(sizes, recipe.epochs, strict=True)):
            if epochs <= 0 or (resumed is not None and number < resumed[0]["phase"]):
                continue
            if size is not None:
                student.set_input_size(img_size=(size, size))
            images = train.with_transform(train_transform(config, recipe.augment, size))
            phase = Phase(
                student, images, recipe, epochs, teacher, judge, seed + 1000 * number, console, group, history,
                coach or Coach(), checkpoint, number, lesson_bytes,
            )  # fmt: skip
            phase.run(f"tuning at {size or own_size[0]} px", resumed)
            resumed = None
        if student.patch_embed.img_size != own_size:
            student.set_input_size(img_size=own_size)
    finally:
        student.eval().cpu()
        if teacher is not None:
            teacher.cpu()
    return history


#: A checkpoint: facts and tensors.
Resumed = tuple[dict[str, Any], dict[str, Tensor]]
Steppers = list[tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]]


def _on(state: dict[str, Tensor], where: torch.device) -> dict[str, Tensor]:
    return {name: value.to(where) for name, value in state.items()}


@dataclass
class Phase:
    """One run of the schedule from start to end. Searching for the rate is a part of its steps."""

    student: VisionTransformer
    images: Images  # under the training transform
    recipe: Recipe
    epochs: float
    teacher: VisionTransformer | None
    judge: Judge | None
    seed: int
    console: Console
    group: Group
    history: History
    coach: Coach
    checkpoint: Checkpoint | None = None
    number: int = 0
    lesson_bytes: int | None = None

    def __post_init__(self) -> None:
        self.taken = 0  # lessons, before the schedule that is running
        self.lessons = Lessons(
            self.images,
            self.recipe.batch_size,
            self.epochs,
            views=self.recipe.views if self.recipe.augment else 1,
            seed=self.seed,
            ask=None if self.teacher is None else self._ask,
            rank=self.group.rank,
            size=self.group.size,
            echo=1 if self.teacher is None else self.recipe.echo,
            workers=loader_workers(self.group.device),
            console=self.console,
            room=self.lesson_bytes,
        )
        self.steps = max(1, round(self.lessons.per_epoch * self.epochs))
        asked, where = self.recipe.precision, self.group.device
        self.precision = Precision("training", asked, self.steps, where, self.console)
        self.teaching = Precision("teacher", asked, self.steps, where, self.console)
        self.read = losses.read_tokens(self.student if self.teacher is None else self.teacher)

    def run(self, what: str, resumed: Resumed | None = None) -> None:
        self.student.train()
        best = None if self.judge is None else Best(self.student, self.judge)
        rate, left, start = self.recipe.learning_rate, self.steps, 0
        if resumed is not None:
            rate, left, start = (resumed[0][key] for key in ("rate", "steps", "step"))
            self.taken = resumed[0]["lessons"]
            self.precision.restore(resumed[0]["precision"])
            self.teaching.restore(resumed[0]["teaching"])
        lessons = self.lessons.after(self.taken)
        with self.console.progress(what, self.steps * self.recipe.batch_size, "images") as self.advance:
            try:
                if resumed is None:
                    if best is not None and self.recipe.learning_rate_search:
                        rate, left = self._search(lessons, best)
                    self.history.learning_rates.append(rate)
                self._train(itertools.islice(lessons, left - start), left, rate, best, resumed)
            except Diverged as diverged:
                if best is None:
                    raise UsageError(f"{diverged}; lower [finetune] learning_rate") from diverged
                self.console.warn(
                    f"{diverged}: tuning stops, and the best weights so far stay (divergence {best.value:.4f} nats); "
                    "lower [finetune] learning_rate"
                )
        self.history.precision = self.precision.name
        self.history.teacher_precision = self.teaching.name
        if best is not None:
            self.student.load_state_dict(best.state)

    def _search(self, lessons: Iterator[Lesson], best: Best) -> tuple[float, int]:
        """Try some rates for a few steps, all on the same lessons; returns the best rate and the steps left.

        A trial is the whole schedule in small. The model goes on from where the best one led it.
        """
        few, many = SEARCH_STEPS
        each = min(many, int(self.steps * SEARCH_SHARE / len(SEARCH_RATES)))
        if each < few:
            return self.recipe.learning_rate, self.steps
        left = self.steps - each * len(SEARCH_RATES)
        shorter = (each / left) ** HORIZON
        part = list(itertools.islice(lessons, each))
        self.taken += each
        start, found = copy.deepcopy(self.student.state_dict()), []
        for rate in (factor * self.recipe.learning_rate for factor in SEARCH_RATES):
            self.student.load_state_dict(start)
            try:
                self._train(part, each, shorter * rate, None)
                found.append((number_or_inf(best.judge(self.student)), rate, copy.deepcopy(self.student.state_dict())))
            except Diverged:
                found.append((math.inf, rate, start))
        value, rate, state = min(
            found, key=lambda trial: trial[0] * (1 - SEARCH_MARGIN * (trial[1] == self.recipe.learning_rate))
        )
        self.student.load_state_dict(state)
        best.offer(value, state)
        best.stale = 0
        tried = ", ".join(f"{r:.1e}: {v:.4f}" for v, r, _ in found)
        self.console.say(
            f"learning rate {rate:.1e}: the best of {len(found)} in trials of {each} steps, each at {shorter:.2f} of it "
            f"(divergence {tried} nats)"
        )
        return rate, left

    def _train(
        self, lessons: Iterable[Lesson], steps: int, rate: float, best: Best | None, resumed: Resumed | None = None
    ) -> None:
        """`steps` steps of a schedule of that length; with `best`, checked along the way and perhaps ended early.

        Raises Diverged when the loss stops being a number.
        """
        steppers = self._steppers(steps, rate)
        average = Average(self.student, self.recipe.ema) if best is not None and self.recipe.ema else None
        checks = {round((i + 1) * steps / self.recipe.checks) for i in range(self.recipe.checks)} if best else set()
        saves = self.checkpoint if best is not None or self.judge is None else None  # not in the trial of a rate
        start = 0
        if resumed is not None:
            start = resumed[0]["step"]
            self._restore(resumed, steppers, average, best)
        for step, lesson in enumerate(lessons, start + 1):
            if self.checkpoint is not None:
                torch.manual_seed(self.seed * 1_000_003 + step)  # what a step draws, if anything, is the step's own
            self.coach.before(step - 1, steps)
            loss = self._backward(lesson)
            if not math.isfinite(loss):
                raise Diverged(f"the loss became {loss} at step {step - 1} of {steps}")
            torch.nn.utils.clip_grad_norm_(self.student.parameters(), MAX_NORM)
            for optimizer, schedule in steppers:
                optimizer.step()
                schedule.step()
            self.coach.after(step - 1, steps)
            self.history.losses.append(loss)
            self.advance(self.recipe.batch_size, f"loss {loss:.4f}")
            if average is not None:
                average.update(self.student)
            if best is not None and step in checks:
                value = best.check(self.student, average, last=step == steps)
                self.history.checks.append((len(self.history.losses), value))
                self.console.detail(f"step {step}: divergence {value:.4f} nats, best {best.value:.4f}")
                if self.recipe.patience and best.stale >= self.recipe.patience and step < steps:
                    self.console.say(f"stopped at step {step} of {steps}: no better for {best.stale} checks")
                    return
            if saves is not None and step < steps and self.group.leads(saves.due()):
                self._save(saves, step, steps, rate, steppers, average, best)

    def _save(
        self, checkpoint: Checkpoint, step: int, steps: int, rate: float, steppers: Steppers,
        average: Average | None, best: Best | None,
    ) -> None:  # fmt: skip
        """Keep all that the steps after `step` depend on; what several processes know alike, the first one writes."""
        if self.group.rank:
            return
        facts = {
            "phase": self.number, "step": step, "steps": steps, "rate": rate, "lessons": self.taken + step,
            "schedules": [{k: v for k, v in own.state_dict().items() if k != "lr_lambdas"} for _, own in steppers],
            "rates": [[group["lr"] for group in own.param_groups] for own, _ in steppers],
            "averaged": average.steps if average is not None else 0, "best": best and best.value, "stale": best and best.stale,
            "precision": self.precision.state(), "teaching": self.teaching.state(),
            "history": to_json(self.history), "corrupt": self.images.corrupt,
        }  # fmt: skip
        tensors = {
            **saved.named("student", self.student.state_dict()), **saved.named("best", best.state if best else {}),
            **saved.named("average", average.state if average is not None else {}),
        }  # fmt: skip
        for number, (optimizer, _) in enumerate(steppers):
            moments = {f"{i}.{k}": v for i, own in optimizer.state_dict()["state"].items() for k, v in own.items()}
            tensors |= saved.named(f"optimizer{number}", moments)
        facts["coach"] = freeze(self.coach.state(), tensors)
        checkpoint.save(facts, tensors)

    def _restore(self, resumed: Resumed, steppers: Steppers, average: Average | None, best: Best | None) -> None:
        facts, tensors = resumed
        self.taken -= facts["step"]
        self.student.load_state_dict(saved.part(tensors, "student"))
        for number, (optimizer, schedule) in enumerate(steppers):
            moments: dict[int, dict[str, Tensor]] = {}
            for key, value in saved.part(tensors, f"optimizer{number}").items():
                index, _, name = key.partition(".")
                moments.setdefault(int(index), {})[name] = value
            optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
            schedule.load_state_dict({**schedule.state_dict(), **facts["schedules"][number]})
            for group, rate in zip(optimizer.param_groups, facts["rates"][number], strict=True):
                group["lr"] = rate
        if average is not None:
            average.steps, average.state = facts["averaged"], _on(saved.part(tensors, "average"), self.group.device)
        if best is not None:
            best.value, best.stale = facts["best"], facts["stale"]
            best.state = _on(saved.part(tensors, "best"), self.group.device)
        self.coach.restore(thaw(facts["coach"], tensors))
        self.advance(facts["step"] * self.recipe.batch_size, "resumed")

    def _backward(self, lesson: Lesson) -> float:
        """Gradients of the mean loss over the whole batch; returns that loss."""
        pixels, labels, targets = lesson
        self.student.zero_grad(set_to_none=True)
        total: Tensor | None = None
        with self.precision.run(len(labels)):
            if len(labels):
                where = self.group.device
                with self.precision.autocast():
                    total = losses.total_loss(
                        self.student,
                        pixels.to(where),
                        labels.to(where),
                        targets and targets.to(where),
                        self.recipe,
                        self.read,
                    )
                    penalty = self.coach.penalty()
                (total if penalty is None else total + len(labels) * penalty).backward()
        return self.group.average_gradients(self.student.parameters(), len(labels), total)

    def _ask(self, pixels: Tensor) -> losses.Targets:
        assert self.teacher is not None
        with self.teaching.run(len(pixels)), self.teaching.autocast():
            return losses.teach(self.teacher, pixels.to(self.group.device), self.recipe, self.read)

    def _steppers(self, steps: int, rate: float) -> Steppers:
        """Optimisers, each with its schedule."""
        warmup = max(1, round(self.recipe.warmup * steps))

        def factor(step: int) -> float:
            cosine = 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / max(1, steps - warmup)))
            return min((step + 1) / warmup, cosine)

        made = optimizers.create(self.student, self.recipe.optimizer, rate, self.recipe.weight_decay)
        return [(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)) for optimizer in made]
