"""python -m pytest tests/test_checkpoint.py

A tuning that is killed after any step goes on as if it had not been; one that diverges keeps the best weights.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import parts
import pytest
import small
import torch

from edgeprune import schedules
from edgeprune.config import Recipe
from edgeprune.console import Console
from edgeprune.tuning import checkpoint as module
from edgeprune.tuning import frozen, loop
from edgeprune.tuning.checkpoint import Checkpoint
from edgeprune.tuning.lessons import Lessons
from edgeprune.tuning.loss import Targets
from edgeprune.types import BlockPlan, Plan

RECIPE = Recipe(epochs=(3.0,), batch_size=8, learning_rate=2e-3, precision="float32", views=0, checks=3)
RECIPES = {
    "answers kept": replace(RECIPE, views=1),
    "echoed": replace(RECIPE, augment={"hflip": 0.5, "scale": (0.5, 1.0)}, echo=2),
    "views kept": replace(RECIPE, augment={"hflip": 0.5, "scale": (0.5, 1.0)}, views=2, epochs=(4.0,)),
    "rate searched": replace(RECIPE, views=1, epochs=(8.0,)),
    "by Muon": replace(RECIPE, views=1, optimizer="muon"),
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


# Schedules: the coach's state is a part of it ---------------------------------------------------------


@pytest.mark.usefixtures("every_step")
@pytest.mark.parametrize("stops", [(8,), pytest.param((1, 4, 11, 14), marks=pytest.mark.slow)], ids=["once", "often"])
@pytest.mark.parametrize("name", [name for name in schedules.names() if name != schedules.DEFAULT])
def test_a_killed_schedule_ends_bit_for_bit_like_one_that_was_not(
    tiny_vit: Any, tmp_path: Path, name: str, stops: tuple[int, ...]
) -> None:
    def train(folder: Path, stop: int = 0) -> tuple[Any, ...]:
        given = parts.training(copy.deepcopy(tiny_vit), tiny_vit, target_ms=4.0)
        saved = 0

        class Counting(Checkpoint):
            def save(self, *state: Any) -> None:
                nonlocal saved
                super().save(*state)
                saved += 1
                if saved == stop:
                    raise Killed

        coach = schedules.get(name).coach(given)
        try:
            history = loop.fit(given.model, parts.images(40), parts.RECIPE, parts.CONFIG, teacher=tiny_vit, coach=coach,
                               checkpoint=Counting(folder))  # fmt: skip
        except Killed:
            return ()
        given.gates.remove()
        return coach.plan(), history.losses, given.model.state_dict()

    plan, losses, weights = train(tmp_path / "whole")
    assert len(losses) == 15
    for stop in stops:
        folder = tmp_path / str(stop)
        assert train(folder, stop) == ()
        torch.manual_seed(99)
        resumed = train(folder)
        assert resumed[0] == plan and resumed[1] == losses, stop
        assert all(torch.equal(value, resumed[2][key]) for key, value in weights.items()), stop


def test_what_a_coach_knows_is_kept_without_pickle() -> None:
    tensors: dict[str, torch.Tensor] = {}
    watched = torch.ones(3, requires_grad=True)
    watched.grad = torch.arange(3.0)
    generator = torch.Generator().manual_seed(7)
    torch.rand(3, generator=generator)
    plan = Plan((BlockPlan((0, 2), (1,)), BlockPlan((), (), 9)), reducer="tome")
    value = {
        (0, "attn"): watched, "computed": 2 * watched, "many": [1, (2.5, None), "x", True], "steps": range(3, 9),
        "array": np.arange(4), "drawn": generator, "plan": plan,
    }  # fmt: skip
    found = frozen.thaw(json.loads(json.dumps(frozen.freeze(value, tensors))), tensors)
    assert list(found) == list(value)
    again = found[0, "attn"]
    assert again.requires_grad and torch.equal(again, watched) and torch.equal(again.grad, watched.grad)
    assert not found["computed"].requires_grad and torch.equal(found["computed"], 2 * watched.detach())
    assert found["many"] == value["many"] and found["steps"] == range(3, 9) and found["plan"] == plan
    assert np.array_equal(found["array"], np.arange(4))
    assert torch.equal(torch.rand(5, generator=found["drawn"]), torch.rand(5, generator=generator))
    with pytest.raises(TypeError, match="Path cannot be a part of a checkpoint"):
        frozen.freeze(Path("x"), tensors)


# `edgeprune train` ------------------------------------------------------------------------------------

KILLED = """
import os, signal
import edgeprune.tuning.checkpoint as c
c.EVERY_S, c.SHARE = 0, 1e9
save, saved = c.Checkpoint.save, 0
def counted(self, *state):
    global saved
    save(self, *state)
    saved += 1
    if saved == 25:
        os.kill(os.getpid(), signal.SIGKILL)
c.Checkpoint.save = counted
from edgeprune.cli import main
main()
"""


def test_a_killed_training_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    card = tmp_path / "small.toml"
    phases = "epochs = [0.5, 0.5]\nsizes = [16, 32]\nprecision = 'float32'"
    card.write_text(small.CARD.replace("epochs = [4.0]", phases))
    torch.set_num_threads(1)
    whole = small.run("train", card, "--out", tmp_path / "whole.safetensors", "--format", "json")
    assert whole.code == 0, whole.err
    out = tmp_path / "killed.safetensors"
    command = [sys.executable, "-c", KILLED, "train", str(card), "--out", str(out)]
    killed = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert killed.returncode == -signal.SIGKILL and not out.exists(), killed.stderr
    other = small.run("train", card, "--out", out, "--seed", 1, "--epochs", 0.1, "--epochs", 0.1)
    assert other.code == 0 and "it is of another training" in other.err
    out.unlink()
    subprocess.run(command, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    resumed = small.run("train", card, "--out", out, "--format", "json")
    # the last step of a phase has none: it is over
    assert resumed.code == 0 and "going on from the checkpoint after 26 steps" in resumed.err
    assert resumed.document["accuracy"] == whole.document["accuracy"]
    assert out.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"small.toml", "whole.safetensors", out.name}
