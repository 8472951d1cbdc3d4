"""python -m pytest tests/test_torch_free.py

A device: an environment that holds what `edgeprune[runtime]` declares and nothing else, no torch above all.
It is linked together from this environment's own packages, which takes a second and no network; `tests/wheel.sh`
installs the same with pip.
"""

from __future__ import annotations

import os
import subprocess
import sysconfig
import venv
from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
import small
from packaging.requirements import Requirement
from small import Workspace

from edgeprune import errors, images
from edgeprune.config import read_toml

ROOT = Path(__file__).parent.parent
#: Measuring stops when the intervals are tight; this bounds it on a noisy machine.
QUICK = "import edgeprune.checks as checks; checks.SECONDS = 2.0; from edgeprune.cli import main; main()"

#: The same of what `edgeprune profile model.onnx` measures.
SURVEY = {name: seconds for name, seconds in small.BUDGETS.items() if ".survey." in name or ".choose." in name}

#: `device(argument, ...)`: `edgeprune ARGUMENT...` there; or with `code`, that Python program.
Device = Callable[..., subprocess.CompletedProcess[str]]


def declared(extra: str) -> set[str]:
    """The packages that `edgeprune[extra]` needs, and those that they need."""
    project = read_toml(ROOT / "pyproject.toml")["project"]
    waiting = [Requirement(text) for text in project["dependencies"] + project["optional-dependencies"][extra]]
    found = set()
    while waiting:
        one = waiting.pop()
        if one.name in found or (one.marker and not one.marker.evaluate({"extra": ""})):
            continue
        found.add(one.name)
        waiting += map(Requirement, distribution(one.name).requires or [])
    return found


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Device:
    root = tmp_path_factory.mktemp("device")
    venv.create(root / "venv", symlinks=True, with_pip=False)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(root / "venv"), "platbase": str(root / "venv")}))
    for name in {*declared("runtime"), "edgeprune"}:
        package = distribution(name)
        for top in {file.parts[0] for file in package.files or []} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(package.locate_file(top))
    elsewhere = root / "elsewhere"
    elsewhere.mkdir()
    python = root / "venv" / "bin" / "python"

    def run(*arguments: object, code: str = QUICK) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        return subprocess.run(
            [str(python), "-c", code, *map(str, arguments)],
            capture_output=True, text=True, cwd=elsewhere, timeout=120, env={**kept, "NO_COLOR": "1"},
        )  # fmt: skip

    return run


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built with torch, on digits."""
    space: Workspace = small.workspace(tmp_path_factory.getbasetemp())
    built = space.build("--latency", "2x", "--latency", "70%")  # as in test_end_to_end: mostly done before
    assert built.code in (errors.PASSED, errors.GATE_FAILED, errors.INCONCLUSIVE), built.err
    return space.out / "small-here-2x"


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The evaluation digits as an image folder."""
    root = tmp_path_factory.mktemp("digits")
    source = images.Digits()
    for i in source.split()[1]:
        image, label = source[int(i)]
        (root / "validation" / str(label)).mkdir(parents=True, exist_ok=True)
        image.save(root / "validation" / str(label) / f"{i}.png")
    return root


def test_what_a_build_needs_is_not_there(device: Device) -> None:
    code = (
        "import importlib.util as u, sys\n"
        "print([m for m in sys.argv[1:] if u.find_spec(m)])\n"
        "import edgeprune, numpy, onnxruntime, PIL"
    )
    absent = (
        "torch",
        "torchvision",
        "timm",
        "onnx",
        "onnxsim",
        "onnxscript",
        "safetensors",
        "sklearn",
        "scipy",
        "pytest",
    )
    ran = device(*absent, code=code)
    assert (ran.returncode, ran.stdout.strip()) == (0, "[]"), ran.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--version"], "edgeprune, version"), (["--help"], "validate"), (["targets"], "cpu-neon"), (["methods"], "fisher"),
        (["models"], "digits"), (["targets", "detect"], "cpu-"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_what_there_is_can_be_listed(device: Device, arguments: list[str], says: str) -> None:
    ran = device(*arguments)
    if arguments == ["targets", "detect"] and ran.returncode == errors.TargetUnavailable.exit_code:
        pytest.skip("no shipped target fits this machine")
    assert ran.returncode == errors.PASSED, ran.stderr
    assert says in ran.stdout


def test_validate_times_the_artifact(device: Device, artifact: Path) -> None:
    ran = device("validate", artifact, "--format", "json")
    assert "Traceback" not in ran.stderr
    found = small.strict_json(ran.stdout)
    assert ran.returncode == found["exit_code"] in (errors.PASSED, errors.GATE_FAILED, errors.INCONCLUSIVE)
    assert found["same_device"] is True
    assert [check["name"] for check in found["checks"]] == ["latency p50"]
    text = device("validate", artifact)
    assert "latency p50" in text.stdout
    assert text.stdout.splitlines()[-1] in ("PASS", "FAIL", "INCONCLUSIVE")


def test_validate_judges_the_images_of_the_build(device: Device, artifact: Path, digits: Path, tmp_path: Path) -> None:
    """To the image: preprocessing without torch gives what the build saw."""
    out = tmp_path / "below" / "found.json"
    ran = device("validate", artifact, "--data-dir", digits, "--out", out, "--format", "json")
    found = small.strict_json(ran.stdout)
    recorded: Any = small.strict_json((artifact / "manifest.json").read_text())
    assert found["accuracy"]["accuracy"] == recorded["pruned"]["accuracy"] == found["accuracy"]["recorded"]
    assert found["accuracy"]["images"] == recorded["accuracy"]["images"] == 599
    assert [check["name"] for check in found["checks"]] == ["latency p50", "accuracy"]
    assert found["checks"][1]["verdict"] == "pass"
    written = small.strict_json(out.read_text())
    samples = written.pop("samples_ms")
    assert written == found
    assert len(samples["pruned"]) == len(samples["anchor"]) >= found["latency"]["samples"]
    assert all(ms > 0 for times in samples.values() for ms in times)


def test_profile_surveys_an_onnx_file(device: Device, artifact: Path, tmp_path: Path) -> None:
    """What takes the onnx package is left out, and that is said."""
    quick = "; ".join(f"import {name.rpartition('.')[0]}; {name} = {s}" for name, s in SURVEY.items())
    code = f"{quick}; from edgeprune.cli import main; main()"
    asked = ("profile", artifact / "model.onnx", "--threads", 1, "--out", tmp_path / "p", "--format", "json")
    ran = device(*asked, code=code)
    if ran.returncode == errors.TargetUnavailable.exit_code:
        pytest.skip("no shipped target fits this machine")
    assert ran.returncode == errors.PASSED, ran.stderr
    found = small.strict_json(ran.stdout)
    assert {row["runtime"] for row in found["survey"]["precisions"]} >= {"onnxruntime"}
    assert found["survey"]["operators"]
    assert all("pip install onnx" in reason for reason in found["survey"]["left_out"])
    assert small.strict_json((tmp_path / "p" / "profile.json").read_text()) == found
    assert "## Operators" in (tmp_path / "p" / "profile.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["build", "digits", "--target", "cpu-avx2", "--latency", "2x"], "building needs"),
        (["build", "digits", "--target", "cpu-avx2", "--latency", "2x", "--dry-run"], "building needs"),
        (["build", "vit_tiny_patch16_224", "--target", "cpu-avx2", "--latency", "2x"], "building needs"),
        (["train", "digits"], "training needs"),
        (["profile", "digits", "--target", "cpu-avx2"], "profiling a card needs"),
        (["models", "show", "vit_tiny_patch16_224"], "looking up a timm name needs"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_build_names_what_is_missing_and_the_fix(device: Device, arguments: list[str], says: str) -> None:
    ran = device(*arguments)
    missing = (
        "torch, timm, onnx, onnxscript, onnxsim, safetensors, scikit-learn, jinja2, plotly, cyclonedx-python-lib, in-toto-attestation, "
        "packageurl-python (not installed)"
    )
    fix = "install them with: pip install 'edgeprune[build]'"
    assert ran.stderr.strip() == f"edgeprune: {says} {missing}; {fix}"
    assert (ran.returncode, ran.stdout) == (errors.UsageError.exit_code, "")


def test_digits_want_scikit_learn(device: Device, artifact: Path) -> None:
    ran = device("validate", artifact, "--data", "digits", "-q")
    assert ran.returncode == errors.UsageError.exit_code
    assert ran.stderr.strip() == (
        "edgeprune: the digits data set needs scikit-learn (not installed); install it with: pip install scikit-learn"
    )
