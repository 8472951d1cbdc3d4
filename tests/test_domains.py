"""python -m pytest tests/test_domains.py

Data sets with domains, of which one is held out: DIR/<domain>/<class>/*.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import small
import torch
from test_benchmarks import script
from test_docs import manifest_errors

from edgeprune import api, checks, config, criteria, data, images, inspection, pipeline, report, vit
from edgeprune.config import CalibrationSpec, DataSpec, ModelSpec
from edgeprune.errors import UsageError

CONFIG: dict[str, Any] = {
    "input_size": (3, 32, 32), "interpolation": "bilinear", "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0,
}  # fmt: skip
DOMAINS = ("photo", "sketch", "cartoon")


@pytest.fixture
def folder(image_folder: Callable[..., Path]) -> Path:
    """3 domains of 2 classes with 10 images each."""
    return image_folder(DOMAINS, per_class=10)


def splits(where: Path, held_out: str = "sketch", seed: int = 0) -> data.Splits:
    spec = ModelSpec("test", "", "vit", 2, DataSpec("folder", str(where), held_out_domain=held_out))
    return data.load_splits(replace(spec, calibration=CalibrationSpec(4)), CONFIG, seed)


def files(part: data.Images) -> list[Path]:
    return [Path(part.source.reader.filename(int(i), absolute=True)) for i in part.indices]


def domains(part: data.Images, where: Path) -> list[str]:
    return [path.relative_to(where).parts[0] for path in files(part)]


# Splits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("held_out", DOMAINS)
def test_the_held_out_domain_is_only_judged(folder: Path, held_out: str) -> None:
    found = splits(folder, held_out)
    seen = sorted(set(DOMAINS) - {held_out})
    for part in (found.train, found.calibration, found.evaluation):
        assert set(domains(part, folder)) <= set(seen)
    assert (len(found.train), len(found.calibration), len(found.evaluation)) == (28, 4, 8)
    assert list(found.domains) == [*seen, held_out]
    assert [len(part) for part in found.domains.values()] == [4, 4, 20]
    assert all(set(domains(part, folder)) == {name} for name, part in found.domains.items())
    everything = [path for part in (found.train, found.calibration, *found.domains.values()) for path in files(part)]
    assert len(everything) == len(set(everything)) == 60
    judged = [path for name in seen for path in files(found.domains[name])]
    assert judged == files(found.evaluation)
    assert found.classes == ("ant", "bee") and found.source.endswith(f"without domain '{held_out}' (divided 80:20)")
    assert found.facts["evaluation"] == 8


def test_the_division_is_drawn_by_the_seed(folder: Path) -> None:
    first, again, other = splits(folder), splits(folder), splits(folder, seed=1)
    for part in ("train", "calibration", "evaluation"):
        assert files(getattr(first, part)) == files(getattr(again, part)) != files(getattr(other, part))


def test_labels_are_those_of_the_class_folders(folder: Path) -> None:
    found = splits(folder)
    for part in (found.train, *found.domains.values()):
        assert [found.classes[part[i][1]] for i in range(len(part))] == [path.parent.name for path in files(part)]


def test_a_folder_without_a_held_out_domain_is_read_as_ever(image_folder: Callable[..., Path]) -> None:
    found = splits(image_folder(("train", "validation")), "")
    assert found.domains == {} and len(found.evaluation) == 16


def test_an_unreadable_image_of_the_held_out_domain_is_named(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    where = image_folder(DOMAINS, per_class=101, size=8)
    bad = where / "sketch" / "bee" / "sketch-bee-7.png"
    bad.write_bytes(b"no image")
    found = splits(where)
    assert sum(len(labels) for _, labels in found.domains["sketch"].batches(64)) == 201
    from edgeprune.console import SILENT

    found.report(tmp_path, SILENT)
    assert json.loads((tmp_path / "unreadable.json").read_text()) == [str(bad)]


# Refusals -----------------------------------------------------------------------------------


def test_an_unknown_domain(folder: Path) -> None:
    with pytest.raises(UsageError, match="unknown domain 'skech'; did you mean 'sketch'"):
        splits(folder, "skech")


def test_a_domain_with_other_classes(folder: Path, image_folder: Callable[..., Path]) -> None:
    image_folder(("cartoon",), classes=("wasp",), per_class=2)
    says = r"the domain 'cartoon' has other classes than 'photo' \(wasp\); all domains need the same"
    with pytest.raises(UsageError, match=says):
        splits(folder)
    shutil.rmtree(folder / "cartoon" / "wasp")
    shutil.rmtree(folder / "sketch" / "bee")
    with pytest.raises(UsageError, match=r"the domain 'sketch' has other classes than 'cartoon' \(bee\)"):
        splits(folder)


def test_fewer_than_two_domains(image_folder: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match=r"has one domain only \(photo\); holding one out needs two"):
        splits(image_folder(("photo",)), "photo")


def test_images_that_are_in_no_domain(image_folder: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match=r"lies in no class of a domain; domains are read as DIR/<domain>/<class>"):
        splits(image_folder(("",)))


def test_a_domain_too_small_to_keep_a_fifth_back(image_folder: Callable[..., Path]) -> None:
    image_folder(("photo", "sketch"))
    with pytest.raises(UsageError, match="the domain 'tiny' has fewer than 5 images"):
        splits(image_folder(("tiny",), per_class=2))


@pytest.mark.parametrize("where", ["", "/nowhere/at/all"])
def test_no_folder(where: str) -> None:
    with pytest.raises(UsageError, match="--data-dir"):
        splits(Path(where) if where else "")  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, {"data": "digits"}, {"data": "torch/cifar10", "data_dir": "/tmp"}])
def test_only_folders_have_domains(options: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=r"'sketch' cannot be held out .* give --data folder --data-dir DIR"):
        api.request("digits", target="cpu-avx2", latency="2x", held_out_domain="sketch", **options)


def test_the_option_reaches_the_card_and_the_cache_keys(folder: Path) -> None:
    made = [
        api.request("digits", target="cpu-avx2", latency="2x", data_dir=folder, held_out_domain=name)[0]
        for name in ("", "sketch", "photo")
    ]
    assert [one.card.data for one in made] == [
        DataSpec("folder", str(folder), held_out_domain=name) for name in ("", "sketch", "photo")
    ]
    assert len({pipeline.stage_key(pipeline.PIPELINE[0], one, {}) for one in made}) == 3


# Accuracy by domain -------------------------------------------------------------------------


class Oracle:
    """Stands in for the clock: says what is asked of each model, by the first pixel of an image."""

    def predict(self, name: str, pixels: np.ndarray) -> np.ndarray:
        said = pixels[:, 0].astype(int) if name == "dense" else pixels[:, 1].astype(int)
        return np.eye(3)[said]


def test_the_parts_make_the_whole() -> None:
    rng = np.random.default_rng(0)
    batches = [(np.arange(n), rng.integers(0, 3, (n, 2)), rng.integers(0, 3, n)) for n in (7, 5, 9)]
    clock: Any = Oracle()
    whole = checks.summary(inspection.predictions(clock, "dense", "pruned", batches).answers)
    parts = [inspection.predictions(clock, "dense", "pruned", [batch]).answers for batch in batches]
    assert checks.summary(*parts) == whole
    said, truth = np.concatenate([x for _, x, _ in batches]), np.concatenate([y for _, _, y in batches])
    assert whole.dense == pytest.approx(100 * (said[:, 0] == truth).mean())
    assert whole.agreement == pytest.approx(100 * (said[:, 0] == said[:, 1]).mean())
    assert whole.images == 21


def test_facts_of_a_domain() -> None:
    right = np.arange(10) < 8
    facts = checks.domain_facts("sketch", (right, ~right, right), held_out=True)
    assert (facts["dense"], facts["pruned"], facts["images"], facts["held_out"]) == (80.0, 20.0, 10, True)
    assert facts["dense_ci"] == checks.wilson(8, 10) and facts["pruned_ci"] == checks.wilson(2, 10)


def test_the_report_has_a_line_per_domain() -> None:
    right = np.arange(10) < 8
    facts = [checks.domain_facts(name, (right, right, right), held_out=name == "b") for name in "ab"]
    lines = report.domains({"domains": facts})
    assert lines[2:] == [
        "| a | 10 | 80.00 %, 49.02 to 94.33 | 80.00 %, 49.02 to 94.33 |",
        "| b (held out: never trained on) | 10 | 80.00 %, 49.02 to 94.33 | 80.00 %, 49.02 to 94.33 |",
        "",
    ]
    assert report.domains({}) == []


def test_a_device_without_torch_judges_the_same_images(folder: Path) -> None:
    built = splits(folder, seed=3)
    recorded = {
        "classes": ["ant", "bee"], "data": {"source": built.source, "evaluation": 8, "seed": 3},
        "domains": [{"name": name, "held_out": name == "sketch"} for name in built.domains],
    }  # fmt: skip
    found = images.for_artifact(recorded, "", str(folder))
    assert found is not None
    assert found.names == [str(path) for path in files(built.evaluation)]
    assert found.source.endswith("without domain 'sketch' (divided 80:20)")
    other = images.for_artifact(recorded, "", str(folder / "sketch"))
    assert other is not None and len(other) == 20 and "divided" not in other.source


# The benchmark ------------------------------------------------------------------------------


@pytest.fixture
def bench() -> ModuleType:
    return script("domains")


def test_made_domains_are_a_data_set(bench: ModuleType, tmp_path: Path) -> None:
    where = bench.make_domains(tmp_path / "a", 200)
    assert sorted(path.name for path in where.iterdir()) == sorted(bench.STYLES)
    found = splits(where, "noisy")
    assert len(found.classes) == 10 and len(found.domains["noisy"]) == 50
    names = [path.name for path in where.rglob("*.png")]
    assert len(names) == len(set(names)) == 200, "no digit is in two domains"
    again = bench.make_domains(tmp_path / "b", 200)
    for path in where.rglob("*.png"):
        assert path.read_bytes() == (again / path.relative_to(where)).read_bytes()


def test_styles_differ(bench: ModuleType) -> None:
    pixels = images.Digits().pixels[5]
    made = {
        name: np.asarray(bench.draw(pixels, name, np.random.default_rng(0)), dtype=int) for name in bench.STYLES
    }  # fmt: skip
    assert (made["clean"] + made["inverted"] == 255).all()
    assert made["noisy"].min() >= 0 and made["noisy"].mean() > made["clean"].mean()
    assert made["clean"].std(axis=2).max() == 0 < made["coloured"].std(axis=2).min()


@pytest.mark.parametrize("removed", [0.0, 0.3, 0.5, 0.75, 0.95])
def test_what_is_removed_is_what_was_asked_for(bench: ModuleType, removed: float) -> None:
    model = vit.create(bench.CARD.architecture, bench.CARD.kwargs, 10)
    heads, neurons, really = bench.uniform(model, removed)
    sizes = vit.anatomy(model)
    assert really == pytest.approx(removed, abs=0.002)
    small = vit.slice_model(model, vit.plan_of_shape(((heads, neurons),) * sizes.blocks))
    dense, empty = (vit.parameters(vit.slice_model(model, vit.plan_of_shape((shape,) * sizes.blocks))) for shape in
                    ((sizes.only.heads, sizes.only.neurons), (0, 0)))  # fmt: skip
    empty += sizes.blocks * 4 * sizes.only.width  # norms go only with sub-blocks that go entirely, and are not prunable
    gone = (dense - vit.parameters(small)) / (dense - empty)
    assert gone == pytest.approx(really, abs=1e-6)


def test_one_head_stays(bench: ModuleType, tiny_vit: Any) -> None:
    heads, neurons, really = bench.uniform(tiny_vit, 0.95)
    assert (heads, neurons) == (1, 0) and 0.5 < really < 0.95


def test_the_benchmark_runs(
    bench: ModuleType, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """On two classes and one tiny block: every row, of every domain left out."""
    card = replace(
        bench.QUICK, num_classes=2, kwargs={**bench.QUICK.kwargs, "patch_size": 16, "depth": 1},
        calibration=CalibrationSpec(8, 8), train=replace(bench.QUICK.train, epochs=(1.0,)),
    )  # fmt: skip
    monkeypatch.setattr(bench, "CARD", card)
    names = [name for name in bench.CRITERIA.split(",") if name in criteria.names()] or ["magnitude"]
    results = tmp_path / "rows.jsonl"
    with torch.random.fork_rng():
        bench.main(["--data-dir", str(folder), "--criteria", ",".join(names), "--removed", "50,75", "--steps", "2",
                    "--results", str(results)])  # fmt: skip
    found = [json.loads(line) for line in results.read_text().splitlines()]
    assert [row["held_out"] for row in found] == [name for name in sorted(DOMAINS) for _ in range(1 + 2 * len(names))]
    for row in found:
        assert 0 <= row["unseen"] <= 100 and row["unseen_ci"][0] <= row["unseen"] <= row["unseen_ci"][1]
    assert len({(row["asked"], row["parameters"]) for row in found}) == 3, "all criteria keep the same sizes"
    out = capsys.readouterr().out
    assert out.startswith(bench.HEADING) and out.count("| dense |") == 4 and f"| {names[0]} | 75 % |" in out


def test_a_wrong_criterion_is_said_before_anything_is_trained(bench: ModuleType, folder: Path) -> None:
    with pytest.raises(UsageError, match="unknown criterion 'magnitud'"):
        bench.main(["--data-dir", str(folder), "--criteria", "magnitud"])


# A build ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_build_with_a_held_out_domain_and_a_selection(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, image_folder: Callable[..., Path]
) -> None:
    """Everything that it says of domains, and the same images again without torch."""
    where = image_folder(DOMAINS, per_class=30)
    space = small.workspace(tmp_path_factory.getbasetemp())
    small.random_weights(tmp_path / "two.safetensors", 2, depth=1, num_heads=1)
    card = tmp_path / "two.toml"
    text = small.ONE.replace("one.safetensors", "two.safetensors").replace("num_classes = 10", "num_classes = 2")
    card.write_text(text.replace("images = 64", "images = 32"))
    out = tmp_path / "artifacts"
    built = space.build(
        "--data", "folder", "--data-dir", where, "--held-out-domain", "sketch", "--selection", "density",
        "--tune-on", "0.5", "--method", "global-magnitude", "--latency", "70%", "--max-drop", "100", "--format", "json",
        card=card, out=out, cache=tmp_path / "cache",
    )  # fmt: skip
    assert built.code in (0, 1, 6), built.err
    [artifact] = built.document["artifacts"]
    manifest = artifact["manifest"]
    assert manifest_errors(manifest) == []
    assert manifest["selection"] == {"name": "density", "tune_on": 0.5}
    assert (manifest["data"]["calibration"], manifest["data"]["train"], manifest["data"]["evaluation"]) == (32, 32, 24)
    assert [(d["name"], d["held_out"], d["images"]) for d in manifest["domains"]] == [
        ("cartoon", False, 12), ("photo", False, 12), ("sketch", True, 60),
    ]  # fmt: skip
    assert manifest["accuracy"]["images"] == 24
    for which in ("dense", "pruned"):
        seen = sum(d[which] * d["images"] for d in manifest["domains"] if not d["held_out"]) / 24
        assert manifest["accuracy"][which] == pytest.approx(seen)
    text = (Path(artifact["path"]) / "report.md").read_text()
    assert "| sketch (held out: never trained on) | 60 |" in text
    again = images.for_artifact(manifest, "", str(where))
    assert again is not None and len(again) == 24
    assert "domain 'sketch', held out: " in built.err and "selection 'density': 32 images to calibrate on" in built.err
    assert config.load_card(str(card)).data.held_out_domain == ""
