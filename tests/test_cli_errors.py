"""python -m pytest tests/test_cli_errors.py

Every refusal of the command line: the exit code of the contract, one sentence that names what is wrong and what to do,
no traceback, and one JSON document where JSON was asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small
from small import Result, Workspace
from test_docs import manifest  # noqa: F401  a fixture

from edgeprune import api, cli, config, errors, pipeline
from edgeprune import artifact as artifacts
from edgeprune.config import tomllib

USAGE, TARGET, INFEASIBLE, STORAGE = (
    kind.exit_code for kind in (errors.UsageError, errors.TargetUnavailable, errors.Infeasible, errors.StorageError)
)


def refused(result: Result, code: int, *says: str) -> str:
    """Check a refusal of a quiet command; returns its sentence."""
    assert result.code == code, f"{result.code}, not {code}: {result.err}"
    assert "Traceback" not in result.err + result.out
    lines = [
        line
        for line in result.err.strip().splitlines()
        if not line.strip().startswith("warning: the dense model names")
    ]
    assert len(lines) == 1, f"not one sentence but {len(lines)} lines: {result.err}"
    assert lines[0].startswith("edgeprune: ")
    for part in says:
        assert part in lines[0]
    return lines[0]


def check(command: list[Any], code: int, *says: str) -> None:
    """The command is refused, quietly, in text and in JSON."""
    text = small.run(*command, "-q")
    sentence = refused(text, code, *says)
    assert text.out == ""
    found = small.run(*command, "-q", "--format", "json")
    assert found.document == {"exit_code": code, "error": sentence.removeprefix("edgeprune: ")}
    assert found.code == code
    assert found.err.strip() == sentence


def build(space: Workspace, tmp_path: Path, *options: Any, **change: Any) -> list[Any]:
    """A `build` command that would work, but for what is changed; own output and cache folders."""
    asked = {"card": space.card, "--target": space.target, "--latency": "2x", "--runtime": "onnxruntime",
             "--out": tmp_path / "out", "--cache-dir": tmp_path / "cache", **change}  # fmt: skip
    command: list[Any] = ["build", asked.pop("card")]
    for option, value in asked.items():
        command += [option, value]
    return [*command, *options]


# Names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"--target": "cpu-avx3"}, "unknown target 'cpu-avx3'; did you mean 'cpu-avx2'?"),
        ({"--target": "toaster"}, "unknown target 'toaster'; known: cpu-amx, cpu-avx2,"),
        ({"--target": "nowhere.toml"}, "there is no file 'nowhere.toml'"),
        ({"card": "digit"}, "unknown model 'digit'; did you mean 'digits'?"),
        ({"card": "qqqq"}, "unknown model 'qqqq'; known: cifar10,"),
        ({"card": "vit_tiny_patch16_225"}, "unknown model 'vit_tiny_patch16_225'; "),
        ({"card": "nowhere.toml"}, "there is no file 'nowhere.toml'"),
        ({"--runtime": "onnxruntim"}, "unknown runtime 'onnxruntim'; did you mean 'onnxruntime'?"),
        ({"--runtime": "tflite"}, "unknown runtime 'tflite'; "),
        ({"--criterion": "magnitud"}, "unknown criterion 'magnitud'; did you mean 'magnitude'?"),
        ({"--method": "edgprune"}, "unknown method 'edgprune'; did you mean 'edgeprune'?"),
        ({"--allocator": "knapsac"}, "unknown allocator 'knapsac'; did you mean 'knapsack'?"),
        ({"--schedule": "one-shoot"}, "unknown schedule 'one-shoot'; did you mean 'one-shot'?"),
        ({"--recovery": "refitt"}, "unknown recovery 'refitt'; did you mean 'refit'?"),
        ({"--precision": "fp64"}, "precision 'fp64' is not one of target 'here': fp32"),
        ({"--weights": "nowhere.safetensors"}, "weights file 'nowhere.safetensors' does not exist; give"),
        ({"--threads": "-1"}, "threads must be 0 (all) or more, not -1"),
        ({"--epochs": "-1"}, "epochs must be 0 or more, not -1"),
        ({"--search-seconds": "-1"}, "search-seconds must be 0 or more, not -1"),
        ({"--polish": "-1"}, "polish must be 0 or more passes, not -1"),
        ({"--max-drop": "-1"}, "max-drop must be 0 or more accuracy points, not -1"),
        ({"--max-drop": "inf"}, "max-drop must be 0 or more accuracy points, not inf"),
        ({"--seed": "-1"}, "seed must be from 0 to 4294967295, not -1"),
        ({"--seed": "5000000000"}, "seed must be from 0 to 4294967295, not 5000000000"),
    ],
)
def test_a_name_or_number_that_means_nothing(
    space: Workspace, tmp_path: Path, change: dict[str, str], says: str
) -> None:
    check(build(space, tmp_path, **change), USAGE, says)
    assert not list(tmp_path.glob("cache/*")), "refused before any work"


def test_two_ways_to_go_gradually(space: Workspace) -> None:
    command = ["build", space.card, "--target", space.target, "--latency", "2x", "--gradual", "--schedule", "gradual"]
    check(command, USAGE, "--gradual prunes from tuned models, the schedule 'gradual' from the dense one; give one")


def test_a_gradual_family_keeps_its_tokens(space: Workspace) -> None:
    command = ["build", space.card, "--target", space.target, "--latency", "2x", "--gradual", "--dims", "mlp,tokens"]
    check(
        command,
        USAGE,
        "--gradual prunes a model on from where it is, with all its tokens, in dense shape and float; leave tokens out of --dims",
    )
    made, _ = api.request(str(space.card), target=str(space.target), latency="2x", gradual=True)
    assert made.dims == config.WIDTHS


@pytest.mark.parametrize(
    ("options", "says"),
    [({"quantile": "p95"}, "unknown quantile 'p95'; "), ({"accuracy_on": "moon"}, "unknown accuracy-on 'moon'; ")],
)
def test_what_python_callers_may_get_wrong(space: Workspace, options: dict[str, str], says: str) -> None:
    with pytest.raises(errors.UsageError, match=says):
        api.request(str(space.card), target=str(space.target), latency="2x", **options)


def test_a_name_of_timms_has_no_file_to_show() -> None:
    refused(small.run("models", "show", "vit_tiny_patch16_224"), USAGE, "'vit_tiny_patch16_224' needs no card")


@pytest.mark.parametrize("command", ["profile", "train", "models", "targets"])
def test_other_commands_refuse_unknown_names_too(space: Workspace, command: str) -> None:
    if command == "profile":
        check(["profile", "digit", "--target", "cpu-avx2"], USAGE, "did you mean 'digits'?")
    elif command == "train":
        check(["train", "digit"], USAGE, "did you mean 'digits'?")
    else:
        refused(small.run(command, "show", "digit" if command == "models" else "cpu-avx3"), USAGE, "did you mean '")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere.onnx"], "there is no model file 'nowhere.onnx'"),
        (["nowhere.onnx", "--check", "3"], "--check is for model cards; 'nowhere.onnx' is an ONNX file"),
        (["nowhere.onnx", "--export", "p.json"], "--export is for model cards"),
        (["nowhere.onnx", "--data-dir", "x"], "--data-dir is for model cards"),
        (["digits", "--check", "-1"], "check must be 0 or more plans, not -1"),
    ],
)
def test_profile_refuses(space: Workspace, arguments: list[str], says: str) -> None:
    check(["profile", *arguments, "--target", space.target], USAGE, says)


def test_an_onnx_file_that_is_none_is_refused(space: Workspace, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_text("no model")
    check(["profile", tmp_path / "model.onnx", "--target", space.target, "--runtime", "onnxruntime"], USAGE,
          "model.onnx' is not an ONNX model")  # fmt: skip


def test_a_profile_that_is_not_there_is_refused(space: Workspace, tmp_path: Path) -> None:
    check(["build", space.card, "--target", space.target, "--latency", "2x", "--profile", tmp_path / "p.json"], USAGE,
          "write one with `edgeprune profile --export FILE`")  # fmt: skip


@pytest.mark.parametrize(
    ("latency", "says"),
    [
        ("fastms", "latency 'fastms' is not a number; write 10ms, 2.5x"),
        ("1,5x", "latency '1,5x' is not a number; write 10ms"),
        ("-3ms", "latency '-3ms' must be above zero"),
        ("0ms", "latency '0ms' must be above zero"),
        ("0x", "latency '0x' must be above zero"),
        ("nanms", "latency 'nanms' must be above zero and finite"),
        ("infms", "latency 'infms' must be above zero and finite"),
        ("10", "latency '10' has no unit; write 10ms, 2.5x (speed-up over dense) or 40% (of dense)"),
        ("", "latency '' has no unit"),
    ],
)
def test_a_latency_that_means_nothing(space: Workspace, tmp_path: Path, latency: str, says: str) -> None:
    check(build(space, tmp_path, **{"--latency": latency}), USAGE, says)


def test_one_bad_latency_among_good_ones_stops_all(space: Workspace, tmp_path: Path) -> None:
    check(build(space, tmp_path, "--latency", "10"), USAGE, "latency '10' has no unit")
    assert not list(tmp_path.glob("cache/*"))


def test_options_that_click_refuses_are_one_json_document_too(space: Workspace) -> None:
    for command in (
        ["build", "digits", "--latency", "2x"],
        ["build", "digits", "--target", "cpu-avx2"],
        ["build", "digits", "--target", "cpu-avx2", "--latency", "2x", "--threads", "many"],
        ["build", "digits", "--target", "cpu-avx2", "--latency", "2x", "--fast"],
        ["bild"],
    ):
        found = small.run(*command, "--format", "json")
        assert found.code == found.document["exit_code"] == USAGE
        assert found.document["error"]
        assert "Traceback" not in found.err


# Cards and targets --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("num_classes", "num_clases", "unknown key 'num_clases'; did you mean 'num_classes'?"),
        ("embed_dim = 48", "embed_dim = 48\n[finetunes]\nepochs = [1.0]", "unknown key 'finetunes'; did you mean 'finetune'?"),
        ("batch_size = 32\nlearning_rate = 1e-3", "batch = 32", "[finetune]: unknown key 'batch'; did you mean 'batch_size'?"),
        ("batch_size = 32\nlearning_rate = 1e-3", 'optimizer = "moon"', "[finetune]: unknown optimizer 'moon'; did you mean 'muon'?"),
        ('architecture = "vit_tiny_patch16_224"\n', "", "the key 'architecture' is missing"),
        ('name = "digits"\n', "", "[data]: the key 'name' is missing"),
        ("num_classes = 10", 'num_classes = "ten"', "'num_classes' must be a whole number, not 'ten'"),
        ("num_classes = 10", "num_classes =", "is not valid TOML"),
        ('"vit_tiny_patch16_224"', '"vit_tiny_patch61_224"', "unknown model 'vit_tiny_patch61_224'; did you mean 'vit_tiny_patch16_224'?"),
        ("embed_dim = 48", "embed_dmi = 48", "timm cannot make 'vit_tiny_patch16_224'"),
    ],
)  # fmt: skip
def test_a_card_with_a_mistake(space: Workspace, tmp_path: Path, old: str, new: str, says: str) -> None:
    card = tmp_path / "mine.toml"
    assert old in small.CARD
    card.write_text(small.CARD.replace(old, new, 1).replace("small.safetensors", str(space.root / "small.safetensors")))
    check(build(space, tmp_path, card=card), USAGE, says, *([str(card)] if "vit_tiny" not in says else []))


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("neuron_step", "neurons_step", "unknown key 'neurons_step'; did you mean 'neuron_step'?"),
        ("threads = 1\n", "", "the key 'threads' is missing"),
        ('"p50"', '"p95"', "quantile must be p50, p90 or p99, not 'p95'"),
        ("neuron_step = 32", "neuron_step = 0", "neuron_step must be at least 1"),
    ],
)
def test_a_target_with_a_mistake(space: Workspace, tmp_path: Path, old: str, new: str, says: str) -> None:
    target = tmp_path / "mine.toml"
    target.write_text(small.TARGET.replace(old, new, 1))
    check(build(space, tmp_path, **{"--target": target}), USAGE, str(target), says)


def test_a_target_whose_instructions_this_cpu_lacks(space: Workspace, tmp_path: Path) -> None:
    target = tmp_path / "tomorrow.toml"
    target.write_text(small.TARGET.replace("cpu_flags = []", 'cpu_flags = ["avx4096", "warp_drive"]'))
    sentence = "avx4096, warp_drive"
    for extra in ([], ["--dry-run"]):
        check(
            build(space, tmp_path, *extra, **{"--target": target}), TARGET, "'tomorrow'", sentence, "edgeprune targets"
        )
    check(["profile", space.card, "--target", target, "--cache-dir", tmp_path / "cache"], TARGET, sentence)
    assert not list(tmp_path.glob("cache/*"))


def test_a_target_of_another_machine(space: Workspace, tmp_path: Path) -> None:
    target = tmp_path / "mainframe.toml"
    target.write_text("\n".join(
        'machine = ["s390x"]' if line.startswith("machine") else line for line in small.TARGET.splitlines()
    ))  # fmt: skip
    check(build(space, tmp_path, **{"--target": target}), TARGET, "s390x")


def test_a_target_whose_runtime_is_not_installed(
    space: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgeprune import runtimes

    monkeypatch.setattr(runtimes.get("onnxruntime"), "available", lambda: "onnxruntime is not installed; install it with: pip install onnxruntime")  # fmt: skip
    command = build(space, tmp_path, **{"--cache-dir": space.cache})
    check(command, TARGET, "onnxruntime is not installed", "pip install onnxruntime")


# Weights ------------------------------------------------------------------------------------


def pickled(path: Path, marker: Path) -> Path:
    """A .pth that writes `marker` when it is unpickled without care."""

    class Attack:
        def __reduce__(self) -> Any:
            return os.system, (f"touch '{marker}'",)

    path.write_bytes(pickle.dumps({"state_dict": Attack()}))
    return path


@pytest.mark.parametrize("zipped", [False, True])
def test_pickled_code_is_refused_and_not_run(space: Workspace, tmp_path: Path, zipped: bool) -> None:
    marker = tmp_path / "code-was-run"
    if zipped:
        import torch

        class Attack:
            def __reduce__(self) -> Any:
                return os.system, (f"touch '{marker}'",)

        weights = tmp_path / "evil.pth"
        torch.save({"state_dict": Attack()}, weights)
    else:
        weights = pickled(tmp_path / "evil.pth", marker)
    check(build(space, tmp_path, **{"--weights": weights}), USAGE, str(weights), "pickled code", "state_dict alone")
    assert not marker.exists()
    if not zipped:
        pickle.loads(weights.read_bytes())  # noqa: S301  the trap is a real one
        assert marker.exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("text.safetensors", b"these are no weights"),
        ("text.pth", b"these are no weights"),
        ("empty.safetensors", b""),
        ("empty.pth", b""),
        ("short.safetensors", (1 << 40).to_bytes(8, "little") + b"{}"),
        ("list.pth", None),
        ("folder.safetensors", "folder"),
    ],
)
def test_a_file_that_holds_no_weights(space: Workspace, tmp_path: Path, name: str, content: Any) -> None:
    weights = tmp_path / name
    if content == "folder":
        weights.mkdir()
    elif content is None:
        import torch

        torch.save([1, 2, 3], weights)
    else:
        weights.write_bytes(content)
    check(build(space, tmp_path, **{"--weights": weights}), USAGE, str(weights))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_that_do_not_fit_name_the_tensors(space: Workspace, tmp_path: Path, suffix: str) -> None:
    weights = small.random_weights(tmp_path / f"narrow{suffix}", embed_dim=24)
    check(
        build(space, tmp_path, **{"--weights": weights}),
        USAGE,
        str(weights),
        "cls_token is (1, 1, 24), the model wants (1, 1, 48)",
        "more",
    )


def test_weights_of_a_deeper_model_name_what_is_unknown(space: Workspace, tmp_path: Path) -> None:
    weights = small.random_weights(tmp_path / "deep.safetensors", depth=4)
    check(
        build(space, tmp_path, **{"--weights": weights}),
        USAGE,
        "blocks.3.attn.proj.bias is unknown to the model",
        "more",
    )


def test_a_card_without_weights_wants_them(space: Workspace, tmp_path: Path) -> None:
    card = tmp_path / "bare.toml"
    card.write_text(small.CARD.replace('weights = "small.safetensors"\n', ""))
    check(build(space, tmp_path, card=card), USAGE, "'bare' has no weights", "--weights")
    card.write_text(small.CARD)  # names a file that is not beside it
    check(build(space, tmp_path, card=card), USAGE, str(tmp_path / "small.safetensors"), "does not exist")


# Data ---------------------------------------------------------------------------------------


@pytest.fixture
def folder_card(space: Workspace, tmp_path: Path) -> Callable[..., Path]:
    """A card on an image folder, two classes, untrained weights."""

    def write(images: Path, classes: int = 2) -> Path:
        small.random_weights(tmp_path / "two.safetensors", classes, depth=2, num_heads=1)
        card = tmp_path / "two.toml"
        text = small.ONE.replace("one.safetensors", "two.safetensors").replace("depth = 1", "depth = 2")
        text = text.replace('"digits"', f'"folder"\ndir = "{images}"')
        card.write_text(
            text.replace("num_classes = 10", f"num_classes = {classes}").replace("images = 64", "images = 32")
        )
        return card

    return write


def test_an_image_folder_that_is_empty_or_missing(
    space: Workspace, tmp_path: Path, folder_card: Callable[..., Path]
) -> None:
    images = tmp_path / "images"
    card = folder_card(images)
    check(build(space, tmp_path, card=card), USAGE, str(images), "--data-dir")
    images.mkdir()
    check(build(space, tmp_path, card=card), USAGE, str(images))
    (images / "train" / "ant").mkdir(parents=True)
    check(build(space, tmp_path, card=card), USAGE, str(images))
    check(build(space, tmp_path, "--data", "folder"), USAGE, "--data-dir")


def test_a_data_set_that_nobody_knows(space: Workspace, tmp_path: Path) -> None:
    check(build(space, tmp_path, "--data", "torch/nothing", "--data-dir", tmp_path), USAGE, "torch/nothing")


def test_a_class_count_that_does_not_match(
    space: Workspace, tmp_path: Path, image_folder: Callable[..., Path], folder_card: Callable[..., Path]
) -> None:
    images = image_folder(classes=("ant", "bee", "cat"), per_class=20)
    check(
        build(space, tmp_path, card=folder_card(images)),
        USAGE,
        str(images),
        "has 3 classes, the model 2",
        "num_classes",
    )


def corrupt(images: Path, part: str, count: int) -> list[Path]:
    """Damage the first `count` images of a part, each in another way."""
    chosen = sorted((images / part).rglob("*.png"))[:count]
    for i, path in enumerate(chosen):
        content = path.read_bytes()
        path.write_bytes([b"", b"no image at all", content[: len(content) // 2]][i % 3])
    return chosen


def test_one_corrupt_image_of_hundreds_is_named_and_the_build_goes_on(
    space: Workspace, tmp_path: Path, image_folder: Callable[..., Path], folder_card: Callable[..., Path]
) -> None:
    """One to calibrate on, one to tune on, one to judge on: all are said, and in the manifest."""
    from edgeprune import config, data, vit

    images = image_folder(per_class=110)
    card = config.load_card(str(folder_card(images)))
    network = vit.create(card.architecture, card.kwargs, card.num_classes)
    splits = data.load_splits(card, data.transform_config(card, network), seed=0)
    bad = []
    for part in (splits.calibration, splits.train, splits.evaluation):
        bad.append(Path(part.source.reader.filename(int(part.indices[0]), absolute=True)))
        bad[-1].write_bytes(bad[-1].read_bytes()[:100])
    command = build(space, tmp_path, card=tmp_path / "two.toml", **{"--latency": "60%"})
    with small.quick():
        built = small.run(*command, "--format", "json")
    assert built.code in (errors.PASSED, errors.GATE_FAILED, errors.INCONCLUSIVE), built.err
    [artifact] = built.document["artifacts"]
    assert artifact["manifest"]["accuracy"]["images"] == 219
    assert artifact["manifest"]["data"]["unreadable"] == sorted(map(str, bad))
    for path in bad:
        assert path.name in built.err, "an image that is skipped is named"


@pytest.mark.parametrize("part", ["train", "validation"])
def test_more_than_one_percent_of_corrupt_images_are_refused(
    space: Workspace, tmp_path: Path, image_folder: Callable[..., Path], folder_card: Callable[..., Path], part: str
) -> None:
    images = image_folder(per_class=110)
    bad = corrupt(images, part, 60)
    with small.quick():
        found = small.run(*build(space, tmp_path, "-q", card=folder_card(images), **{"--latency": "1000ms"}))
    sentence = refused(found, USAGE, "cannot be read", "1%", "repair or remove")
    assert any(str(path) in sentence for path in bad)


# Places -------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--out", "--cache-dir"])
def test_a_folder_that_cannot_be_written(space: Workspace, tmp_path: Path, option: str) -> None:
    """A path below a regular file: nobody can write there, root included."""
    (tmp_path / "file").write_text("")
    check(
        build(space, tmp_path, **{option: tmp_path / "file" / "below"}),
        STORAGE,
        str(tmp_path / "file" / "below"),
        option,
    )


def test_training_to_a_place_that_cannot_be_written(space: Workspace, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "weights.safetensors"
    check(["train", space.card, "--out", out], STORAGE, str(out), "--out")


def test_training_that_is_refused_leaves_no_empty_file(space: Workspace, tmp_path: Path) -> None:
    out = tmp_path / "weights.safetensors"
    check(["train", space.card, "--data", "folder", "--data-dir", tmp_path / "nowhere", "--out", out], USAGE, "nowhere")
    assert not out.exists()


def test_a_disk_that_fills_up_in_a_stage(space: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was finished before stays, what was not leaves nothing."""
    stages = [stage for stage in pipeline.PIPELINE if stage.name == "calibrate"]

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", "levels.npz")

    shared = [space.build("--latency", "2x", "--dry-run")]
    assert shared[0].code == errors.PASSED
    broken = pipeline.Stage("calibrate", full, stages[0].reads, stages[0].asks)
    monkeypatch.setattr(pipeline, "PIPELINE", (pipeline.PIPELINE[0], broken))
    command = build(space, tmp_path)
    check(command, STORAGE, "calibrate", "No space left on device", "levels.npz", str(tmp_path / "cache"))
    assert [path.name.rpartition("-")[0] for path in (tmp_path / "cache").iterdir()] == ["baseline"]


# What cannot be reached ---------------------------------------------------------------------


@pytest.mark.parametrize("latency", ["0.001us", "1000000x"])
def test_a_latency_below_what_is_reachable(space: Workspace, tmp_path: Path, latency: str) -> None:
    """Said before any tuning, with the lowest reachable latency; the profile is kept."""
    command = build(space, tmp_path, "--format", "json", **{"--latency": latency, "--cache-dir": space.cache})
    before = {path.name for path in space.cache.glob("*")}
    with small.quick():
        found = small.run(*command)
    assert found.code == found.document["exit_code"] == INFEASIBLE, found.err
    lines = [line for line in found.err.splitlines() if line.startswith("edgeprune: ")]
    assert lines == [f"edgeprune: {found.document['error']}"]
    assert "cannot be reached" in lines[0]
    assert "the lowest that small can reach on here is about" in lines[0]
    assert "ask for more, or start from a smaller model" in lines[0]
    lowest = float(lines[0].partition("is about ")[2].split(" ms")[0])
    assert lowest > 0, "a number that a user can ask for"
    assert "finetune" not in found.err
    made = {path.name.rpartition("-")[0] for path in space.cache.glob("*-*") if path.name not in before}
    assert made <= {"baseline", "profile", "calibrate"}
    assert not list((tmp_path / "out").glob("*"))


# Validate -----------------------------------------------------------------------------------


@pytest.fixture
def artifact(tmp_path: Path, manifest: dict[str, Any]) -> Path:  # noqa: F811
    """An artifact as far as it is read before anything is measured; two classes, on an image folder."""
    folder = tmp_path / "artifact"
    folder.mkdir()
    target = {**tomllib.loads(small.TARGET), "name": "here"}
    profile = {
        "target": target, "anchor_ms": {"onnxruntime": 1.0}, "anchor": {"slope": 0.5},
        "worker": {"info": {"version": "1"}}, "device": {}, "conditions": {},
    }  # fmt: skip
    (folder / "profile.json").write_text(json.dumps(profile))
    for name in set(manifest["files"]) - {"profile.json"}:
        (folder / name).write_bytes(b"\x3a\x00" if name == "model.onnx" else b"x")  # an empty graph
    files = {
        name: {
            "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest(),
            "bytes": (folder / name).stat().st_size,
        }
        for name in manifest["files"]
    }
    data = {**manifest["data"], "source": "folder data set", "evaluation": 16}
    artifacts.write_manifest(folder, {**manifest, "files": files, "classes": ["ant", "bee"], "data": data})
    return folder


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--target", "cpu-avx3"], "unknown target 'cpu-avx3'; did you mean 'cpu-avx2'?"),
        (["--target", "nowhere.toml"], "there is no file 'nowhere.toml'"),
        (["--data", "digits"], "the artifact was built on folder data set, not on digits; give --data-dir DIR"),
        (["--data", "torch/cifar10"], "validate reads 'digits' or 'folder', not 'torch/cifar10'; write the images to"),
        (["--data", "folder"], "the data set 'folder' needs --data-dir DIR"),
        (["--data-dir", "/nowhere/at/all"], "there is no folder '/nowhere/at/all'; give --data-dir an existing folder"),
        (["--threads", "-1"], "--threads -1 is not a thread count; use 0 for all"),
    ],
)
def test_validate_refuses_what_means_nothing(artifact: Path, options: list[str], says: str) -> None:
    check(["validate", artifact, *options], USAGE, says)


@pytest.mark.parametrize(
    ("old", "new", "code", "says"),
    [
        ('"onnxruntime", "openvino"', '"openvino"', USAGE, "the artifact's runtime 'onnxruntime' is not one of target 'board': openvino"),
        ('["fp32"]', '["int8"]', USAGE, "the artifact's precision 'fp32' is not one of target 'board': int8"),
        ("cpu_flags = []", 'cpu_flags = ["warp_drive"]', TARGET, "target 'board' is not here: this CPU lacks warp_drive"),
        ('max_isa = ""', 'max_isa = "AVX3"', USAGE, "unknown max_isa in target board: 'AVX3'; did you mean 'AVX'"),
    ],
)  # fmt: skip
def test_validate_under_a_target_that_does_not_fit(
    artifact: Path, tmp_path: Path, old: str, new: str, code: int, says: str
) -> None:
    assert old in small.TARGET
    (tmp_path / "board.toml").write_text(small.TARGET.replace(old, new))
    check(["validate", artifact, "--target", tmp_path / "board.toml"], code, says)


def test_validate_on_images_of_other_classes(artifact: Path, image_folder: Callable[..., Path]) -> None:
    images = image_folder(classes=("ant", "wasp"))
    check(["validate", artifact, "--data-dir", images], USAGE, f"{images}/validation/wasp", "no class", "(ant, bee)")


def test_validate_to_a_place_that_cannot_be_written(artifact: Path, tmp_path: Path) -> None:
    for out in (artifact / "profile.json" / "found.json", tmp_path):
        check(["validate", artifact, "--out", out], STORAGE, f"cannot write to '{out}'", "choose another --out")


def test_a_build_without_its_packages(space: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a device looks like; tests/test_torch_free.py has a real one."""
    from edgeprune import extras

    monkeypatch.setattr(extras, "BUILD", {"torch": "torch", "no_such_module": "timm"})
    says = "needs timm (not installed); install it with: pip install 'edgeprune[build]'"
    check(build(space, tmp_path), USAGE, f"building {says}")
    check(build(space, tmp_path, "--dry-run"), USAGE, f"building {says}")
    check(["train", space.card], USAGE, f"training {says}")


# Ctrl-C -------------------------------------------------------------------------------------


def children(pid: int) -> list[int]:
    """Processes whose parent is `pid`, from /proc."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(") ")[2].split()[1])
        except OSError:
            continue
        if parent == pid:
            found.append(int(stat.parent.name))
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def wait_for(condition: Callable[[], Any], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.05)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds worker processes in /proc")
def test_ctrl_c_ends_with_130_and_the_same_command_resumes(space: Workspace, tmp_path: Path) -> None:
    command = [*build(space, tmp_path, card=space.one, **{"--latency": "1000ms"}), "--format", "json"]
    endless = "from edgeprune.stages import profile; profile.FEWEST = 10**9; "
    process = subprocess.Popen(
        [sys.executable, "-c", endless + "from edgeprune.cli import main; main()", *map(str, command)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    lines: list[str] = []
    assert process.stderr is not None
    stderr = process.stderr
    reader = threading.Thread(target=lambda: lines.extend(stderr), daemon=True)
    reader.start()
    try:
        wait_for(
            lambda: any("threads: " in line for line in lines) or process.poll() is not None, 120, "the profile stage"
        )
        wait_for(lambda: children(process.pid) or process.poll() is not None, 120, "the measuring worker")
        time.sleep(0.5)
        workers = children(process.pid)
        assert process.poll() is None, "".join(lines)
        assert workers
        process.send_signal(signal.SIGINT)
        code = process.wait(timeout=120)
    finally:
        process.kill()
    reader.join(timeout=60)
    text = "".join(lines)
    assert code == errors.INTERRUPTED, text
    assert "Traceback" not in text
    said = [line for line in text.splitlines() if line.startswith("edgeprune: ")]
    assert said == ["edgeprune: interrupted; finished stages are kept: run the same command again to resume"]
    assert process.stdout is not None
    assert small.strict_json(process.stdout.read())["exit_code"] == errors.INTERRUPTED
    wait_for(lambda: not any(map(alive, workers)), 60, "the worker to end")
    assert [path.name.rpartition("-")[0] for path in (tmp_path / "cache").iterdir()] == ["baseline"]
    assert not list((tmp_path / "out").iterdir())
    # Native libraries write to the file descriptor itself: only a process of its own shows that stdout is JSON alone.
    resumed = subprocess.run(
        [sys.executable, "-c", small.QUICK, *map(str, command)],
        capture_output=True, text=True, cwd=tmp_path, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "CI": "1"},
    )  # fmt: skip
    assert resumed.returncode == errors.PASSED, resumed.stderr
    assert "\x1b" not in resumed.stderr
    [artifact] = small.strict_json(resumed.stdout)["artifacts"]
    assert [s["name"] for s in artifact["manifest"]["stages"] if s["cached"]] == ["baseline"]
    assert (tmp_path / "out" / "one-here-1000ms" / "manifest.json").is_file()


# Defects ------------------------------------------------------------------------------------


def test_a_defect_is_said_to_be_one(space: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(pipeline, "preflight", broken)
    check(build(space, tmp_path), errors.EdgepruneError.exit_code, cli.CRASH_HELP, "ZeroDivisionError", "-v")
    told = small.run(*build(space, tmp_path, "-v", "--format", "json"))
    assert "Traceback" in told.err
    assert told.code == told.document["exit_code"] == errors.EdgepruneError.exit_code
