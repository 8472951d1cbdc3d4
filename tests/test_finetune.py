"""python -m pytest tests/test_finetune.py"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from edgeprune import data, vit
from edgeprune.config import Recipe
from edgeprune.errors import UsageError
from edgeprune.stages import finetune
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


def test_a_teacher_is_approached(tiny_vit: Any, images: data.Images) -> None:
    student = vit.slice_model(tiny_vit, HARSH)
    before, teacher = finetune.divergence(student, tiny_vit, images, 16), state(tiny_vit)
    finetune.fit(student, images, RECIPE, CONFIG, teacher=tiny_vit)
    assert finetune.divergence(student, tiny_vit, images, 16) < 0.6 * before
    assert same(teacher, state(tiny_vit)) and not student.training


def test_divergence_is_the_mean_kl(tiny_vit: Any, images: data.Images) -> None:
    student = vit.slice_model(tiny_vit, HARSH)
    with torch.no_grad():
        x = torch.stack([image for image, _ in images])
        p, q = tiny_vit(x).softmax(-1), student(x).softmax(-1)
    want = float((p * (p / q).log()).sum(-1).mean())
    assert finetune.divergence(student, tiny_vit, images, 7) == pytest.approx(want, rel=1e-4)
    assert finetune.divergence(tiny_vit, tiny_vit, images, 7) == pytest.approx(0.0, abs=1e-6)


def test_cached_teacher_outputs_equal_those_on_the_fly(
    tiny_vit: Any, images: data.Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lessons() -> dict[float, tuple[Any, ...]]:
        made = finetune._lessons(images, RECIPE, tiny_vit, 5, 0, finetune.SILENT)
        rows = {}
        for pixels, labels, targets in made:
            assert targets is not None
            for i in range(len(labels)):
                rows[float(pixels[i].sum())] = (pixels[i], labels[i], targets[0][i], targets[1][:, i])
        return rows

    cached = lessons()
    monkeypatch.setattr(finetune, "CACHE_BYTES", 0)
    direct = lessons()
    assert len(direct) == 40 and cached.keys() == direct.keys()
    for key, (pixels, label, logits, tokens) in direct.items():
        assert torch.equal(cached[key][0], pixels) and cached[key][1] == label
        torch.testing.assert_close(cached[key][2], logits)
        torch.testing.assert_close(cached[key][3], tokens, rtol=2e-3, atol=2e-3)  # kept as fp16
        assert cached[key][3].dtype == torch.float32


@pytest.mark.parametrize("cache", [0, 1 << 30])
@pytest.mark.parametrize("steps", [1, 5, 12])
def test_as_many_batches_as_steps(
    tiny_vit: Any, images: data.Images, monkeypatch: pytest.MonkeyPatch, cache: int, steps: int
) -> None:
    """Five batches an epoch; every image once per epoch, in another order."""
    monkeypatch.setattr(finetune, "CACHE_BYTES", cache)
    seen = [x.sum((1, 2, 3)) for x, _, _ in finetune._lessons(images, RECIPE, tiny_vit, steps, 0, finetune.SILENT)]
    assert len(seen) == steps
    if steps >= 10:
        first, second = torch.cat(seen[:5]), torch.cat(seen[5:10])
        assert not torch.equal(first, second) and torch.equal(first.sort().values, second.sort().values)


def test_labels_alone_teach_a_simple_task(make_vit: Callable[..., Any], images: data.Images) -> None:
    model = make_vit(num_classes=2)
    recipe = Recipe(epochs=(6.0,), batch_size=8, learning_rate=2e-3, label_weight=1.0, label_smoothing=0.05)
    finetune.fit(model, images, recipe, CONFIG)
    x, y = torch.stack([i for i, _ in images]), torch.tensor([y for _, y in images])
    assert (model(x).argmax(-1) == y).float().mean() == 1.0


def test_the_same_seed_gives_the_same_weights(tiny_vit: Any, images: data.Images) -> None:
    def fit(seed: int) -> dict[str, torch.Tensor]:
        student = vit.slice_model(tiny_vit, HARSH)
        recipe = replace(RECIPE, epochs=(1.0,), augment={"hflip": 0.5, "color_jitter": 0.3})
        finetune.fit(student, images, recipe, CONFIG, teacher=tiny_vit, seed=seed)
        return state(student)

    first = fit(0)
    assert same(first, fit(0)) and not same(first, fit(1))


def test_phases_resize_the_model_and_bring_it_back(
    make_vit: Callable[..., Any], images: data.Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = make_vit(num_classes=2), []
    loss = finetune._loss

    def watched(student: Any, pixels: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append((tuple(pixels.shape[2:]), student.pos_embed.shape[1]))
        return loss(student, pixels, *rest)

    monkeypatch.setattr(finetune, "_loss", watched)
    recipe = Recipe(epochs=(1.0, 0.0, 1.0), sizes=(16, 8, 24), batch_size=20, label_weight=1.0)
    finetune.fit(model, images, recipe, CONFIG)
    assert seen == [((16, 16), 5)] * 2 + [((24, 24), 10)] * 2
    assert tuple(model.pos_embed.shape) == (1, 17, 48) and tuple(model.patch_embed.img_size) == (32, 32)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 2)
    assert "pos_embed" in model.state_dict() and model.pos_embed.requires_grad


def test_phases_with_other_sizes_work_with_a_teacher_or_are_refused(tiny_vit: Any, images: data.Images) -> None:
    """The teacher takes one size only: the recipe is refused as the user's, or the teacher follows."""
    student, teacher = vit.slice_model(tiny_vit, HARSH), state(tiny_vit)
    recipe = replace(RECIPE, epochs=(1.0, 1.0), sizes=(16, 32))
    try:
        finetune.fit(student, images, recipe, CONFIG, teacher=tiny_vit)
    except UsageError as error:
        assert "sizes" in str(error)
    assert same(teacher, state(tiny_vit)) and tuple(tiny_vit.patch_embed.img_size) == (32, 32)


def test_a_model_that_is_not_square_keeps_its_shape(make_vit: Callable[..., Any], images: data.Images) -> None:
    model = make_vit(num_classes=2, img_size=(32, 16))
    config = {**CONFIG, "input_size": (3, 32, 16)}
    finetune.fit(model, images, Recipe(epochs=(1.0,), batch_size=20, label_weight=1.0), config)
    assert tuple(model.patch_embed.img_size) == (32, 16)


@pytest.mark.parametrize("weights", [{"token_layers": 0}, {"token_weight": 0.0}, {"logit_weight": 0.0}])
@pytest.mark.parametrize("cache", [0, 1 << 30])
def test_every_part_of_the_loss_can_be_left_out(
    tiny_vit: Any, images: data.Images, monkeypatch: pytest.MonkeyPatch, weights: dict[str, Any], cache: int
) -> None:
    monkeypatch.setattr(finetune, "CACHE_BYTES", cache)
    student = vit.slice_model(tiny_vit, HARSH)
    before = state(student)
    finetune.fit(student, images, replace(RECIPE, epochs=(0.2,), **weights), CONFIG, teacher=tiny_vit)
    assert not same(before, state(student))


def test_the_loss_is_zero_at_the_teacher(tiny_vit: Any, make_images: Callable[..., Any]) -> None:
    pixels = make_images(4)
    targets = finetune.teach(tiny_vit, pixels, RECIPE)
    loss = finetune._loss(tiny_vit, pixels, torch.zeros(4).long(), targets, RECIPE)
    assert loss.item() == pytest.approx(0.0, abs=1e-6)


def test_a_loss_that_is_no_number_stops_the_tuning(tiny_vit: Any, images: data.Images) -> None:
    student = vit.slice_model(tiny_vit, HARSH)
    with torch.no_grad():
        student.head.bias.fill_(float("nan"))
    with pytest.raises(UsageError, match=r"loss became nan at step 0 of 20; lower \[finetune\] learning_rate"):
        finetune.fit(student, images, RECIPE, CONFIG, teacher=tiny_vit)


def test_epochs_and_sizes_must_match(tiny_vit: Any, images: data.Images) -> None:
    with pytest.raises(UsageError, match="2 'epochs' but 1 'sizes'"):
        finetune.fit(tiny_vit, images, replace(RECIPE, epochs=(1.0, 1.0), sizes=(32,)), CONFIG)


def test_no_epochs_change_nothing(tiny_vit: Any, images: data.Images) -> None:
    before = state(tiny_vit)
    finetune.fit(tiny_vit, images, replace(RECIPE, epochs=(0.0,)), CONFIG, teacher=tiny_vit)
    assert same(before, state(tiny_vit))


@pytest.mark.parametrize(
    ("blocks", "count", "layers"), [(12, 4, [2, 5, 8, 11]), (3, 4, [0, 1, 2]), (12, 1, [11]), (12, 0, [])]
)
def test_feature_layers(blocks: int, count: int, layers: list[int]) -> None:
    assert finetune.feature_layers(blocks, count) == layers
