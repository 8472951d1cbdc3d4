"""python -m pytest tests/test_fuzz.py            a thousand inputs
python -m pytest tests/test_fuzz.py -m slow    ten thousand, and ONNX files in the worker that opens them

Mutated cards, targets, plans, manifests, profiles, weights, ONNX files and images: each is taken or refused with an exit
code of the contract; none is a defect (70), a traceback, or a hang.
"""

from __future__ import annotations

import contextlib
import copy
import gzip
import hashlib
import io
import json
import random
import struct
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faults
import numpy as np
import pytest
import small
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_docs import manifest  # noqa: F401  a fixture
from test_hostile import add_model, reseal, sound  # noqa: F401  fixtures

from edgeprune import api, artifact, config, errors, images, onnxfile, recheck, vit, weightfile
from edgeprune.console import SILENT
from edgeprune.errors import EdgepruneError, TargetUnavailable
from edgeprune.latency.clock import Clock

SLOWEST_S = 10.0
STRANGE: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**70), 10**400, 0.0, -0.5, 1e-300, 1e308, float("nan"), float("inf"), "",
    "x", "../../x", "/etc/passwd", "a\x00b", "\x1b[2J", "$(id)", "\ud800", "x" * 5000, [], [[]], [0] * 1000, {}, {"x": {}},
    "onnxruntime", "fp32", "model.onnx", [1, 2, 3], [None],
]  # fmt: skip


def few(count: int) -> Any:
    """So many inputs by default, twenty times as many when asked for; the same in every run."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        return settings(
            max_examples=count, deadline=None, phases=[Phase.generate], derandomize=True, database=None,
            suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
        )(given(seed=st.integers(0, 2**64))(test))  # fmt: skip

    return decorate


def both(count: int) -> list[Any]:
    """How many inputs: by default, and with -m slow."""
    return [count, pytest.param(20 * count, marks=pytest.mark.slow)]


def damaged(content: bytes, rng: random.Random) -> bytes:
    """The content with some bytes changed, taken away, doubled, or cut off."""
    out = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
        at, length = rng.randrange(len(out) + 1), rng.choice([1, 1, 2, 4, 8, 64, 1000])
        what = rng.randrange(7)
        if what == 0:
            out[at : at + length] = rng.randbytes(length)
        elif what == 1:
            del out[at : at + length]
        elif what == 2:
            out[at:at] = out[at : at + length]
        elif what == 3:
            del out[at:]
        elif what == 4 and out:
            out[at % len(out)] ^= 1 << rng.randrange(8)
        elif what == 5:
            out[at : at + 8] = struct.pack("<Q", rng.choice([0, 1, 2**31, 2**63 - 1, 2**64 - 1, len(out)]))
        else:
            out[at:at] = rng.choice(
                [b"\x00", b"\xff" * 8, b"[" * 200, b"{" * 200, b"9" * 400, b"\n", b'"', "\u202e".encode()]
            )
    return bytes(out)


def changed(document: Any, rng: random.Random) -> Any:
    """The document with some values replaced by strange ones, taken away, or moved."""
    document = json.loads(json.dumps(document))
    for _ in range(rng.choice([1, 1, 2, 3])):
        node, key = rng.choice(list(places(document)))
        what = rng.randrange(5)
        if what == 0:
            del node[key]
        elif what == 1 and isinstance(node, dict):
            node[rng.choice(["x", "", "../x", "sha256", "\x1b"])] = copy.deepcopy(rng.choice(STRANGE))
        elif what == 2:
            other, at = rng.choice(list(places(document)))
            node[key] = copy.deepcopy(other[at])
        else:
            node[key] = copy.deepcopy(rng.choice(STRANGE))
    return document


def places(node: Any) -> Iterator[tuple[Any, Any]]:
    keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    for key in keys:
        yield node, key
        yield from places(node[key])


def survives(take: Callable[[], Any]) -> str:
    """Run it: it is taken, or refused with a code of the contract, in one sentence and soon. Returns which."""
    start = time.process_time()
    try:
        take()
        outcome = "taken"
    except EdgepruneError as error:
        assert error.exit_code in (2, 3, 4, 5), repr(error)
        assert str(error).strip()
        outcome = type(error).__name__
    assert time.process_time() - start < SLOWEST_S
    return outcome


def fuzz(count: int, one: Callable[[random.Random], Any]) -> None:
    """`one` on `count` inputs; some must be refused, or the mutations say nothing."""
    outcomes: dict[str, int] = {}

    @few(count)
    def test(seed: int) -> None:
        outcome = survives(lambda: one(random.Random(seed)))
        outcomes[outcome] = outcomes.get(outcome, 0) + 1

    test()
    assert outcomes.get("UsageError", 0) > count // 10, outcomes
    print(outcomes)


@pytest.mark.parametrize("count", both(60))
@pytest.mark.parametrize("kind", ["card", "target"])
def test_cards_and_targets(tmp_path: Path, kind: str, count: int) -> None:
    """Bytes that change, and values that are strange."""
    text = small.CARD if kind == "card" else small.TARGET
    path = tmp_path / "mine.toml"
    load: Callable[[str], Any] = config.load_card if kind == "card" else config.load_target

    def one(rng: random.Random) -> None:
        if rng.random() < 0.5:
            path.write_bytes(damaged(text.encode(), rng))
        else:
            path.write_text(toml(changed(config.tomllib.loads(text), rng)), encoding="utf-8", errors="replace")
        card = load(str(path))
        if kind == "card" and "dir" not in path.read_text(errors="replace"):
            model = vit.create(card.architecture, card.kwargs, card.num_classes) if tiny(card.kwargs) else None
            assert model is None or len(model.blocks) >= 0

    fuzz(count, one)


def tiny(kwargs: dict[str, Any]) -> bool:
    """Whether a model of these sizes is made in no time."""
    numbers = [v for v in kwargs.values() if isinstance(v, (int, float)) and not isinstance(v, bool)]
    return (
        {"img_size", "patch_size", "embed_dim", "depth"} <= set(kwargs)
        and all(-100 < v < 100 for v in numbers)
        and kwargs["depth"] in (1, 2, 3)
    )


def toml(table: dict[str, Any], where: str = "") -> str:
    """As much of TOML as cards need; what TOML has no words for is written as JSON, and refused."""

    def value(x: Any) -> str:
        if isinstance(x, float):
            return repr(x)
        return json.dumps(x, ensure_ascii=True) if not isinstance(x, dict) else "{}"

    lines = [f"{json.dumps(k)} = {value(v)}" for k, v in table.items() if not isinstance(v, dict)]
    for key, child in table.items():
        if isinstance(child, dict):
            name = f"{where}{json.dumps(key)}"
            lines += [f"[{name}]", toml(child, f"{name}.")]
    return "\n".join(lines)


@pytest.mark.parametrize("count", both(40))
def test_plans(tmp_path: Path, tiny_vit: Any, tiny_kwargs: dict[str, Any], count: int) -> None:
    """Up to the weights that they are to fit."""
    from safetensors.torch import save_file

    save_file(tiny_vit.state_dict(), tmp_path / "model.safetensors")
    path = tmp_path / "plan.json"
    dense = vit.dense_plan(vit.anatomy(tiny_vit))
    artifact.write_plan(artifact.PlannedModel("vit_tiny_patch16_224", tiny_kwargs, 5, dense, 1.0, 1.0), path)
    text = path.read_text()

    def one(rng: random.Random) -> None:
        if rng.random() < 0.5:
            path.write_bytes(damaged(text.encode(), rng))
        else:
            path.write_text(json.dumps(changed(json.loads(text), rng)))
        planned = artifact.read_plan(path)
        if tiny(planned.kwargs) and abs(planned.num_classes) < 1000:
            artifact.rebuild(planned, tmp_path / "model.safetensors")

    fuzz(count, one)


class Nobody:
    """In place of the clock: all that is read before anything is timed has been read."""

    def __init__(self, *_: Any, **__: Any) -> None:
        raise TargetUnavailable("nothing is timed here")


@pytest.mark.parametrize("count", both(60))
def test_manifests(sound: Path, manifest: dict[str, Any], monkeypatch: pytest.MonkeyPatch, count: int) -> None:  # noqa: F811
    """Sealed anew after the change, as an attacker would; through both commands that read them."""
    monkeypatch.setattr(recheck, "Clock", Nobody)
    own = artifact.read_manifest(sound)
    content = (sound / "manifest.json").read_bytes()

    def one(rng: random.Random) -> None:
        if rng.random() < 0.3:
            (sound / "manifest.json").write_bytes(damaged(content, rng))
        else:
            artifact.write_manifest(sound, changed({k: v for k, v in own.items() if k != "sha256"}, rng))
        for command in ("report", "validate"):
            found = small.run(command, sound)
            assert found.code in (0, 2, 3, 5), found.err
            assert "Traceback" not in found.err and "\x1b" not in found.err + found.out
        if found.code == 2:
            raise errors.UsageError(found.err)

    fuzz(count, one)


@pytest.mark.parametrize("count", both(60))
def test_profiles_in_artifacts(
    sound: Path,  # noqa: F811
    manifest: dict[str, Any],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    count: int,
) -> None:
    monkeypatch.setattr(recheck, "Clock", Nobody)
    profile = json.loads((sound / "profile.json").read_text())

    def one(rng: random.Random) -> None:
        (sound / "profile.json").write_text(json.dumps(changed(profile, rng)))
        reseal(sound, manifest)
        recheck.validate_artifact(sound)

    fuzz(count, one)


@pytest.mark.parametrize("count", both(40))
def test_profiles_that_builds_take(tmp_path: Path, count: int) -> None:
    from edgeprune.stages import profile as stage
    from edgeprune.vit import Anatomy, Stage

    recorded, target = faults.recorded(tmp_path)
    document = json.loads(recorded.read_text())
    (tmp_path / "small.toml").write_text(small.CARD)
    sizes = Anatomy((Stage(3, 3, 16, 192, 48, 17),), (3, 32, 32), 10)
    out = tmp_path / "out"
    out.mkdir()

    def one(rng: random.Random) -> None:
        if rng.random() < 0.3:
            recorded.write_bytes(damaged(json.dumps(document).encode(), rng))
        else:
            recorded.write_text(json.dumps(changed(document, rng)))
        made, _ = api.request(str(tmp_path / "small.toml"), target=str(target), latency="2x", profile=recorded)
        stage.adopt(made, sizes, recorded, out, SILENT)
        found, table = stage.read_profile(out)
        table.predict_ms(sizes.shape)
        assert found["anchor"]["p50"] > 0

    fuzz(count, one)


@pytest.mark.parametrize("count", both(40))
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights(tmp_path: Path, tiny_vit: Any, suffix: str, count: int) -> None:
    import torch
    from safetensors.torch import save

    state = dict(tiny_vit.state_dict())
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(state, path)
        content = path.read_bytes()
    else:
        content = save(state)
    header = int.from_bytes(content[:8], "little") + 8 if suffix == ".safetensors" else 3000

    def one(rng: random.Random) -> None:
        if rng.random() < 0.7:  # where the structure is
            path.write_bytes(damaged(content[:header], rng) + content[header:])
        else:
            path.write_bytes(damaged(content, rng))
        weightfile.load(tiny_vit, weightfile.read(path), str(path))

    fuzz(count, one)


@pytest.mark.parametrize("count", both(60))
def test_onnx_files_that_are_walked(tmp_path: Path, count: int) -> None:
    path = tmp_path / "model.onnx"
    contents = [
        add_model(path, location, where).read_bytes()
        for location in ("", "../x")
        for where in ("initializer", "constant")
    ]

    def one(rng: random.Random) -> None:
        path.write_bytes(damaged(rng.choice(contents), rng))
        onnxfile.refuse_outside(path)

    fuzz(count, one)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_onnx_files_that_a_runtime_opens(tmp_path: Path, runtime: str) -> None:
    """In its worker, which may die of one; the next one gets a new worker."""
    path = tmp_path / "model.onnx"
    content = add_model(path).read_bytes()
    clocks: list[Clock] = []

    def one(rng: random.Random) -> None:
        path.write_bytes(damaged(content, rng))
        if not clocks or clocks[0]._process.poll() is not None:
            clocks[:] = [Clock(runtime, threads=1, timeout_s=20.0)]
        clocks[0].load("model", path)

    try:
        fuzz(300, one)
    finally:
        for clock in clocks:
            clock.close()


@pytest.mark.parametrize("count", both(40))
def test_packed_anchors(tmp_path: Path, count: int) -> None:
    content = gzip.compress(add_model(tmp_path / "a.onnx").read_bytes() * 100)

    def one(rng: random.Random) -> None:
        (tmp_path / "a.gz").write_bytes(damaged(content, rng))
        recheck.unpack(tmp_path / "a.gz", tmp_path / "out.onnx")
        onnxfile.refuse_external(tmp_path / "out.onnx")

    fuzz(count, one)


@pytest.mark.parametrize("count", both(60))
@pytest.mark.parametrize("suffix", [".zip", ".tar"])
def test_archives(tmp_path: Path, suffix: str, count: int) -> None:
    """Up to the content of every image in them."""
    path = tmp_path / f"set{suffix}"
    content = archive(suffix)

    def one(rng: random.Random) -> None:
        path.write_bytes(damaged(content, rng))
        found = images.tree(path)
        for file in found.files():
            with contextlib.suppress(ValueError, OSError):  # an unreadable image
                found.open(file)

    fuzz(count, one)


def archive(suffix: str) -> bytes:
    """Two images, one with a long name, in a .zip or a .tar."""
    made = io.BytesIO()
    names = ("train/a/1.png", f"train/b/{'long' * 40}.png")
    if suffix == ".zip":
        with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as file:
            for name in names:
                file.writestr(name, b"content" * 20)
    else:
        with tarfile.open(fileobj=made, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for name in names:
                entry = tarfile.TarInfo(name)
                entry.size = 140
                tar.addfile(entry, io.BytesIO(b"content" * 20))
    return made.getvalue()


@pytest.mark.parametrize("count", both(40))
@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "tiff", "bmp", "webp"])
def test_images(tmp_path: Path, kind: str, count: int) -> None:
    """Whatever is in a file called .png; unreadable ones are noted, and one of one is more than 1 %."""
    from PIL import Image

    path = tmp_path / "x.png"
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, format=kind)
    content = path.read_bytes()
    preprocessing = {
        "input_size": [3, 16, 16],
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
    }
    outcomes = {"read": 0, "noted": 0}

    @few(count)
    def test(seed: int) -> None:
        path.write_bytes(damaged(content, random.Random(seed)))
        evaluation = images.Evaluation("x", ["x.png"], [0], lambda i: images.read_image(path.open("rb")))
        survives(lambda: list(evaluation.batches(preprocessing, 1)))
        outcomes["noted" if evaluation.corrupt else "read"] += 1

    test()
    assert outcomes["noted"] > count // 20, outcomes


def test_the_mutations_leave_the_digest_of_the_original_alone() -> None:
    """They work on copies: a fuzz test that damages its own base tests ever less."""
    content = b"x" * 100
    before = hashlib.sha256(content).hexdigest()
    damaged(content, random.Random(0))
    document = {"a": [1, {"b": 2}]}
    changed(document, random.Random(0))
    assert (hashlib.sha256(content).hexdigest(), document) == (before, {"a": [1, {"b": 2}]})
