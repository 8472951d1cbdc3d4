"""python -m pytest tests/test_archives.py

Image sets in .zip and .tar: read as the folder that they were made of, and never unpacked; hostile ones refused.
"""

from __future__ import annotations

import copy
import io
import os
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
import torch
from small import Workspace

from edgeprune import data, errors, images
from edgeprune.archives import MAX_BYTES, Archive, is_archive
from edgeprune.config import DataSpec, ModelSpec
from edgeprune.errors import UsageError

CONFIG = {
    "input_size": (3, 32, 32),
    "interpolation": "bilinear",
    "mean": (0.5,) * 3,
    "std": (0.5,) * 3,
    "crop_pct": 1.0,
}
PIXEL = b"not looked at"


def pack(folder: Path, path: Path, inside: str = "") -> Path:
    """All of a folder, in an order of its own, with entries for folders too."""
    names = sorted(p for p in folder.rglob("*"))[::-1]
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            for one in names:
                file.write(one, inside + str(one.relative_to(folder)))
    else:
        with tarfile.open(path, "w") as tar:
            for one in names:
                tar.add(one, inside + str(one.relative_to(folder)), recursive=False)
    return path


def splits(root: Path, held_out: str = "") -> data.Splits:
    spec = ModelSpec("x", "", "x", 2, DataSpec("folder", str(root), held_out_domain=held_out))
    return data.load_splits(spec, CONFIG, 0)


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
@pytest.mark.parametrize(
    ("parts", "inside"),
    [(("train", "validation"), ""), (("train", "val"), "./set/"), (("",), "my set/"), (("train",), "")],
)
def test_an_archive_is_read_as_the_folder_in_it(
    image_folder: Callable[..., Path], tmp_path: Path, suffix: str, parts: tuple[str, ...], inside: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Classes beside numbers that sort by value; 10 of them and 180 images, as calibration takes some."""
    folder = image_folder(parts, classes=("a2", "a10"), per_class=200)
    (folder / parts[0] / "a2" / "notes.txt").write_text("no image")
    path = pack(folder, tmp_path / f"set{suffix}", inside)
    before = set(tmp_path.rglob("*"))
    one, other = splits(folder), splits(path)
    assert one.classes == other.classes == ("a2", "a10")
    for name in ("train", "calibration", "evaluation"):
        wanted, found = getattr(one, name), getattr(other, name)
        assert len(wanted) == len(found) > 0
        for (x, y), (x2, y2) in zip(wanted.take(24).batches(8), found.take(24).batches(8), strict=True):
            assert torch.equal(x, x2) and torch.equal(y, y2)
        assert np.array_equal(wanted.listed_labels(), found.listed_labels())
    assert one.facts == {**other.facts, "source": one.source}
    assert set(tmp_path.rglob("*")) == before, "nothing was unpacked"
    several = list(other.train.take(16).batches(4, workers=2))
    assert torch.equal(torch.cat([x for x, _ in several]), next(one.train.take(16).batches(16))[0])


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
def test_domains_in_an_archive(image_folder: Callable[..., Path], tmp_path: Path, suffix: str) -> None:
    folder = image_folder(("photo", "sketch", "clip"), per_class=150)
    one, other = splits(folder, "sketch"), splits(pack(folder, tmp_path / f"set{suffix}"), "sketch")
    assert list(one.domains) == list(other.domains) and one.classes == other.classes
    for name, wanted in one.domains.items():
        assert np.array_equal(wanted.indices, other.domains[name].indices)


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
@pytest.mark.parametrize("divided", [False, True])
def test_validate_reads_archives(image_folder: Callable[..., Path], tmp_path: Path, suffix: str, divided: bool) -> None:
    folder = image_folder(("",) if divided else ("train", "validation"), per_class=10)
    manifest = {"classes": ["ant", "bee"],
                "data": {"source": "x" + images.DIVIDED * divided, "evaluation": 4 if divided else 20, "seed": 0}}  # fmt: skip
    path = pack(folder, tmp_path / f"set{suffix}")
    one, other = (images.for_artifact(manifest, "", str(root)) for root in (folder, path))
    assert one is not None and other is not None
    assert len(one) == len(other) == manifest["data"]["evaluation"]
    assert [Path(n).relative_to(folder) for n in one.names] == [Path(n).relative_to(path) for n in other.names]
    for a, b in zip(one.batches(CONFIG, 4), other.batches(CONFIG, 4), strict=True):
        assert np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1])


def test_an_archive_travels_to_other_processes(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as file:
        file.writestr("a/1.png", PIXEL)
        file.writestr("b/1.png", PIXEL)
    archive = Archive(tmp_path / "set.zip", (".png",))
    archive.read("a/1.png")
    assert copy.copy(archive).read("a/1.png").read() == PIXEL


def test_a_build_from_an_archive(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, image_folder: Any) -> None:
    """It stops at its first stage, as there are too few images; all of them were found."""
    space: Workspace = small.workspace(tmp_path_factory.getbasetemp())
    path = pack(image_folder(per_class=4), tmp_path / "set.zip")
    found = space.build("--latency", "2x", "--data-dir", path, cache=tmp_path / "cache", out=tmp_path / "out")
    assert found.code == errors.UsageError.exit_code
    assert "has 8 training images, but the card sets 64 aside for calibration" in found.err


# What is refused ---------------------------------------------------------------------------------


def refused(path: Path, says: str) -> None:
    with pytest.raises(UsageError, match=says) as found:
        images.tree(path)
    assert str(path) in str(found.value) and "\x1b" not in str(found.value)


NAMES = ["../up.png", "a/../../up.png", "/etc/a.png", "a\\..\\..\\up.png", "C:/a.png", "a/\x1b[2J.png", "a/b\n.png"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("suffix", [".zip", ".tar"])
def test_names_that_lead_elsewhere(tmp_path: Path, name: str, suffix: str) -> None:
    path = tmp_path / f"set{suffix}"
    if suffix == ".zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("a/1.png", PIXEL)
            file.writestr(name, PIXEL)
    else:
        with tarfile.open(path, "w") as tar:
            for one in ("a/1.png", name):
                entry = tarfile.TarInfo(one)
                entry.size = len(PIXEL)
                tar.addfile(entry, io.BytesIO(PIXEL))
    refused(path, "named so as to lead out of a folder; make the archive without it")


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.CONTTYPE]
)
def test_links_and_devices_in_a_tar(tmp_path: Path, kind: bytes) -> None:
    path = tmp_path / "set.tar"
    with tarfile.open(path, "w") as tar:
        entry = tarfile.TarInfo("a/1.png")
        entry.type, entry.linkname = kind, "/etc/passwd"
        tar.addfile(entry)
    if kind == tarfile.CONTTYPE:  # an old word for a regular file
        assert [str(name) for name in images.tree(path).files()] == ["1.png"]
    else:
        refused(path, "a link, a device or a sparse file")


@pytest.mark.parametrize("mode", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO])
def test_links_and_devices_in_a_zip(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as file:
        entry = zipfile.ZipInfo("a/1.png")
        entry.external_attr = (mode | 0o777) << 16
        file.writestr(entry, "/etc/passwd")
    refused(path, "a link or a device")


def test_a_zip_bomb_is_refused_by_what_it_declares(tmp_path: Path) -> None:
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file, file.open("a/1.png", "w") as member:
        for _ in range(MAX_BYTES // (1 << 20) + 1):
            member.write(bytes(1 << 20))
    assert path.stat().st_size < 1 << 20
    refused(path, "more than any image")


@pytest.mark.parametrize("declared", [100, 10_000_000])
def test_an_entry_that_is_not_as_large_as_it_says_is_an_unreadable_image(tmp_path: Path, declared: int) -> None:
    """No more is unpacked than was declared."""
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/1.png", bytes(1_000_000))
        file.writestr("b/1.png", PIXEL)
    content = path.read_bytes()
    size = struct.pack("<I", 1_000_000)
    assert content.count(size) == 2, "beside the entry and in the directory"
    path.write_bytes(content.replace(size, struct.pack("<I", declared)))
    archive = Archive(path, (".png",))
    with pytest.raises(ValueError, match="the archive is damaged there"):
        archive.read("a/1.png")
    assert archive.read("b/1.png").read() == PIXEL


def test_damaged_archives(tmp_path: Path) -> None:
    good = tmp_path / "good.tar"
    with tarfile.open(good, "w") as tar:
        entry = tarfile.TarInfo("a/1.png")
        entry.size = 5000
        tar.addfile(entry, io.BytesIO(bytes(5000)))
    for name, content, says in (
        ("cut.tar", good.read_bytes()[:3000], "it ends within|unexpected end"),
        ("none.tar", b"x" * 2000, "is no sound tar archive"),
        ("none.zip", b"PK" * 2000, "is no sound zip archive"),
        ("empty.zip", b"", "is no sound zip archive"),
    ):
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, says)
    with tarfile.open(tmp_path / "long.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        entry = tarfile.TarInfo("a/1.png")
        entry.pax_headers = {"comment": "x" * (2 << 20)}
        tar.addfile(entry)
    refused(tmp_path / "long.tar", "a header of")
    with zipfile.ZipFile(tmp_path / "twice.zip", "w") as file:
        file.writestr("a/1.png", PIXEL)
        with pytest.warns(UserWarning, match="Duplicate name"):
            file.writestr("a/1.png", PIXEL)
    refused(tmp_path / "twice.zip", "holds 'a/1.png' twice")


def test_what_is_no_archive(tmp_path: Path) -> None:
    for name, says in (("set.tar.gz", "compressed as a whole"), ("set.7z", "compressed"), ("set.png", "is no folder")):
        (tmp_path / name).write_bytes(PIXEL)
        with pytest.raises(UsageError, match=says):
            is_archive(tmp_path / name)
    os.mkdir(tmp_path / "folder.zip")
    assert not is_archive(tmp_path / "folder.zip") and not is_archive(tmp_path / "nowhere.zip")
    with zipfile.ZipFile(tmp_path / "flat.zip", "w") as file:
        file.writestr("1.png", PIXEL)
        file.writestr("a/2.png", PIXEL)
    with pytest.raises(UsageError, match="lies in no folder that names its class"):
        splits(tmp_path / "flat.zip")
