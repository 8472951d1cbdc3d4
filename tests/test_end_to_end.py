"""python -m pytest tests/test_end_to_end.py

The whole way on a small card, through the command line; one build of two latencies serves most tests. Nothing here
depends on how fast or how noisy the machine is: verdicts are compared with their own numbers, not wished for.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import onnxruntime
import pytest
import small
import torch
from small import Result, Workspace
from test_docs import manifest_errors

import edgeprune
from edgeprune import api, artifact, config, errors, pipeline, report
from edgeprune.latency.machine import here
from edgeprune.stages import profile, prune, shapes, validate

LATENCIES = ("2x", "70%")
SHARED = ("baseline", "profile", "calibrate", "roofline")
OWN = ("prune", "finetune", "export", "simplify", "compile", "validate", "inspect")
STAGES = (*SHARED[:3], *OWN[:-1], "roofline", "inspect")  # in order
FILES = {
    "anchor.onnx.gz",
    "manifest.json",
    "model.onnx",
    "model.safetensors",
    "plan.json",
    "profile.json",
    "provenance.json",
    "report.html",
    "report.json",
    "report.md",
    "sbom.cdx.json",
}
#: These say which stages were cached and which other artifacts were built in the same run.
OF_THE_RUN = {"manifest.json", "report.md", "report.html", "report.json", "provenance.json", "sbom.cdx.json"}


@pytest.fixture
def cache_copy(space: Workspace, family: Result, tmp_path: Path) -> Path:
    """A cache of this test's own, with all that the family build has finished."""
    return Path(shutil.copytree(space.cache, tmp_path / "cache"))


def manifest(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = small.strict_json((folder / "manifest.json").read_text())
    return document


def gates(checks: list[dict[str, Any]]) -> int:
    """The exit code that these verdicts mean."""
    verdicts = {check["verdict"] for check in checks}
    assert verdicts <= {"pass", "fail", "inconclusive"}
    return (
        errors.GATE_FAILED
        if "fail" in verdicts
        else errors.INCONCLUSIVE
        if "inconclusive" in verdicts
        else errors.PASSED
    )


def done(cache: Path) -> dict[str, int]:
    """When each finished stage folder was written, in ns."""
    return {path.parent.name: path.stat().st_mtime_ns for path in cache.glob("*/done.json")}


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# Train --------------------------------------------------------------------------------------


def test_training_writes_half_precision_weights_that_know_something(space: Workspace) -> None:
    from safetensors.torch import load_file

    assert space.trained.code == errors.PASSED, space.trained.err
    facts = space.trained.document
    state = load_file(facts["weights"])
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    assert facts["images"] == 599
    assert facts["accuracy"] > 20, "no better than guessing one of ten digits"


# Build --------------------------------------------------------------------------------------


def test_the_exit_code_is_what_the_checks_say(family: Result, artifacts: list[Path]) -> None:
    codes = [gates(manifest(folder)["checks"]) for folder in artifacts]
    assert family.code == (errors.GATE_FAILED if errors.GATE_FAILED in codes else max(codes))
    assert family.document["exit_code"] == family.code


def test_stdout_is_the_manifests_and_stderr_the_story(family: Result, artifacts: list[Path]) -> None:
    built = family.document["artifacts"]
    assert [entry["manifest"] for entry in built] == [manifest(folder) for folder in artifacts]
    for stage in (*SHARED, *OWN):
        assert f"▸ {stage}" in family.err
    assert "Traceback" not in family.err


def test_the_artifacts_are_named_and_whole(space: Workspace, artifacts: list[Path]) -> None:
    assert [folder.name for folder in artifacts] == ["small-here-2x", "small-here-70pct"]
    assert {folder.name for folder in space.out.iterdir()} >= {folder.name for folder in artifacts}
    assert not [path for path in space.out.iterdir() if path.name.startswith(".")], "half-written folders are left"
    assert not [path for path in space.cache.iterdir() if path.name.startswith(".")], "half-written stages are left"
    for folder in artifacts:
        assert {path.name for path in folder.iterdir()} == FILES


@pytest.mark.parametrize("which", [0, 1])
def test_the_manifest_is_valid(artifacts: list[Path], which: int) -> None:
    assert manifest_errors(manifest(artifacts[which])) == []


@pytest.mark.parametrize("which", [0, 1])
def test_every_file_has_its_hash_and_size(artifacts: list[Path], which: int) -> None:
    folder = artifacts[which]
    files = manifest(folder)["files"]
    assert set(files) == FILES - {"manifest.json"}
    for name, facts in files.items():
        content = (folder / name).read_bytes()
        assert facts == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


@pytest.mark.parametrize(("which", "share"), [(0, 0.5), (1, 0.7)])
def test_the_manifest_agrees_with_itself_and_its_files(artifacts: list[Path], which: int, share: float) -> None:
    document = manifest(artifacts[which])
    profile = json.loads((artifacts[which] / "profile.json").read_text())
    plan = json.loads((artifacts[which] / "plan.json").read_text())
    pruned, anchor_ms = document["pruned"], profile["anchor_ms"]["onnxruntime"]
    assert document["request"]["latency_ms"] == pytest.approx(share * profile["table"]["dense_ms"])
    assert pruned["latency_ms"]["p50"] == pytest.approx(pruned["ratio"] * anchor_ms)
    assert pruned["latency_ci_ms"][0] <= pruned["latency_ms"]["p50"] <= pruned["latency_ci_ms"][1]
    assert document["dense"]["latency_ms"]["p50"] == pytest.approx(profile["anchor"]["p50"])
    kept = [[len(block["heads"]), len(block["neurons"])] for block in plan["blocks"]]
    assert document["shape"] == plan["shape"] and [row[:2] for row in plan["shape"]] == kept
    # Where plans turn out faster than the table says, the search goes on above the limit by the table.
    assert pruned["predicted_ms"] == plan["predicted_ms"] < profile["table"]["dense_ms"]
    assert (document["runtime"], document["threads"], document["entry"]) == ("onnxruntime", 1, "model.onnx")
    assert document["data"]["evaluation"] == document["accuracy"]["images"] == 599
    assert document["data"]["unreadable"] == []
    [check] = document["checks"]
    assert (check["name"], check["value"]) == ("latency p50", pruned["latency_ms"]["p50"])


def test_pruning_pays(artifacts: list[Path]) -> None:
    fast, slow = (manifest(folder) for folder in artifacts)
    for document, ratio in ((fast, 0.5), (slow, 0.7)):
        # A gate may fail by a hair on a noisy machine; a third beyond the limit is a defect.
        assert document["pruned"]["ratio"] < 1.33 * ratio
        assert document["pruned"]["params"] < document["dense"]["params"]
        assert document["pruned"]["macs"] < document["dense"]["macs"]
    assert fast["pruned"]["predicted_ms"] < slow["pruned"]["predicted_ms"]
    assert fast["dense"] == slow["dense"]


def test_the_dense_accuracy_is_the_trained_one(space: Workspace, artifacts: list[Path]) -> None:
    """Measured through ONNX in the worker, on the same images: one image apart at most for rounding."""
    trained = space.trained.document["accuracy"]
    assert manifest(artifacts[0])["dense"]["accuracy"] == pytest.approx(trained, abs=100 / 599 + 1e-9)


def equals_the_loaded(folder: Path, code: str, rest: Sequence[object], tmp_path: Path) -> None:
    """Code in a process of its own, given files of pixels and for logits and the rest, answers as `edgeprune.load` does."""
    pixels = np.random.default_rng(0).standard_normal((5, 3, 32, 32), dtype=np.float32)
    asked, answered = tmp_path / "pixels.npy", tmp_path / "logits.npy"
    np.save(asked, pixels)
    command = [sys.executable, "-c", code, *map(str, (asked, answered, *rest))]
    subprocess.run(command, check=True, cwd=tmp_path, timeout=60)
    model = edgeprune.load(folder)
    assert not model.training
    with torch.no_grad():
        want = model(torch.from_numpy(pixels)).numpy()
    np.testing.assert_allclose(np.load(answered), want, atol=1e-4 * float(np.abs(want).max()))


@pytest.mark.parametrize("which", [0, 1])
def test_the_onnx_equals_the_torch_model(artifacts: list[Path], which: int, tmp_path: Path) -> None:
    """In bare onnxruntime, in a process that has nothing but numpy."""
    code = (
        "import sys, numpy, onnxruntime\n"
        "session = onnxruntime.InferenceSession(sys.argv[3], providers=['CPUExecutionProvider'])\n"
        "pixels = numpy.load(sys.argv[1])\n"
        "numpy.save(sys.argv[2], numpy.concatenate([session.run(['logits'], {'pixels': x[None]})[0] for x in pixels]))\n"
        "assert not {'torch', 'edgeprune', 'onnx'} & set(sys.modules)\n"
    )
    equals_the_loaded(artifacts[which], code, [artifacts[which] / "model.onnx"], tmp_path)


def test_it_opens_as_it_was_measured(artifacts: list[Path], tmp_path: Path) -> None:
    """In a process that never imports torch."""
    code = (
        "import sys, numpy, edgeprune\n"
        "session = edgeprune.open(sys.argv[3])\n"
        "assert session.facts['threads'] == int(sys.argv[4]) and session.input_shape == (1, 3, 32, 32)\n"
        "pixels = numpy.load(sys.argv[1])\n"
        "numpy.save(sys.argv[2], numpy.concatenate([session.run(x[None]) for x in pixels]))\n"
        "assert 'torch' not in sys.modules\n"
    )
    equals_the_loaded(artifacts[0], code, [artifacts[0], manifest(artifacts[0])["threads"]], tmp_path)
    damaged = shutil.copytree(artifacts[0], tmp_path / "damaged")
    with (damaged / "model.onnx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(errors.UsageError, match=r"model\.onnx"):
        edgeprune.open(damaged)


def test_the_loaded_model_has_the_plans_sizes(artifacts: list[Path]) -> None:
    document = manifest(artifacts[0])
    model: Any = edgeprune.load(artifacts[0])
    assert sum(p.numel() for p in model.parameters()) == document["pruned"]["params"]
    for block, (heads, neurons, *_) in zip(model.blocks, document["shape"], strict=True):
        assert getattr(block.attn, "num_heads", 0) == heads
        assert (block.mlp.fc1.out_features if hasattr(block.mlp, "fc1") else 0) == neurons


def test_the_anchor_is_the_dense_graph_without_its_weights(space: Workspace, artifacts: list[Path]) -> None:
    packed = (artifacts[0] / "anchor.onnx.gz").read_bytes()
    anchor = onnx.load_from_string(gzip.decompress(packed))
    request, _ = api.request(str(space.card), target=str(space.target), latency="2x", runtime="onnxruntime")
    baseline = small.finished(space.cache, request, "baseline")["baseline"]
    dense = onnx.load(baseline / "dense.onnx")
    assert [node.op_type for node in anchor.graph.node] == [node.op_type for node in dense.graph.node]
    assert [tuple(t.dims) for t in anchor.graph.initializer] == [tuple(t.dims) for t in dense.graph.initializer]
    assert len(packed) < (baseline / "dense.onnx").stat().st_size / 5
    session = onnxruntime.InferenceSession(gzip.decompress(packed), providers=["CPUExecutionProvider"])
    assert np.isfinite(session.run(None, {"pixels": np.zeros((1, 3, 32, 32), np.float32)})[0]).all()


def test_latencies_share_what_does_not_depend_on_them(space: Workspace, artifacts: list[Path]) -> None:
    first, second = (manifest(folder)["stages"] for folder in artifacts)
    assert [stage["name"] for stage in first] == [stage["name"] for stage in second] == [*STAGES]
    assert {stage["name"] for stage in second if stage["cached"]} == set(SHARED)
    assert not any(stage["cached"] for stage in first if stage["name"] in OWN)
    assert [s["seconds"] for s in first][:3] == [s["seconds"] for s in second][:3]
    profiles = [(folder / "profile.json").read_bytes() for folder in artifacts]
    assert profiles[0] == profiles[1]


# Again --------------------------------------------------------------------------------------


def test_the_same_command_again_does_no_work(space: Workspace, family: Result, artifacts: list[Path]) -> None:
    before, files = done(space.cache), [snapshot(folder) for folder in artifacts]
    start = time.process_time()
    again = space.build("--latency", LATENCIES[0], "--latency", LATENCIES[1], "--format", "json")
    seconds = time.process_time() - start  # a busy machine takes longer without more work
    assert (again.code, again.out) == (family.code, family.out)
    assert done(space.cache) == before
    assert [snapshot(folder) for folder in artifacts] == files
    assert again.err.count("done before") == len(SHARED) + 2 * len(OWN)
    assert seconds < 10


def test_an_undecided_verdict_is_looked_for_again(space: Workspace, cache_copy: Path, tmp_path: Path) -> None:
    """The same command measures once more; what comes before is not done again."""
    before = done(cache_copy)
    with small.quick(), mock.patch.object(validate, "decided", lambda folder: False):
        again = small.run(
            "build", space.card, "--target", space.target, "--runtime", "onnxruntime", "--latency", LATENCIES[0],
            "--cache-dir", cache_copy, "--out", tmp_path / "out",
        )  # fmt: skip
    assert again.code in (0, 1, 6), again.err
    assert "validate is done again: it came to no verdict" in again.err
    after = done(cache_copy)
    changed = {name.rsplit("-", 1)[0] for name in after if before.get(name) != after[name]}
    assert "validate" in changed and changed <= {"validate", "inspect"}


@pytest.mark.parametrize(
    "measured, value, verdict, again",
    [(True, 1.0, "inconclusive", True), (True, None, "inconclusive", True), (False, None, "inconclusive", False),
     (True, 1.0, "pass", False)],
)  # fmt: skip
def test_only_what_was_measured_is_measured_again(
    tmp_path: Path, measured: bool, value: float | None, verdict: str, again: bool
) -> None:
    """With too few rounds for a quantile there is no value; what was predicted for another device stays so."""
    check = {"name": "latency p50", "value": value, "limit": 1.0, "verdict": verdict, "reason": "so"}
    (tmp_path / "validation.json").write_text(json.dumps({"measured": measured, "checks": [check]}))
    assert validate.decided(tmp_path) != again


def test_a_lost_artifact_comes_back_from_the_cache(
    space: Workspace, artifacts: list[Path], tmp_path: Path, cache_copy: Path
) -> None:
    before = done(cache_copy)
    built = space.build("--latency", "2x", "--format", "json", cache=cache_copy, out=tmp_path / "elsewhere")
    folder = tmp_path / "elsewhere" / "small-here-2x"
    assert built.code == gates(manifest(artifacts[0])["checks"])
    assert done(cache_copy) == before
    for name in FILES - OF_THE_RUN:
        assert (folder / name).read_bytes() == (artifacts[0] / name).read_bytes()
    assert all(stage["cached"] for stage in manifest(folder)["stages"])


def test_a_damaged_cache_is_noticed(space: Workspace, cache_copy: Path, tmp_path: Path) -> None:
    """The damaged stage would run again, and nothing before it."""
    for exported in cache_copy.glob("export-*"):
        (exported / "exported.onnx").write_bytes(b"not what was written")
    rows = space.build("--latency", "2x", "--dry-run", "--format", "json", cache=cache_copy, out=tmp_path).document
    assert [row["stage"] for row in rows] == [*STAGES]
    before = STAGES[: STAGES.index("export")]
    assert {row["stage"]: row["done"] for row in rows if row["stage"] in (*before, "export")} == {
        **dict.fromkeys(before, True),
        "export": False,
    }


@pytest.fixture(scope="session")
def rebuilt(space: Workspace, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result, dict[str, int]]:
    """A family of two, then one of them with --rebuild: the folder, that result, the stages before it."""
    root = tmp_path_factory.mktemp("rebuild")
    both = ["--latency", "1000ms", "--latency", "999ms"]
    first = space.build(*both, card=space.one, cache=root / "cache", out=root / "first")
    assert first.code == errors.PASSED, first.err
    before = done(root / "cache")
    again = space.build(
        *both[:2], "--rebuild", "--format", "json", card=space.one, cache=root / "cache", out=root / "again"
    )
    return root, again, before


@pytest.mark.slow
def test_rebuild_does_everything_again(rebuilt: tuple[Path, Result, dict[str, int]]) -> None:
    root, again, before = rebuilt
    assert again.code == errors.PASSED, again.err
    assert "done before" not in again.err
    [stages] = [entry["manifest"]["stages"] for entry in again.document["artifacts"]]
    assert not any(stage["cached"] for stage in stages)
    mine = {name for name, when in done(root / "cache").items() if when != before.get(name)}
    assert sorted(name.rpartition("-")[0] for name in mine) == sorted([*SHARED, *OWN])


@pytest.mark.slow
def test_new_measurements_are_not_mixed_with_what_was_built_on_the_old(
    space: Workspace, rebuilt: tuple[Path, Result, dict[str, int]]
) -> None:
    """The other latency is still in the cache, made with the first profile; the profile in the cache is a new one."""
    root, _, _ = rebuilt
    space.build("--latency", "999ms", card=space.one, cache=root / "cache", out=root / "after")
    folder = root / "after" / "one-here-999ms"
    profile = json.loads((folder / "profile.json").read_text())
    assert manifest(folder)["dense"]["latency_ms"]["p50"] == pytest.approx(profile["anchor"]["p50"])
    ratio, anchor_ms = manifest(folder)["pruned"]["ratio"], profile["anchor_ms"]["onnxruntime"]
    assert manifest(folder)["pruned"]["latency_ms"]["p50"] == pytest.approx(ratio * anchor_ms)


def test_dry_run_says_what_would_run_and_runs_nothing(space: Workspace, artifacts: list[Path], tmp_path: Path) -> None:
    before = done(space.cache)
    asked = ["--latency", "2x", "--latency", "80%", "--dry-run"]
    rows = space.build(*asked, "--format", "json", out=tmp_path / "out")
    assert (rows.code, rows.err) == (errors.PASSED, "")
    found = {(row["stage"], row["latency"]): row["done"] for row in rows.document}
    shared = {(stage, "every latency"): True for stage in SHARED}
    own = {(stage, latency): latency == "2x" for stage in OWN for latency in ("2x", "80%")}
    assert found == {**shared, **own}
    text = space.build(*asked, out=tmp_path / "out")
    assert text.code == errors.PASSED
    assert text.out.count("done before") == len(SHARED) + len(OWN)
    assert text.out.count("would run") == len(OWN)
    assert done(space.cache) == before
    assert not list((tmp_path / "out").glob("*")), "a dry run writes no artifact"


def test_the_same_latency_table_gives_the_same_plan(space: Workspace, cache_copy: Path, tmp_path: Path) -> None:
    """Byte for byte: calibration, solver and re-fit are deterministic. The plan's own timing is taken from the table
    here, since two measurements are never alike."""
    request, _ = api.request(str(space.card), target=str(space.target), latency="55%", runtime="onnxruntime")
    plans, weights = [], []
    for name in ("one", "two"):
        cache = tmp_path / name
        cache.mkdir()
        for source in small.finished(cache_copy, request, "profile").values():
            shutil.copytree(source, cache / source.name)

        _, table = profile.read_profile(next(cache.glob("profile-*")))

        def predicted(clock: Any, dense: Any, plan: Any, request: Any, quiet: Any, table: Any = table) -> Any:
            ms = table.predict_ms(plan.shape) * 1.03  # so that the search goes on for a round or two
            return ms, (ms, ms), True

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(prune, "measure", predicted)
            folder = pipeline.run_stages(pipeline.PIPELINE[:5], request, cache)["prune"].folder
        plans.append((folder / "plan.json").read_bytes())
        weights.append((folder / "pruned.safetensors").read_bytes())
    assert plans[0] == plans[1]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_the_search_goes_on_below_a_plan_that_just_misses(
    space: Workspace, rebuilt: tuple[Path, Result, dict[str, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table may name the same plan for a slightly smaller budget; cheaper plans are still to be had."""
    cache = Path(shutil.copytree(rebuilt[0] / "cache", tmp_path / "cache"))
    request, _ = api.request(str(space.one), target=str(space.target), latency="80%", runtime="onnxruntime")
    shapes: list[Any] = []

    _, table = profile.read_profile(next(cache.glob("profile-*")))

    def first_misses(clock: Any, dense: Any, plan: Any, request: Any, quiet: Any) -> Any:
        shapes.append(plan.shape)
        limit = request.latency.limit_ms(quiet.ms)
        ms = 0.995 * limit if plan.shape == shapes[0] else table.predict_ms(plan.shape)
        return ms, (0.99 * ms, 1.01 * ms), True

    monkeypatch.setattr(prune, "measure", first_misses)
    folder = pipeline.run_stages(pipeline.PIPELINE[:5], request, cache)["prune"].folder
    kept = json.loads((folder / "plan.json").read_text())["shape"]
    assert kept != [list(block) for block in shapes[0]]


# Options ------------------------------------------------------------------------------------


def test_a_generous_latency_builds_the_dense_model_and_says_so(
    space: Workspace, family: Result, cache_copy: Path, tmp_path: Path
) -> None:
    built = space.build("--latency", "1000ms", cache=cache_copy, out=tmp_path)
    assert built.code == errors.PASSED, built.err
    assert "the dense model already meets 1000.00 ms" in built.err
    document = manifest(tmp_path / "small-here-1000ms")
    assert document["shape"] == [[3, 192]] * 3
    assert document["pruned"]["params"] == document["dense"]["params"]
    assert document["pruned"]["accuracy"] == document["dense"]["accuracy"]
    assert document["accuracy"]["agreement"] == 100
    assert 0.75 < document["pruned"]["ratio"] < 1.33, "the dense model against itself"
    assert "PASS" in built.out
    assert str(tmp_path / "small-here-1000ms") in built.out


def test_max_drop_is_a_second_gate(space: Workspace, artifacts: list[Path], cache_copy: Path, tmp_path: Path) -> None:
    """It changes the last stages alone, and its verdict follows from the accuracies."""
    built = space.build("--latency", "2x", "--max-drop", "0.0", cache=cache_copy, out=tmp_path)
    document = manifest(tmp_path / "small-here-2x")
    assert {stage["name"] for stage in document["stages"] if not stage["cached"]} == {"validate", "inspect"}
    assert document["request"]["max_drop"] == 0.0
    assert [check["name"] for check in document["checks"]] == ["latency p50", "accuracy drop"]
    drop = document["checks"][1]
    assert drop["value"] == pytest.approx(document["accuracy"]["dense"] - document["accuracy"]["pruned"])
    assert drop["verdict"] == ("pass" if drop["value"] <= 0 else "fail")
    assert built.code == gates(document["checks"])


def test_a_failed_gate_ends_with_1_and_keeps_the_artifact(
    space: Workspace, artifacts: list[Path], cache_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = validate.checks.summary

    def worse(*arguments: Any) -> Any:
        found = real(*arguments)
        return type(found)(**{**vars(found), "pruned": found.dense - 5.0})

    monkeypatch.setattr(validate.checks, "summary", worse)
    built = space.build("--latency", "2x", "--max-drop", "4", cache=cache_copy, out=tmp_path)
    assert built.code == errors.GATE_FAILED
    assert "FAIL: accuracy drop" in built.out
    assert manifest(tmp_path / "small-here-2x")["checks"][1]["verdict"] == "fail"
    assert "FAIL: accuracy drop" in (tmp_path / "small-here-2x" / "report.md").read_text()


def test_openvino_brings_its_own_files(space: Workspace, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    cache = tmp_path / "cache"
    built = space.build("--latency", "1000ms", "--runtime", "openvino", card=space.one, cache=cache, out=tmp_path)
    assert built.code == errors.PASSED, built.err
    folder = tmp_path / "one-here-1000ms"
    document = manifest(folder)
    assert manifest_errors(document) == []
    assert {path.name for path in folder.iterdir()} == FILES | {"model.xml", "model.bin"}
    assert (document["runtime"], document["entry"]) == ("openvino", "model.xml")
    assert document["accuracy"]["agreement"] == 100


def test_a_config_file_holds_the_options_and_the_command_line_wins(
    space: Workspace, family: Result, tmp_path: Path
) -> None:
    file = tmp_path / "build.toml"
    file.write_text(
        f'model = "{space.card}"\ntarget = "{space.target}"\nlatency = ["2x", "90%"]\nruntime = "onnxruntime"\n'
        f'cache-dir = "{space.cache}"\nout = "{tmp_path / "out"}"\n'
    )
    rows = small.run("build", "--config", file, "--dry-run", "--format", "json")
    assert rows.code == errors.PASSED, rows.err
    assert {row["latency"] for row in rows.document} == {"every latency", "2x", "90%"}
    assert [row["done"] for row in rows.document if row["latency"] == "2x"] == [True] * len(OWN)
    rows = small.run("build", "--config", file, "--latency", "30%", "--dry-run", "--format", "json")
    assert {row["latency"] for row in rows.document} == {"every latency", "30%"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('latncy = "2x"', "unknown key 'latncy'; did you mean 'latency'?"),
        ("latency = ", "is not valid TOML"),
    ],
)
def test_a_config_file_with_mistakes_is_refused(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "build.toml"
    file.write_text(text)
    refused = small.run("build", "--config", file, "--target", "cpu-avx2", "--latency", "2x")
    assert refused.code == errors.UsageError.exit_code
    assert str(file) in refused.err
    assert says in refused.err


# The other commands -------------------------------------------------------------------------


def test_profile_takes_the_table_of_the_build_from_the_cache(
    space: Workspace, artifacts: list[Path], tmp_path: Path
) -> None:
    """And adds what a build does not need: the survey and, if asked for, held-out plans."""
    asked = ["profile", space.card, "--target", space.target, "--runtime", "onnxruntime", "--cache-dir", space.cache]
    with small.quick():
        found = small.run(
            *asked, "--check", 5, "--export", tmp_path / "p.json", "--out", tmp_path / "p", "--format", "json"
        )
    assert found.code == errors.PASSED, found.err
    document = found.document
    added = {name: document.pop(name) for name in ("survey", "check")}
    assert document == json.loads((artifacts[0] / "profile.json").read_text())
    table = document["table"]
    [stage] = table["stages"]
    assert len(stage["attn_ms"]) == 4
    assert stage["mlp_widths"] == [0, 32, 64, 96, 128, 160, 192]
    assert stage["attn_ms"] == sorted(stage["attn_ms"])
    assert stage["mlp_ms"] == sorted(stage["mlp_ms"])
    assert table["fit"]["plans"] == small.BUDGETS["edgeprune.stages.candidates.FITTING_PLANS"]
    assert table["empty_ms"] < table["dense_ms"] == document["anchor"]["p50"]
    for kind, total in (("attention", 3), ("MLP", 6)):
        rows = [row for row in added["survey"]["sub_blocks"] if row["kind"] == kind]
        assert len(rows) == total
        assert all(0 <= row["ms"] <= table["dense_ms"] for row in rows)
    assert [plan["shape"] for plan in added["check"]["plans"]] != []
    for plan in added["check"]["plans"]:
        assert plan["error"] == pytest.approx(plan["predicted_ms"] / plan["measured_ms"] - 1)
    for path in (tmp_path / "p.json", tmp_path / "p" / "profile.json"):
        assert json.loads(path.read_text()) == {**document, **added}
    with np.load(tmp_path / "p" / "samples.npz") as samples:
        assert {"empty", "heads0", "neurons32", "plan0"} <= set(samples.files)
        assert {f"{name}.waited" for name in samples.files if "." not in name} <= set(samples.files)
        assert len({samples[name].shape for name in samples.files}) == 1
        assert samples["heads0"].shape[0] == 2, "of the model and of the dense one"
    report = (tmp_path / "p" / "profile.md").read_text()
    for title in (
        "Sub-blocks",
        "Latency table, per block",
        "Operators",
        "Noise while surveying",
        "Predicted against measured",
    ):
        assert f"## {title}\n" in report
    start = time.process_time()
    text = small.run(*asked, "--check", 5)
    assert time.process_time() - start < 10, "everything was done before"
    assert text.code == errors.PASSED
    assert "3 heads" in text.out
    assert "192 neurons" in text.out


def test_a_profile_of_this_device_builds_a_validated_artifact(
    space: Workspace, artifacts: list[Path], tmp_path: Path
) -> None:
    built = space.build("--latency", "2x", "--profile", artifacts[0] / "profile.json", out=tmp_path / "out")
    assert built.code in (errors.PASSED, errors.GATE_FAILED, errors.INCONCLUSIVE), built.err
    assert "recorded on" in built.err
    assert manifest(tmp_path / "out" / "small-here-2x")["pruned"]["latency_ms"]["samples"] >= 9


@pytest.fixture(scope="module")
def elsewhere(space: Workspace, artifacts: list[Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A profile that another device recorded, of a target that is not here; and that target."""
    folder = tmp_path_factory.mktemp("elsewhere")
    target = folder / "board.toml"
    machine = "aarch64" if platform.machine() == "x86_64" else "x86_64"
    target.write_text(re.sub(r"machine = .*", f'machine = ["{machine}"]', small.TARGET))
    document = json.loads((artifacts[0] / "profile.json").read_text())
    document["device"] |= {"cpu": "a board", "machine": machine}
    document["target"] |= {"name": "board", "machine": [machine]}
    (folder / "board.json").write_text(json.dumps(document))
    return folder / "board.json", target


def test_a_profile_of_another_device_predicts_and_says_so(
    space: Workspace, elsewhere: tuple[Path, Path], tmp_path: Path
) -> None:
    recorded, target = elsewhere
    asked = ("build", space.card, "--target", target, "--latency", "2x", "--cache-dir", space.cache, "--out", tmp_path)
    assert small.run(*asked).code == errors.TargetUnavailable.exit_code, "nothing can be measured for it here"
    built = small.run(*asked, "--profile", recorded)
    assert built.code == errors.INCONCLUSIVE, built.err
    assert "predicted, not validated" in built.err
    folder = tmp_path / "small-board-2x"
    document = manifest(folder)
    assert document["pruned"]["latency_ms"] == {"p50": None, "p90": None, "p99": None, "samples": 0}
    assert document["pruned"]["predicted_ms"] <= 0.95 * document["request"]["latency_ms"]
    assert document["accuracy"]["images"] == 599, "accuracy is measured all the same"
    [check] = document["checks"]
    assert (check["value"], check["verdict"]) == (None, "inconclusive")
    assert "the profile is of a board; run `edgeprune validate` there" in check["reason"]
    assert "not measured" in (folder / "report.md").read_text()
    compared = small.run("report", folder, folder)
    assert compared.code == errors.PASSED
    assert "INCONCLUSIVE" in compared.out
    refused = small.run("validate", folder)
    assert refused.code == errors.TargetUnavailable.exit_code


def test_predictions_cannot_be_checked_on_another_device(
    space: Workspace, elsewhere: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(errors.UsageError, match="a board: this machine cannot check predictions for it"):
        profile.refuse_recorded(json.loads(elsewhere[0].read_text()), "check predictions", here())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d.update(schema="x"), "is not a profile of schema edgeprune.profile/1"),
        (lambda d: d.pop("table"), "the profile is damaged (KeyError: 'table')"),
        (lambda d: d["table"].pop("base_ms"), "not a latency table"),
        (lambda d: d.pop("anchor"), "the profile is damaged (KeyError: 'anchor')"),
        (lambda d: d["anchor"].pop("samples"), "the profile is damaged (KeyError: 'samples')"),
        (lambda d: d["anchor"].update(samples="many"), "the profile is damaged (ValueError: the anchor's samples"),
        (lambda d: d["anchor"].update(p50=-1), "no positive number"),
        (lambda d: d["table"]["stages"][0].update(mlp_ms=[0.0, 1.0]), "more or fewer MLP prices"),
        (lambda d: d["table"]["stages"][0].update(blocks=4), "its table is not of 3 blocks"),
        (lambda d: d["table"].update(runtime="tensorrt"), "unknown runtime"),
        (lambda d: d["model"].update(tokens=197), "its model's tokens is 197, not 17"),
        (lambda d: d["target"].update(name="board"), "its target is board, not here"),
        (lambda d: d["table"].update(runtime="openvino"), "its runtime is openvino, not onnxruntime"),
    ],
)  # fmt: skip
def test_a_profile_of_something_else_is_refused(
    space: Workspace, artifacts: list[Path], tmp_path: Path, change: Callable[[Any], Any], says: str
) -> None:
    document = json.loads((artifacts[0] / "profile.json").read_text())
    change(document)
    (tmp_path / "p.json").write_text(json.dumps(document))
    refused = space.build("--latency", "2x", "--profile", tmp_path / "p.json")
    assert refused.code == errors.UsageError.exit_code
    assert says in refused.err
    assert "Traceback" not in refused.err


def test_report_of_one_is_report_md(artifacts: list[Path]) -> None:
    found = small.run("report", artifacts[0])
    assert found.code == errors.PASSED
    assert found.out.strip() == (artifacts[0] / "report.md").read_text().strip()
    assert found.out.splitlines()[0] == "# small on here at 2x"


def test_report_of_several_compares_them(artifacts: list[Path]) -> None:
    found = small.run("report", *artifacts)
    assert found.code == errors.PASSED
    lines = found.out.strip().partition("\n\n")[0].splitlines()
    assert len(lines) == 4
    assert {line.count("|") for line in lines} == {lines[0].count("|")}
    assert "small here 2x" in lines[2]
    assert "small here 70%" in lines[3]
    assert found.out.strip() == report.comparison([manifest(folder) for folder in artifacts]).strip()


def test_validate_measures_again_without_torch(artifacts: list[Path], tmp_path: Path) -> None:
    """On the device of the profile its anchor counts; the exit code is the verdict's."""
    code = (
        "import sys, edgeprune.checks as checks\n"
        "checks.SECONDS = 3.0\n"
        "from edgeprune.cli import main\n"
        "try:\n    main()\nfinally:\n    assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, "validate", str(artifacts[0]), "--format", "json"],
        capture_output=True, text=True, cwd=tmp_path, timeout=120,
    )  # fmt: skip
    assert "torch was imported" not in ran.stderr
    found = small.strict_json(ran.stdout)
    document = manifest(artifacts[0])
    assert found["same_device"] is True
    assert ran.returncode == found["exit_code"] == gates(found["checks"])
    [check] = found["checks"]
    assert check["limit"] == document["request"]["latency_ms"]
    assert found["latency"]["p50"] == check["value"]
    assert found["latency"]["p50"] == pytest.approx(document["pruned"]["latency_ms"]["p50"], rel=0.5)


def test_validate_in_words(artifacts: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeprune.checks.SECONDS", 1.0)
    found = small.run("validate", artifacts[1])
    assert found.code in (errors.PASSED, errors.GATE_FAILED, errors.INCONCLUSIVE)
    assert re.search(
        r"latency p50 .* [\d.]+ ms .* <= [\d.]+ ms .* (pass|fail|inconclusive) .* 95 % interval", found.out
    )
    assert f"{len(FILES) - 1} files have their hashes" in found.out
    words = {errors.PASSED: "PASS", errors.GATE_FAILED: "FAIL", errors.INCONCLUSIVE: "INCONCLUSIVE"}
    assert found.out.splitlines()[-1] == words[found.code]


def test_validate_with_the_data_of_the_build(artifacts: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same digits in the same runtime: the recorded accuracy, to the image."""
    monkeypatch.setattr("edgeprune.checks.SECONDS", 1.0)
    found = api.validate(artifacts[0], data="digits")
    recorded = manifest(artifacts[0])
    assert found["accuracy"]["accuracy"] == recorded["pruned"]["accuracy"]
    assert found["accuracy"]["dense"] == recorded["dense"]["accuracy"]
    assert found["accuracy"]["images"] == 599
    assert [check["name"] for check in found["checks"]] == ["latency p50", "accuracy"]
    assert found["checks"][1]["verdict"] == "pass"


def test_validate_under_another_target(artifacts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name is in the result; the profile counts as long as both are held to the same instructions."""
    monkeypatch.setattr("edgeprune.checks.SECONDS", 1.0)
    (tmp_path / "board.toml").write_text(small.TARGET)
    found = api.validate(artifacts[0], target=str(tmp_path / "board.toml"))
    assert (found["target"], found["same_device"]) == ("board", True)


def test_validate_of_an_artifact_whose_latency_was_only_predicted(
    artifacts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Built for this device somewhere else: nothing was measured at build, all is here."""
    monkeypatch.setattr("edgeprune.checks.SECONDS", 1.0)
    folder = Path(shutil.copytree(artifacts[0], tmp_path / "artifact"))
    document = manifest(folder)
    document["pruned"]["latency_ms"] = {"p50": None, "p90": None, "p99": None, "samples": 0}
    document["pruned"]["latency_ci_ms"] = document["pruned"]["drift"] = None
    artifact.write_manifest(folder, document)
    found = api.validate(folder)
    assert found["same_device"] is True
    assert found["checks"][0]["value"] > 0


@pytest.mark.parametrize("name", sorted(FILES - {"manifest.json"}))
def test_one_changed_byte_is_noticed(artifacts: list[Path], tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(artifacts[0], tmp_path / "artifact"))
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    found = small.run("validate", folder, "--format", "json")
    assert found.code == errors.UsageError.exit_code
    assert name in found.document["error"]
    assert "build it again" in found.err
    assert "Traceback" not in found.err


def test_a_missing_file_and_no_artifact_at_all(artifacts: list[Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(artifacts[0], tmp_path / "artifact"))
    (folder / "model.onnx").unlink()
    found = small.run("validate", folder)
    assert (found.code, "model.onnx is missing" in found.err) == (errors.UsageError.exit_code, True)
    for command in ("validate", "report"):
        found = small.run(command, tmp_path)
        assert found.code == errors.UsageError.exit_code
        assert f"'{tmp_path}' is not an artifact" in found.err
    with pytest.raises(errors.UsageError, match=r"plan\.json has changed"):
        (folder / "plan.json").write_text((folder / "plan.json").read_text().replace('"heads":[', '"heads":[ ', 1))
        edgeprune.load(folder)


def test_the_readme_names_every_file_of_the_artifact(artifacts: list[Path]) -> None:
    readme = (config.shipped("models").parent / "README.md").read_text()
    for name in FILES:
        assert f"`{name}`" in readme


def test_a_table_is_measured_in_groups_where_memory_is_short(
    space: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each group turn by turn with the dense model; the table is of all of them."""
    monkeypatch.setattr(profile, "table_room", lambda free: 1e6)
    with small.quick():
        found = small.run(
            "profile", space.one, "--target", space.target, "--runtime", "onnxruntime", "--cache-dir", tmp_path, "--format", "json"
        )  # fmt: skip
    assert found.code == errors.PASSED, found.err
    said = re.search(r"the table's (\d+) models are measured in (\d+) groups", found.err)
    assert said and 1 < int(said[2]) < int(said[1])
    table = found.document["table"]
    assert table["stages"][0]["mlp_ms"] == sorted(table["stages"][0]["mlp_ms"])
    assert 0 < table["empty_ms"] < table["dense_ms"]


@pytest.mark.slow
def test_a_few_blocks_are_measured_and_speak_for_all(
    space: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table is of all blocks, and predicts plans of them; the few blocks of a large model are not large."""
    monkeypatch.setattr(shapes, "is_large", lambda sizes: sizes.blocks == 3)
    monkeypatch.setattr(shapes, "SHALLOW", 2)
    with small.quick():
        found = small.run(
            "profile", space.card, "--target", space.target, "--runtime", "onnxruntime", "--cache-dir", tmp_path,
            "--check", "4", "--format", "json",
        )  # fmt: skip
    assert found.code == errors.PASSED, found.err
    assert "in the first 2 of 3 blocks" in found.err
    table = found.document["table"]
    [stage] = table["stages"]
    assert stage["blocks"] == 3
    assert table["base_ms"] + 3 * (stage["attn_ms"][-1] + stage["mlp_ms"][-1]) == pytest.approx(
        table["dense_ms"], rel=0.3
    )
    with np.load(next(tmp_path.glob("profile-*/samples.npz"))) as samples:
        own, anchor = samples["shallow"]
        timed = {int(found[1]) for name in samples for found in [re.match(r"tokens(\d+)\.", name)] if found}
    assert timed == set(table["patches"][:-1]), "no number of patches that the table does not have"
    assert 0.2 < np.median(own / anchor) < 1.05, "two dense blocks beside the dense model of three"


@pytest.mark.slow
def test_gradual_prunes_the_tuned_model_further(space: Workspace, cache_copy: Path, tmp_path: Path) -> None:
    """The harder latency keeps a part of what the milder one kept, whatever their order on the command line."""
    asked = ["--gradual", "--latency", "45%", "--latency", "75%"]
    built = space.build(*asked, cache=cache_copy, out=tmp_path)
    assert built.code in (0, 1, 6), built.err
    mild, hard = (
        artifact.read_plan(next(tmp_path.glob(f"*-{text}")) / "plan.json").plan for text in ("75pct", "45pct")
    )
    for kept, still in zip(mild.blocks, hard.blocks, strict=True):
        assert set(still.heads) <= set(kept.heads) and set(still.neurons) <= set(kept.neurons)
    assert mild != hard
    assert built.err.index("finetune for 75%") < built.err.index("calibrate for 45%")
    after = space.build(*asked, "--dry-run", "--format", "json", cache=cache_copy, out=tmp_path)
    assert all(row["done"] for row in after.document), "the same command would do no work"
    assert [row["latency"] for row in after.document if row["stage"] == "calibrate"] == ["every latency", "45%"]
