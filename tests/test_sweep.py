"""python -m pytest tests/test_sweep.py        (with -m slow: on a Ray cluster of two nodes, one of which is killed)

The matrix, the schedule with an engine that only pretends, and sweeps of a card of one block.
"""

from __future__ import annotations

import importlib.util
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import small
from small import Workspace

from edgeprune import api, errors
from edgeprune.console import SILENT
from edgeprune.fleet import local, matrix, schedule
from edgeprune.fleet.matrix import Job
from edgeprune.fleet.schedule import Outcome, Slot, place


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The card of one block without its training, and a profile that was recorded on another device."""
    root = tmp_path_factory.mktemp("sweep")
    (root / "one.toml").write_text(small.ONE)
    small.random_weights(root / "one.safetensors", depth=1, num_heads=1)
    (root / "here.toml").write_text(small.TARGET)
    made = Workspace(root, small.Result(0, "", ""))
    with small.quick():
        document = api.table(str(made.one), target=str(made.target), runtime="onnxruntime", cache_dir=made.cache)
    document["device"]["cpu"] = "another one"
    (root / "elsewhere.json").write_text(json.dumps(document))
    return made


def write(space: Workspace, path: Path, latencies: Sequence[str], target: str = "", more: str = "") -> Path:
    """A matrix of the small card; nothing is measured and nothing is timed, so that it always comes to the same."""
    target = target or f'{{ target = "{space.target}", profile = "{space.root}/elsewhere.json" }}'
    path.write_text(
        f'models = ["{space.one}"]\ntargets = [{target}]\nlatencies = {json.dumps(list(latencies))}\n'
        f"[build]\nepochs = 0\nsearch-seconds = 0\n{more}"
    )
    return path


# The matrix ---------------------------------------------------------------------------------


def test_a_target_is_profiled_once_per_model(space: Workspace, tmp_path: Path) -> None:
    path = write(space, tmp_path / "m.toml", ["2x", "40%"], target=f'"{space.target}"')
    jobs = matrix.read(path)
    assert [(job.name, job.needs, job.where) for job in jobs] == [
        ("profile-one-here", "", ""), ("one-here-2x", "profile-one-here", ""), ("one-here-40pct", "profile-one-here", ""),
    ]  # fmt: skip
    assert jobs[0].profiles and jobs[1].options["epochs"] == 0


def test_a_recorded_profile_is_taken_and_a_device_is_named(space: Workspace, tmp_path: Path) -> None:
    [job] = matrix.read(write(space, tmp_path / "m.toml", ["2x"]))
    assert (job.needs, job.where) == ("", None)
    assert job.recorded is not None and job.recorded["cpu"] == "another one"
    target = f'"{space.target}", {{ target = "{space.target}", device = "ssh://pi@board" }}'
    jobs = matrix.read(write(space, tmp_path / "m.toml", ["2x"], target=target))
    assert [job.name for job in jobs] == [
        "profile-one-here",
        "one-here-2x",
        "profile-one-here-pi-board",
        "one-here-2x-pi-board",
    ]
    assert jobs[-1].where == "ssh://pi@board"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("models =", "model ="), "did you mean 'models'"),
        (("latencies =", "latencies = []\nx ="), "unknown key 'x'"),
        (('["2x"]', "[]"), "'latencies' must be a list"),
        (('["2x"]', "[2]"), "a latency is a text"),
        (('["2x"]', '["2"]'), "has no unit"),
        (('["2x"]', '["2x", "2x"]'), "is there twice"),
        (("epochs =", "epoch ="), "did you mean 'epochs'"),
        (("epochs = 0", "epochs = -1"), "epochs must be 0 or more"),
        (("profile =", "epochs ="), "unknown option 'epochs'"),
        (("target =", "board ="), "a table with the key 'target'"),
        (("[build]", "[build"), "is not valid TOML"),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else None,
)
def test_a_wrong_matrix_is_refused_before_any_work(
    space: Workspace, tmp_path: Path, change: tuple[str, str], says: str
) -> None:
    path = write(space, tmp_path / "m.toml", ["2x"])
    assert change[0] in path.read_text()
    path.write_text(path.read_text().replace(*change))
    ended = small.run("sweep", path, "--out", tmp_path / "out", "--cache-dir", tmp_path / "cache", "--format", "json")
    assert ended.code == errors.UsageError.exit_code
    assert says in ended.document["error"]
    assert "Traceback" not in ended.err
    assert not (tmp_path / "out").exists()


# The schedule -------------------------------------------------------------------------------


def job(name: str, where: str | None = "", needs: str = "", profiles: bool = False) -> Job:
    return Job(name, {}, needs, where, profiles=profiles)


A1, A2, B = Slot("a1", "a", {"cpu": "x"}), Slot("a2", "a", {"cpu": "x"}), Slot("b", "b", {"cpu": "y"})


@pytest.mark.parametrize(
    ("where", "running", "expected"),
    [
        ("", {}, "a1"),
        ("", {"a1": None}, "b"),  # something runs on the machine a
        ("", {"a1": None, "b": None}, None),
        (None, {"a1": None}, "b"),  # what measures nowhere may share, but need not
        (None, {"a1": None, "b": None}, "a2"),
        (None, {"a1": ""}, "b"),  # something measures on the machine a
        (None, {"a1": "", "b": None}, None),
        ("pi", {"a1": "pi"}, None),  # something measures on the device
        ("pi", {"a1": "other"}, "b"),
    ],
)
def test_measurements_share_no_machine(where: str | None, running: dict[str, str | None], expected: str | None) -> None:
    jobs = {slot: job(f"on {slot}", there) for slot, there in running.items()}
    found = place(job("new", where), [A1, A2, B], jobs)
    assert (found.name if found else None) == expected


def test_a_build_measures_where_its_profile_was_taken() -> None:
    assert place(job("new"), [A1, A2, B], {}, {"device": {"cpu": "y"}}) == B
    assert place(job("new"), [A1, A2, B], {"b": job("other")}, {"device": {"cpu": "y"}}) is None
    assert place(job("new"), [A1, A2], {}, {"device": {"cpu": "y"}}) == A1  # no such machine is left
    alike = Job("new", {}, where=None, recorded={"cpu": "x"})  # it would measure on a
    assert place(alike, [A1, A2], {"a1": job("other", None)}) is None


class Pretender:
    """An engine whose jobs end at once, in order; `says` what each comes to, None once per loss."""

    def __init__(self, says: Mapping[str, list[Any]], slots: Sequence[Slot] = (A1, B)) -> None:
        self.says, self.places, self.running = says, list(slots), list[Job]()
        self.log: list[str] = []
        self.given: dict[str, Any] = {}

    def slots(self) -> Sequence[Slot]:
        return self.places

    def start(self, job: Job, slot: Slot, profile: Mapping[str, Any] | None) -> None:
        self.running.append(job)
        self.log.append(job.name)
        self.given[job.name] = profile

    def wait(self) -> Outcome:
        ended = self.running.pop(0)
        return Outcome(ended, self.says.get(ended.name, [{"exit_code": 0, "error": ""}]).pop(0))


def scheduled(jobs: Sequence[Job], engine: Pretender) -> dict[str, Any]:
    ended: dict[str, Any] = {}
    schedule.run(jobs, engine, lambda outcome: ended.__setitem__(outcome.job.name, outcome.result), SILENT)
    return ended


def test_builds_get_the_profile_and_fail_with_it() -> None:
    profile = {"device": {"cpu": "y"}, "table": 1}
    refused = {"exit_code": 3, "error": "not here"}
    engine = Pretender({"p": [{"exit_code": 0, "error": "", "profile": profile}], "q": [refused]})
    jobs = [
        job("p", profiles=True),
        job("a", needs="p"),
        job("b", needs="p"),
        job("q", profiles=True),
        job("c", needs="q"),
    ]
    ended = scheduled(jobs, engine)
    assert engine.given["a"] == engine.given["b"] == profile
    assert ended["c"] == refused and "c" not in engine.log
    assert ended["a"]["exit_code"] == 0


def test_a_job_whose_machine_is_lost_runs_again_but_not_for_ever() -> None:
    engine = Pretender({"a": [None, {"exit_code": 0, "error": ""}], "b": [None, None, None]})
    ended = scheduled([job("a", None), job("b", None), job("c", None)], engine)
    assert ended["a"]["exit_code"] == ended["c"]["exit_code"] == 0
    assert (ended["b"]["exit_code"], engine.log.count("b")) == (errors.TargetUnavailable.exit_code, schedule.ATTEMPTS)
    assert "lost 3 times" in ended["b"]["error"]


def test_no_machine_left_is_said() -> None:
    with pytest.raises(errors.TargetUnavailable, match="no machine is left"):
        scheduled([job("a")], Pretender({}, slots=()))


def test_a_process_that_crashes_is_an_outcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local.process, "command", lambda folder: ["/bin/sh", "-c", "echo the reason; exit 9"])
    with local.Local(1, tmp_path, {"cache_dir": "", "rebuild": False}) as engine:
        engine.start(job("a"), engine.slots()[0], None)
        result = engine.wait().result
    assert result is not None
    assert result["exit_code"] == errors.EdgepruneError.exit_code
    assert "exit code 9" in result["error"] and "the reason" in result["error"]


# Sweeps -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sweep_builds_what_can_be_built(space: Workspace, tmp_path: Path) -> None:
    path = write(space, tmp_path / "m.toml", ["80%", "100x"])
    command = ("sweep", path, "--out", tmp_path / "out", "--cache-dir", space.cache, "--jobs", "2", "--format", "json")
    ended = small.run(*command)
    document = ended.document
    by_name = {cell["name"]: cell for cell in document["cells"]}
    assert by_name["one-here-100x"]["exit_code"] == errors.Infeasible.exit_code
    assert "cannot be reached" in by_name["one-here-100x"]["error"]
    assert by_name["one-here-80pct"]["exit_code"] == errors.INCONCLUSIVE  # predicted, not validated
    assert ended.code == document["exit_code"] == errors.INCONCLUSIVE
    manifest = json.loads((tmp_path / "out" / "one-here-80pct" / "manifest.json").read_text())
    assert "not validated" in manifest["checks"][0]["reason"]
    report = (tmp_path / "out" / "sweep.md").read_text()
    assert "1 of 2 artifacts" in report and "cannot be reached" in report
    assert json.loads((tmp_path / "out" / "sweep.json").read_text()) == document
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["logs", "one-here-80pct", "sweep.json", "sweep.md"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed (edgeprune[ray])")
def test_a_cluster_that_loses_a_node_builds_the_same(
    space: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray
    from ray.cluster_utils import Cluster as Nodes

    from edgeprune.fleet import cluster

    path = write(space, tmp_path / "m.toml", ["90%", "70%", "60%"])
    here = small.run("sweep", path, "--out", tmp_path / "local", "--cache-dir", tmp_path / "cache1", "-q")
    memory = {"object_store_memory": 80 << 20}
    nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **memory})
    try:
        pair = [nodes.add_node(num_cpus=1, **memory) for _ in range(2)]
        monkeypatch.setenv("RAY_ADDRESS", nodes.address)
        started: list[str] = []
        real: Callable[..., None] = cluster.Cluster.start

        def start(self: cluster.Cluster, job: Job, slot: Slot, profile: Any) -> None:
            real(self, job, slot, profile)
            started.append(job.name)
            if len(started) == 2:
                [victim] = [node for node in pair if node.node_id == slot.name]
                threading.Timer(3, nodes.remove_node, args=(victim,), kwargs={"allow_graceful": False}).start()

        monkeypatch.setattr(cluster.Cluster, "start", start)
        there = small.run("sweep", path, "--out", tmp_path / "ray", "--cache-dir", tmp_path / "cache2", "--engine", "ray",
                          "--format", "json")  # fmt: skip
    finally:
        ray.shutdown()
        nodes.shutdown()
    assert "its machine was lost; attempt 2 of 3" in there.err
    assert (here.code, there.code) == (errors.INCONCLUSIVE, errors.INCONCLUSIVE), there.err
    names = [cell["name"] for cell in there.document["cells"]]
    assert len(names) == 3 and len(started) == 4
    for name in names:
        for file in ("plan.json", "model.safetensors", "model.onnx"):
            assert (tmp_path / "local" / name / file).read_bytes() == (tmp_path / "ray" / name / file).read_bytes()


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed (edgeprune[ray])")
def test_no_cluster_is_said(space: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    ended = small.run("sweep", write(space, tmp_path / "m.toml", ["2x"]), "--out", tmp_path / "out", "--cache-dir",
                      tmp_path / "cache", "--engine", "ray", "-q")  # fmt: skip
    assert ended.code == errors.TargetUnavailable.exit_code
    assert "ray start --head" in ended.err
