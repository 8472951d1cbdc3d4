"""python -m pytest tests/test_gates.py

Every gate through the command line: pass, fail and inconclusive, with exit codes, and what CI systems read of it.

Manifests are edited where a verdict is wished for: what was promised changes, never what is measured.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import small
from small import Result, Workspace

from edgeprune import artifact, ci, errors, images, recheck, regression
from edgeprune.stages import validate

CODES = {"pass": errors.PASSED, "fail": errors.GATE_FAILED, "inconclusive": errors.INCONCLUSIVE}
#: Failures, errors of the one gate in JUnit; GitHub's annotation.
TOLD = {"pass": (0, 0, ""), "fail": (1, 0, "::error "), "inconclusive": (0, 1, "::warning ")}


@pytest.fixture
def edited(artifacts: list[Path], tmp_path: Path) -> Callable[..., Path]:
    """`edited(change, profile=change)`: a copy of the 2x artifact whose manifest, and profile, were changed."""

    def copy(change: Callable[[Any], None], profile: Callable[[Any], None] | None = None, which: int = 0) -> Path:
        folder = Path(shutil.copytree(artifacts[which], tmp_path / f"copy{len(list(tmp_path.iterdir()))}"))
        document = json.loads((folder / "manifest.json").read_text())
        change(document)
        if profile is not None:
            profiled = json.loads((folder / "profile.json").read_text())
            profile(profiled)
            content = json.dumps(profiled).encode()
            (folder / "profile.json").write_bytes(content)
            document["files"]["profile.json"] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        artifact.write_manifest(folder, document)
        return folder

    return copy


def judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gate: str, verdict: str, folder: Path, *more: object
) -> Any:
    """`edgeprune validate FOLDER ... --format json --junit --github`: the verdict everywhere; returns the check."""
    monkeypatch.setattr("edgeprune.checks.SECONDS", 1.0)
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    ran = small.run("validate", folder, *more, "--format", "json", "--junit", tmp_path / "junit.xml", "--github")
    found = ran.document
    check = next(check for check in found["checks"] if check["name"] == gate)
    assert check["verdict"] == verdict, check["reason"]
    case = next(case for case in cases(tmp_path / "junit.xml") if case.get("name") == gate)
    failures, problems, annotation = TOLD[verdict]
    assert (len(case.findall("failure")), len(case.findall("error")), len(case.findall("skipped"))) == (
        failures,
        problems,
        0,
    )
    said = [line for line in ran.err.splitlines() if line.startswith("::") and f"%3A {gate} {verdict}" in line]
    assert [line.startswith(annotation) for line in said] == [True] * bool(annotation)
    assert f"| {gate} |" in (tmp_path / "summary.md").read_text()
    verdicts = {check["verdict"] for check in found["checks"]}
    worst = "fail" if "fail" in verdicts else "inconclusive" if "inconclusive" in verdicts else "pass"
    assert ran.code == found["exit_code"] == CODES[worst]
    return check


def cases(path: Path) -> list[ElementTree.Element]:
    root = ElementTree.parse(path).getroot()
    found = root.findall("testsuite/testcase")
    assert root.tag == "testsuites"
    assert [int(root.get(name, "-1")) for name in ("tests", "failures", "errors")] == [
        len(found), sum(case.find("failure") is not None for case in found), sum(case.find("error") is not None for case in found),
    ]  # fmt: skip
    return found


def limit(ms: float) -> Callable[[Any], None]:
    return lambda document: document["request"].update(latency_ms=ms)


# Latency ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ms", "verdict"), [(1e6, "pass"), (1e-6, "fail")])
def test_latency(edited: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ms: float, verdict: str) -> None:
    real = recheck.measure
    if verdict == "fail":  # only a machine that was calm can say so, and this one may be busy
        monkeypatch.setattr(
            recheck, "measure", lambda *given, **more: dataclasses.replace(real(*given, **more), calm=True)
        )
    check = judged(tmp_path, monkeypatch, "latency p50", verdict, edited(limit(ms)))
    assert check["limit"] == ms


@pytest.mark.parametrize(("share", "verdict"), [(1000, "pass"), (0.1, "inconclusive")])
def test_latency_of_a_machine_that_is_never_as_quiet_as_the_profile(
    edited: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, verdict: str
) -> None:
    """Corrected, the artifact takes a hundredth of what it did; as it is, it may still be within the limit, or not."""

    def ask(document: Any) -> None:
        limit(share * document["pruned"]["latency_ms"]["p50"])(document)

    def quicker(profile: Any) -> None:
        profile["anchor_ms"] = {name: ms / 100 for name, ms in profile["anchor_ms"].items()}

    reason = judged(tmp_path, monkeypatch, "latency p50", verdict, edited(ask, quicker))["reason"]
    assert "never quiet enough" in reason
    assert ("yet even so all is within" in reason) == (verdict == "pass")


@pytest.mark.parametrize(("ratio", "verdict"), [(0.001, "pass"), (1000.0, "fail"), (None, "inconclusive")])
def test_latency_at_build(
    space: Workspace,
    artifacts: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ratio: float | None,
    verdict: str,
) -> None:
    """A device that is as it was profiled, one that has become slow, one that was never calm."""
    real = validate.checks.measure

    def measured(*arguments: Any, **options: Any) -> Any:
        found = real(*arguments, **options)
        if ratio is None:
            slow = {name: 10 * getattr(found, name) for name in ("samples_ms", "anchor_ms", "raw_ms")}
            return dataclasses.replace(found, calm=False, **slow)
        return dataclasses.replace(found, ratio=ratio, ratio_ci=(0.99 * ratio, 1.01 * ratio), calm=True)

    monkeypatch.setattr(validate.checks, "measure", measured)
    cache = Path(shutil.copytree(space.cache, tmp_path / "cache"))
    for done in cache.glob("validate-*"):
        shutil.rmtree(done)
    built = space.build(
        "--latency",
        "2x",
        "--format",
        "json",
        "--junit",
        tmp_path / "j.xml",
        "--github",
        cache=cache,
        out=tmp_path / "out",
    )
    assert built.code == built.document["exit_code"] == CODES[verdict]
    [case] = cases(tmp_path / "j.xml")
    failures, problems, annotation = TOLD[verdict]
    assert (len(case.findall("failure")), len(case.findall("error"))) == (failures, problems)
    assert any(line.startswith(annotation) for line in built.err.splitlines()) if annotation else "::" not in built.err
    page = (tmp_path / "out" / "small-here-2x" / "report.html").read_text()
    assert f'<p class="word {verdict}">{verdict.upper()}</p>' in page


# Accuracy -----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def other_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty digits, none of which the build judged."""
    root, source = tmp_path_factory.mktemp("digits"), images.Digits()
    for i in source.split()[0][:60]:
        image, label = source[int(i)]
        (root / str(label)).mkdir(exist_ok=True)
        image.save(root / str(label) / f"{i}.png")
    return root


@pytest.mark.parametrize(("recorded", "verdict"), [(None, "pass"), (100.0, "fail")])
def test_accuracy(
    edited: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: float | None, verdict: str
) -> None:
    def promise(document: Any) -> None:
        limit(1e6)(document)
        if recorded is not None:
            document["pruned"]["accuracy"] = recorded

    judged(tmp_path, monkeypatch, "accuracy", verdict, edited(promise), "--data", "digits")


@pytest.mark.parametrize(
    ("dense", "most", "verdict"), [(None, 100.0, "pass"), (100.0, 1.0, "fail"), (None, 0.0, "inconclusive")]
)
def test_accuracy_drop(
    edited: Any,
    other_digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dense: float | None,
    most: float,
    verdict: str,
) -> None:
    """On sixty other images a drop of nothing cannot be told."""

    def promise(document: Any) -> None:
        limit(1e6)(document)
        document["request"]["max_drop"] = most
        if dense is not None:
            document["dense"]["accuracy"] = dense

    judged(tmp_path, monkeypatch, "accuracy drop", verdict, edited(promise), "--data-dir", other_digits)


# Regression ---------------------------------------------------------------------------------


def test_an_artifact_is_no_slower_than_itself(
    edited: Any, artifacts: list[Path], tmp_path: Path, monkeypatch: Any
) -> None:
    more = ["--baseline", artifacts[0] / "manifest.json", "--max-regression", "50%"]
    check = judged(tmp_path, monkeypatch, regression.NAME, "pass", edited(limit(1e6)), *more)
    assert "turn by turn with the baseline" in check["reason"]
    assert abs(check["value"]) < 25
    assert check["limit"] == 50


def test_a_larger_model_is_slower(edited: Any, artifacts: list[Path], tmp_path: Path, monkeypatch: Any) -> None:
    """70 % of dense against 50 %, timed turn by turn: two fifths slower."""
    more = ["--baseline", artifacts[0], "--max-regression", "3%"]
    check = judged(tmp_path, monkeypatch, regression.NAME, "fail", edited(limit(1e6), which=1), *more)
    assert 10 < check["value"] < 100


@pytest.mark.parametrize(
    ("ms", "calm", "verdict"),
    [
        (1000.0, True, "pass"),
        (1000.0, False, "pass"),
        (1e-4, True, "fail"),
        (1e-4, False, "inconclusive"),
        (None, True, "inconclusive"),
    ],
)
def test_a_manifest_alone(
    edited: Any,
    artifacts: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ms: float | None,
    calm: bool,
    verdict: str,
) -> None:
    """Its recorded milliseconds count on the same device; another device's decide nothing, and a busy machine fails nothing."""
    real = recheck.measure
    monkeypatch.setattr(recheck, "measure", lambda *given, **more: dataclasses.replace(real(*given, **more), calm=calm))
    before = json.loads((artifacts[0] / "manifest.json").read_text())
    if ms is None:
        before["device"]["cpu"] = "a board"
    else:
        before["pruned"]["latency_ms"]["p50"] = ms
        before["pruned"]["latency_ci_ms"] = [0.99 * ms, 1.01 * ms]
    (tmp_path / "before.json").write_text(json.dumps(before))
    more = ["--baseline", tmp_path / "before.json", "--max-regression", "3%"]
    check = judged(tmp_path, monkeypatch, regression.NAME, verdict, edited(limit(1e6)), *more)
    if ms is None:
        assert check["value"] is None
        assert "another device (a board)" in check["reason"]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--baseline", "nowhere.json", "--max-regression", "3%"], "there is no baseline 'nowhere.json'"),
        (["--baseline", "README.md", "--max-regression", "3%"], "is not valid JSON"),
        (["--baseline", "tests", "--max-regression", "3%"], "has no manifest.json"),
        (["--baseline", "nowhere.json"], "add --max-regression 3%"),
        (["--max-regression", "3%"], "add --baseline manifest.json"),
        (["--baseline", "nowhere.json", "--max-regression", "3"], "a percentage as in 3%, not '3'"),
        (["--baseline", "nowhere.json", "--max-regression", "-3%"], "a percentage as in 3%, not '-3%'"),
    ],
)
def test_a_baseline_that_is_none(
    artifacts: list[Path], monkeypatch: pytest.MonkeyPatch, more: list[str], says: str
) -> None:
    monkeypatch.chdir(Path(__file__).parent.parent)
    ran = small.run("validate", artifacts[0], *more, "--format", "json")
    assert ran.code == ran.document["exit_code"] == errors.UsageError.exit_code
    assert says in ran.document["error"]
    assert "Traceback" not in ran.err


# What CI reads ------------------------------------------------------------------------------


def test_a_command_that_fails_is_an_error_in_junit_and_on_github(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    ran = small.run("validate", tmp_path / "nothing", "--junit", tmp_path / "j.xml", "--github")
    assert ran.code == errors.UsageError.exit_code
    [case] = cases(tmp_path / "j.xml")
    assert "is not an artifact" in case.find("error").get("message")  # type: ignore[union-attr]
    assert [line for line in ran.err.splitlines() if line.startswith("::error title=edgeprune validate::")]
    assert "is not an artifact" in (tmp_path / "summary.md").read_text()


def test_junit_that_cannot_be_written_is_said_before_any_work(artifacts: list[Path], tmp_path: Path) -> None:
    ran = small.run("validate", artifacts[0], "--junit", tmp_path)
    assert ran.code == errors.StorageError.exit_code
    assert "choose another --junit" in ran.err


def test_hostile_names_stay_text() -> None:
    """In XML a control character, on GitHub a line break or a colon, would end what it stands in."""
    check = {
        "name": "latency p50",
        "value": 1.0,
        "limit": 1.0,
        "verdict": "fail",
        "reason": "100 %\n::set-output x=1\x00<b>",
    }
    [line] = ci.notices("build", [ci.Suite("a,b::c", [check])])
    assert line == "::error title=a%2Cb%3A%3Ac%3A latency p50 fail::100 %25%0A::set-output x=1\x00<b>"
    root = ElementTree.fromstring(ci.xml("build", [ci.Suite("a,b::c", [check])]))
    assert root.find("testsuite/testcase/failure").get("message") == "100 %\n::set-output x=1�<b>"  # type: ignore[union-attr]


# JSON ---------------------------------------------------------------------------------------


def piped(tmp_path: Path, *arguments: object, program: str = small.QUICK) -> Result:
    """`edgeprune ARGUMENT... --format json | python -m json.tool`, with the exit code of the first."""
    words = [sys.executable, "-c", program, *map(str, arguments), "--format", "json"]
    ran = subprocess.run(
        ["bash", "-c", '"$@" | "$0" -m json.tool; echo "${PIPESTATUS[*]}" >codes', sys.executable, *words],
        capture_output=True, text=True, cwd=tmp_path, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    code, tool = map(int, (tmp_path / "codes").read_text().split())
    assert tool == 0, f"{ran.stdout}\n{ran.stderr}"
    return Result(code, ran.stdout, ran.stderr)


def test_json_of_a_build_through_a_pipe(space: Workspace, artifacts: list[Path], tmp_path: Path) -> None:
    ran = piped(
        tmp_path, "build", space.card, "--target", space.target, "--runtime", "onnxruntime", "--latency", "2x", "--latency", "70%",
        "--cache-dir", space.cache, "--out", space.out,
    )  # fmt: skip
    assert ran.code == ran.document["exit_code"]
    assert len(ran.document["artifacts"]) == 2


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        (2, ["build", "nobody", "--target", "cpu-avx2", "--latency", "2x"]),
        (2, ["build", "--target", "cpu-avx2"]),
        (2, ["build", "--target", "cpu-avx2", "--latency", "soon"]),
        (2, ["build", "--target", "cpu-avx2", "--latency", "2x", "--sped"]),
        (3, ["build", "--target", "board.toml", "--latency", "2x"]),
        (
            4,
            [
                "build",
                "CARD",
                "--target",
                "HERE",
                "--runtime",
                "onnxruntime",
                "--latency",
                "1us",
                "--cache-dir",
                "CACHE",
            ],
        ),
        (5, ["build", "--target", "HERE", "--latency", "2x", "--out", "file/below"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_json_of_every_failure_through_a_pipe(
    space: Workspace, artifacts: list[Path], tmp_path: Path, code: int, arguments: list[str]
) -> None:
    (tmp_path / "board.toml").write_text(re.sub(r"machine = .*", 'machine = ["pdp11"]', small.TARGET))
    (tmp_path / "file").write_text("no folder")
    names = {"CARD": space.card, "HERE": space.target, "CACHE": space.cache}
    program = "from edgeprune.cli import main; main()"  # nothing is measured
    ran = piped(tmp_path, *(names.get(word, word) for word in arguments), program=program)
    assert ran.code == ran.document["exit_code"] == code
    assert ran.document["error"]


@pytest.mark.parametrize("verbose", [[], ["-v"]])
def test_json_of_a_defect_and_of_ctrl_c(tmp_path: Path, verbose: list[str]) -> None:
    for error, code in (("ZeroDivisionError('x')", 70), ("KeyboardInterrupt()", errors.INTERRUPTED)):
        program = f"import edgeprune.api as api\ndef broken(*_, **__): raise {error}\napi.build = broken\nfrom edgeprune.cli import main; main()"
        ran = piped(tmp_path, "build", "--target", "cpu-avx2", "--latency", "2x", *verbose, program=program)
        assert ran.code == ran.document["exit_code"] == code
