"""python -m pytest tests/test_inspection.py

The numbers of the report: predictions, calibration, flips, corruptions, features, memory, energy, provenance.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgeprune import checks, corruptions, inspection, provenance
from edgeprune.latency import resources


def predictions(labels: list[int], dense: list[int], pruned: list[int], sure: float = 0.8) -> inspection.Predictions:
    n, right = len(labels), np.array([dense, pruned]) == np.array(labels)
    return inspection.Predictions(
        np.arange(n),
        np.array(labels),
        np.array([dense, pruned]),
        np.full((2, n), sure),
        np.where(right, sure, 1 - sure),
    )


class Oracle:
    """Stands in for the clock: logits by the first pixels of an image."""

    def predict(self, name: str, pixels: np.ndarray) -> np.ndarray:
        return pixels[:, :3] if name == "dense" else pixels[:, 3:]


def test_predictions_are_softmaxed_and_come_back_from_disk(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    batches = [(np.arange(n) + 10 * n, rng.normal(size=(n, 6)) * 50, rng.integers(0, 3, n)) for n in (4, 3)]
    clock: Any = Oracle()
    said = inspection.predictions(clock, "dense", "pruned", batches)
    logits = np.concatenate([pixels for _, pixels, _ in batches]).reshape(7, 2, 3).transpose(1, 0, 2)
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    assert np.array_equal(said.top, logits.argmax(-1))
    assert said.confidence == pytest.approx(shares.max(-1))
    assert said.likelihood == pytest.approx(np.stack([s[np.arange(7), said.labels] for s in shares]))
    assert said.places.tolist() == [40, 41, 42, 43, 30, 31, 32]
    assert checks.summary(said.answers).images == 7
    inspection.save({"a": said, "": inspection.joined([said, said])}, tmp_path / "answers.npz")
    back = inspection.load(tmp_path / "answers.npz")
    assert list(back) == ["a", ""]
    assert len(back[""].labels) == 14
    for name in vars(said):
        assert np.array_equal(getattr(back["a"], name), getattr(said, name))


def test_classes_and_flips() -> None:
    #                     lost  gained  both right  wrong otherwise  wrong alike
    said = predictions([0, 0, 1, 1, 1], [0, 1, 1, 0, 0], [1, 0, 1, 2, 0])
    assert [(row["name"], row["images"], row["dense"], row["pruned"]) for row in inspection.per_class(said, ["ant"])] == [
        ("ant", 2, 50.0, 50.0), ("1", 3, pytest.approx(100 / 3), pytest.approx(100 / 3)),
    ]  # fmt: skip
    found = inspection.flips(said, 5)
    assert (found["lost"], found["gained"], found["otherwise_wrong"]) == (1, 1, 1)
    assert found["examples"] == {"lost": [0], "gained": [1]}


def test_the_surest_flips_are_shown_first() -> None:
    said = predictions([0] * 4, [0] * 4, [1] * 4)
    said.confidence[0] = [0.5, 0.9, 0.7, 0.6]
    assert inspection.flips(said, 3)["examples"]["lost"] == [1, 2, 3]


def test_calibration_by_hand() -> None:
    """Always 80 % sure: right in 3 of 4 (dense), never (pruned)."""
    found = inspection.calibration(predictions([0] * 4, [0, 0, 0, 1], [1] * 4))
    assert found["dense"]["ece"] == pytest.approx(5.0)
    assert found["pruned"]["ece"] == pytest.approx(80.0)
    assert found["dense"]["brier"] == pytest.approx((3 * 0.04 + 0.64) / 4)
    assert found["pruned"]["nll"] == pytest.approx(-np.log(0.2))
    assert found["dense"]["bins"] == [{"confidence": pytest.approx(0.8), "accuracy": 0.75, "images": 4}]


def test_a_sure_model_has_a_last_bin() -> None:
    assert inspection.calibration(predictions([0], [0], [0], sure=1.0))["dense"]["bins"][0]["images"] == 1


def test_the_paired_drop() -> None:
    found = inspection.paired(np.array([1, 1, 1, 0]) > 0, np.array([1, 0, 1, 0]) > 0)
    assert (found["dense"], found["pruned"], found["drop"], found["images"]) == (75.0, 50.0, 25.0, 4)
    assert found["drop_ci"][0] < 0 < 25 < found["drop_ci"][1]
    alike = inspection.paired(np.ones(9, bool), np.ones(9, bool))
    assert alike["drop"] == 0 and alike["drop_ci"][0] < 0 < alike["drop_ci"][1], "none changed is no proof of none"


def test_angles() -> None:
    a = np.array([[1.0, 0.0], [0.0, 2.0]], np.float32)
    assert inspection.angles(a, a) == (pytest.approx(0.0, abs=1e-3), pytest.approx(1.0))
    assert inspection.angles(a, 3 * a[:, ::-1]) == (pytest.approx(90.0), pytest.approx(3.0))
    assert inspection.angles(a, 0 * a) == (pytest.approx(90.0), pytest.approx(0.0))


# Corruptions --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    """Smooth and coloured, with an edge."""
    x, y = np.meshgrid(np.linspace(0, 1, 60), np.linspace(0, 1, 48))
    return np.stack([200 * x, 40 + 150 * y, np.where(x > 0.5, 180, 60)], -1).astype(np.uint8)


@pytest.mark.parametrize("kind", corruptions.KINDS)
def test_a_corruption_grows_with_its_severity_and_is_the_same_again(kind: str, picture: np.ndarray) -> None:
    off = []
    for severity in range(1, 6):
        one, two = (corruptions.corrupt(kind, picture, np.random.default_rng(7), severity) for _ in range(2))
        assert (one.shape, one.dtype) == (picture.shape, np.uint8)
        assert np.array_equal(one, two)
        off.append(np.abs(one.astype(float) - picture).mean())
    assert off[0] > 0
    assert off[4] > 1.1 * off[0]
    # Small images may round two severities to the same length; none may be clearly milder than the one before.
    assert all(later > 0.85 * earlier for earlier, later in itertools.pairwise(off))


@pytest.mark.parametrize("kind", corruptions.KINDS)
@pytest.mark.parametrize("level", [0, 255])
def test_black_and_white_survive_every_corruption(kind: str, level: int) -> None:
    plain = np.full((9, 7, 3), level, np.uint8)
    assert corruptions.corrupt(kind, plain, np.random.default_rng(0), 5).shape == plain.shape


def test_what_keeps_the_mean_keeps_it(picture: np.ndarray) -> None:
    for kind in (
        "contrast",
        "pixelate",
        "motion blur",
        "defocus blur",
        "glass blur",
        "elastic transform",
        "gaussian noise",
    ):
        changed = corruptions.corrupt(kind, picture, np.random.default_rng(0), 2)
        assert changed.mean() == pytest.approx(picture.mean(), abs=6)


# Memory and energy --------------------------------------------------------------------------


def test_peak_memory_of_a_process() -> None:
    if resources.peak_bytes(os.getpid()) is None:
        pytest.skip("this system has no /proc/PID/status")
    peaks = []
    for megabytes in (1, 200):
        held = f"block = b'x' * ({megabytes} << 20); print(len(block), flush=True); input()"
        command = [sys.executable, "-c", held]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            process.stdout.readline()
            peaks.append(resources.peak_bytes(process.pid))
            process.communicate("\n")
    small, large = peaks
    assert small is not None and large is not None
    assert 190 << 20 < large - small < 230 << 20


def test_peak_memory_that_is_not_shown(tmp_path: Path) -> None:
    assert resources.peak_bytes(1, tmp_path) is None


def powercap(root: Path, microjoules: int, limit: int = 1000) -> Path:
    for zone in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0", "intel-rapl"):
        (root / zone).mkdir(exist_ok=True, parents=True)
        (root / zone / "energy_uj").write_text(f"{microjoules}\n")
        (root / zone / "max_energy_range_uj").write_text(f"{limit}\n")
    return root


def test_energy_of_all_packages_and_a_counter_that_starts_again(tmp_path: Path) -> None:
    before = resources.microjoules(powercap(tmp_path, 900))
    assert before == {"intel-rapl:0": (900, 1000), "intel-rapl:1": (900, 1000)}
    after = resources.microjoules(powercap(tmp_path, 99))
    assert after is not None
    assert resources.spent_joules(before, after) == pytest.approx(2 * 200e-6)


def test_energy_that_cannot_be_read(tmp_path: Path) -> None:
    assert resources.microjoules(tmp_path / "nowhere") is None
    assert resources.microjoules(tmp_path) is None
    (powercap(tmp_path, 1) / "intel-rapl:1" / "energy_uj").write_text("")
    assert resources.microjoules(tmp_path) is None


# Provenance ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    digest = hashlib.sha256(b"model").hexdigest()
    names = (
        "model",
        "architecture",
        "target",
        "method",
        "criterion",
        "allocator",
        "schedule",
        "recovery",
        "reducer",
        "precision",
        "runtime",
    )
    return {
        **dict.fromkeys(names, "x"), "dims": ["heads"], "request": {"latency": "2x", "latency_ms": 1.5, "max_drop": None}, "seed": 3, "threads": 2,
        "key": "0" * 64, "environment": {"edgeprune": "0.1", "python": "3.11"}, "files": {"model.onnx": {"sha256": digest, "bytes": 5}},
    }  # fmt: skip


def test_the_statement_is_in_toto_with_slsa(manifest: dict[str, Any]) -> None:
    found = json.loads(provenance.statement(manifest, {"dense.safetensors": "1" * 64}))
    assert found["_type"] == "https://in-toto.io/Statement/v1"
    assert found["predicateType"] == "https://slsa.dev/provenance/v1"
    assert found["subject"] == [{"name": "model.onnx", "digest": {"sha256": manifest["files"]["model.onnx"]["sha256"]}}]
    definition = found["predicate"]["buildDefinition"]
    assert definition["externalParameters"]["request"]["latency"] == "2x"
    assert definition["externalParameters"]["seed"] == 3
    assert definition["resolvedDependencies"][0] == {"name": "dense.safetensors", "digest": {"sha256": "1" * 64}}
    assert f"pkg:pypi/numpy@{np.__version__}" in {d.get("uri") for d in definition["resolvedDependencies"]}
    assert set(found["predicate"]["runDetails"]) >= {"builder", "metadata"}


def test_a_statement_about_nothing_is_refused(manifest: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="subject"):
        provenance.statement({**manifest, "files": {}}, {})


def test_the_bill_of_materials_is_cyclonedx(manifest: dict[str, Any]) -> None:
    found = json.loads(provenance.sbom(manifest))
    assert (found["bomFormat"], found["specVersion"]) == ("CycloneDX", "1.6")
    components = {c["name"]: c for c in found["components"]}
    assert {"edgeprune", "numpy", "torch", "onnx", "timm", "python"} <= set(components)
    assert components["numpy"]["version"] == np.__version__
    assert components["numpy"]["purl"] == f"pkg:pypi/numpy@{np.__version__}"
    assert not {"pytest", "ruff", "mypy"} & set(components), "tools of development are no materials"
    references = {c["bom-ref"] for c in found["components"]} | {found["metadata"]["component"]["bom-ref"]}
    for dependency in found["dependencies"]:
        assert {dependency["ref"], *dependency.get("dependsOn", ())} <= references
    needed = {d["ref"]: d.get("dependsOn", []) for d in found["dependencies"]}
    assert components["numpy"]["bom-ref"] in needed[components["onnxruntime"]["bom-ref"]]
    assert json.loads(provenance.sbom(manifest))["serialNumber"] == found["serialNumber"]


# Thumbnails ---------------------------------------------------------------------------------


def test_a_thumbnail_is_the_image_as_the_model_sees_it() -> None:
    import base64

    from edgeprune.compat import create_transform
    from edgeprune.data import Images
    from edgeprune.stages import inspect

    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    config = {
        "input_size": (3, 64, 64),
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.3, 0.4),
        "interpolation": "bicubic",
        "crop_pct": 1.0,
    }
    images = Images([(Image.fromarray(pixels), 0)], np.array([0]), create_transform(**config), "test")
    head, _, code = inspect.thumbnail(images, 0, config).partition(",")
    assert head == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(code))) as shown:
        assert np.array_equal(np.asarray(shown), pixels)
