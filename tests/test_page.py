"""python -m pytest tests/test_page.py

report.html in a real browser: both themes, desktop and phone. Without an installed Chromium those tests are skipped.
Screenshots go to the test's temporary folder, or to $EDGEPRUNE_SCREENSHOTS.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import small
from small import Workspace

from edgeprune import artifact, errors
from edgeprune.report import page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed (apt-get install chromium)")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")
    with sync_api.sync_playwright() as playwright:
        # A container has no user namespaces for Chromium's own sandbox; what is opened is our own file.
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def open_page(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """`open_page(file, theme, size)`: the drawn page; at the end, that it said nothing and asked for nothing else."""
    said: list[str] = []
    asked: list[str] = []
    opened = []

    def look(file: Path, theme: str = "light", size: str = "desktop") -> Any:
        width, height = SIZES[size]
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=theme)
        view = context.new_page()
        view.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        view.on("pageerror", lambda error: said.append(str(error)))
        view.on("request", lambda request: asked.append(request.url))
        view.goto(file.resolve().as_uri())
        view.wait_for_selector("html[data-plots]", state="attached", timeout=60_000)
        folder = Path(os.environ.get("EDGEPRUNE_SCREENSHOTS", tmp_path))
        folder.mkdir(parents=True, exist_ok=True)
        view.screenshot(path=str(folder / f"{file.stem}-{theme}-{size}.png"), full_page=True)
        opened.append((context, file))
        return view

    yield look
    for context, _ in opened:
        context.close()
    assert said == []
    assert asked == [file.resolve().as_uri() for _, file in opened], "the page loads something"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_section_is_there_and_fits(artifacts: list[Path], open_page: Any, theme: str, size: str) -> None:
    view = open_page(artifacts[0] / page.FILE, theme, size)
    assert view.eval_on_selector_all("section", "all => all.map(s => s.id)") == list(page.SECTIONS)
    assert view.eval_on_selector("section", "s => s.id") == "verdict"
    assert all(view.eval_on_selector_all("section", "all => all.map(s => s.getBoundingClientRect().height > 40)"))
    plots = view.locator(".plot").count()
    assert plots >= 11
    assert view.locator(".plot .main-svg").count() >= plots, "a plot was not drawn"
    assert view.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), (
        "the page is wider than the screen"
    )
    paper, ink = view.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    assert (light(paper) > light(ink)) == (theme == "light")
    tick = view.locator(".xtick text").first.evaluate("t => getComputedStyle(t).fill")
    assert abs(light(tick) - light(paper)) > 100, "the axes cannot be read"


def light(color: str) -> float:
    return sum(map(float, re.findall(r"[\d.]+", color)[:3])) / 3


def test_plots_answer_the_pointer(artifacts: list[Path], open_page: Any) -> None:
    view = open_page(artifacts[0] / page.FILE)
    bar = view.locator("#stages .bars .point").nth(1)
    bar.scroll_into_view_if_needed()
    bar.hover(force=True)
    view.wait_for_selector("#stages .hovertext", timeout=10_000)
    assert "profile" in view.locator("#stages .hovertext").first.text_content()


def test_tables_sort(artifacts: list[Path], open_page: Any) -> None:
    view = open_page(artifacts[0] / page.FILE)
    column = "all => all.map(cell => parseFloat(cell.textContent))"
    cells, heading = "#stages tbody td:nth-child(2)", view.locator("#stages th").nth(1)
    before = view.eval_on_selector_all(cells, column)
    for direction, order in (("ascending", sorted(before)), ("descending", sorted(before, reverse=True))):
        heading.locator("button").click()
        assert heading.get_attribute("aria-sort") == direction
        assert view.eval_on_selector_all(cells, column) == order


def test_the_theme_follows_the_system(artifacts: list[Path], open_page: Any) -> None:
    """Also while the page is open: axes are drawn again."""
    view = open_page(artifacts[0] / page.FILE)
    ink = view.locator(".xtick text").first.evaluate("t => getComputedStyle(t).fill")
    view.emulate_media(color_scheme="dark")
    for _ in range(100):  # polled from here: the page's policy forbids evaluated strings
        if view.locator(".xtick text").first.evaluate("t => getComputedStyle(t).fill") != ink:
            return
        view.wait_for_timeout(100)
    pytest.fail("the axes keep their colour")


def test_the_page_of_several(artifacts: list[Path], open_page: Any, tmp_path: Path) -> None:
    """One front, the dense model once, and of two what changed."""
    ran = small.run("report", *artifacts, "--html", tmp_path / "family.html")
    assert ran.code == errors.PASSED, ran.err
    assert ran.out.strip() == str(tmp_path / "family.html")
    view = open_page(tmp_path / "family.html", "dark", "phone")
    assert view.eval_on_selector_all("section", "all => all.map(s => s.id)") == [
        "pareto",
        "artifacts",
        "changes",
        "verdicts",
    ]
    text = view.inner_text("main")
    for folder in artifacts:
        assert folder.name in text
    figure = json.loads(view.locator(".plot script").text_content())
    assert [len(trace["x"]) for trace in figure["data"] if trace["name"] == "dense"] == [1]
    assert view.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


# Without a browser --------------------------------------------------------------------------


def test_the_page_of_an_artifact_is_made_again_from_its_files(artifacts: list[Path], tmp_path: Path) -> None:
    ran = small.run("report", artifacts[0], "--html", tmp_path / "again.html")
    assert ran.code == errors.PASSED, ran.err
    old, new = (file.read_text() for file in (artifacts[0] / page.FILE, tmp_path / "again.html"))
    files = r"(?s)<details><summary>Files</summary>.*?</details>"  # the page in the artifact cannot list itself
    assert re.sub(files, "", new) == re.sub(files, "", old)


def test_the_page_says_what_the_manifest_says(artifacts: list[Path]) -> None:
    text = (artifacts[0] / page.FILE).read_text()
    document = json.loads((artifacts[0] / "manifest.json").read_text())
    facts = json.loads((artifacts[0] / page.FACTS).read_text())
    assert f"{document['pruned']['accuracy']:.2f} %" in text
    assert f"{1 / document['pruned']['ratio']:.2f} x" in text
    assert document["device"]["cpu"] in text
    assert {point["name"] for point in facts["family"]} == {folder.name for folder in artifacts}
    assert sum(row["images"] for row in facts["classes"]) == facts["images"] == document["accuracy"]["images"]
    gained, lost = facts["flips"]["gained"], facts["flips"]["lost"]
    drop = document["accuracy"]["dense"] - document["accuracy"]["pruned"]
    assert 100 * (lost - gained) / facts["images"] == pytest.approx(drop)
    assert len(facts["geometry"]["blocks"]) == len(document["shape"])
    assert not re.search(r"""(?:src|href)=["']?https?:""", text), "a link to somewhere"


def test_the_patches_that_each_block_leaves(artifacts: list[Path]) -> None:
    """A block without a number has what came in; a plan without any keeps all."""
    manifest = json.loads((artifacts[0] / "manifest.json").read_text())
    documents = page.read(artifacts[0], manifest)
    plan, profile = documents["plan"], documents["profile"]
    assert page.patches(plan, profile) == []
    profile["table"]["patches"] = [4, 8, 16]
    plan["blocks"][1]["patches"] = 8
    assert page.patches(plan, profile) == [16, 8, 8]
    text = page.artifact_page(manifest, documents)
    assert "Patches that each block leaves" in text
    assert "<td>8 of 16</td>" in text


def test_siblings_are_drawn_beside(artifacts: list[Path]) -> None:
    manifest = json.loads((artifacts[0] / "manifest.json").read_text())
    documents = page.read(artifacts[0], manifest)
    assert documents["facts"]["siblings"] == documents["facts"]["siblings_notes"] == []
    documents["facts"]["siblings"] = [{"name": "deit_larger", "ms": 34.56, "accuracy": 98.76}]
    documents["facts"]["siblings_notes"] = ["These artifacts are of different devices: their latencies do not compare."]
    text = page.artifact_page(manifest, documents)
    assert "<td>dense deit_larger</td>" in text
    assert "<td>34.56 ms</td>" in text
    assert "different devices" in text


def test_a_build_draws_a_sibling(space: Workspace, artifacts: list[Path], tmp_path: Path) -> None:
    """Nothing is done again but the artifact; its manifest says the same otherwise."""
    built = space.build("--latency", "2x", "--latency", "70%", "--sibling", artifacts[1], "--out", tmp_path)
    assert built.code in (errors.PASSED, errors.GATE_FAILED, errors.INCONCLUSIVE), built.err
    facts = json.loads((tmp_path / artifacts[0].name / page.FACTS).read_text())
    manifest = artifact.read_manifest(artifacts[1])
    assert facts["siblings"] == [page.dense_point(manifest)]
    assert facts["siblings_notes"] == []


def test_a_sibling_must_be_an_artifact(space: Workspace, tmp_path: Path) -> None:
    refused = space.build("--latency", "2x", "--sibling", tmp_path)
    assert refused.code == errors.UsageError.exit_code
    assert "manifest.json" in refused.err


def test_hostile_names_do_not_become_markup(artifacts: list[Path]) -> None:
    """Names of classes, domains and devices come from folders and files of strangers."""
    hostile = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    manifest = json.loads((artifacts[0] / "manifest.json").read_text())
    documents = page.read(artifacts[0], manifest)
    manifest["data"]["source"] = manifest["checks"][0]["reason"] = hostile
    documents["facts"]["classes"][0]["name"] = hostile
    documents["facts"]["family"][0]["name"] = hostile
    documents["profile"]["device"]["cpu"] = hostile
    plain = (artifacts[0] / page.FILE).read_text()
    text = page.artifact_page(manifest, documents)
    assert text.count("<script") == plain.count("<script")
    assert "<img src=x" not in text


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda folder, document: document["files"].pop(page.FACTS), "'report.json' is missing"),
        (lambda folder, document: (folder / page.FACTS).write_text("{}"), "report.json has changed"),
        (lambda folder, document: (folder / page.FACTS).unlink(), "report.json is missing"),
    ],
)
def test_what_has_no_page_says_so(artifacts: list[Path], tmp_path: Path, change: Any, says: str) -> None:
    folder = Path(shutil.copytree(artifacts[0], tmp_path / "artifact"))
    document = json.loads((folder / "manifest.json").read_text())
    change(folder, document)
    artifact.write_manifest(folder, document)
    ran = small.run("report", folder, "--html", tmp_path / "page.html")
    assert ran.code == errors.UsageError.exit_code
    assert says in ran.err
    assert not (tmp_path / "page.html").exists()


def test_report_as_json(artifacts: list[Path]) -> None:
    one = small.run("report", artifacts[0], "--format", "json")
    two = small.run("report", *artifacts, "--format", "json")
    assert one.code == two.code == errors.PASSED
    assert [set(ran.document) for ran in (one, two)] == [{"artifacts"}, {"artifacts", "changes"}]
    latency = two.document["changes"][0]
    assert latency["name"] == "latency p50"
    assert latency["judged"] == "worse", "70 % of dense after 50 %"
    assert "| latency p50 |" in small.run("report", *artifacts).out
