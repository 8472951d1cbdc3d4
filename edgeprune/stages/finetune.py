"""Fine-tune: distil the dense model into the pruned one (ZipLM's recipe, arXiv 2302.04089, section 3.3).

loss = label_weight * cross entropy + logit_weight * T^2 KL(teacher || student)
     + token_weight * mean over layers of ||h_s - h_t||^2 / ||h_t||^2

The residual width is never pruned, so token features compare without a mapping layer. The same
function trains a card from scratch: no teacher, nothing pruned.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from edgeprune import artifact, vit
from edgeprune.compat import VisionTransformer
from edgeprune.config import Recipe, Request
from edgeprune.console import SILENT, Console
from edgeprune.data import Images, train_transform
from edgeprune.errors import UsageError
from edgeprune.stages import baseline

CHECK_IMAGES = 256
WORSE = 2  # times the divergence before; smaller differences are within what few check images can tell
NEGLIGIBLE = 1e-3  # nats; AdamW's first steps alone move a model further than that
CACHE_BYTES = 2 << 30  # teacher outputs above this size are computed again in every epoch


def run(request: Request, read: Mapping[str, Path], out: Path, console: Console) -> None:
    """Writes `model.safetensors`, `plan.json` (unchanged) and `finetune.json`."""
    dense = baseline.load(request, read["baseline"])
    planned = artifact.read_plan(read["prune"] / "plan.json")
    student = artifact.rebuild(planned, read["prune"] / "pruned.safetensors")
    recipe = request.card.finetune
    shutil.copyfile(read["prune"] / "plan.json", out / "plan.json")
    check, train = divide(dense.splits.train)
    before = divergence(student, dense.model, check, recipe.batch_size)
    untuned = {k: v.clone() for k, v in student.state_dict().items()}
    after = before
    if planned.plan == vit.dense_plan(dense.sizes):
        console.say("nothing was pruned: no tuning")
    elif sum(recipe.epochs) <= 0:
        console.say("no tuning: 0 epochs were asked for")
    elif before < NEGLIGIBLE:
        console.say(
            f"no tuning: on {len(check)} unseen images the pruned model diverges from the dense one by {before:.1e} nats, "
            f"less than {NEGLIGIBLE:.0e}; there is nothing to recover"
        )
    else:
        fit(
            student,
            train,
            recipe,
            dense.transforms,
            teacher=dense.model,
            seed=request.seed,
            console=console,
        )
        after = divergence(student, dense.model, check, recipe.batch_size)
        console.say(
            f"divergence from the dense model on {len(check)} images kept out of tuning: "
            f"{before:.4f} nats before, {after:.4f} after"
        )
        if not after < WORSE * before:
            student.load_state_dict(untuned)
            console.warn(f"tuning made the model diverge more than {WORSE} times as much; the untuned weights are kept")
    save_file({k: v.contiguous() for k, v in student.state_dict().items()}, out / "model.safetensors")
    dense.splits.report(out, console)
    (out / "finetune.json").write_text(
        json.dumps({"divergence_before": before, "divergence_after": after, "epochs": recipe.epochs})
    )


def divide(images: Images) -> tuple[Images, Images]:
    """(check, train): a tenth of the training images, at most `CHECK_IMAGES`, judges the tuning and takes no part in it.

    The calibration images cannot: the survivors were re-fitted on them.
    """
    count = min(CHECK_IMAGES, max(1, len(images) // 10))
    return images.take(count), images.drop(count)


@torch.no_grad()
def divergence(student: VisionTransformer, teacher: VisionTransformer, images: Images, batch_size: int) -> float:
    """Mean KL(teacher || student) of the predicted classes, in nats."""
    total = count = 0.0
    for pixels, _ in images.batches(batch_size):
        own, wanted = student(pixels).log_softmax(-1), teacher(pixels).log_softmax(-1)
        total += float(F.kl_div(own, wanted, log_target=True, reduction="sum"))
        count += len(pixels)
    return total / count


def fit(
    student: VisionTransformer,
    train: Images,
    recipe: Recipe,
    config: dict[str, object],
    *,
    teacher: VisionTransformer | None = None,
    seed: int = 0,
    console: Console = SILENT,
) -> None:
    """Tune `student` in place on `train`, phase after phase of the recipe; leaves it in eval mode.

    Raises UsageError when the loss stops being a number.
    """
    own_size = student.patch_embed.img_size
    sizes: tuple[int | None, ...] = recipe.sizes or (None,) * len(recipe.epochs)
    if teacher is not None and recipe.sizes:
        raise UsageError("the recipe has 'sizes', but a teacher only sees the model's own image size; leave them out")
    if len(sizes) != len(recipe.epochs):
        raise UsageError(
            f"the recipe has {len(recipe.epochs)} 'epochs' but {len(sizes)} 'sizes'; give one of each per phase"
        )
    random.seed(seed)  # timm's augmentation draws from all three
    np.random.seed(seed)
    torch.manual_seed(seed)
    for phase, (size, epochs) in enumerate(zip(sizes, recipe.epochs, strict=True)):
        if epochs <= 0:
            continue
        if size is not None:
            student.set_input_size(img_size=(size, size))
        images = train.with_transform(train_transform(config, recipe.augment, size))
        _phase(
            student,
            images,
            recipe,
            epochs,
            teacher,
            seed + 1000 * phase,
            console,
            f"tuning at {size or own_size[0]} px",
        )
    if student.patch_embed.img_size != own_size:
        student.set_input_size(img_size=own_size)
    student.eval()


def _phase(
    student: VisionTransformer, images: Images, recipe: Recipe, epochs: float, teacher: VisionTransformer | None,
    seed: int, console: Console, what: str,
) -> None:  # fmt: skip
    student.train()
    decay = [p for p in student.parameters() if p.ndim >= 2]
    plain = [p for p in student.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
    )
    per_epoch = math.ceil(len(images) / recipe.batch_size)
    steps = max(1, round(per_epoch * epochs))
    warmup = max(1, round(recipe.warmup * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            (step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / max(1, steps - warmup)))
        ),
    )
    lessons = _lessons(images, recipe, teacher, steps, seed, console)
    with console.progress(what, steps * recipe.batch_size, "images") as advance:
        for step, (pixels, labels, targets) in enumerate(lessons):
            loss = _loss(student, pixels, labels, targets, recipe)
            if not math.isfinite(loss.item()):
                raise UsageError(
                    f"the loss became {loss.item()} at step {step} of {steps}; lower [finetune] learning_rate"
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            advance(len(labels), f"epoch {1 + step // per_epoch}/{math.ceil(epochs)} loss {loss.item():.4f}")


#: What the teacher says of a batch: logits `[n, classes]`, token features `[layers, n, tokens, width]`.
Targets = tuple[Tensor, Tensor] | None


def _lessons(
    images: Images, recipe: Recipe, teacher: VisionTransformer | None, steps: int, seed: int, console: Console
) -> Iterator[tuple[Tensor, Tensor, Targets]]:
    """`steps` shuffled batches with the teacher's outputs, cached where no augmentation changes them."""
    cached = _cache(images, recipe, teacher, console) if teacher is not None and not recipe.augment else None
    done = 0
    for epoch in range(steps):
        if cached is not None:
            pixels, labels, logits, tokens = cached
            order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed + epoch))
            for pick in order.split(recipe.batch_size):
                yield pixels[pick], labels[pick], (logits[pick], tokens[:, pick].float())
                done += 1
                if done == steps:
                    return
        else:
            for pixels_, labels_ in images.batches(recipe.batch_size, shuffle_seed=seed + epoch):
                yield pixels_, labels_, None if teacher is None else teach(teacher, pixels_, recipe)
                done += 1
                if done == steps:
                    return


def _cache(
    images: Images, recipe: Recipe, teacher: VisionTransformer, console: Console
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    sizes = vit.anatomy(teacher)
    per_image = 4 * math.prod(sizes.image) + 2 * recipe.token_layers * sizes.tokens * sizes.width
    if per_image * len(images) > CACHE_BYTES:
        console.say(
            f"teacher outputs are not cached: {per_image * len(images) / 2**30:.1f} GiB is above {CACHE_BYTES / 2**30:.0f} GiB"
        )
        return None
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    with console.progress("teacher outputs", len(images), "images") as advance:
        for pixels, labels in images.batches(recipe.batch_size):
            logits, tokens = teach(teacher, pixels, recipe)
            parts.append((pixels, labels, logits, tokens.half()))
            advance(len(labels), "")
    columns = list(zip(*parts, strict=True))
    return torch.cat(columns[0]), torch.cat(columns[1]), torch.cat(columns[2]), torch.cat(columns[3], dim=1)


def feature_layers(blocks: int, count: int) -> list[int]:
    """`count` block indices, evenly spread and ending with the last."""
    count = min(count, blocks)
    return [round((i + 1) * blocks / count) - 1 for i in range(count)]


@torch.no_grad()
def teach(teacher: VisionTransformer, pixels: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """The teacher's logits `[n, classes]` and token features `[layers, n, tokens, width]`."""
    *hidden, logits = vit.streams(teacher, pixels)
    chosen = feature_layers(len(hidden), recipe.token_layers)
    return logits, torch.stack([hidden[i] for i in chosen]) if chosen else logits.new_zeros(0, len(pixels), 1, 1)


def _loss(student: VisionTransformer, pixels: Tensor, labels: Tensor, targets: Targets, recipe: Recipe) -> Tensor:
    *hidden, logits = vit.streams(student, pixels)
    loss = logits.new_zeros(())
    if recipe.label_weight:
        loss = loss + recipe.label_weight * F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
    if targets is None:
        return loss
    teacher_logits, tokens = targets
    if recipe.logit_weight:
        t = recipe.temperature
        kl = F.kl_div(
            F.log_softmax(logits / t, -1), F.log_softmax(teacher_logits / t, -1), log_target=True, reduction="batchmean"
        )
        loss = loss + recipe.logit_weight * t * t * kl
    if recipe.token_weight and recipe.token_layers:
        chosen = feature_layers(len(hidden), recipe.token_layers)
        distances = [
            (hidden[i] - wanted).square().mean() / wanted.square().mean()
            for i, wanted in zip(chosen, tokens, strict=True)
        ]
        loss = loss + recipe.token_weight * torch.stack(distances).mean()
    return loss
