"""python -m pytest tests/test_ci_files.py

action.yml and the example workflows: their shell runs, their options exist, their inputs are what the action takes.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from update_readme import commands

ROOT = Path(__file__).parent.parent
ACTION = yaml.safe_load((ROOT / "action.yml").read_text())
GITHUB = yaml.safe_load((ROOT / "examples/ci/github.yml").read_text())
GITLAB = yaml.safe_load((ROOT / "examples/ci/gitlab.yml").read_text())
OPTIONS = {name: {o for p in c.command.params for o in p.opts} for name, c in commands()}


def step(name: str) -> dict[str, Any]:
    [found] = [step for step in ACTION["runs"]["steps"] if step.get("id") == name]
    return dict(found)


def ran(tmp_path: Path, program: str | None = None, **inputs: str) -> tuple[int, dict[str, str], list[str]]:
    """The action's own step, as GitHub runs it: exit code, outputs, and the words that edgeprune got.

    program: what stands in for edgeprune, Python; None = edgeprune itself.
    """
    script = step("edgeprune")
    values = {name: spec.get("default", "") for name, spec in ACTION["inputs"].items()} | inputs
    environment = {
        name: re.sub(r"\$\{\{ inputs\.([\w-]+) \}\}", lambda found: values[found[1]], text)
        for name, text in script["env"].items()
    }
    assert "${{" not in script["run"], "an input is pasted into the script"
    (tmp_path / "bin").mkdir(exist_ok=True)
    code = program or "from edgeprune.cli import main; main()"
    told = f"import json, sys; json.dump(sys.argv[1:], open({str(tmp_path / 'words')!r}, 'w')); "
    executable = tmp_path / "bin" / "edgeprune"
    executable.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -c {shlex.quote(told + code)} "$@"\n')
    executable.chmod(0o755)
    found = subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script["run"]], cwd=tmp_path, timeout=120,
        env={**os.environ, **environment, "GITHUB_OUTPUT": str(tmp_path / "output"), "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md"),
             "EDGEPRUNE_CACHE_DIR": str(tmp_path / "cache"), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
    )  # fmt: skip
    text = (tmp_path / "output").read_text() if (tmp_path / "output").exists() else ""
    outputs = dict(line.split("=", 1) for line in text.splitlines())
    words = json.loads((tmp_path / "words").read_text()) if (tmp_path / "words").exists() else []
    return found.returncode, outputs, words


@pytest.mark.parametrize("code", [0, 1, 6])
def test_the_actions_step_ends_with_the_gates_code(tmp_path: Path, code: int) -> None:
    program = f"print('{{}}'); sys.exit({code})"
    ended, outputs, words = ran(
        tmp_path, program, target="cpu-avx2", latency="2x 40%", **{"max-drop": "1.0"}, args="--epochs 2"
    )
    assert ended == code
    assert outputs["exit-code"] == str(code)
    assert Path(outputs["json"]).read_text() == "{}\n"
    assert words == [
        "build", "digits", "--out", "artifacts", "--latency", "2x", "--latency", "40%", "--max-drop", "1.0", "--target", "cpu-avx2",
        "--epochs", "2", "--junit", "edgeprune-junit.xml", "--github", "--format", "json",
    ]  # fmt: skip
    assert {word for word in words if word.startswith("--")} <= OPTIONS["edgeprune build"]


def test_the_actions_step_validates_with_a_baseline(tmp_path: Path) -> None:
    inputs = {"artifact": "a b; rm -rf *", "baseline": "before", "max-regression": "3%"}
    _, _, words = ran(tmp_path, "pass", command="validate", **inputs)
    assert words[:6] == ["validate", "a b; rm -rf *", "--baseline", "before", "--max-regression", "3%"]
    assert {word for word in words if word.startswith("--")} <= OPTIONS["edgeprune validate"]


def test_the_real_program_through_the_actions_step(tmp_path: Path) -> None:
    """What is no artifact: exit code 2, a JUnit file, a summary, JSON."""
    ended, outputs, _ = ran(tmp_path, command="validate", artifact="nowhere")
    assert ended == int(outputs["exit-code"]) == 2
    assert json.loads(Path(outputs["json"]).read_text())["exit_code"] == 2
    assert "is not an artifact" in (tmp_path / "edgeprune-junit.xml").read_text()
    assert "is not an artifact" in (tmp_path / "summary.md").read_text()


def test_the_action_refuses_another_command(tmp_path: Path) -> None:
    ended, _, words = ran(tmp_path, "pass", command="rm")
    assert (ended, words) == (2, [])


def test_the_example_for_github_gives_inputs_that_the_action_takes() -> None:
    used = [s for job in GITHUB["jobs"].values() for s in job["steps"] if "edgeprune@" in s.get("uses", "")]
    assert len(used) == 2
    for one in used:
        assert set(one["with"]) <= set(ACTION["inputs"])
    matrix = GITHUB["jobs"]["build"]["strategy"]["matrix"]["include"]
    assert {row["target"] for row in matrix} <= {path.stem for path in (ROOT / "targets").glob("*.toml")}
    assert any("upload-artifact" in s.get("uses", "") for s in GITHUB["jobs"]["build"]["steps"])


def test_the_example_for_gitlab_runs_commands_that_exist() -> None:
    lines = [line for job in GITLAB.values() if isinstance(job, dict) for line in job.get("script", ())]
    found = [shlex.split(line) for line in lines if line.startswith("edgeprune ")]
    assert [words[1] for words in found] == ["build", "validate"]
    for words in found:
        assert {word for word in words if word.startswith("--")} <= OPTIONS[f"edgeprune {words[1]}"]
    [matrix] = GITLAB["build"]["parallel"]["matrix"]
    assert set(matrix["TARGET"]) <= {path.stem for path in (ROOT / "targets").glob("*.toml")}
    assert GITLAB["build"]["artifacts"]["reports"]["junit"] == "junit.xml"


@pytest.mark.parametrize("document", [ACTION, GITHUB], ids=["action.yml", "github.yml"])
def test_every_shell_script_parses(document: Any) -> None:
    def scripts(node: Any) -> list[str]:
        if isinstance(node, dict):
            own = [node["run"]] if isinstance(node.get("run"), str) else []
            return own + [text for child in node.values() for text in scripts(child)]
        return [text for child in node for text in scripts(child)] if isinstance(node, list) else []

    assert scripts(document)
    for text in scripts(document):
        subprocess.run(["bash", "-n", "-c", text], check=True)
