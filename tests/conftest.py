"""Shared fixtures: tiny Vision Transformers, generated plans, and small image folders. Nothing heavy is imported here."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from small import Result, Workspace

# Several processes of tests share the cores: torch in one thread each. Before torch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

#: Files that take longest: with several processes, what begins last should end soon.
LONGEST = ("test_end_to_end.py", "test_benchmarks.py", "test_cli_errors.py", "test_remote.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


# A shell that runs the tests in the background has its processes ignore Ctrl-C, which some of them are about.
signal.signal(signal.SIGINT, signal.default_int_handler)

#: 3 blocks of 3 heads and 24 neurons, 48 wide, 32 pixels in patches of 8: 17 tokens, 5 classes.
TINY: dict[str, Any] = {
    "img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "mlp_ratio": 0.5,
}  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def exact_products() -> Iterator[None]:
    """Products as float32 has them also where this CPU multiplies bfloat16: tests compare with what is exact."""
    from edgeprune import products

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "has_bfloat16", lambda: False)
        yield


@pytest.fixture(scope="session")
def tiny_kwargs() -> dict[str, Any]:
    """The arguments of the tiny ViT, for `vit.create('vit_tiny_patch16_224', kwargs, 5)`; a copy."""
    return dict(TINY)


@pytest.fixture(scope="session")
def make_vit() -> Callable[..., Any]:
    """`make_vit(architecture, seed=0, double=False, num_classes=5, **kwargs)`: a tiny ViT, every tensor random.

    A fresh model is zero in its biases and one in its norms, and would hide what goes wrong there.
    """
    import torch

    from edgeprune import vit

    torch.set_num_threads(1)

    def make(
        architecture: str = "vit_tiny_patch16_224",
        *,
        seed: int = 0,
        double: bool = False,
        num_classes: int = 5,
        **kwargs: Any,
    ) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = vit.create(architecture, {**TINY, **kwargs}, num_classes)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    noise = torch.randn_like(parameter) * 0.15
                    parameter.copy_(1 + noise if "norm" in name and name.endswith("weight") else noise)
        return model.double() if double else model

    return make


@pytest.fixture
def tiny_vit(make_vit: Callable[..., Any]) -> Any:
    """A tiny ViT in float32 and eval mode; the test may change it."""
    return make_vit()


@pytest.fixture
def tiny_vit64(make_vit: Callable[..., Any]) -> Any:
    """A tiny ViT in float64 and eval mode; the test may change it."""
    return make_vit(double=True)


@pytest.fixture(scope="session")
def make_images() -> Callable[..., Any]:
    """`make_images(count, seed=0, double=False, size=32)`: random images `[count, 3, size, size]`."""
    import torch

    def make(count: int, *, seed: int = 0, double: bool = False, size: int = 32) -> Any:
        dtype = torch.float64 if double else torch.float32
        return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=dtype)

    return make


@pytest.fixture
def image_folder(tmp_path: Path) -> Callable[..., Path]:
    """`image_folder(parts, classes, per_class, size, name)`: random PNGs in `<part>/<class>/`; "" = no part folder."""
    from PIL import Image

    def write(
        parts: Sequence[str] = ("train", "validation"),
        classes: Sequence[str] = ("ant", "bee"),
        per_class: int = 8,
        size: int = 32,
        name: str = "images",
        seed: int = 0,
    ) -> Path:
        rng = np.random.default_rng(seed)
        root = tmp_path / name
        for part in parts:
            for label in classes:
                folder = root / part / label
                folder.mkdir(parents=True, exist_ok=True)
                for i in range(per_class):
                    pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / f"{part or 'image'}-{label}-{i}.png")
        return root

    return write


@pytest.fixture(scope="session")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The small card, trained, and a target that is this machine."""
    import small

    return small.workspace(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def family(space: Workspace) -> Result:
    """`edgeprune build --latency 2x --latency 70% --format json` of the small card, once."""
    return space.build("--latency", "2x", "--latency", "70%", "--format", "json")


@pytest.fixture(scope="session")
def artifacts(family: Result) -> list[Path]:
    """The folders of that build."""
    assert family.code in (0, 1, 6), family.err  # gates may pass, fail or be inconclusive, on a busy machine
    return [Path(built["path"]) for built in family.document["artifacts"]]
