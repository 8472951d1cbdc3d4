"""Footprint: how much memory a build will take, said before it starts, and how it is kept within `--max-memory`.

Every term is a size of the model times a number of images, or of copies of the weights; tests hold the sum to what
builds really take. Memory counts as resident, of this process and of the worker that measures beside it, if it does so
on this machine. What grows with the number of images can wait on disk (`edgeprune.shelf`) or be remembered less, so a
limit has to leave room for the rest only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from edgeprune import images, schedules, stitch, vit
from edgeprune.allocators import search
from edgeprune.config import CalibrationSpec, DataSpec, Recipe, Request
from edgeprune.console import Console
from edgeprune.criteria import SCORED, fisher
from edgeprune.errors import UsageError
from edgeprune.latency import device
from edgeprune.latency.clock import COPIES
from edgeprune.latency.device import LOADED
from edgeprune.stages import candidates, profile, shapes
from edgeprune.tuning import judge, lessons
from edgeprune.vit import Anatomy

GIB = 1 << 30
#: What the interpreter and the libraries take in this process once all of them are loaded, and in a worker.
LIBRARIES, WORKER = int(0.75 * GIB), int(0.2 * GIB)
EXPORTED = 8  # times its weights: what a model takes while it becomes ONNX and is simplified
SPARE = 1.2  # times the sum: what allocators do not give back, and small things

#: What else helps where a stage needs too much.
FIXES = {
    "profile": "give more, or a --profile recorded where there is more, or a --device that measures",
    "calibrate": "give more, or a smaller [calibration] batch_size in the card",
    "finetune": "give more, or a smaller [finetune] batch_size in the card",
    "sparsify": "give more, or a smaller [finetune] batch_size in the card",
}
MEMINFO = Path("/proc/meminfo")


def in_words(size: float) -> str:
    return f"{size / GIB:.2f} GiB"


@dataclass(frozen=True)
class Need:
    """What a stage takes at most, in bytes: `least`, which it cannot do without, and what may wait on disk or be left out."""

    stage: str
    least: float
    more: float = 0.0

    @property
    def most(self) -> float:
        return self.least + self.more


def give_back() -> None:
    """Return freed memory to the system, where the C library can: what one stage has freed, the next one would add to."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def within(request: Request, stages: Sequence[str], console: Console) -> Request:
    """The request with its limits on what is kept, after the expected peak has been said.

    Raises UsageError where --max-memory is not enough for these stages; warns where the machine has less than is expected.
    """
    with torch.device("meta"):  # sizes alone
        model = vit.create(
            request.card.architecture, request.card.arguments, request.card.num_classes, request.card.anatomy
        )
    found = [need for need in needs(request, vit.anatomy(model), vit.parameters(model)) if need.stage in stages]
    peak = max(found, key=lambda need: need.most)
    limit = request.max_memory
    if limit is None:
        console.say(f"memory: at most {in_words(peak.most)} expected, in the stage {peak.stage}")
        free = available()
        if free is not None and peak.most > free:
            console.warn(
                f"{in_words(peak.most)} of memory are expected to be needed and {in_words(free)} are available here; "
                "give --max-memory, with which less is kept in memory, or what lowers it: "
                + FIXES.get(peak.stage, "fewer [calibration] images in the card").removeprefix("give more, or ")
            )
        return request
    short = max(found, key=lambda need: need.least)
    if short.least > limit:
        raise UsageError(
            f"--max-memory {in_words(limit)} is not enough: the stage {short.stage} needs {in_words(short.least)}, whatever waits "
            f"on disk; {FIXES.get(short.stage, 'give more')}"
        )
    room = {need.stage: int((limit - need.least) / SPARE) for need in found if need.most > limit}
    kept = {
        "prune": "activations of calibration images wait on disk",
        "finetune": "fewer answers of the teacher are kept",
        "profile": "the table's models are loaded in groups",
    }
    said = "; ".join(words for stage, words in kept.items() if stage in room)
    console.say(
        f"memory: at most {in_words(min(peak.most, limit))} expected, in the stage {peak.stage}{f', as {said}' if said else ''}"
    )
    return replace(
        request, shelf_bytes=room.get("prune"), lesson_bytes=room.get("finetune", room.get("sparsify")),
        table_bytes=room.get("profile"),
    )  # fmt: skip


def needs(request: Request, sizes: Anatomy, parameters: int) -> list[Need]:
    """What each stage takes that takes much."""
    card, weights = request.card, 4 * parameters
    measuring = 0.0 if request.device else 1.0
    dense = WORKER + COPIES * LOADED * weights
    export = EXPORTED * weights
    found = [
        Need("baseline", weights + export),
        profiling(request, sizes, weights, weights + export, weights + measuring * (dense + LOADED * weights)),
        calibrating(request, sizes, weights),
        pruning(card.calibration, sizes, weights, measuring * (dense + COPIES * LOADED * weights) + export),
        tuning("finetune", card.finetune, card.data, sizes, weights),
        Need("export", 3 * weights + export),
        Need("simplify", export),
        Need("compile", export),
        Need("validate", 3 * weights + WORKER + 2 * COPIES * LOADED * weights),
        Need("inspect", 3 * weights + WORKER + 2 * LOADED * weights + 128 * sizes.streamed),
        Need("survey", weights + export + measuring * (dense + COPIES * LOADED * weights)),
        Need("check", weights + export + measuring * (dense + LOADED * weights * request.check)),
    ]
    if request.schedule != schedules.DEFAULT:
        trains, scores = (
            tuning("sparsify", card.finetune, card.data, sizes, weights),
            calibrating(request, sizes, weights),
        )
        found.append(Need("sparsify", trains.least + scores.most, trains.more))
    if request.profile is not None:
        found = [need for need in found if need.stage != "profile"]
    return [Need(need.stage, LIBRARIES + SPARE * need.least, SPARE * need.more) for need in found]


def profiling(request: Request, sizes: Anatomy, weights: int, exporting: float, timing: float) -> Need:
    """Exports, and when these are over the table's models beside the dense one."""
    table = min(LOADED * weights * (_candidates(request, sizes) - 1), profile.table_room(available()))
    least = max(exporting, timing)
    return Need("profile", least, 0.0 if request.device else max(0.0, timing + table - least))


def stream(sizes: Anatomy) -> int:
    """A residual stream of one image, where it is largest."""
    return max(4 * stage.tokens * stage.width for stage in sizes.stages)


def pixels(sizes: Anatomy) -> int:
    channels, height, width = sizes.image
    return 4 * channels * height * width


def graph(sizes: Anatomy) -> int:
    """What one image leaves for the backward pass: 12 tensors of the width and 3 of the neurons per block."""
    return sum(s.blocks * 4 * s.tokens * (12 * s.width + 3 * rows(sizes, s)) for s in sizes.stages)


def rows(sizes: Anatomy, stage: vit.Stage) -> int:
    """Of fc1."""
    return stage.neurons * sizes.row_groups("mlp")


def squares(sizes: Anatomy) -> int:
    """Covariances of the inputs of all last layers, in float64."""
    return sum(8 * s.blocks * (s.width**2 + s.neurons**2) for s in sizes.stages)


def calibrating(request: Request, sizes: Anatomy, weights: int) -> Need:
    """Backward passes over a batch, moments of every layer, and the weight changes that are scored at once."""
    spec = request.card.calibration
    pairs = list(zip(sizes.stages, map(len, vit.grids(sizes, request.target.neuron_step)), strict=True))
    changes = sum(4 * s.width * s.blocks * (s.neurons * grid + s.width * (s.heads + 1)) for s, grid in pairs)
    largest = max(4 * s.width * s.neurons * grid for s, grid in pairs)  # at least one sub-block is scored at once
    batch = min(spec.batch_size, spec.images)
    tokens = spec.images * sum(4 * 2 * s.blocks * s.tokens for s in sizes.stages)  # how much each counts
    scored = max(min(changes, fisher.CHANGES_BYTES + largest), 2 * weights)  # or means and squares of gradients
    if request.criterion == "kl":
        scored += judged(sizes, min(spec.images, SCORED, stitch.most_images(sizes)), 1)
    work = max(
        6 * 8 * max(s.width, s.neurons) ** 2 for s in sizes.stages
    )  # a covariance's factor, inverse and solutions
    per_image = max(4 * s.width * s.neurons for s in sizes.stages)
    taken = batch * (graph(sizes) + per_image) + 2 * squares(sizes) + scored + tokens + work
    return Need("calibrate", 2 * weights + taken)


def pruning(spec: CalibrationSpec, sizes: Anatomy, weights: int, measuring: float) -> Need:
    """Judges of the search, re-fitted sub-blocks, and the refit over all calibration images at once; which may wait on disk."""
    most = min(search.JUDGED, stitch.most_images(sizes) // 2)
    fitted = min(spec.images - spec.images // 4, most)
    both = fitted + min(max(spec.images // 4, 1), most)
    waiting = spec.images * (pixels(sizes) + _refit(sizes)) + (2 * both + fitted) * 4 * sizes.streamed
    every = max(vit.MAX_WIDTHS, *(s.heads for s in sizes.stages)) * weights / 2  # sub-blocks at every level
    work = both * pixels(sizes) * 2 + judged(sizes, both, 0)
    least = 3 * weights + min(every, stitch.DATABASE_BYTES) + squares(sizes) + work + measuring
    return Need("prune", least, waiting)


def available(meminfo: str | None = None, group: Path | None = None) -> int | None:
    """Bytes that this process may still take: free memory, or less where its control group has a limit; None if unknown.

    meminfo: the text of /proc/meminfo. group: the folder of the control group.
    """
    words = device.cpu_facts(device.read(MEMINFO) if meminfo is None else meminfo).get("memavailable", "").split()
    found = [1024 * int(words[0])] if words else []
    if group is None:
        own = device.read(device.CGROUP).rpartition("::")[2].strip("/ \n")  # version 2: one line, 0::/path
        group = device.CGROUP_ROOT / own
    for folder in (group, *group.parents):
        limit, used = device.read(folder / "memory.max"), device.read(folder / "memory.current")
        if limit.isdigit() and used.isdigit():
            found.append(max(0, int(limit) - int(used)))
    return min(found) if found else None


def _refit(sizes: Anatomy) -> int:
    """What the refit knows of one image: streams before and after, of both models, and what a layer sees and misses."""
    found = []
    for s in sizes.stages:
        first = 3 * s.width + 2 * max(3 * s.width, rows(sizes, s))
        last = 6 * s.width + max(s.width, s.neurons)
        found.append(4 * s.tokens * max(first, last))
    return max(found)


def judged(sizes: Anatomy, count: int, held: int) -> int:
    """What a judge works with on so many images at once, and the streams of `held` choices."""
    one = max(4 * s.tokens * (6 * s.width + 4 * max(3 * s.width, rows(sizes, s))) for s in sizes.stages)
    return count * (one + held * 4 * sizes.streamed)


def tuning(stage: str, recipe: Recipe, data: DataSpec, sizes: Anatomy, weights: int) -> Need:
    """Weights of both models, gradients, AdamW, the average and the best, a batch, and answers that are kept."""
    if sum(recipe.epochs) <= 0:
        return Need(stage, 4 * weights)
    read = stream(sizes) * max(recipe.token_layers - 1, 0) // 2 + pixels(sizes)  # of one image, as it is kept
    answered = read + stream(sizes) * recipe.token_layers
    checked = judge.CHECK_IMAGES * pixels(sizes)
    least = 14 * weights + recipe.batch_size * (graph(sizes) + 2 * answered) + checked
    views = recipe.views if recipe.augment else 1
    count = training_images(data)
    if 0 < views < max(recipe.epochs):
        kept = float("inf") if count is None else count * views * read
    else:
        kept = recipe.batch_size * lessons.ECHO_LESSONS * read if recipe.echo > 1 else 0
    return Need(stage, least, min(kept, lessons.CACHE_BYTES))


def training_images(data: DataSpec) -> int | None:
    """At most so many; None where that takes more than a look at a folder."""
    if data.name == "digits":
        return images.DIGITS - images.DIGITS_TEST
    part = Path(data.dir) / data.train_split
    if data.name != "folder" or not Path(data.dir).is_dir():  # an archive's directory is read later
        return None
    return sum(
        len(files) for _, _, files in os.walk(part if part.is_dir() else data.dir, followlinks=data.follow_links)
    )


def _candidates(request: Request, sizes: Anatomy) -> float:
    """The models that the latency table is measured on, in dense ones."""
    grids, large = vit.grids(sizes, request.target.neuron_step), shapes.is_large(sizes)
    dims = vit.choosable(request.dims, sizes)
    tokens = 3 * len(shapes.patch_counts(sizes)[:-1]) if "tokens" in dims else 0
    forms = shapes.INT8_SIZES * len(sizes.stages) if "precision" in dims else 0  # of MLPs
    for stage in sizes.stages:
        every = shapes.forms(dims, stage.head_dim)
        forms += sum(shapes.RANK_SIZES if form.rank else shapes.INT8_SIZES for form in every)
    if tokens:
        tokens += (1 + len(shapes.FORM_TOKENS)) * (("qk" in dims) + 2 * ("precision" in dims))
    whole = (candidates.LARGE_FITTING_PLANS if large else candidates.FITTING_PLANS) / 2 + bool(tokens)
    if len(sizes.stages) > 1:  # all but one stage of each are dense
        heads = sum(len(shapes.head_counts(sizes, i, large)) for i in range(len(sizes.stages)))
        return heads + sum(len(shapes.measured_widths(grid, large)) for grid in grids) + forms + whole
    attn, mlp = 4 * sizes.only.width, sizes.only.width + rows(sizes, sizes.only)
    share = attn / (attn + mlp)
    alike = (
        len(shapes.head_counts(sizes, 0, large)) * (1 - share / 2)
        + len(shapes.measured_widths(grids[0], large)) * (share + (1 - share) / 2)
        + forms
    )
    depth = shapes.depth(sizes) / sizes.blocks
    return alike * depth + tokens * (depth if large else 1) + whole
