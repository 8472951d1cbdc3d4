"""python -m pytest tests/test_footprint.py            small models
python -m pytest tests/test_footprint.py -m slow    the digits build

Memory: what is said before a build is not exceeded, and a limit changes where things wait, not what comes out.
"""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import faults
import pytest
import small
import torch
from parts import calibration
from small import Workspace

from edgeprune import api, config, errors, footprint, pipeline, recovery, vit
from edgeprune.console import SILENT
from edgeprune.errors import UsageError
from edgeprune.shelf import MEMORY, Kept, Shelf
from edgeprune.stitch import Database, Judge

MIB = 1 << 20


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GiB", 4 << 30), ("4G", 4 << 30), ("4g", 4 << 30), ("500MB", 500_000_000), ("1.5 GiB", 3 << 29), ("1000", 1000),
     ("2TiB", 2 << 40), ("64kb", 64_000)],
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert config.parse_size(text, "max-memory") == size


@pytest.mark.parametrize("text", ["0", "-1GiB", "4 gigs", "GiB", "nan", "inf", "1e9", "9" * 30, "4GiBB", "4\nGiB x"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="max-memory must be a size such as 4GiB"):
        config.parse_size(text, "max-memory")


def test_what_is_available_is_the_least_of_all_limits(tmp_path: Path) -> None:
    group = tmp_path / "a" / "b"
    group.mkdir(parents=True)
    meminfo = "MemAvailable:    2048 kB\n"
    assert footprint.available(meminfo, group) == 2 * MIB
    (tmp_path / "a" / "memory.max").write_text("1000000\n")
    (tmp_path / "a" / "memory.current").write_text("400000\n")
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("1\n")
    assert footprint.available(meminfo, group) == 600_000
    assert footprint.available("", tmp_path) is None
    assert (footprint.available() or 0) > 0


# The shelf ---------------------------------------------------------------------------------------


def test_a_shelf_gives_back_what_was_put_there(tmp_path: Path) -> None:
    made = [torch.randn(3, 5), torch.arange(7), torch.randn(0, 4), torch.randn(6, 4)[:, 1:3], torch.randn(2).half()]
    for limit in (0, 70, None):
        shelf = Shelf(limit, tmp_path)
        kept = shelf.keep(iter(made))
        assert len(kept) == len(made) and isinstance(kept[1:3], Kept)
        for wanted, found in zip([*made, *made[1:3]], [*kept, *kept[1:3]], strict=True):
            assert found.dtype == wanted.dtype and torch.equal(found, wanted)
    assert not list(tmp_path.iterdir()), "the file has no name: it goes with the process, killed or not"


def test_a_shelf_holds_no_more_than_its_limit_and_uses_room_again(tmp_path: Path) -> None:
    shelf = Shelf(100, tmp_path)
    kept = shelf.keep(torch.full((10,), float(i)) for i in range(5))
    assert shelf.held == 80 and shelf.end == 120, "two of 40 bytes in memory, three in the file"
    for _ in range(6):
        kept = shelf.keep([x + 1 for x in kept])
        gc.collect()
    assert [float(x[0]) for x in kept] == [6, 7, 8, 9, 10]
    assert shelf.held <= 80 and shelf.end <= 320, "places are used again"
    del kept
    gc.collect()
    assert shelf.held == 0 and sum(map(len, shelf.free.values())) * 40 == shelf.end


@pytest.mark.parametrize("limit", [0, 100_000])
def test_a_refit_from_a_shelf_is_the_same(tiny_vit: Any, tmp_path: Path, limit: int) -> None:
    found = calibration(tiny_vit, "fisher")
    plan = vit.Plan(tuple(vit.BlockPlan((0, 2), tuple(range(0, 24, 2))) for _ in range(3)))
    made = []
    for shelf in (MEMORY, Shelf(limit, tmp_path)):
        pruned = vit.slice_model(tiny_vit, plan)
        said = recovery.sequential(tiny_vit, pruned, shelf.keep(found.batches), found.weights, plan, shelf)
        made.append((said, pruned.state_dict()))
    assert made[0][0] == made[1][0] and made[0][0][0] > 0
    assert all(torch.equal(made[0][1][name], value) for name, value in made[1][1].items())
    assert shelf.end > 0, "something waited on disk"


def test_a_judge_from_a_shelf_says_the_same(tiny_vit: Any, make_images: Callable[..., Any], tmp_path: Path) -> None:
    found = calibration(tiny_vit)
    counts = [(0, 1, 3) if level.kind == "attn" else (0, 8, 24) for level in found.levels]
    database = Database(tiny_vit, found.levels, counts, found.moments)
    said = []
    for shelf in (MEMORY, Shelf(0, tmp_path)):
        judge = Judge(database, make_images(6), shelf=shelf)
        judge.keep((2,) * 6)
        said.append([judge.divergence((*[2] * i, 1, *[2] * (5 - i))) for i in range(6)])
    assert said[0] == said[1] and shelf.end > 0


def test_a_database_forgets_what_nobody_asked_for_longest(tiny_vit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = calibration(tiny_vit)
    database = Database(tiny_vit, found.levels, [(0, 1, 2, 3), (0, 8, 16, 24)] * 3, found.moments)
    first = database.sub_block(0, 1)
    wanted = [p.clone() for p in first.parameters()]
    monkeypatch.setattr("edgeprune.stitch.DATABASE_BYTES", 10_000)
    for option in (2, 1, 3):
        database.sub_block(0, option)
    assert database.sub_block(0, 1) is not first and len(database._made) < 3
    again = list(database.sub_block(0, 1).parameters())
    assert all(torch.equal(a, b) for a, b in zip(wanted, again, strict=True))


# Builds ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return small.workspace(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recorded profile of the small card, and its target."""
    return faults.recorded(tmp_path_factory.mktemp("recorded"))


def test_too_little_memory_is_said_before_any_work(space: Workspace, tmp_path: Path) -> None:
    found = space.build("--latency", "50%", "--max-memory", "100MB", cache=tmp_path / "cache", out=tmp_path / "out")
    assert found.code == errors.UsageError.exit_code
    assert re.search(r"--max-memory 0\.09 GiB is not enough: the stage \w+ needs \d\.\d+ GiB", found.err)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    assert not list((tmp_path / "cache").glob("*-*"))


def test_a_machine_with_too_little_is_warned_of(
    space: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []

    class Console(type(SILENT)):  # type: ignore[misc]
        def say(self, text: str) -> None:
            lines.append(text)

        def warn(self, text: str) -> None:
            lines.append(f"warning: {text}")

    request, _ = api.request(str(space.card), target=str(space.target), latency="50%")
    monkeypatch.setattr(footprint, "available", lambda: 100 * MIB)
    assert footprint.within(request, ["calibrate", "prune"], Console()) == request
    assert re.match(r"memory: at most \d\.\d\d GiB expected, in the stage", lines[0])
    assert "0.10 GiB are available here" in lines[1] and "--max-memory" in lines[1]


def test_a_limit_changes_where_things_wait_and_not_what_comes_out(
    space: Workspace, elsewhere: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is that of a machine without libraries, on which the small card's activations matter."""
    profile, target = elsewhere
    monkeypatch.setattr(footprint, "LIBRARIES", 0)
    request, _ = api.request(str(space.card), target=str(target), latency="60%", profile=profile)
    with torch.device("meta"):
        model = vit.create(request.card.architecture, request.card.kwargs, 10)
    needed = {need.stage: need for need in footprint.needs(request, vit.anatomy(model), vit.parameters(model))}
    least = max(need.least for need in needed.values())
    limit = int(max(least, needed["prune"].least + 0.02 * needed["prune"].more)) + 1
    assert limit < needed["prune"].most
    within = footprint.within(replace(request, max_memory=limit), list(needed), SILENT)
    assert within.shelf_bytes is not None and within.shelf_bytes < 0.9 * needed["prune"].more
    common = ["--profile", profile, "--target", target, "--latency", "60%", "--search-seconds", "0", "--epochs", "0"]
    made = []
    for name, extra in (("free", []), ("bound", ["--max-memory", str(limit)])):
        found = space.build(*common, *extra, cache=tmp_path / name, out=tmp_path / f"out-{name}")
        assert found.code == errors.INCONCLUSIVE, found.err
        [folder] = (tmp_path / f"out-{name}").iterdir()
        made.append([(folder / file).read_bytes() for file in ("plan.json", "model.safetensors", "model.onnx")])
        assert ("activations of calibration images wait on disk" in found.err) == (name == "bound")
    assert made[0] == made[1]


def test_the_number_of_kept_lessons_is_a_part_of_the_key(space: Workspace) -> None:
    request, _ = api.request(str(space.card), target=str(space.target), latency="50%")
    stage = next(stage for stage in pipeline.PIPELINE if stage.name == "finetune")
    keys = dict.fromkeys(stage.reads, "")
    kept = [pipeline.stage_key(stage, replace(request, lesson_bytes=n), keys) for n in (None, 100)]
    assert kept[0] != kept[1]


def built(card: Path, target: Path, profile: Path, root: Path, *arguments: str) -> tuple[float, float]:
    """(expected, peak) in bytes, of a build in a process of its own: what it said, and its greatest resident memory."""
    # Its own VmHWM: what wait4 tells includes this process, from which it was forked.
    told = "import atexit; atexit.register(lambda: print(open('/proc/self/status').read()))"
    program = f"{told}\nimport edgeprune.stages.finetune as f; f.NEGLIGIBLE = -1.0\n{small.QUICK}"
    command = [
        sys.executable, "-c", program, "build", str(card), "--target", str(target), "--profile", str(profile), "--latency", "60%",
        "--cache-dir", str(root / "cache"), "--out", str(root / "out"), *arguments,
    ]  # fmt: skip
    ended = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert ended.returncode == errors.INCONCLUSIVE, ended.stderr
    said = re.search(r"memory: at most (\d+\.\d+) GiB expected", ended.stderr)
    peak = re.search(r"^VmHWM:\s+(\d+) kB", ended.stdout, re.MULTILINE)
    assert said and peak, ended.stderr
    return float(said[1]) * (1 << 30), int(peak[1]) * 1024


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_a_small_build_takes_no_more_than_it_says(
    space: Workspace, elsewhere: tuple[Path, Path], tmp_path: Path
) -> None:
    expected, peak = built(space.card, elsewhere[1], elsewhere[0], tmp_path)
    print(f"small: {expected / MIB:.0f} MiB expected, {peak / MIB:.0f} taken")
    assert expected / 3 < peak < expected


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize("limit", ["", "3.5GiB"])
def test_the_digits_build_takes_no_more_than_it_says(tmp_path: Path, limit: str) -> None:
    """Measuring is left out, so that the peak is this process': the profile is of another device."""
    profile, target = faults.recorded(tmp_path, blocks=12, heads=3, width=192, tokens=197)
    options = ["--search-seconds", "20", "--epochs", "0.3", *(["--max-memory", limit] if limit else [])]
    expected, peak = built(config.shipped("models") / "digits.toml", target, profile, tmp_path, *options)
    print(f"digits {limit}: {expected / MIB:.0f} MiB expected, {peak / MIB:.0f} taken")
    # much below it where the machine is slow: then the search looks at fewer images
    assert expected / 4 < peak < expected
