"""python -m pytest tests/test_finetune.py"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import parts
import pytest
import torch
from PIL import Image

from edgeprune import config, data, vit
from edgeprune.config import Recipe
from edgeprune.console import SILENT, Console
from edgeprune.errors import UsageError
from edgeprune.tuning import lessons, loss, optimizers, precision
from edgeprune.tuning.judge import Average, wearing
from edgeprune.tuning.loop import fit
from edgeprune.types import BlockPlan, Plan

CONFIG: dict[str, Any] = {
    "input_size": (3, 32, 32), "interpolation": "bilinear", "mean": (0.5,) * 3, "std": (0.25,) * 3, "crop_pct": 1.0,
}  # fmt: skip

HARSH = Plan((BlockPlan((1,), (1, 5, 9)), BlockPlan((), (0, 4)), BlockPlan((0, 2), ())))

RECIPE = Recipe(epochs=(4.0,), batch_size=8, learning_rate=2e-3)


class Bright:
    """Images that are dark (class 0) or bright (class 1), with noise."""

    def __init__(self, count: int) -> None:
        rng = np.random.default_rng(0)
        noise = rng.integers(0, 100, (count, 32, 32, 3))
        self.labels = np.arange(count) % 2
        self.pixels = (noise + 150 * self.labels[:, None, None, None]).astype(np.uint8)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]), int(self.labels[index])


@pytest.fixture
def images() -> data.Images:
    return data.Images(Bright(40), np.arange(40), data.eval_transform(CONFIG), "training")


def state(model: Any) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("optimizer", config.OPTIMIZERS)
def test_a_teacher_is_approached(tiny_vit: Any, images: data.Images, optimizer: str) -> None:
    student = vit.slice_model(tiny_vit, HARSH)
    before, teacher = parts.divergence(student, tiny_vit, images, 16), state(tiny_vit)
    fit(student, images, replace(RECIPE, optimizer=optimizer), CONFIG, teacher=tiny_vit)
    assert parts.divergence(student, tiny_vit, images, 16) < 0.6 * before
    assert same(teacher, state(tiny_vit)) and not student.training


def test_muon_steps_the_matrices_of_the_blocks_near_orthogonally(tiny_vit: Any) -> None:
    """However unequal the gradient's directions; a step is as large as AdamW's usually is; layers without units go by."""
    model = vit.slice_model(tiny_vit, HARSH)
    steppers = optimizers.create(model, "muon", 1e-2, 0.0)
    before = state(model)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
        if p.ndim == 2 and len(p):
            p.grad *= torch.logspace(0, 1, len(p))[:, None]
    gradient = torch.linalg.svdvals(model.blocks[0].attn.qkv.weight.grad)
    assert gradient.max() > 10 * gradient.min()
    for stepper in steppers:
        stepper.step()
    moved = {name: before[name] - value for name, value in model.state_dict().items()}
    assert all(bool((step != 0).any()) for step in moved.values() if step.numel())
    for name in ("blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight"):
        values = torch.linalg.svdvals(moved[name])
        assert values.max() < 2 * values.min()
        assert moved[name].square().mean().sqrt() == pytest.approx(0.2 * 1e-2, rel=0.5)
    assert moved["patch_embed.proj.weight"].abs().max() == pytest.approx(1e-2, rel=1e-3)


def test_an_unknown_optimizer() -> None:
    with pytest.raises(config.BadValue, match="unknown optimizer 'adam'; did you mean 'adamw'"):
        replace(RECIPE, optimizer="adam")


def test_divergence_is_the_mean_kl(tiny_vit: Any, images: data.Images) -> None:
    student = vit.slice_model(tiny_vit, HARSH)
    with torch.no_grad():
        x = torch.stack([image for image, _ in images])
        p, q = tiny_vit(x).softmax(-1), student(x).softmax(-1)
    want = float((p * (p / q).log()).sum(-1).mean())
    assert parts.divergence(student, tiny_vit, images, 7) == pytest.approx(want, rel=1e-4)
    assert parts.divergence(tiny_vit, tiny_vit, images, 7) == pytest.approx(0.0, abs=1e-6)


def lessons_of(teacher: Any, images: data.Images, **changes: Any) -> lessons.Lessons:
    read = loss.read_tokens(teacher)
    options = {"batch_size": 8, "epochs": 2.0, "views": 1, "seed": 0, **changes}
    return lessons.Lessons(images, ask=lambda pixels: loss.teach(teacher, pixels, RECIPE, read), **options)


@pytest.mark.parametrize("cache", [0, 1 << 30])
@pytest.mark.parametrize("steps", [1, 5, 12])
def test_every_image_once_per_epoch_in_another_order(
    tiny_vit: Any, images: data.Images, monkeypatch: pytest.MonkeyPatch, cache: int, steps: int
) -> None:
    """Five batches an epoch."""
    monkeypatch.setattr(lessons, "CACHE_BYTES", cache)
    seen = [x.sum((1, 2, 3)) for x, _, _ in itertools.islice(lessons_of(tiny_vit, images), steps)]
    assert len(seen) == steps
    if steps >= 10:
        first, second = torch.cat(seen[:5]), torch.cat(seen[5:10])
        assert not torch.equal(first, second) and torch.equal(first.sort().values, second.sort().values)


def test_kept_answers_equal_those_asked_for_again(
    tiny_vit: Any, images: data.Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    def second_epoch() -> list[lessons.Lesson]:
        return list(itertools.islice(lessons_of(tiny_vit, images), 5, 10))

    kept = second_epoch()
    monkeypatch.setattr(lessons, "CACHE_BYTES", 0)
    for (pixels, labels, targets), (pixels_, labels_, targets_) in zip(kept, second_epoch(), strict=True):
        assert torch.equal(pixels, pixels_) and torch.equal(labels, labels_)
        assert targets is not None and targets_ is not None
        torch.testing.assert_close(targets.logits, targets_.logits)
        for own, wanted in zip(targets.tokens, targets_.tokens, strict=True):
            assert own.dtype == wanted.dtype == torch.float16
            torch.testing.assert_close(own, wanted)


@pytest.mark.parametrize(("views", "epochs", "asked"), [(1, 3.0, 40), (2, 3.0, 80), (0, 3.0, 120), (1, 0.4, 16)])
def test_the_teacher_is_asked_once_per_view(
    tiny_vit: Any, images: data.Images, views: int, epochs: float, asked: int
) -> None:
    """And never for images that no step needs."""
    counted = []
    own = lessons_of(tiny_vit, images, views=views, epochs=epochs)
    ask = own.ask

    def counting(pixels: torch.Tensor) -> loss.Targets:
        counted.append(len(pixels))
        assert ask is not None
        return ask(pixels)

    own.ask = counting
    list(itertools.islice(own, round(5 * epochs)))
    assert sum(counted) == asked


def test_lessons_are_given_again(tiny_vit: Any, images: data.Images, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of four twice before the next four come, and the teacher is asked once."""
    monkeypatch.setattr(lessons, "ECHO_LESSONS", 4)
    own = lessons_of(tiny_vit, images, views=0, epochs=4.0, echo=2)
    sums = [float(pixels.sum()) for pixels, _, _ in itertools.islice(own, 16)]
    assert sorted(sums[:4]) == sorted(sums[4:8]) and sorted(sums[8:12]) == sorted(sums[12:16])
    assert len({*sums[:4], *sums[8:12]}) == 8


@pytest.mark.parametrize("views", [0, 1])
def test_shares_of_processes_make_up_the_batches_of_one(tiny_vit: Any, images: data.Images, views: int) -> None:
    """Down to the random views; batches of 9 and 4 images for three processes."""
    images = images.with_transform(data.train_transform(CONFIG, {"hflip": 0.5, "color_jitter": 0.3}))

    def pixels(rank: int, size: int) -> list[torch.Tensor]:
        made = lessons_of(tiny_vit, images, batch_size=9, views=views, rank=rank, size=size)
        return [x for x, _, _ in itertools.islice(made, 10)]

    for whole, *shares in zip(pixels(0, 1), *(pixels(rank, 3) for rank in range(3)), strict=True):
        together = torch.stack([image for share in shares for image in share])
        assert torch.equal(whole.flatten(1).sum(1).sort().values, together.flatten(1).sum(1).sort().values)


def test_loader_workers_change_nothing(tiny_vit: Any, images: data.Images) -> None:
    images = images.with_transform(data.train_transform(CONFIG, {"hflip": 0.5, "color_jitter": 0.3}))
    alone, helped = (
        torch.cat([x for x, _, _ in itertools.islice(lessons_of(tiny_vit, images, workers=workers), 5)])
        for workers in (0, 2)
    )
    assert torch.equal(alone, helped)


def test_labels_alone_teach_a_simple_task(make_vit: Callable[..., Any], images: data.Images) -> None:
    model = make_vit(num_classes=2)
    recipe = Recipe(epochs=(6.0,), batch_size=8, learning_rate=2e-3, label_weight=1.0, label_smoothing=0.05)
    fit(model, images, recipe, CONFIG)
    x, y = torch.stack([i for i, _ in images]), torch.tensor([y for _, y in images])
    assert (model(x).argmax(-1) == y).float().mean() == 1.0


def test_the_same_seed_gives_the_same_weights(tiny_vit: Any, images: data.Images) -> None:
    def tuned(seed: int) -> dict[str, torch.Tensor]:
        student = vit.slice_model(tiny_vit, HARSH)
        recipe = replace(RECIPE, epochs=(1.0,), augment={"hflip": 0.5, "color_jitter": 0.3})
        fit(student, images, recipe, CONFIG, teacher=tiny_vit, seed=seed)
        return state(student)

    first = tuned(0)
    assert same(first, tuned(0)) and not same(first, tuned(1))


def test_phases_resize_the_model_and_bring_it_back(
    make_vit: Callable[..., Any], images: data.Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = make_vit(num_classes=2), []
    total_loss = loss.total_loss

    def watched(student: Any, pixels: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append((tuple(pixels.shape[2:]), student.pos_embed.shape[1]))
        return total_loss(student, pixels, *rest)

    monkeypatch.setattr(loss, "total_loss", watched)
    recipe = Recipe(epochs=(1.0, 0.0, 1.0), sizes=(16, 8, 24), batch_size=20, label_weight=1.0)
    fit(model, images, recipe, CONFIG)
    assert seen == [((16, 16), 5)] * 2 + [((24, 24), 10)] * 2
    assert tuple(model.pos_embed.shape) == (1, 17, 48) and tuple(model.patch_embed.img_size) == (32, 32)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 2)
    assert "pos_embed" in model.state_dict() and model.pos_embed.requires_grad


def test_phases_with_other_sizes_work_with_a_teacher_or_are_refused(tiny_vit: Any, images: data.Images) -> None:
    """The teacher takes one size only: the recipe is refused as the user's, or the teacher follows."""
    student, teacher = vit.slice_model(tiny_vit, HARSH), state(tiny_vit)
    recipe = replace(RECIPE, epochs=(1.0, 1.0), sizes=(16, 32))
    try:
        fit(student, images, recipe, CONFIG, teacher=tiny_vit)
    except UsageError as error:
        assert "sizes" in str(error)
    assert same(teacher, state(tiny_vit)) and tuple(tiny_vit.patch_embed.img_size) == (32, 32)


def test_a_model_that_is_not_square_keeps_its_shape(make_vit: Callable[..., Any], images: data.Images) -> None:
    model = make_vit(num_classes=2, img_size=(32, 16))
    config = {**CONFIG, "input_size": (3, 32, 16)}
    fit(model, images, Recipe(epochs=(1.0,), batch_size=20, label_weight=1.0), config)
    assert tuple(model.patch_embed.img_size) == (32, 16)


@pytest.mark.parametrize("weights", [{"token_layers": 0}, {"token_weight": 0.0}, {"logit_weight": 0.0}])
@pytest.mark.parametrize("cache", [0, 1 << 30])
def test_every_part_of_the_loss_can_be_left_out(
    tiny_vit: Any, images: data.Images, monkeypatch: pytest.MonkeyPatch, weights: dict[str, Any], cache: int
) -> None:
    monkeypatch.setattr(lessons, "CACHE_BYTES", cache)
    student = vit.slice_model(tiny_vit, HARSH)
    before = state(student)
    fit(student, images, replace(RECIPE, epochs=(0.2,), **weights), CONFIG, teacher=tiny_vit)
    assert not same(before, state(student))


def test_the_loss_is_zero_at_the_teacher(tiny_vit: Any, make_images: Callable[..., Any]) -> None:
    pixels = make_images(4)
    read = loss.read_tokens(tiny_vit)
    targets = loss.teach(tiny_vit, pixels, RECIPE, read)
    assert loss.total_loss(tiny_vit, pixels, torch.zeros(4).long(), targets, RECIPE, read).item() == pytest.approx(
        0.0, abs=1e-6
    )


def test_the_loss_of_a_batch_is_the_sum_over_its_parts(tiny_vit: Any, make_images: Callable[..., Any]) -> None:
    student, pixels, labels = vit.slice_model(tiny_vit, HARSH), make_images(6), torch.arange(6) % 5
    read, recipe = loss.read_tokens(tiny_vit), replace(RECIPE, label_weight=0.5, temperature=2.0)

    def of(part: slice) -> float:
        targets = loss.teach(tiny_vit, pixels[part], recipe, read)
        return loss.total_loss(student, pixels[part], labels[part], targets, recipe, read).item()

    assert of(slice(0, 2)) + of(slice(2, 6)) == pytest.approx(of(slice(0, 6)), rel=1e-5)


@pytest.mark.parametrize(
    ("architecture", "kwargs", "tokens"),
    [
        ("vit_tiny_patch16_224", {}, [0]),
        ("deit_tiny_distilled_patch16_224", {}, [0, 1]),
        ("vit_tiny_patch16_224", {"global_pool": "avg"}, list(range(1, 17))),
        ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}, list(range(16))),
    ],
)
def test_tokens_that_the_head_reads(
    make_vit: Callable[..., Any], architecture: str, kwargs: dict[str, Any], tokens: list[int]
) -> None:
    assert loss.read_tokens(make_vit(architecture, **kwargs)).nonzero().flatten().tolist() == tokens


def test_the_cls_token_has_its_share() -> None:
    read = torch.tensor([True] + [False] * 4)
    torch.testing.assert_close(loss.token_weights(read, 0.5), torch.tensor([0.5] + [0.125] * 4))
    torch.testing.assert_close(loss.token_weights(read, 0.0), torch.full((5,), 0.2))
    torch.testing.assert_close(loss.token_weights(read, 1.0), torch.tensor([1.0, 0, 0, 0, 0]))
    torch.testing.assert_close(loss.token_weights(~read, 0.5), torch.full((5,), 0.2))  # pooled: they count enough
    torch.testing.assert_close(loss.token_weights(torch.ones(4).bool(), 1.0), torch.full((4,), 0.25))


def test_a_loss_that_is_no_number_stops_the_tuning(tiny_vit: Any, images: data.Images) -> None:
    student = vit.slice_model(tiny_vit, HARSH)
    with torch.no_grad():
        student.head.bias.fill_(float("nan"))
    with pytest.raises(UsageError, match=r"loss became nan at step 0 of 20; lower \[finetune\] learning_rate"):
        fit(student, images, RECIPE, CONFIG, teacher=tiny_vit)


def test_epochs_and_sizes_must_match(tiny_vit: Any, images: data.Images) -> None:
    with pytest.raises(UsageError, match="2 'epochs' but 1 'sizes'"):
        fit(tiny_vit, images, replace(RECIPE, epochs=(1.0, 1.0), sizes=(32,)), CONFIG)


def test_the_model_ends_with_the_weights_that_were_best(tiny_vit: Any, images: data.Images) -> None:
    """At a rate that wrecks it, with those it came with; the early end is said."""
    student = vit.slice_model(tiny_vit, HARSH)
    before = state(student)
    recipe = replace(RECIPE, learning_rate=30.0, learning_rate_search=False, checks=10, patience=2, ema=0.0)
    history = fit(student, images.drop(8), recipe, CONFIG, teacher=tiny_vit, check=images.take(8))
    assert same(before, state(student)) and not student.training
    assert len(history.checks) == 2 and len(history.losses) < 16


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_the_best_check_is_what_is_returned(tiny_vit: Any, images: data.Images, ema: float) -> None:
    student, check = vit.slice_model(tiny_vit, HARSH), images.take(8)
    start = parts.divergence(student, tiny_vit, check, 8)
    history = fit(student, images.drop(8), replace(RECIPE, ema=ema), CONFIG, teacher=tiny_vit, check=check)
    found = parts.divergence(student, tiny_vit, check, 8)
    assert found < start and found == pytest.approx(min(value for _, value in history.checks), rel=1e-4)


def test_the_search_finds_a_rate_within_the_steps(tiny_vit: Any, images: data.Images) -> None:
    """From a recipe whose rate is too low, upwards; what it costs is part of the epochs."""
    recipe = replace(RECIPE, epochs=(80.0,), learning_rate=3e-5, learning_rate_search=True)
    history = fit(
        vit.slice_model(tiny_vit, HARSH), images.drop(8), recipe, CONFIG, teacher=tiny_vit, check=images.take(8)
    )
    assert history.learning_rates == [pytest.approx(9e-5)] and len(history.losses) == 320
    assert history.checks[-1][0] == 320


def test_a_moving_average_follows_the_weights() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    average = Average(model, 0.5)
    torch.nn.init.ones_(model.weight)
    for want in (0.9, 0.98, 0.995):  # early on the horizon is short: decay 1/10, 2/11, 3/12
        average.update(model)
        assert average.state["weight"].item() == pytest.approx(want, abs=5e-3)
    with wearing(model, average.state):
        assert model.weight.item() < 1.0
    assert model.weight.item() == 1.0


def test_bfloat16_only_where_it_pays(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Eight steps in turns, the first of each not timed; then the faster one."""
    monkeypatch.setattr(precision, "has_bfloat16", lambda _: True)
    cpu = torch.device("cpu")
    for cost, want in ((0.5, "bfloat16"), (0.97, "float32"), (1.5, "float32")):
        choice = precision.Precision("training", "auto", 100, cpu, Console())
        now = [0.0]
        monkeypatch.setattr(precision.time, "perf_counter", lambda now=now: now[0])
        for images in (8, 8, 8, 0, 8, 8, 4, 8, 8):  # nothing is learnt from an empty share
            with choice.run(images):
                now[0] += images * (cost if choice.name == "bfloat16" else 1.0)
        assert choice.name == want
        assert f"training in {want}: bfloat16 takes {cost:.2f} of the time" in capsys.readouterr().err
    assert precision.Precision("training", "auto", 10, cpu, SILENT).name == "float32"
    with pytest.raises(UsageError, match="precision must be one of auto, float32, bfloat16 in a recipe, not 'half'"):
        precision.Precision("training", "half", 10, cpu, SILENT)


def test_tuning_in_bfloat16_works(tiny_vit: Any, images: data.Images) -> None:
    student = vit.slice_model(tiny_vit, HARSH)
    before = parts.divergence(student, tiny_vit, images, 16)
    history = fit(student, images, replace(RECIPE, precision="bfloat16"), CONFIG, teacher=tiny_vit)
    assert parts.divergence(student, tiny_vit, images, 16) < 0.6 * before and history.precision == "bfloat16"
    assert all(p.dtype == torch.float32 for p in student.parameters())


def test_no_epochs_change_nothing(tiny_vit: Any, images: data.Images) -> None:
    before = state(tiny_vit)
    fit(tiny_vit, images, replace(RECIPE, epochs=(0.0,)), CONFIG, teacher=tiny_vit)
    assert same(before, state(tiny_vit))


@pytest.mark.parametrize(
    ("blocks", "count", "layers"), [(12, 4, [2, 5, 8, 11]), (3, 4, [0, 1, 2]), (12, 1, [11]), (12, 0, [])]
)
def test_feature_layers(blocks: int, count: int, layers: list[int]) -> None:
    assert loss.feature_layers(blocks, count) == layers
