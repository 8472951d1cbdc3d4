"""python -m pytest tests/test_hostile.py

Files from elsewhere that want more than to be read: each is refused in one sentence, and does nothing.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import small
import torch
from onnx import TensorProto, helper
from test_docs import SCHEMA, manifest, manifest_errors  # noqa: F401  a fixture

import edgeprune
from edgeprune import artifact, config, errors, images, onnxfile, recheck, schema, vit, weightfile
from edgeprune.errors import UsageError
from edgeprune.latency.clock import Clock

# ONNX ---------------------------------------------------------------------------------------


def add_model(path: Path, location: str = "", where: str = "initializer") -> Path:
    """y = x + w, its weights in the file or at a location outside."""
    w = helper.make_tensor("w", TensorProto.FLOAT, [1, 4], np.ones(4, np.float32).tobytes(), raw=True)
    if location:
        w.ClearField("raw_data")
        w.data_location = TensorProto.EXTERNAL
        w.external_data.add(key="location", value=location)
        w.external_data.add(key="length", value="16")
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4]) for n in "xy")
    nodes = [helper.make_node("Add", ["x", "w"], ["y"])]
    held = [w]
    if where == "constant":
        held, nodes = [], [helper.make_node("Constant", [], ["w"], value=w), *nodes]
    graph = helper.make_graph(nodes, "g", [x], [y], held)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.mark.parametrize("where", ["initializer", "constant"])
@pytest.mark.parametrize(
    "location", ["../secret.bin", "/etc/hostname", "a/../../secret.bin", "link.bin", "sub/link/x.bin"]
)
def test_an_onnx_file_that_reads_outside_its_folder(tmp_path: Path, location: str, where: str) -> None:
    (tmp_path / "secret.bin").write_bytes(bytes(16))
    (tmp_path / "in" / "sub").mkdir(parents=True)
    os.symlink(tmp_path / "secret.bin", tmp_path / "in" / "link.bin")
    os.symlink(tmp_path, tmp_path / "in" / "sub" / "link")
    path = add_model(tmp_path / "in" / "model.onnx", location, where)
    assert onnxfile.external(path) == [location]
    with pytest.raises(UsageError, match="outside its folder"):
        onnxfile.refuse_outside(path)
    with pytest.raises(UsageError, match="in another file"):
        onnxfile.refuse_external(path)


def test_the_worker_refuses_it_before_the_runtime_opens_it(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "secret.bin").write_bytes(np.full(4, 7, np.float32).tobytes())
    with Clock("onnxruntime", threads=1) as clock:
        with pytest.raises(UsageError, match=r"'\.\./secret\.bin', which is outside its folder"):
            clock.load("evil", add_model(tmp_path / "in" / "model.onnx", "../secret.bin"))
        clock.load("good", add_model(tmp_path / "in" / "good.onnx"))
        np.testing.assert_array_equal(clock.predict("good", np.zeros((1, 4), np.float32)), np.ones((1, 4)))
        shutil.copy(tmp_path / "secret.bin", tmp_path / "in" / "own.bin")
        clock.load("beside", add_model(tmp_path / "in" / "beside.onnx", "own.bin"))
        np.testing.assert_array_equal(clock.predict("beside", np.zeros((1, 4), np.float32)), np.full((1, 4), 7))


def test_the_walker_finds_what_onnx_says_in_a_real_model(tmp_path: Path) -> None:
    """Every tensor of an exported ViT moved out of its file; and none of the file as it was."""
    from edgeprune.stages import export

    model = vit.create(
        "vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}, 5
    )
    export.to_onnx(model, (3, 32, 32), tmp_path / "model.onnx")
    assert onnxfile.external(tmp_path / "model.onnx") == []
    loaded = onnx.load(tmp_path / "model.onnx")
    onnx.save(loaded, tmp_path / "out.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert onnxfile.external(tmp_path / "out.onnx") == ["weights.bin"]


def test_messages_without_end_are_refused(tmp_path: Path) -> None:
    body = b""
    for _ in range(200):  # graph -> node -> attribute -> graph
        for field in (6, 5, 1):
            body = bytes([field << 3 | 2]) + varint(len(body)) + body
    (tmp_path / "deep.onnx").write_bytes(b"\x3a" + varint(len(body)) + body)
    with pytest.raises(UsageError, match="nested"):
        onnxfile.external(tmp_path / "deep.onnx")


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


# Weights ------------------------------------------------------------------------------------


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    """A .pth whose tensor is a gigabyte of zeros in a megabyte."""
    path = tmp_path / "bomb.pth"
    stored = io.BytesIO()
    torch.save({"w": torch.zeros(4)}, stored)
    with zipfile.ZipFile(stored) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            with target.open(entry.filename, "w", force_zip64=True) as file:
                if entry.filename.endswith("data/0"):
                    for _ in range(1024):
                        file.write(bytes(1 << 20))
                else:
                    file.write(source.read(entry))
    assert path.stat().st_size < 2 << 20
    with pytest.raises(UsageError, match="compressed archive of 10737"):
        weightfile.read(path)


def test_a_bomb_whose_directory_lies_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pth"
    torch.save({"w": torch.zeros(1000)}, path)
    content = bytearray(path.read_bytes())
    at = content.rindex(b"PK\x01\x02")
    content[at + 24 : at + 28] = struct.pack("<I", 1 << 31)
    path.write_bytes(content)
    with pytest.raises(UsageError):
        weightfile.read(path)


class Attack:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.marker}'",)


@pytest.mark.parametrize(
    "kwargs", ["checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "pretrained"]
)
def test_a_card_or_plan_cannot_make_timm_unpickle_a_file(
    tmp_path: Path, kwargs: str, tiny_kwargs: dict[str, Any]
) -> None:
    marker, evil = tmp_path / "code-was-run", tmp_path / "evil.pth"
    evil.write_bytes(pickle.dumps({"state_dict": Attack(marker)}))
    with pytest.raises(UsageError, match=f"unknown argument '{kwargs}'"):
        vit.create("vit_tiny_patch16_224", {**tiny_kwargs, kwargs: str(evil)}, 5)
    assert not marker.exists()


def test_loading_an_artifact_runs_no_code(tmp_path: Path, tiny_vit: Any, tiny_kwargs: dict[str, Any]) -> None:
    """Its plan names a checkpoint that timm would have unpickled; the hashes are all right."""
    from safetensors.torch import save_file

    marker, evil = tmp_path / "code-was-run", tmp_path / "evil.pth"
    evil.write_bytes(pickle.dumps({"state_dict": Attack(marker)}))
    folder = tmp_path / "artifact"
    folder.mkdir()
    plan = vit.dense_plan(vit.anatomy(tiny_vit))
    kwargs = {**tiny_kwargs, "checkpoint_path": str(evil)}
    artifact.write_plan(artifact.PlannedModel("vit_tiny_patch16_224", kwargs, 5, plan, 1.0, 1.0), folder / "plan.json")
    save_file(tiny_vit.state_dict(), folder / "model.safetensors")
    reseal(folder, {"schema": artifact.MANIFEST_SCHEMA})
    with pytest.raises(UsageError, match="unknown argument 'checkpoint_path'"):
        edgeprune.load(folder)
    assert not marker.exists()


def reseal(folder: Path, document: dict[str, Any]) -> None:
    """A manifest with the hashes of whatever files are there: what an attacker writes."""
    files = {
        path.name: {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}
        for path in folder.iterdir()
        if path.name != "manifest.json" and path.is_file()
    }
    artifact.write_manifest(folder, {**document, "files": files})


# Artifacts ----------------------------------------------------------------------------------


@pytest.fixture
def sound(tmp_path: Path, manifest: dict[str, Any]) -> Path:  # noqa: F811
    """An artifact that `validate` would time: two additions for models."""
    folder = tmp_path / "artifact"
    folder.mkdir()
    target = {**config.tomllib.loads(small.TARGET), "name": "here"}
    profile = {"target": target, "anchor_ms": {"onnxruntime": 1.0}, "anchor": {"slope": 0.5},
               "worker": {"info": {"version": "1"}}, "device": {}, "conditions": {}}  # fmt: skip
    (folder / "profile.json").write_text(json.dumps(profile))
    add_model(folder / "model.onnx")
    (folder / "anchor.onnx.gz").write_bytes(gzip.compress(add_model(tmp_path / "anchor.onnx").read_bytes()))
    made = ("report.md", "report.html", "report.json", "provenance.json", "sbom.cdx.json")
    for name in ("plan.json", "model.safetensors", *made):
        (folder / name).write_text("x")
    reseal(folder, manifest)
    return folder


def refused(folder: Path, *says: str) -> None:
    """`validate` and its exit code, in one sentence."""
    found = small.run("validate", folder, "-q")
    assert found.code == errors.UsageError.exit_code, found.err
    [line] = found.err.strip().splitlines()
    for part in says:
        assert part in line


def test_a_sound_one_is_timed(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeprune.checks.SECONDS", 0.2)
    assert small.run("validate", sound).code in (0, 1, 6)


@pytest.mark.parametrize(
    "name", ["../outside.onnx", "/etc/hostname", "sub/model.onnx", "..\\outside.onnx", "..", "a\x00b"]
)
def test_a_manifest_that_names_files_outside(sound: Path, manifest: dict[str, Any], name: str) -> None:  # noqa: F811
    shutil.copy(sound / "model.onnx", sound.parent / "outside.onnx")
    document = artifact.read_manifest(sound)
    document["files"][name] = {"sha256": hashlib.sha256((sound / "model.onnx").read_bytes()).hexdigest(), "bytes": 1}
    artifact.write_manifest(sound, document)
    refused(sound, "manifest.json")
    document = artifact.read_manifest(sound)
    del document["files"][name]
    artifact.write_manifest(sound, {**document, "entry": name})
    refused(sound, "entry" if name != ".." else "outside the artifact")


@pytest.mark.parametrize("name", ["model.onnx", "anchor.onnx.gz", "profile.json"])
def test_what_has_no_hash_is_not_opened(sound: Path, name: str) -> None:
    document = artifact.read_manifest(sound)
    del document["files"][name]
    artifact.write_manifest(sound, document)
    refused(sound, name)
    artifact.write_manifest(sound, {**artifact.read_manifest(sound), "entry": "other.onnx"})
    add_model(sound / "other.onnx")
    refused(sound, "other.onnx is not in the manifest" if name == "" else "")


def test_an_entry_that_has_no_hash_is_not_opened(sound: Path) -> None:
    add_model(sound / "other.onnx")
    artifact.write_manifest(sound, {**artifact.read_manifest(sound), "entry": "other.onnx"})
    refused(sound, "other.onnx is not in the manifest")
    artifact.write_manifest(sound, {**artifact.read_manifest(sound), "entry": "model.xml"})
    refused(sound, "model.xml is not in the manifest", "model.bin is not in the manifest")


def test_links_in_an_artifact(sound: Path) -> None:
    (sound / "model.onnx").rename(sound.parent / "elsewhere.onnx")
    os.symlink(sound.parent / "elsewhere.onnx", sound / "model.onnx")
    refused(sound, "model.onnx is a link")


def test_a_model_in_an_artifact_that_reads_other_files(sound: Path, manifest: dict[str, Any]) -> None:  # noqa: F811
    (sound / "unhashed.bin").write_bytes(bytes(16))
    add_model(sound / "model.onnx", "unhashed.bin")
    reseal(sound, manifest)
    document = artifact.read_manifest(sound)
    del document["files"]["unhashed.bin"]
    artifact.write_manifest(sound, document)
    refused(sound, "keeps weights in another file")
    add_model(sound / "model.onnx")
    (sound / "anchor.onnx.gz").write_bytes(
        gzip.compress(add_model(sound.parent / "a.onnx", "/etc/hostname").read_bytes())
    )
    reseal(sound, manifest)
    refused(sound, "keeps weights in another file")


def test_a_gzip_bomb_ends_where_a_model_would(
    sound: Path,
    manifest: dict[str, Any],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recheck, "MAX_ONNX", 1 << 20)
    (sound / "anchor.onnx.gz").write_bytes(gzip.compress(bytes(64 << 20)))
    reseal(sound, manifest)
    refused(sound, "unpacks to more than 1 MiB")


@pytest.mark.parametrize(
    "content",
    [b"", b"x", gzip.compress(b"model")[:-3], gzip.compress(b"")],
    ids=["nothing", "no gzip", "cut off", "gzip of nothing"],  # a gzip's own bytes tell the time of collection
)
def test_an_anchor_that_is_none(sound: Path, manifest: dict[str, Any], content: bytes) -> None:  # noqa: F811
    (sound / "anchor.onnx.gz").write_bytes(content)
    reseal(sound, manifest)
    refused(sound, "anchor")


def test_escapes_do_not_reach_the_terminal(sound: Path) -> None:
    document = artifact.read_manifest(sound)
    artifact.write_manifest(sound, {**document, "model": "\x1b]0;owned\x07"})
    for command in ("report", "validate"):
        found = small.run(command, sound)
        assert found.code == errors.UsageError.exit_code
        assert "control character U+001B" in found.err
        assert "\x1b" not in found.err + found.out


def test_the_checker_knows_all_that_the_schema_says() -> None:
    def walk(node: Any, names: bool = False) -> None:
        if isinstance(node, dict):
            assert names or set(node) <= schema.KEYWORDS, set(node) - schema.KEYWORDS
            for key, child in node.items():
                walk(child, not names and key in ("properties", "$defs"))

    walk(SCHEMA)


@pytest.mark.parametrize(
    "value", [None, True, False, 0, -1, 0.5, 1234.5, 10**400, "", "x", "a/b", [], [1], [None, None, None], {}, {"x": 1}]
)
def test_the_checker_agrees_with_jsonschema(manifest: dict[str, Any], value: Any) -> None:  # noqa: F811
    """At every place of a manifest; numbers beyond float and control characters are refused beside that."""

    def places(node: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        return [at, *(place for key, child in children for place in places(child, (*at, key)))]

    assert schema.problem(manifest, SCHEMA) == ""
    for place in places(manifest)[1:]:
        changed = json.loads(json.dumps(manifest))
        node = changed
        for key in place[:-1]:
            node = node[key]
        node[place[-1]] = value
        if value == 10**400:
            assert schema.problem(changed, SCHEMA), place
        else:
            assert bool(schema.problem(changed, SCHEMA)) == bool(manifest_errors(changed)), (place, value)


# Images -------------------------------------------------------------------------------------


def test_links_in_image_folders(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = image_folder()
    images.check_links(folder)
    own = folder / "train" / "ant" / "train-ant-0.png"
    os.symlink(own, folder / "train" / "bee" / "within.png")
    images.check_links(folder)
    secret = tmp_path / "secret.png"
    shutil.copy(own, secret)
    for target, says in (
        (secret, "outside"),
        ("/dev/zero", "outside"),
        (tmp_path, "outside"),
        (folder, "a folder that it lies in"),
    ):
        os.symlink(target, folder / "train" / "bee" / "evil.png")
        with pytest.raises(UsageError, match=says):
            images.check_links(folder)
        (folder / "train" / "bee" / "evil.png").unlink()
    os.symlink("nothing.png", folder / "train" / "bee" / "dangling.png")
    with pytest.raises(UsageError, match="a link to nothing"):
        images.check_links(folder)
    (folder / "train" / "bee" / "dangling.png").unlink()
    os.mkfifo(folder / "train" / "bee" / "pipe.png")
    with pytest.raises(UsageError, match="no regular file"):
        images.check_links(folder)


def test_links_that_are_followed(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    """A subset made of links: refused, unless it is trusted. What cannot end is refused in any case."""
    whole = image_folder(("",))
    subset = tmp_path / "subset"
    (subset / "bee").mkdir(parents=True)
    for path in list((whole / "bee").iterdir())[:3]:
        os.symlink(path, subset / "bee" / path.name)
    os.symlink(whole / "ant", subset / "ant")
    recorded = {"classes": ["ant", "bee"], "data": {"source": "x", "evaluation": 9, "seed": 0}}
    with pytest.raises(UsageError, match=r"outside .*; copy what it leads to, or give --follow-links"):
        images.for_artifact(recorded, "", str(subset))
    found = images.for_artifact(recorded, "", str(subset), follow_links=True)
    assert found is not None and len(found) == 8 + 3
    os.symlink(subset, whole / "ant" / "back")
    with pytest.raises(UsageError, match="a folder that it lies in"):
        images.check_links(subset, follow=True)
    (whole / "ant" / "back").unlink()
    os.symlink("/dev/zero", subset / "bee" / "zero.png")
    with pytest.raises(UsageError, match="no regular file"):
        images.check_links(subset, follow=True)


@pytest.mark.parametrize("follow", [False, True])
def test_links_that_multiply(tmp_path: Path, follow: bool) -> None:
    """Two in each of 40 folders lead to the next: 2^40 ways."""
    for i in range(40):
        (tmp_path / str(i)).mkdir()
        for name in ("a", "b") if i else ():
            os.symlink(tmp_path / str(i), tmp_path / str(i - 1) / name)
    with pytest.raises(UsageError, match="in more than 100 ways"):
        images.check_links(tmp_path, follow)


@pytest.mark.parametrize("make", ["png", "tiff"])
def test_a_decompression_bomb_is_an_unreadable_image(image_folder: Callable[..., Path], make: str) -> None:
    """One that says it is 30,000 pixels wide and high; it is named, and not unpacked."""
    from PIL import Image

    folder = image_folder()
    bomb = folder / "train" / "ant" / "bomb.png"
    Image.new("1", (30_000, 30_000)).save(bomb, format=make, compression="group4" if make == "tiff" else None)
    with pytest.raises((OSError, Image.DecompressionBombError)):
        images.read_image(bomb.open("rb"))


def test_preprocessing_that_would_fill_the_memory() -> None:
    from PIL import Image

    base = {
        "input_size": [3, 32, 32],
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
    }
    for change in ({"crop_pct": 1e-6}, {"input_size": [3, 10**6, 10**6]}):
        with pytest.raises(UsageError, match="more than"):
            images.preprocess(Image.new("RGB", (8, 8)), {**base, **change})


# Names and TOML -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../../out", "a/b", "/tmp/x", "..", ".hidden", "-rf", "a\nb", "$(touch x)", "a;b", "`x`", "", "n" * 300, "\x1b[2J"])  # fmt: skip
@pytest.mark.parametrize("kind", ["card", "target"])
def test_names_that_are_no_folder_names(tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / "x.toml"
    text = small.CARD if kind == "card" else small.TARGET
    path.write_text(f"name = {json.dumps(name)}\n{text}")
    with pytest.raises(UsageError, match=r"x\.toml.* name"):
        config.load_card(str(path)) if kind == "card" else config.load_target(str(path))


def test_names_that_are(tmp_path: Path) -> None:
    for name in ("deit-tiny", "a b", "v1.2_x", "x" * 100):
        (tmp_path / "x.toml").write_text(f"name = {json.dumps(name)}\n{small.CARD}")
        assert config.load_card(str(tmp_path / "x.toml")).name == name


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("learning_rate = 1e-3", "learning_rate = nan", "'learning_rate' must be a finite number, not nan"),
        ("learning_rate = 1e-3", "learning_rate = inf", "'learning_rate' must be a finite number, not inf"),
        ("learning_rate = 1e-3", "learning_rate = -1.0", "'learning_rate' must be 0 or more, not -1.0"),
        ("batch_size = 32\nlearning_rate = 1e-3", "batch_size = 0", "[finetune]: 'batch_size' must be 1 or more, not 0"),
        ("epochs = [0.5]", "epochs = [-0.5]", "'epochs' must be 0 or more, not -0.5"),
        ("images = 64", "images = 0", "[calibration]: 'images' must be 1 or more, not 0"),
        ("num_classes = 10", "num_classes = -1", "'num_classes' must be from 0 to 1e+06, not -1"),
        ("crop_pct = 1.0", "std = [0.0]", "[transforms]: 'std' must be"),
        ("num_classes = 10", f"num_classes = {'9' * 5000}", "is not valid TOML"),
        ("num_classes = 10", f"num_classes = {'[' * 5000}{']' * 5000}", "is not valid TOML"),
        ("images = 64", "images = 64.0", "must be a whole number"),
        ("crop_pct = 1.0", f"crop_pct = {'9' * 400}", "too large a number"),
    ],
)  # fmt: skip
def test_toml_with_strange_values(tmp_path: Path, old: str, new: str, says: str) -> None:
    assert old in small.CARD
    path = tmp_path / "x.toml"
    path.write_text(small.CARD.replace(old, new, 1))
    with pytest.raises(UsageError) as error:
        config.load_card(str(path))
    assert says in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize("text", ["9" * 5000, "[" * 100_000, '{"a": NaN}', '{"a": Infinity}', "\ufeff{}", '"\\ud800"'])
def test_json_with_strange_values(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"x\.json"):
        artifact.read_json(path)


def test_json_of_any_length_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact, "MAX_JSON", 1000)
    (tmp_path / "x.json").write_text("[" + "1," * 600 + "1]")
    with pytest.raises(UsageError, match="larger than"):
        artifact.read_json(tmp_path / "x.json")


# No shell, no pickle ------------------------------------------------------------------------


def test_no_line_of_edgeprune_starts_a_shell_or_unpickles() -> None:
    """Every call by name: what is started gets a list, and what is loaded is data."""
    import ast

    for path in Path(edgeprune.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert name not in (
                "os.system",
                "os.popen",
                "eval",
                "exec",
                "pickle.load",
                "pickle.loads",
                "marshal.loads",
            ), path
            assert given.get("shell", "False") == "False", path
            if name == "torch.load":
                assert given["weights_only"] == "True", path
            if name == "np.load":
                assert given.get("allow_pickle", "False") == "False", path
