"""python -m pytest tests/test_tutorials.py

The commands of docs/*.md, in order, through the real command line: on the small card instead of `digits`, and for a
target that is whatever this machine is. Gates may fail on a busy machine; commands may not.
"""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
import small
from small import Result, Workspace

from edgeprune import criteria, errors, images

DOCS = Path(__file__).parent.parent / "docs"
EVERY = sorted(path.stem for path in DOCS.glob("*.md"))
TUTORIALS = [name for name in EVERY if "\n```sh\n" in (DOCS / f"{name}.md").read_text()]
GATES = (errors.PASSED, errors.GATE_FAILED, errors.INCONCLUSIVE)


def fenced(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (DOCS / f"{name}.md").read_text(), re.DOTALL | re.MULTILINE)


def commands(name: str) -> list[list[str]]:
    """The words of every line of the tutorial's `sh` blocks."""
    return [shlex.split(line) for block in fenced(name, "sh") for line in block.splitlines()]


@pytest.fixture
def here(space: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to be in, where the session's card and target lie; what was done with them is done."""
    for path in (space.card, space.target, space.card.with_suffix(".safetensors")):
        shutil.copyfile(path, tmp_path / path.name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EDGEPRUNE_CACHE_DIR", str(space.cache))
    return tmp_path


def follow(name: str) -> dict[str, Result]:
    """Every command of the tutorial, each ending as a gate does."""
    found = {}
    for words in commands(name):
        assert words[0] == "edgeprune", f"docs/{name}.md: {' '.join(words)}"
        asked = words[1:]
        if asked[0] in ("build", "profile"):
            asked = [asked[0], asked[1].replace("digits", "small.toml"), *asked[2:], "--runtime", "onnxruntime"]
            asked[asked.index("--target") + 1] = "here.toml"
        asked = [re.sub(r"cpu-(avx2|neon)", "here", word).replace("digits-", "small-") for word in asked]
        with small.quick():
            ran = small.run(*asked)
        assert ran.code in GATES, f"{' '.join(asked)}\n{ran.err}"
        assert "Traceback" not in ran.err
        found[" ".join(words)] = ran
    return found


def test_every_page_is_listed_and_every_tutorial_has_a_test() -> None:
    for text, prefix in ((DOCS / "README.md").read_text(), ""), ((DOCS.parent / "README.md").read_text(), "docs/"):
        listed = re.findall(rf"\]\({prefix}([a-z-]+)\.md\)", text)
        assert set(listed) | {"README"} == set(EVERY)
    source = Path(__file__).read_text()
    for name in TUTORIALS:
        assert commands(name)
        assert f'follow("{name}")' in source


@pytest.mark.parametrize("name", EVERY)
def test_links_lead_somewhere(name: str) -> None:
    for path, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]+))?\)", (DOCS / f"{name}.md").read_text()):
        target = DOCS / path if path else DOCS / f"{name}.md"
        assert target.exists(), path
        headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor in [re.sub(r"[^a-z0-9 -]", "", own.lower()).replace(" ", "-") for own in headings]


@pytest.mark.slow
def test_own_model(here: Path) -> None:
    [card] = fenced("own-model", "toml")
    for long, short in (
        ("[30.0]", "[1.0]"), ("[4.0]", "[0.2]"), ("embed_dim = 96", "embed_dim = 48"), ("depth = 4", "depth = 1"),
        ("num_heads = 3", "num_heads = 1"),
    ):  # fmt: skip
        assert long in card
        card = card.replace(long, short)
    (here / "mine.toml").write_text(card)
    source = images.Digits()
    for part, rows in zip(("train", "validation"), source.split(), strict=True):
        for i in rows[:400]:
            image, label = source[int(i)]
            (here / "photos" / part / str(label)).mkdir(parents=True, exist_ok=True)
            image.resize((32, 32)).save(here / "photos" / part / str(label) / f"{i}.png")
    ran = follow("own-model")
    assert (here / "artifacts/mine-here-2x/report.html").is_file()
    assert (here / "methods.html").is_file()
    assert any("accuracy drop" in found.err for words, found in ran.items() if " build " in words)


@pytest.mark.slow
def test_raspberry_pi(here: Path) -> None:
    follow("raspberry-pi")
    for name in ("pi.json", "found.json", "artifacts/small-here-60pct/model.onnx"):
        assert (here / name).is_file()


def test_reading_a_profile(here: Path) -> None:
    """What the tutorial explains is what there is, in the same order."""
    [ran] = follow("reading-a-profile").values()
    explained = re.findall(r"^\*\*(.+?)\.\*\*", (DOCS / "reading-a-profile.md").read_text(), re.MULTILINE)
    assert explained == re.findall(r"^## (.+)$", (here / "profile/profile.md").read_text(), re.MULTILINE)
    assert all(title in ran.out for title in explained)


@pytest.fixture
def criterion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The tutorial's file, as if it lay in edgeprune/criteria."""
    [code] = fenced("writing-a-criterion", "python")
    (tmp_path / "criteria").mkdir()
    (tmp_path / "criteria/mine.py").write_text(code)
    monkeypatch.setattr(criteria, "__path__", [*criteria.__path__, str(tmp_path / "criteria")])
    yield
    sys.modules.pop("edgeprune.criteria.mine", None)


def test_writing_a_criterion(here: Path, criterion: None) -> None:
    ran = follow("writing-a-criterion")
    assert "fall" in ran["edgeprune methods mine"].out
    for folder in ("with-mine", "with-default"):
        assert (here / folder / "small-here-2x/manifest.json").is_file()
    assert (here / "compared.html").is_file()


def test_ci(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(here / "summary.md"))
    ran = follow("ci")
    for name in ("build.xml", "validate.xml"):
        assert ElementTree.parse(here / name).getroot().tag == "testsuites"
    assert "## edgeprune build" in (here / "summary.md").read_text()
    regressed = next(found for words, found in ran.items() if "--baseline" in words)
    assert "latency regression" in regressed.out
    documented = set(re.findall(r"^\| (\d) \|", (DOCS / "ci.md").read_text(), re.MULTILINE))
    assert documented == {str(code) for code in GATES}
