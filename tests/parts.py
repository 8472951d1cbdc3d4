"""What the parts of a method are given, for a tiny ViT: evidence, an allocator's task, a damage, a training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from edgeprune import allocators, criteria, data, obs, vit
from edgeprune.calibration import Calibration
from edgeprune.config import Recipe
from edgeprune.console import SILENT
from edgeprune.criteria import Evidence
from edgeprune.gates import Gates
from edgeprune.recoveries import Damage
from edgeprune.schedules import Planned, Training
from edgeprune.tuning import group
from edgeprune.tuning.judge import Judge
from edgeprune.tuning.loop import fit
from edgeprune.types import LatencyTable, Levels, Plan, Prices, Shape, SubBlock

CLASSES = 5
CONFIG: dict[str, Any] = {
    "input_size": (3, 32, 32), "interpolation": "bilinear", "mean": (0.5,) * 3, "std": (0.25,) * 3, "crop_pct": 1.0,
}  # fmt: skip

#: 3 blocks of 3 heads and 24 neurons: 1 ms that stay, 1.2 ms per dense sub-block, dense 8.2 ms.
TABLE = LatencyTable(
    runtime="onnxruntime", precision="fp32", threads=1, base_ms=1.0,
    stages=(Prices(3, np.array([0.0, 0.5, 0.9, 1.2]), (0, 8, 16, 24), np.array([0.0, 0.5, 0.9, 1.2])),),
    dense_ms=8.2, empty_ms=1.0, samples=1,
)  # fmt: skip

RECIPE = Recipe(epochs=(3.0,), batch_size=8, learning_rate=2e-3, precision="float32", echo=1)


class Tinted:
    """Images of a class each: the same noise, brighter with the class."""

    def __init__(self, count: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.labels = np.arange(count) % CLASSES
        noise = rng.integers(0, 100, (count, 32, 32, 3))
        self.pixels = (noise + 35 * self.labels[:, None, None, None]).astype(np.uint8)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]), int(self.labels[index])


def images(count: int, seed: int = 0) -> data.Images:
    return data.Images(Tinted(count, seed), np.arange(count), data.eval_transform(CONFIG), "training")


def divergence(student: Any, teacher: Any, images: data.Images, batch_size: int) -> float:
    """Mean KL(teacher || student) of what they say of the images, in nats."""
    return Judge(teacher, images, batch_size, group.alone())(student)


def evidence(
    model: Any, criterion: str = "magnitude", calibration: data.Images | None = None
) -> tuple[Evidence, criteria.Statistics]:
    """On labelled calibration images, by default 24."""
    own = calibration or images(24, seed=1)

    def batches() -> Iterator[data.Batch]:
        return own.batches(8)

    uses_loss = criteria.uses_loss(criteria.get(criterion))
    found = criteria.collect(model, batches(), 0, lambda *_: None, uses_loss=uses_loss)
    sizes = vit.anatomy(model)
    made = Evidence(
        model=model, sizes=sizes, moments=found.moments, gradients=found.gradients, batches=batches,
        images=len(own), neuron_grids=(TABLE.stages[0].mlp_widths,) * len(sizes.stages), seed=0, console=SILENT,
    )  # fmt: skip
    return made, found


def inputs_of(evidence: Evidence, at: SubBlock) -> Any:
    """What the last layer of a sub-block sees of all images `[tokens, inputs]`, float64, numpy."""
    seen: list[torch.Tensor] = []
    hook = vit.output_layer(evidence.model.blocks[at[0]], at[1]).register_forward_pre_hook(
        lambda _, x: seen.append(x[0])
    )
    with torch.no_grad():
        for pixels, _ in evidence.batches():
            evidence.model(pixels)
    hook.remove()
    return torch.cat([part.flatten(0, 1) for part in seen]).double().numpy()


def calibration(model: Any, criterion: str = "magnitude", of: data.Images | None = None) -> Calibration:
    made, found = evidence(model, criterion, of)
    levels = criteria.score(criteria.get(criterion), made)
    moments = {at: (own.mean, obs.damped(own.covariance)) for at, own in found.moments.items()}
    return Calibration(levels, moments, [x for x, _ in made.batches()], found.weights or None, made.batches)


def task(
    model: Any,
    criterion: str = "magnitude",
    *,
    teacher: Any = None,
    bounds: Shape = ((3, 24),) * 3,
    seconds: float = 0.0,
) -> allocators.Task:
    found = calibration(model, criterion)
    return allocators.task(found, TABLE, bounds, model, teacher or model, seconds, 0, SILENT)


def damage(model: Any, plan: Plan, criterion: str = "magnitude", *, teacher: Any = None) -> Damage:
    return Damage(teacher or model, model, plan, calibration(model, criterion), 0, SILENT)


def training(
    model: Any, teacher: Any, *, target_ms: float, criterion: str = "magnitude", allocator: str = "knapsack"
) -> Training:
    """The schedule's view; `model` is trained under fresh gates."""
    gates = Gates(model)
    own = images(24, seed=1)

    def score() -> list[Levels]:
        return calibration(gates.folded(), criterion, own).levels

    def allocate(levels: list[Levels], budget_ms: float, bounds: Shape = ((3, 24),) * 3) -> Plan:
        found = replace(calibration(gates.folded(), criterion, own), levels=levels)
        made = allocators.task(found, TABLE, bounds, gates.folded(), teacher, 0.0, 0, SILENT)
        return made.plan(allocators.get(allocator).prepare(made)(budget_ms - TABLE.base_ms))

    return Training(
        model=model, gates=gates, teacher=teacher, table=TABLE, target_ms=target_ms, score=score, allocate=allocate,
        batches=lambda: own.batches(8), labelled=lambda: own.batches(8), seed=0, console=SILENT,
    )  # fmt: skip


def train(make: Callable[[Training], Planned], given: Training, recipe: Recipe = RECIPE) -> Plan:
    """Run the schedule for 15 steps (or the recipe's); its plan, with the gates gone."""
    coach = make(given)
    fit(given.model, images(40), recipe, CONFIG, teacher=given.teacher, seed=0, coach=coach)
    given.gates.remove()
    return coach.plan()


def state(model: Any) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}
