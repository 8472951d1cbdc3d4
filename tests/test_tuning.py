"""python -m pytest tests/test_tuning.py

Tuning in several processes.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small
import torch

from edgeprune import api, artifact, config, extras, vit
from edgeprune.artifact import PlannedModel
from edgeprune.config import Request
from edgeprune.console import SILENT, Console
from edgeprune.errors import EdgepruneError, UsageError
from edgeprune.stages import baseline, finetune
from edgeprune.tuning import launch
from edgeprune.tuning.loop import History
from edgeprune.types import BlockPlan, Plan

PLAN = Plan((BlockPlan((1,), tuple(range(0, 192, 3))), BlockPlan((), tuple(range(96))), BlockPlan((0, 2), ())))


@pytest.fixture(scope="module")
def request_(tmp_path_factory: pytest.TempPathFactory) -> Request:
    """The small card on digits, augmented, its weights random; 29 images a batch leave shares of 15 and 14."""
    root = tmp_path_factory.mktemp("group")
    (root / "small.toml").write_text(small.CARD)
    (root / "here.toml").write_text(small.TARGET)
    small.random_weights(root / "small.safetensors")
    made, _ = api.request(str(root / "small.toml"), target=str(root / "here.toml"), latency="2x")
    recipe = replace(made.card.finetune, epochs=(0.5,), batch_size=29, augment={"hflip": 0.5, "scale": (0.7, 1.0)})
    return replace(made, card=replace(made.card, finetune=recipe))


def tune(request: Request, work: Path, console: Console = SILENT) -> tuple[Any, History]:
    """The tuned student and what happened."""
    card = request.card
    dense = baseline.with_data(baseline.load_source(card, None), request)
    planned = PlannedModel(card.architecture, card.kwargs, card.num_classes, PLAN, 1.0, 1.0)
    student = vit.slice_model(dense.model, PLAN)
    return student, finetune.tune(student, planned, dense, card.finetune, request, work, console)


@pytest.fixture(scope="module")
def alone(request_: Request, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, History]:
    return tune(request_, tmp_path_factory.mktemp("alone"))


def test_two_processes_tune_as_one_does(
    request_: Request, alone: tuple[Any, History], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At an equal global batch the loss curves and the weights are the same but for rounding."""
    same(alone, tune(replace(request_, processes=2), tmp_path, Console()))
    assert "2 processes" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_two_machines_tune_as_one_does(request_: Request, alone: tuple[Any, History], tmp_path: Path) -> None:
    """The second is another process here, which knows nothing but its config file and the folder that both share."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    for rank in range(2):
        (tmp_path / f"rank{rank}.yaml").write_text(
            "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nnum_machines: 2\nnum_processes: 2\n"
            f"machine_rank: {rank}\nmain_process_ip: 127.0.0.1\nmain_process_port: {port}\nrdzv_backend: static\n"
            "same_network: true\nmixed_precision: 'no'\nuse_cpu: false\n"
        )
    cache = tmp_path / "cache"
    work = cache / ".finetune-0"
    work.mkdir(parents=True)
    second = subprocess.Popen(
        [sys.executable, "-m", "edgeprune", "join", "--accelerate-config", str(tmp_path / "rank1.yaml"), "--cache-dir", str(cache),
         "--jobs", "1", "--format", "json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        same(alone, tune(replace(request_, accelerate_config=tmp_path / "rank0.yaml"), work))
        out, err = second.communicate(timeout=120)
    finally:
        second.kill()
    assert second.returncode == 0, err
    assert json.loads(out) == {"tunings": 1, "failed": 0}


def same(alone: tuple[Any, History], group: tuple[Any, History]) -> None:
    """What one process and what several made."""
    (alone, curve), (together, curve2) = alone, group
    assert len(curve.losses) == len(curve2.losses) >= 10
    assert curve2.losses == pytest.approx(curve.losses, rel=1e-3)
    assert [step for step, _ in curve2.checks] == [step for step, _ in curve.checks]
    assert [value for _, value in curve2.checks] == pytest.approx([value for _, value in curve.checks], rel=1e-2)
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(together.state_dict()[name], value, rtol=1e-2, atol=1e-3)


def test_an_error_of_the_processes_is_raised_here(request_: Request, tmp_path: Path) -> None:
    recipe = replace(request_.card.finetune, precision="float17")
    broken = replace(request_, processes=2, card=replace(request_.card, finetune=recipe))
    with pytest.raises(UsageError, match="precision must be one of auto, float32, bfloat16 in a recipe, not 'float17'"):
        tune(broken, tmp_path)
    assert not list(tmp_path.iterdir())


def test_processes_that_do_not_start_say_why(
    request_: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "command", lambda *_: [sys.executable, "-c", "import sys; sys.exit('no such device')"])
    with pytest.raises(EdgepruneError, match="the tuning processes ended with code 1: no such device"):
        tune(replace(request_, processes=2), tmp_path)


def test_a_config_file_of_accelerate_is_passed_on(request_: Request, tmp_path: Path) -> None:
    file = tmp_path / "accelerate.yaml"
    with pytest.raises(UsageError, match=r"there is no file '.*accelerate.yaml'; `accelerate config"):
        launch.check_request(0, file)
    file.touch()
    launch.check_request(0, file)
    arguments = launch.command(tmp_path, 0, file)
    assert arguments[arguments.index("--config_file") + 1] == str(file) and arguments[-1] == str(tmp_path)
    with pytest.raises(UsageError, match="leave --processes out"):
        launch.check_request(2, file)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--accelerate-config", "missing.yaml", "--cache-dir", "."], "there is no file 'missing.yaml'"),
        (["--accelerate-config", "here.yaml", "--cache-dir", "nowhere"], "there is no folder 'nowhere'"),
        (["--accelerate-config", "here.yaml", "--cache-dir", ".", "--jobs", "-1"], "jobs must be 0"),
    ],
)
def test_what_cannot_be_joined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.yaml").touch()
    refused = small.run("join", *arguments)
    assert refused.code == UsageError.exit_code
    assert says in refused.err


def test_accelerate_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "ACCELERATE", {"accelerate_that_is_not_here": "accelerate"})
    launch.check_request(1, None)
    with pytest.raises(UsageError, match=r"needs accelerate \(not installed\).* pip install 'edgeprune\[accelerate\]'"):
        launch.check_request(2, None)
    with pytest.raises(UsageError, match="processes must be 0"):
        launch.check_request(-1, None)


def test_the_job_is_whole(request_: Request) -> None:
    """A card survives the way through JSON."""
    card = json.loads(json.dumps(config_json(request_.card)))
    assert config.parse(config.ModelSpec, card, "job.json") == replace(
        request_.card, finetune=replace(request_.card.finetune, augment={"hflip": 0.5, "scale": [0.7, 1.0]})
    )


def config_json(card: config.ModelSpec) -> Any:
    from edgeprune.types import to_json

    return to_json(card)


@pytest.mark.parametrize(
    ("rank", "local", "arguments", "code", "says"),
    [
        ("1", "2", ["build", "nonsense"], 0, ""),
        ("0", "2", ["build", "nonsense", "--target", "cpu-avx2", "--latency", "1x"], 2, "unknown model 'nonsense'"),
        ("0", "2", ["train"], 2, "only `edgeprune build` uses several processes"),
        ("0", "1", ["build"], 2, "--accelerate-config FILE"),
    ],
)
def test_a_build_under_accelerate_launch(rank: str, local: str, arguments: list[str], code: int, says: str) -> None:
    """The first process does the work, the others leave; what cannot be meant is refused."""
    launched = {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": local, "TORCHELASTIC_RUN_ID": "none"}
    result = subprocess.run(
        [sys.executable, "-m", "edgeprune", *arguments], env={**os.environ, **launched},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == code and says in result.stderr, result.stderr


def test_a_group_within_a_group_does_not_see_it() -> None:
    outer = {"PATH": "/bin", "RANK": "0", "MASTER_PORT": "1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    assert launch.clean(outer) == {"PATH": "/bin"}


def test_what_is_left_behind_is_read(tmp_path: Path) -> None:
    (tmp_path / "history.json").write_text(json.dumps({"losses": [1.0], "checks": [[1, 0.5]]}))
    assert History.of(artifact.read_json(tmp_path / "history.json")) == History(losses=[1.0], checks=[(1, 0.5)])


@pytest.mark.slow
def test_processes_that_were_killed_go_on_from_their_checkpoint(
    request_: Request, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second group takes over the losses of the first, and ends where one that was not killed does."""
    recipe = replace(request_.card.finetune, precision="float32", learning_rate_search=False)
    both = replace(request_, processes=2, card=replace(request_.card, finetune=recipe))
    _, whole = tune(both, tmp_path)
    start = launch.command

    def eager(request: Request, folder: Path, after: int | None) -> list[str]:
        """Checkpoints of every step; the first process ends itself after so many."""
        program = (
            "import os, sys, edgeprune.tuning.checkpoint as c; from pathlib import Path\n"
            "c.EVERY_S, c.SHARE, save, saved = 0, 1e9, c.Checkpoint.save, []\n"
            "def counted(self, *state):\n"
            f"    save(self, *state); saved.append(1)\n    if len(saved) == {after}: os.kill(os.getpid(), 9)\n"
            "c.Checkpoint.save = counted\n"
            "from edgeprune.tuning.worker import main; sys.exit(main(Path(sys.argv[1])))\n"
        )
        (folder / "eager.py").write_text(program)
        arguments = start(request, folder)
        at = arguments.index("-m", 3)
        return [*arguments[:at], str(folder / "eager.py"), str(folder)]

    monkeypatch.setattr(launch, "command", lambda request, folder: eager(request, folder, 5))
    with pytest.raises(EdgepruneError):  # as the launcher tells it, or the process that lost the other
        tune(both, tmp_path)
    [kept] = tmp_path.iterdir()
    assert kept.name == "checkpoint"
    monkeypatch.setattr(launch, "command", lambda request, folder: eager(request, folder, None))
    capsys.readouterr()
    _, resumed = tune(both, tmp_path, Console())
    assert "going on from the checkpoint after 5 steps" in capsys.readouterr().err
    assert resumed.losses[:5] == whole.losses[:5]
    assert resumed.losses == pytest.approx(whole.losses, rel=1e-3)
