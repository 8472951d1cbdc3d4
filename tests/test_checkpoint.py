"""python -m pytest tests/test_checkpoint.py

A tuning that is killed after any step goes on as if it had not been; one that diverges keeps the best weights.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import parts
import pytest
import torch

from edgeprune.config import Recipe
from edgeprune.console import Console
from edgeprune.tuning import checkpoint as module
from edgeprune.tuning import loop
from edgeprune.tuning.checkpoint import Checkpoint
from edgeprune.tuning.lessons import Lessons
from edgeprune.tuning.loss import Targets

RECIPE = Recipe(epochs=(3.0,), batch_size=8, learning_rate=2e-3, precision="float32", views=0, checks=3)
RECIPES = {
    "answers kept": replace(RECIPE, views=1),
    "echoed": replace(RECIPE, augment={"hflip": 0.5, "scale": (0.5, 1.0)}, echo=2),
    "views kept": replace(RECIPE, augment={"hflip": 0.5, "scale": (0.5, 1.0)}, views=2, epochs=(4.0,)),
    "rate searched": replace(RECIPE, views=1, epochs=(8.0,)),
    "two phases": replace(RECIPE, epochs=(1.0, 2.0)),
}  # fmt: skip


class Killed(BaseException):
    """As a kill: nothing but what is on the disk survives."""


def tune(
    tiny_vit: Any, recipe: Recipe, folder: Path | None, stop: int = 0, said: Any = None
) -> dict[str, torch.Tensor]:
    """Tune a copy whose MLPs are shifted; `stop`: steps after which it is killed. Every step has a checkpoint."""
    student = copy.deepcopy(tiny_vit)
    with torch.no_grad():
        for block in student.blocks:
            block.mlp.fc2.weight.mul_(0.3)
    images = parts.images(48)
    console = said or Console(quiet=True)
    steps = 0

    class Counting(Checkpoint):
        def save(self, *state: Any) -> None:
            nonlocal steps
            super().save(*state)
            steps += 1
            if steps == stop:
                raise Killed

    kept = Counting(folder, console) if folder is not None else None
    try:
        history = loop.fit(student, images.drop(8), recipe, parts.CONFIG, teacher=tiny_vit, check=images.take(8), seed=3,
                           console=console, checkpoint=kept)  # fmt: skip
    except Killed:
        return {}
    return {**student.state_dict(), "losses": torch.tensor(history.losses), "checks": torch.tensor(history.checks)}


@pytest.fixture
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY_S", 0.0)
    monkeypatch.setattr(module, "SHARE", float("inf"))
    monkeypatch.setattr(loop, "SEARCH_STEPS", (2, 3))


@pytest.mark.usefixtures("every_step")
@pytest.mark.parametrize("what", RECIPES)
def test_a_killed_tuning_ends_bit_for_bit_like_one_that_was_not(tiny_vit: Any, tmp_path: Path, what: str) -> None:
    recipe = RECIPES[what]
    if what != "rate searched":
        recipe = replace(recipe, learning_rate_search=False)
    whole = tune(tiny_vit, recipe, tmp_path / "whole")
    assert not torch.equal(whole["losses"][0], whole["losses"][-1])
    for stop in (1, 4, 6, 11):
        folder = tmp_path / str(stop)
        assert tune(tiny_vit, recipe, folder, stop) == {}
        torch.manual_seed(99)  # another process
        np.random.seed(99)
        resumed = tune(tiny_vit, recipe, folder)
        assert resumed.keys() == whole.keys()
        different = [name for name in whole if not torch.equal(whole[name], resumed[name])]
        assert not different, (stop, different)


@pytest.mark.usefixtures("every_step")
def test_killed_again_and_again(tiny_vit: Any, tmp_path: Path) -> None:
    recipe = RECIPES["echoed"]
    whole = tune(tiny_vit, recipe, tmp_path / "whole")
    for _ in range(100):
        if found := tune(tiny_vit, recipe, tmp_path / "kept", stop=2):
            break
    assert all(torch.equal(whole[name], found[name]) for name in whole)


@pytest.mark.usefixtures("every_step")
@pytest.mark.parametrize("name", ["state.json", "step"])
def test_a_damaged_checkpoint_is_found_said_and_not_used(
    tiny_vit: Any, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = RECIPES["answers kept"]
    whole = tune(tiny_vit, recipe, tmp_path / "whole")
    tune(tiny_vit, recipe, tmp_path / "kept", stop=5)
    [path] = (tmp_path / "kept").glob(f"{name}*")
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)
    again = tune(tiny_vit, recipe, tmp_path / "kept", said=Console())
    assert "the checkpoint of the interrupted tuning cannot be used, it starts anew" in capsys.readouterr().err
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.parametrize("what", ["answers kept", "echoed", "views kept"])
def test_lessons_after_some_are_the_lessons_after_them(what: str) -> None:
    """And far fewer of the answers are asked for than were given."""
    recipe = RECIPES[what]
    asked = 0

    def ask(pixels: torch.Tensor) -> Targets:
        nonlocal asked
        asked += 1
        return Targets(pixels.mean((2, 3)), ())

    def lessons() -> Lessons:
        return Lessons(parts.images(40), 8, 6.0, views=recipe.views if recipe.augment else 1, seed=5, ask=ask,
                       echo=recipe.echo)  # fmt: skip

    all_ = [lesson for lesson, _ in zip(iter(lessons()), range(30))]
    for count in (1, 5, 7, 23):
        asked = 0
        found = next(lessons().after(count))
        assert torch.equal(found[0], all_[count][0]) and torch.equal(found[1], all_[count][1])
        assert found[2] is not None and torch.equal(found[2].logits, all_[count][2].logits)
        assert asked <= 16


def test_a_tuning_that_diverges_keeps_the_best_weights(
    tiny_vit: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    total, calls = loop.losses.total_loss, 0

    def broken(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        loss: torch.Tensor = total(*arguments)
        return loss * float("nan") if calls == 12 else loss

    monkeypatch.setattr(loop.losses, "total_loss", broken)
    found = tune(tiny_vit, RECIPES["answers kept"], None, said=Console())
    said = capsys.readouterr().err
    assert "the loss became nan at step 11 of 15: tuning stops, and the best weights so far stay" in said
    assert "learning_rate" in said
    assert len(found["losses"]) == 11
    assert all(torch.isfinite(value).all() for value in found.values())


def test_a_rate_that_diverges_in_its_trial_is_not_taken(
    tiny_vit: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loop, "SEARCH_RATES", (1.0, 1e30))
    monkeypatch.setattr(loop, "SEARCH_STEPS", (2, 3))
    found = tune(tiny_vit, RECIPES["rate searched"], None, said=Console())
    said = capsys.readouterr().err
    assert ": inf" in said and "learning rate 2.0e-03" in said
    assert all(torch.isfinite(value).all() for value in found.values())
