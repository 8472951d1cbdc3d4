"""python -m pytest tests/test_docs.py

What the documentation says is what the program does.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from update_readme import block, blocks, commands, updated

from edgeprune import config, criteria, errors, families, methods, modules, report
from edgeprune.config import ModelSpec, tomllib
from edgeprune.types import Target

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CARDS, HOW = ((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("cards", "how"))
REFERENCE = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
SCHEMA = json.loads((Path(report.__file__).parent / "manifest.schema.json").read_text(encoding="utf-8"))
COMMANDS = dict(commands())


def manifest_errors(document: Any) -> list[str]:
    """What is wrong with a manifest, by place."""
    found = jsonschema.Draft202012Validator(SCHEMA).iter_errors(document)
    return [f"{error.json_path}: {error.message}" for error in found]


def fenced(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


# Commands -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_is_documented(name: str) -> None:
    assert name == "edgeprune" or f"| `{name}` |" in README
    for parameter in COMMANDS[name].command.params:
        for option in [o for o in parameter.opts if o.startswith("--")]:
            assert re.search(rf"{option}\b", REFERENCE), f"{name} {option}"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_reference_has_the_exact_help(name: str) -> None:
    """`python tests/update_readme.py` writes it."""
    pinned = re.search(r"^click==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned, "constraints.txt pins no click"
    if importlib.metadata.version("click") != pinned[1]:
        pytest.skip("another click lays out its help differently")
    assert blocks(REFERENCE).get(name) == block(COMMANDS[name]), "run: python tests/update_readme.py"


def test_no_help_of_a_command_that_is_gone_is_left() -> None:
    assert set(blocks(REFERENCE)) <= set(COMMANDS)
    assert set(re.findall(r"^\| `(edgeprune [a-z ]+)` \|", README, re.MULTILINE)) <= set(COMMANDS)


def test_update_readme_writes_every_block_and_nothing_else() -> None:
    text = "before\n<!-- help:edgeprune -->\nold\n<!-- end -->\nafter\n"
    new = updated(text)
    assert blocks(new) == {name: block(context) for name, context in COMMANDS.items()}
    assert new.startswith("before\n<!-- help:edgeprune -->\n")
    assert new.endswith("<!-- end -->\nafter\n")
    assert "old" not in blocks(new)["edgeprune"].splitlines()
    assert updated(new) == new


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_what_it_does(name: str) -> None:
    assert COMMANDS[name].command.help
    for parameter in COMMANDS[name].command.params:
        if parameter.param_type_name == "option":
            assert getattr(parameter, "help", None), f"{name} {parameter.name} has no help"


def test_every_exit_code_is_documented() -> None:
    kinds = [errors.EdgepruneError, *errors.EdgepruneError.__subclasses__()]
    codes = {kind.exit_code for kind in kinds}
    codes |= {errors.PASSED, errors.GATE_FAILED, errors.INCONCLUSIVE, errors.INTERRUPTED}
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", README, re.MULTILINE)}
    assert documented == codes
    text = COMMANDS["edgeprune"].command.help or ""
    assert {int(code) for code in re.findall(r"\b(\d+) ", text.partition("Exit codes:")[2])} == codes


# Cards and targets --------------------------------------------------------------------------


def example(cls: type) -> dict[str, Any]:
    """The TOML block of docs/cards.md that is a card or a target."""
    [table] = [t for t in map(tomllib.loads, fenced(CARDS, "toml")) if ("machine" in t) == (cls is Target)]
    config.parse(cls, {"name": "example", **table}, "cards.md")
    return table


def keys(cls: type) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}


def test_every_key_of_a_target_is_documented() -> None:
    assert set(example(Target)) == keys(Target) - {"name"}, "a target's name is its file's"


def test_every_key_of_a_card_is_documented() -> None:
    table = example(ModelSpec)
    # [train] has the keys of [finetune]; a card's name is its file's
    assert set(table) | {"train", "name"} == keys(ModelSpec)
    assert "[train]" in CARDS
    for name, cls in (
        ("data", config.DataSpec), ("transforms", config.TransformSpec),
        ("calibration", config.CalibrationSpec), ("finetune", config.Recipe),
        ("features", config.FeaturesSpec), ("deploy", config.DeploySpec),
    ):  # fmt: skip
        assert set(table[name]) == keys(cls)


def test_the_documented_card_has_the_defaults() -> None:
    table, made = example(ModelSpec), config.parse(ModelSpec, {"name": "example", **example(ModelSpec)}, "cards.md")
    for name in ("calibration", "features", "deploy", "finetune"):
        assert getattr(made, name) == type(getattr(made, name))(), f"[{name}] {table[name]}"


def test_every_part_that_a_card_may_name_is_documented() -> None:
    for part in {**families.MODEL_PARTS, **families.BLOCK_PARTS}:
        assert f"`{part}`" in CARDS


@pytest.mark.parametrize("kind", ["models", "targets"])
def test_every_shipped_file_is_listed(kind: str) -> None:
    import small

    listed = small.run(kind)
    assert listed.code == errors.PASSED
    names = config.names(kind)
    assert names
    assert [line.split()[0] for line in listed.out.strip().splitlines()] == names
    for name in names:
        shown = small.run(kind, "show", name)
        assert shown.code == errors.PASSED
        assert tomllib.loads(shown.out) == config.read_toml(config.shipped(kind) / f"{name}.toml")


@pytest.mark.parametrize("name", config.names("models"))
def test_the_readme_names_every_shipped_card(name: str) -> None:
    assert f"`{name}`" in README


@pytest.mark.parametrize("name", config.names("targets"))
def test_the_readme_names_every_shipped_target(name: str) -> None:
    assert re.search(rf"\b{name}\b(?!-)", README)


def test_methods_lists_every_method_and_part() -> None:
    import small

    listed = small.run("methods")
    assert listed.code == errors.PASSED
    for method in methods.METHODS:
        assert re.search(
            rf"^{method.name}\s+{method.kind}\s+{method.criterion}\s+{method.allocator}\s", listed.out, re.MULTILINE
        )
    for kind in modules.PACKAGES:
        for name in modules.names(kind):
            assert re.search(rf"^  {name}\s+\S+", listed.out, re.MULTILINE)
            described = small.run("methods", name)
            assert described.code == errors.PASSED
            assert modules.doc(kind, name).split("\n")[0] in described.out


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:[a-z_]+/)*[a-z_]+(?:\.py|/))`", README + HOW))))
def test_the_file_map_is_true(path: str) -> None:
    assert (ROOT / "edgeprune" / path).exists() or (ROOT / path).exists()


def test_the_stages_are_listed_in_order() -> None:
    from edgeprune.pipeline import PIPELINE

    named = re.findall(r"^\| (\w+) \| .* \| `stages/(\w+)\.py`", HOW, re.MULTILINE)
    assert named == [(stage.name, stage.name) for stage in PIPELINE]


# Contributing -------------------------------------------------------------------------------


@pytest.fixture
def criterion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """CONTRIBUTING's criterion as a module beside the others; its name."""
    [code] = [text for text in fenced(CONTRIBUTING, "python") if "def score" in text]
    said = re.search(r"Save this as `edgeprune/criteria/(\w+)\.py`, and `--criterion (\w+)` works", CONTRIBUTING)
    assert said is not None
    assert said[1] == said[2]
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    (tmp_path / f"{said[1]}.py").write_text(code)
    monkeypatch.setattr(criteria, "__path__", [*criteria.__path__, str(tmp_path)])
    yield said[1]
    sys.modules.pop(f"edgeprune.criteria.{said[1]}", None)


def test_the_criterion_of_contributing_runs(criterion: str, make_vit: Callable[..., Any]) -> None:
    import parts

    assert criterion in criteria.names()
    given, _ = parts.evidence(make_vit(), criterion)
    for level in criteria.score(criteria.get(criterion), given):
        units = given.sizes.units(level.at)
        assert sorted(level.order.tolist()) == list(range(units))
        assert level.errors.shape == (units + 1,)
        assert level.errors[0] == 0
        assert (np.diff(level.errors) >= 0).all()
        assert level.errors[-1] > 0


# The manifest's schema ----------------------------------------------------------------------


def test_the_schema_is_a_schema() -> None:
    from edgeprune.artifact import MANIFEST_SCHEMA

    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["properties"]["schema"]["const"] == SCHEMA["$id"] == MANIFEST_SCHEMA


OPTIONAL = {
    "domains",
    "selection",
    "features",
    "input",
    "weights",
    "class_names",
    "image_size",
    "int8",
}  # of a manifest: where the build had them


def test_the_schema_requires_what_it_names() -> None:
    """Strict throughout: an object whose keys are fixed allows no others."""

    def walk(node: Any, where: str) -> None:
        if not isinstance(node, dict):
            return
        if "properties" in node:
            assert "additionalProperties" in node or where.endswith("preprocessing"), where
            assert set(node["required"]) >= set(node["properties"]) - (OPTIONAL if not where else set()), where
        for name, child in node.get("properties", {}).items():
            walk(child, f"{where}/{name}")
        walk(node.get("items"), f"{where}[]")
        walk(node.get("additionalProperties"), f"{where}/*")

    walk({**SCHEMA, "required": [*SCHEMA["required"]]}, "")


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    """A manifest by hand, as small as the schema allows."""
    digest = "0" * 64
    latency = {"p50": 1.0, "p90": None, "p99": None, "samples": 100}
    return {
        "schema": "edgeprune.manifest/1", "key": digest, "model": "digits", "architecture": "vit", "target": "cpu",
        "request": {
            "latency": "2x", "latency_ms": 1.0, "quantile": "p50", "max_drop": None, "epochs": [1.0], "search_seconds": None,
            "polish": 0, "gradual": False,
        },
        "runtime": "onnxruntime", "entry": "model.onnx", "precision": "fp32", "threads": 1, "method": "edgeprune", "criterion": "fisher", "allocator": "search", "schedule": "one-shot", "recovery": "refit",
        "dims": ["heads"], "reducer": "cls",
        "dense": {"accuracy": 97.0, "latency_ms": {"p50": 2.0, "p90": 2.1}, "params": 10, "macs": 10},
        "pruned": {
            "accuracy": 96.0, "latency_ms": latency, "latency_ci_ms": [0.9, 1.1], "predicted_ms": 1.0, "ratio": 0.5,
            "drift": -0.1, "params": 5, "macs": 5,
        },
        "accuracy": {"dense": 97.0, "pruned": 96.0, "drop_ci": [-1.0, 1.0], "agreement": 99.0, "images": 100},
        "checks": [{"name": "latency p50", "value": 1.0, "limit": 1.0, "verdict": "pass", "reason": "so"}],
        "data": {"source": "digits", "train": 1, "calibration": 1, "evaluation": 1, "seed": 0, "unreadable": []},
        "preprocessing": {
            "input_size": [3, 32, 32], "mean": [0.5], "std": [0.5], "interpolation": "bicubic", "crop_pct": 1.0,
        },
        "classes": ["a"], "shape": [[1, 2]],
        "export": {"max_error": 0.0, "agreement": 1.0, "images": 1, "opset": 20, "ties": 0},
        "worker": {
            "runtime": "onnxruntime", "version": "1", "precision": "fp32", "threads": 1, "max_isa": "", "python": "3",
            "machine": "x", "pid": 1,
        },
        "device": {"system": "Linux", "machine": "x", "cpu": "x", "flags": "", "cpus": 1},
        "environment": {
            "edgeprune": "0", "code": "0" * 16, "python": "3", "system": "Linux",
            "device": {"system": "Linux", "machine": "x", "cpu": "x", "flags": "", "cpus": 1}, "versions": {},
        },
        "provenance": {"statement": "provenance.json", "sbom": "sbom.cdx.json"},
        "seed": 0, "stages": [{"name": "baseline", "seconds": 0.0, "cached": False}],
        "files": {
            name: {"sha256": digest, "bytes": 1}
            for name in ("plan.json", "model.safetensors", "model.onnx", "profile.json", "anchor.onnx.gz", "report.md", "report.html", "report.json", "provenance.json", "sbom.cdx.json")
        },
        "sha256": digest,
    }  # fmt: skip


def test_the_schema_accepts_a_manifest(manifest: dict[str, Any]) -> None:
    assert manifest_errors(manifest) == []


def test_the_report_says_whether_int8_pays(manifest: dict[str, Any]) -> None:
    from edgeprune import report

    assert "int8" not in report.method(manifest)
    with_int8 = {**manifest, "int8": {"attn": 1.27, "mlp": 0.61}}
    assert manifest_errors(with_int8) == []
    said = "int8 was measured at 127% of fp32's time in attention and 61% in MLPs:"
    assert f"{said} no sub-blocks have it" in report.method(with_int8)
    assert f"{said} 2 sub-blocks have it" in report.method({**with_int8, "shape": [[1, 2, 0, 3], [1, 2]]})


def test_the_schema_accepts_domains_and_a_selection(manifest: dict[str, Any]) -> None:
    facts = {"images": 5, "dense": 60.0, "dense_ci": [20.0, 90.0], "pruned": 40.0, "pruned_ci": [10.0, 80.0]}
    domains = [{"name": "photo", "held_out": False, **facts}, {"name": "sketch", "held_out": True, **facts}]
    full = {**manifest, "domains": domains, "selection": {"name": "density", "tune_on": 0.5}}
    assert manifest_errors(full) == []
    assert len(manifest_errors({**full, "domains": domains[:1]})) == 1
    assert len(manifest_errors({**full, "selection": {"name": "density", "tune_on": 0}})) == 1


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("schema", "edgeprune.manifest/2"),
        ("extra", 1),
        ("request.latency", "10"),
        ("request.latency_ms", 0),
        ("request.quantile", "p95"),
        ("pruned.latency_ms.samples", -1),
        ("pruned.latency_ms.p50", "1 ms"),
        ("pruned.latency_ci_ms", [1.0]),
        ("pruned.ratio", 0),
        ("pruned.extra", 1),
        ("dense.accuracy", 100.5),
        ("checks", []),
        ("checks.0.verdict", "maybe"),
        ("shape.0", [1]),
        ("export.agreement", 99.0),
        ("files.sub/model.onnx", {"sha256": "0" * 64, "bytes": 1}),
        ("files.report.md.sha256", "abc"),
        ("stages.0.seconds", -1),
        ("threads", 0),
    ],
)
def test_the_schema_refuses(manifest: dict[str, Any], path: str, value: Any) -> None:
    changed = json.loads(json.dumps(manifest))
    parts: list[Any] = [int(p) if p.isdigit() else p for p in re.split(r"\.(?!onnx|md)", path)]
    node = changed
    for part in parts[:-1]:
        node = node[part]
    node[parts[-1]] = value
    assert len(manifest_errors(changed)) == 1


@pytest.mark.parametrize("key", SCHEMA["required"])
def test_the_schema_misses_every_key(manifest: dict[str, Any], key: str) -> None:
    assert len(manifest_errors({k: v for k, v in manifest.items() if k != key})) == 1
