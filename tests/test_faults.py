"""python -m pytest tests/test_faults.py            a few of everything
python -m pytest tests/test_faults.py -m slow    50 kills, 50 flipped bytes, 20 interrupted builds

Builds that are killed, caches that decay, disks that fill up, and two builds at once: nothing is lost, nothing is mixed.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faults
import numpy as np
import pytest
import small
from faults import Builds
from small import Workspace
from test_cli_errors import children, wait_for

from edgeprune import artifact, cache, errors, pipeline, sealed

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks builds")

#: Tuning that has something to do, and checkpoints of every step.
CODE = "import edgeprune.stages.finetune as f, edgeprune.tuning.checkpoint as c; f.NEGLIGIBLE = -1.0; c.EVERY_S = 0; c.SHARE = 1e9"
RECIPE = "epochs = [0.6]\nprecision = 'float32'\nviews = 1"
MEASURED = {
    "manifest.json",
    "report.md",
    "report.html",
    "report.json",
    "provenance.json",
    "sbom.cdx.json",
}  # they say how long stages took, and which were cached


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A card, a target and its recorded profile."""
    space = small.workspace(tmp_path_factory.getbasetemp())
    root = tmp_path_factory.mktemp("faults")
    card = small.CARD.replace("epochs = [0.5]", RECIPE, 1).replace(
        "small.safetensors", str(space.card.with_suffix(".safetensors"))
    )
    (root / "small.toml").write_text(card)
    profile, target = faults.recorded(root)
    return root / "small.toml", target, profile


@pytest.fixture(scope="module")
def builds(place: tuple[Path, Path, Path]) -> Iterator[Builds]:
    with Builds(*place, code=CODE) as process:
        yield process


@pytest.fixture(scope="module")
def whole(builds: Builds, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, float]:
    """A build that nobody disturbed: its cache, its artifact, its seconds."""
    root = tmp_path_factory.mktemp("whole")
    found = builds.run(root / "cache", root / "out")
    assert found["code"] == errors.INCONCLUSIVE, found["err"]
    assert "divergence from the dense model" in found["err"], "something was tuned"
    return root / "cache", only(root / "out"), found["seconds"]


def only(out: Path) -> Path:
    [folder] = out.iterdir()
    return folder


def same(one: Path, other: Path) -> list[str]:
    """Files of two artifacts that differ, but for times."""
    names = {path.name for path in one.iterdir()} | {path.name for path in other.iterdir()}
    files = [n for n in names - MEASURED if (one / n).read_bytes() != (other / n).read_bytes()]
    facts = [json.loads((folder / "manifest.json").read_text()) for folder in (one, other)]
    for document in facts:
        for name in MEASURED - {"manifest.json"}:
            document["files"].pop(name)
        document["worker"].pop("pid")
        document["stages"] = [stage["name"] for stage in document["stages"]]
        for name in ("sha256", "key"):  # of times, and of what they are in
            document.pop(name)
    return files + [key for key in facts[0] if facts[0][key] != facts[1].get(key)]


def kill_and_resume(
    builds: Builds, whole: tuple[Path, Path, float], root: Path, count: int, seed: int
) -> dict[str, int]:
    """Kill `count` builds at random moments, resume each; returns which stages they were killed in."""
    _, reference, seconds = whole
    rng = np.random.default_rng(seed)
    stages: dict[str, int] = {}
    for i, after in enumerate(rng.uniform(0, seconds, count)):
        here = root / str(i)
        here.mkdir()
        killed = builds.run(here / "cache", here / "out", float(after))
        assert killed["code"] in (-signal.SIGKILL, errors.INCONCLUSIVE), killed["err"]
        if (here / "out").exists():
            for folder in (here / "out").iterdir():
                if not folder.name.startswith("."):
                    artifact.check_files(folder, artifact.read_manifest(folder))  # whole, or not there
        resumed = builds.run(here / "cache", here / "out")
        assert resumed["code"] == errors.INCONCLUSIVE, resumed["err"]
        assert same(only(here / "out"), reference) == [], (i, after)
        left = [path.name for path in (here / "cache").iterdir() if path.name.startswith(".")]
        assert not left, "what the killed build left is swept away"
        last = [line for line in killed["err"].splitlines() if line.startswith("▸ ")]
        stage = last[-1][2:].strip() if last else "start"
        stages[stage] = stages.get(stage, 0) + 1
        shutil.rmtree(here)
    return stages


def test_a_killed_build_resumes_to_the_same_artifact(
    builds: Builds, whole: tuple[Path, Path, float], tmp_path: Path
) -> None:
    kill_and_resume(builds, whole, tmp_path, 1, seed=1)


@pytest.mark.slow
def test_fifty_killed_builds_resume_to_the_same_artifact(
    builds: Builds, whole: tuple[Path, Path, float], tmp_path: Path
) -> None:
    print(kill_and_resume(builds, whole, tmp_path, 50, seed=0))


def test_a_build_killed_while_tuning_goes_on_from_its_checkpoint(
    builds: Builds, whole: tuple[Path, Path, float], tmp_path: Path
) -> None:
    """Resume it without that stage's first part: the checkpoint says how far it was."""
    cached, reference, _ = whole
    shutil.copytree(cached, tmp_path / "cache")
    for stage in ("finetune", "export", "simplify", "compile", "validate"):
        [folder] = (tmp_path / "cache").glob(f"{stage}-*")
        shutil.rmtree(folder)
    killed = builds.run(tmp_path / "cache", tmp_path / "out", when=".finetune-*/checkpoint/state.json")
    assert killed["code"] == -signal.SIGKILL, killed["err"]
    resumed = builds.run(tmp_path / "cache", tmp_path / "out")
    assert "going on from the checkpoint after" in resumed["err"]
    assert same(only(tmp_path / "out"), reference) == []


# Flipped bytes ------------------------------------------------------------------------------


def flip(path: Path, rng: np.random.Generator) -> None:
    content = bytearray(path.read_bytes())
    content[int(rng.integers(len(content)))] ^= int(rng.integers(1, 256))
    path.write_bytes(content)


def flip_and_find(whole: tuple[Path, Path, float], root: Path, count: int, seed: int) -> None:
    cached, built, _ = whole
    rng = np.random.default_rng(seed)
    files = sorted(path for folder in (cached, built) for path in folder.rglob("*") if path.is_file())
    for i in range(count):
        chosen = files[int(rng.integers(len(files)))]
        folder = Path(shutil.copytree(chosen.parent, root / f"{i}-{chosen.parent.name}"))
        flip(folder / chosen.name, rng)
        if chosen.parent == built:
            with pytest.raises(errors.UsageError):
                artifact.check_files(folder, artifact.read_manifest(folder))
        else:
            record, reason = cache.look(folder)
            assert record is None and chosen.name in reason, chosen
        shutil.rmtree(folder)


@pytest.mark.parametrize("seed", [0])
def test_fifty_flipped_bytes_are_found(whole: tuple[Path, Path, float], tmp_path: Path, seed: int) -> None:
    flip_and_find(whole, tmp_path, 50, seed)


@pytest.mark.slow
def test_thousands_of_flipped_bytes_are_found(whole: tuple[Path, Path, float], tmp_path: Path) -> None:
    flip_and_find(whole, tmp_path, 3000, seed=1)


def test_every_flipped_bit_of_a_sealed_file_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    sealed.write(path, {"seconds": 1.25, "name": "a b", "files": {}})
    content = path.read_bytes()
    assert sealed.read(path)["seconds"] == 1.25
    for bit in range(8 * len(content)):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << (bit % 8)
        with pytest.raises(sealed.Damaged):
            sealed.parse(bytes(changed))
    for end in range(len(content)):
        with pytest.raises(sealed.Damaged):
            sealed.parse(content[:end])


def test_a_flipped_byte_in_the_cache_is_said_and_the_stage_done_again(
    builds: Builds, whole: tuple[Path, Path, float], tmp_path: Path
) -> None:
    cached, reference, _ = whole
    shutil.copytree(cached, tmp_path / "cache")
    [folder] = (tmp_path / "cache").glob("calibrate-*")
    flip(folder / "moments.safetensors", np.random.default_rng(0))
    found = builds.run(tmp_path / "cache", tmp_path / "out")
    assert (
        "warning: calibrate is done again: in the cache, moments.safetensors is not as it was written" in found["err"]
    )
    assert found["err"].count("is done again") == 1
    assert found["err"].count("done before") == 9, "it came out as before: what reads it is not stale"
    assert same(only(tmp_path / "out"), reference) == []


# Others -------------------------------------------------------------------------------------


def test_two_builds_with_one_cache_share_the_work(
    place: tuple[Path, Path, Path], builds: Builds, whole: tuple[Path, Path, float], tmp_path: Path
) -> None:
    """Started together: every stage is done once, and both artifacts are right."""
    answers: dict[str, dict[str, Any]] = {}
    with Builds(*place, code=CODE) as second:
        pair = {"a": builds, "b": second}
        threads = [
            threading.Thread(target=lambda n=name, b=process: answers.update({n: b.run(tmp_path / "cache", tmp_path / n)}))
            for name, process in pair.items()
        ]  # fmt: skip
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    text = answers["a"]["err"] + answers["b"]["err"]
    for name in "ab":
        assert answers[name]["code"] == errors.INCONCLUSIVE, answers[name]["err"]
        assert same(only(tmp_path / name), whole[1]) == []
    for stage in (s.name for s in pipeline.PIPELINE if s.name not in ("sparsify", "roofline")):
        assert text.count(f"▸ {stage}\n") == 1, f"{stage} was done twice"
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")]


def run_stages(tmp_path: Path, run: Callable[..., None], times: int = 1) -> list[str]:
    """A pipeline of two stages, the second `run`; what is said."""
    said: list[str] = []

    def first(request: Any, read: Any, out: Path, console: Any) -> None:
        (out / "x").write_text("same")

    request = type("Request", (), {"schedule": "one-shot"})()
    console = type("Said", (), {name: lambda self, text: said.append(text) for name in ("stage", "say", "warn")})()
    stages = (pipeline.Stage("first", first, (), ()), pipeline.Stage("second", run, ("first",), ()))
    cache_dir = tmp_path / "cache"
    cache_dir.mkdir(exist_ok=True)

    def work() -> None:
        finished: dict[str, pipeline.Done] = {}
        for stage in stages:
            key = json.dumps([stage.name, [done.digest for done in finished.values()]]).encode().hex()[-60:]
            finished[stage.name] = pipeline.run_stage(stage, request, key, finished, cache_dir, None, "", console)

    pipeline._until_undisturbed(work, console)
    return said


@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_a_cache_that_is_taken_away_in_the_middle_is_made_again(tmp_path: Path, how: str) -> None:
    tries = 0

    def second(request: Any, read: Any, out: Path, console: Any) -> None:
        nonlocal tries
        tries += 1
        if tries == 1 and how == "deleted":
            shutil.rmtree(tmp_path / "cache")
        elif tries == 1:
            record = sealed.read(read["first"] / cache.RECORD)
            (read["first"] / "x").write_text("other")
            record["files"]["x"] = artifact.sha256(read["first"] / "x")
            sealed.write(read["first"] / cache.RECORD, record)
        (out / "y").write_text((read["first"] / "x").read_text())

    said = run_stages(tmp_path, second)
    assert tries == 2
    assert any("another process has changed or deleted" in text for text in said)
    [folder] = (tmp_path / "cache").glob("second-*")
    assert (folder / "y").read_text() == ("same" if how == "deleted" else "other")


def test_a_cache_that_never_rests_is_an_error(tmp_path: Path) -> None:
    def second(request: Any, read: Any, out: Path, console: Any) -> None:
        shutil.rmtree(tmp_path / "cache")

    with pytest.raises(errors.StorageError, match="give each build its own --cache-dir"):
        run_stages(tmp_path, second)


def test_a_work_folder_is_one_process_at_a_time(tmp_path: Path) -> None:
    waits: list[int] = []
    order: list[str] = []

    def other() -> None:
        with cache.working(tmp_path / ".x", lambda: waits.append(1)) as work:
            order.append("other")
            assert list(work.iterdir()) == []

    with cache.working(tmp_path / ".x", lambda: waits.append(0)) as work:
        (work / "file").write_text("")
        thread = threading.Thread(target=other)
        thread.start()
        time.sleep(0.3)
        order.append("first")
    thread.join()
    assert (order, waits) == (["first", "other"], [1])
    assert list(tmp_path.iterdir()) == []


def test_without_locks_each_process_has_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "fcntl", None)
    with cache.working(tmp_path / ".x", lambda: None) as one, cache.working(tmp_path / ".x", lambda: None) as two:
        assert one != two and one.is_dir() and two.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_sweeping_spares_what_is_in_use_and_checkpoints(tmp_path: Path) -> None:
    for name in (".finetune-old", ".finetune-kept", ".other-x", "baseline-x"):
        (tmp_path / name).mkdir()
    (tmp_path / ".finetune-kept" / cache.CHECKPOINT).mkdir()
    os.symlink(tmp_path / "baseline-x", tmp_path / ".finetune-link")
    with cache.working(tmp_path / ".finetune-used", lambda: None):
        cache.sweep(tmp_path, frozenset({"finetune"}))
        left = {path.name for path in tmp_path.iterdir()}
    assert left == {".finetune-kept", ".finetune-used", ".other-x", "baseline-x", ".finetune-link"}


# Disks --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "limit", [420_000, *(pytest.param(n, marks=pytest.mark.slow) for n in (1_000, 20_000, 60_000, 200_000, 300_000))]
)
def test_a_disk_that_fills_up_is_said_and_the_build_resumes(
    place: tuple[Path, Path, Path], builds: Builds, whole: tuple[Path, Path, float], tmp_path: Path, limit: int
) -> None:
    """No file may be larger than so many bytes: writes fail as on a full disk, in every library that writes."""
    card, target, profile = place
    code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); from edgeprune.cli import main; main()"
    common = [card, "--target", target, "--profile", profile, "--latency", "60%", "--search-seconds", "0"]
    where = ["--cache-dir", tmp_path / "cache", "--out", tmp_path / "out"]
    ran = subprocess.run(
        [sys.executable, "-c", f"{CODE}; {code}", "build", *map(str, [*common, *where]), "-q"],
        capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ran.returncode == errors.StorageError.exit_code, ran.stderr
    assert "Traceback" not in ran.stderr
    [sentence] = [line for line in ran.stderr.splitlines() if line.startswith("edgeprune: ")]
    assert "arge" in sentence or "space" in sentence.lower(), sentence
    assert not list((tmp_path / "out").iterdir())
    resumed = builds.run(tmp_path / "cache", tmp_path / "out")
    assert resumed["code"] == errors.INCONCLUSIVE, resumed["err"]
    assert same(only(tmp_path / "out"), whole[1]) == []


def test_a_cache_whose_clock_went_back_is_as_good(
    builds: Builds, whole: tuple[Path, Path, float], tmp_path: Path
) -> None:
    """Files of tomorrow: no decision is made from times of the wall clock."""
    shutil.copytree(whole[0], tmp_path / "cache")
    future = time.time() + 86400 * 400
    for path in (tmp_path / "cache").rglob("*"):
        os.utime(path, (future, future))
    found = builds.run(tmp_path / "cache", tmp_path / "out")
    assert found["err"].count("done before") == 10
    assert same(only(tmp_path / "out"), whole[1]) == []


def test_a_tuning_process_ends_with_the_build_that_started_it() -> None:
    build = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    code = f"import platform, time, edgeprune.tuning.worker as w; w.WATCH_S = 0.1; w.end_with({{'pid': {build.pid}, 'node': platform.node()}}); print('on', flush=True); time.sleep(60)"
    worker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None and worker.stdout.readline() == "on\n"
    assert worker.poll() is None
    build.kill()
    build.wait()
    assert worker.wait(timeout=60) == 1


# Interruptions ------------------------------------------------------------------------------


def descendants(pid: int) -> list[int]:
    found = children(pid)
    return found + [below for one in found for below in descendants(one)]


def interrupt(space: Workspace, root: Path, count: int, seed: int) -> None:
    """Interrupt builds that measure, at random moments; no process of theirs is left, and nothing half-made."""
    rng = np.random.default_rng(seed)
    interrupted = 0
    for i in range(count):
        number = (signal.SIGINT, signal.SIGTERM)[i % 2]
        here = root / str(i)
        here.mkdir()
        with (here / "err").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", small.QUICK, "build", str(space.one), "--target", str(space.target), "--latency", "50%",
                 "--runtime", "onnxruntime", "--cache-dir", str(here / "cache"), "--out", str(here / "out")],
                stdout=subprocess.DEVNULL, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        wait_for(lambda path=here / "err": "▸" in path.read_text(), 120, "the first stage")
        seen: set[int] = set()
        end = time.monotonic() + float(rng.uniform(0, 9))
        while time.monotonic() < end and process.poll() is None:
            seen.update(descendants(process.pid))
            time.sleep(0.05)
        seen.update(descendants(process.pid))
        process.send_signal(number)
        process.wait(timeout=60)
        err = (here / "err").read_text()
        over = time.monotonic() + 30
        while time.monotonic() < over and any(Path(f"/proc/{pid}").exists() for pid in seen):
            time.sleep(0.05)
        assert not [pid for pid in seen if Path(f"/proc/{pid}").exists()], err
        # Else it was quicker (built, or found the latency infeasible), and the signal met Python on its way out.
        if "artifact: " not in err and "cannot be reached" not in err and "no plan was measured" not in err:
            assert "Traceback" not in err
            assert process.returncode == errors.INTERRUPTED, (process.returncode, err)
            interrupted += 1
        if (here / "cache").exists():
            assert not [path for path in (here / "cache").iterdir() if path.name.startswith(".")]
    print(f"{interrupted} of {count} builds were interrupted before they ended")
    assert interrupted >= count / 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupt_that_python_swallows_is_not_lost(number: int) -> None:
    """It comes while an object is being deleted, whose exceptions are ignored."""
    code = """
import time
from edgeprune import cli
class Deleted:
    def __del__(self):
        print("now", flush=True)
        time.sleep(60)
def work(**_):
    Deleted()
    time.sleep(60)
cli.cli.main = work
cli.main()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "now\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=50)
    assert process.returncode == errors.INTERRUPTED
    assert err.startswith("edgeprune: interrupted") and "Traceback" not in err


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")
def test_no_process_is_left_after_sigterm(space: Workspace, tmp_path: Path) -> None:
    interrupt(space, tmp_path, 2, seed=1)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")
def test_no_process_is_left_after_twenty_interrupted_builds(space: Workspace, tmp_path: Path) -> None:
    interrupt(space, tmp_path, 20, seed=0)
