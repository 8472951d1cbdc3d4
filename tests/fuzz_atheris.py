"""python tests/fuzz_atheris.py TARGET -max_total_time=60        pip install 'edgeprune[fuzz]' brings atheris

Coverage-guided fuzzing of what reads files from elsewhere; not a part of the tests. TARGET is one of those below. The
corpus starts with sound files, made here in a folder that goes with the process; a folder of your own may follow
TARGET, and then keeps what is found. Whatever is no EdgepruneError of the contract is a crash, and so is a hang.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["edgeprune"]):
    from edgeprune import archives, artifact, config, images, onnxfile, schema, sealed, vit, weightfile
    from edgeprune.errors import EdgepruneError
    from edgeprune.stages import profile

import faults
import small
from test_fuzz import archive
from test_hostile import add_model

from edgeprune import api
from edgeprune.console import SILENT

SCHEMA = json.loads((Path(artifact.__file__).parent / "report" / "manifest.schema.json").read_text())
PREPROCESSING = {
    "input_size": [3, 16, 16],
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "mean": [0.5] * 3,
    "std": [0.5] * 3,
}

#: Sound content, and what takes a file.
Target = tuple[list[bytes], Callable[[Path], object]]


def card(folder: Path) -> Target:
    return [
        small.CARD.encode(),
        (Path(config.shipped("models")) / "digits.toml").read_bytes(),
    ], lambda path: config.load_card(str(path))


def target(folder: Path) -> Target:
    return [small.TARGET.encode()], lambda path: config.load_target(str(path))


def plan(folder: Path) -> Target:
    sizes = vit.Anatomy((vit.Stage(2, 3, 16, 24, 48, 17),), (3, 32, 32), 5)
    path = folder / "sound"
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "mlp_ratio": 0.5}
    artifact.write_plan(artifact.PlannedModel("vit_tiny_patch16_224", kwargs, 5, vit.dense_plan(sizes), 1.0, 1.0), path)
    return [path.read_bytes()], artifact.read_plan


def manifest(folder: Path) -> Target:
    """Sealed or not: the schema is asked in any case."""

    def take(path: Path) -> None:
        content = path.read_bytes()
        with contextlib.suppress(sealed.Damaged):
            sealed.parse(content)
        try:
            document = json.loads(content)
        except (ValueError, RecursionError):
            return
        schema.problem(document, SCHEMA)

    sealed.write(folder / "sound", {"schema": "edgeprune.manifest/1", "files": {"a": {"sha256": "0" * 64, "bytes": 1}}})
    return [(folder / "sound").read_bytes()], take


def recorded(folder: Path) -> Target:
    sound, board = faults.recorded(folder)
    (folder / "small.toml").write_text(small.CARD)
    request, _ = api.request(str(folder / "small.toml"), target=str(board), latency="2x")
    sizes = vit.Anatomy((vit.Stage(3, 3, 16, 192, 48, 17),), (3, 32, 32), 10)

    def take(path: Path) -> None:
        profile.adopt(request, sizes, path, folder, SILENT)
        profile.read_profile(folder)

    return [sound.read_bytes()], take


def weights(folder: Path) -> Target:
    import torch
    from safetensors.torch import save

    return [save({"a": torch.zeros(2, 3), "b": torch.ones(4).half()})], weightfile.read


def onnx(folder: Path) -> Target:
    path = folder / "sound.onnx"
    sound = [
        add_model(path, place, where).read_bytes() for place in ("", "../x") for where in ("initializer", "constant")
    ]
    return sound, onnxfile.refuse_outside


def packed(suffix: str) -> Target:
    def take(path: Path) -> None:
        found = archives.Archive(path, images.SUFFIXES)
        for name in found.entries:
            with contextlib.suppress(ValueError, OSError):  # an unreadable image
                found.read(name)

    return [archive(suffix)], take


def image(folder: Path) -> Target:
    from PIL import Image

    sound = []
    for kind in ("png", "jpeg", "gif", "bmp", "webp"):
        made = io.BytesIO()
        Image.new("RGB", (24, 24), (9, 99, 199)).save(made, format=kind)
        sound.append(made.getvalue())

    def take(path: Path) -> None:
        evaluation = images.Evaluation("x", ["x.png"], [0], lambda i: images.read_image(path.open("rb")))
        list(evaluation.batches(PREPROCESSING, 1))

    return sound, take


TARGETS: dict[str, tuple[str, Callable[[Path], Target]]] = {
    "card": (".toml", card), "target": (".toml", target), "plan": (".json", plan), "manifest": (".json", manifest),
    "profile": (".json", recorded), "weights": (".safetensors", weights), "onnx": (".onnx", onnx),
    "zip": (".zip", lambda _: packed(".zip")), "tar": (".tar", lambda _: packed(".tar")),
    "image": (".png", image),
}  # fmt: skip


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"{__doc__}\nTargets: {', '.join(TARGETS)}")
    suffix, make = TARGETS[sys.argv.pop(1)]
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(prefix="edgeprune-fuzz-") as name:
        folder, corpus = Path(name), Path(name) / "corpus"
        corpus.mkdir()
        sound, take = make(folder)
        for i, content in enumerate(sound):
            (corpus / str(i)).write_bytes(content)
        path = folder / f"input{suffix}"

        def one(content: bytes) -> None:
            path.write_bytes(content)
            try:
                take(path)
            except EdgepruneError as error:
                assert error.exit_code in (2, 3, 4, 5) and str(error).strip(), repr(error)

        own = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
        options = [argument for argument in sys.argv[1:] if argument.startswith("-")]
        atheris.Setup([sys.argv[0], *options, "-timeout=20", f"-artifact_prefix={Path.cwd()}/", *own, str(corpus)], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
