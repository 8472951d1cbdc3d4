"""Whole builds of other families than ViT, small and untrained, through the command line.

python -m pytest tests/test_family_builds.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file
from small import TARGET, quick, run

import edgeprune
from edgeprune.compat import timm

CARD = """
description = "2 blocks on digits"
architecture = "{name}"
num_classes = 10
weights = "weights.safetensors"

[kwargs]
{kwargs}

[data]
name = "digits"

[calibration]
images = 32
batch_size = 16

[finetune]
batch_size = 32
"""

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
FAMILIES: dict[str, dict[str, Any]] = {
    "eva02_tiny_patch14_224": SIZES, "eva02_base_patch14_224": SIZES, "beit_base_patch16_224": SIZES,
    "swin_tiny_patch4_window7_224": {
        "img_size": 32, "embed_dim": 48, "depths": [1, 2], "num_heads": [3, 6], "mlp_ratio": 2.0, "window_size": 4
    },
}  # fmt: skip


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES],
)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, str]:
    """The folder of a build, its manifest, and what it said; weights are in timm's names."""
    name, root = request.param, tmp_path_factory.mktemp(request.param)
    kwargs = FAMILIES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=10, **kwargs)
        for key, parameter in model.named_parameters():
            if key in ("head.weight", "head.fc.weight") or "bias_table" in key:  # nearly 0, or 0, in a fresh model
                torch.nn.init.normal_(parameter, std=0.5)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, root / "weights.safetensors")
    lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in kwargs.items())
    (root / "card.toml").write_text(CARD.format(name=name, kwargs=lines))
    (root / "here.toml").write_text(TARGET)
    with quick():
        done = run(
            "build", root / "card.toml", "--target", root / "here.toml", "--latency", "70%", "--epochs", 0, "--polish", 1,
            "--runtime", "onnxruntime", "--cache-dir", root / "cache", "--out", root / "artifacts", "--format", "json",
        )  # fmt: skip
    assert done.code in (0, 1, 6), done.err  # how quick this machine is today is not what is tested
    document = done.document
    return root, document, done.err


def test_something_is_pruned_and_the_artifact_is_whole(
    built: tuple[Path, Any, str], make_images: Callable[..., Any]
) -> None:
    root, _, _ = built
    (folder,) = (root / "artifacts").iterdir()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["pruned"]["params"] < manifest["dense"]["params"]
    assert manifest["pruned"]["macs"] < manifest["dense"]["macs"]
    model, images = edgeprune.load(folder), make_images(4)
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    got = np.concatenate([session.run(None, {"pixels": image[None].numpy()})[0] for image in images])
    with torch.no_grad():
        want = model(images).numpy()
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


def test_that_tokens_stay_is_said_once_and_refused_by_name(built: tuple[Path, Any, str]) -> None:
    root, _, told = built
    assert told.count("depends on where its tokens are, so all of them stay") == 1
    refused = run("build", root / "card.toml", "--target", root / "here.toml", "--latency", "2x", "--dims", "tokens",
                  "--cache-dir", root / "other", "--out", root / "others")  # fmt: skip
    assert refused.code == 2 and "choose --dims heads,mlp,depth" in refused.err
