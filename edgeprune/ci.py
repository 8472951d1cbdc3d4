"""What CI systems read: JUnit XML, and GitHub's annotations and step summary. Standard library only.

An undecided gate is an error in JUnit, never skipped: what is skipped counts as passed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from edgeprune import artifact
from edgeprune.errors import EdgepruneError, StorageError

#: GitHub's annotation of each verdict; a gate that passes needs none.
LEVELS = {"fail": "error", "inconclusive": "warning"}


@dataclass(frozen=True)
class Suite:
    """The gates of one artifact."""

    name: str
    checks: Sequence[Mapping[str, Any]]
    seconds: float = 0.0


@dataclass
class Outcome:
    """What a command found; filled in by the command."""

    suites: list[Suite] = field(default_factory=list)
    summary: str = ""  # Markdown


@contextmanager
def told(command: str, junit: str | None, github: bool) -> Iterator[Outcome]:
    """Around a command: what it found goes to the file `junit` and, with `github`, to GitHub, also where it fails.

    Raises StorageError, before any work, when the file cannot be written.
    """
    if junit:
        artifact.must_be_writable(Path(junit), "--junit", folder=False)
    outcome = Outcome()
    try:
        yield outcome
    except BaseException as error:
        known = isinstance(error, EdgepruneError)
        why = (
            "interrupted"
            if isinstance(error, KeyboardInterrupt)
            else str(error)
            if known
            else f"internal error: {error!r}"
        )
        _tell(command, outcome, junit, github, why)
        raise
    _tell(command, outcome, junit, github, "")


def _tell(command: str, outcome: Outcome, junit: str | None, github: bool, error: str) -> None:
    if junit:
        try:
            Path(junit).write_bytes(xml(command, outcome.suites, error))
        except OSError as problem:
            raise StorageError(f"cannot write '{junit}': {problem.strerror}; choose another --junit") from problem
    if github:
        for line in notices(command, outcome.suites, error):
            print(line, file=sys.stderr, flush=True)  # GitHub reads both streams; stdout may be JSON
        _step_summary(outcome.summary if not error else f"## edgeprune {command}\n\n{error}\n")


def xml(command: str, suites: Sequence[Suite], error: str = "") -> bytes:
    """JUnit XML: a test suite per artifact, a test case per gate; an error of the command is a case of its own."""
    root = ElementTree.Element("testsuites", name=f"edgeprune {command}")
    for suite in suites:
        verdicts = [check["verdict"] for check in suite.checks]
        node = ElementTree.SubElement(
            root, "testsuite", name=suite.name, tests=str(len(verdicts)), failures=str(verdicts.count("fail")),
            errors=str(verdicts.count("inconclusive")), skipped="0", time=f"{suite.seconds:.3f}",
        )  # fmt: skip
        for check in suite.checks:
            case = ElementTree.SubElement(
                node, "testcase", classname=f"edgeprune.{suite.name}", name=check["name"], time="0"
            )
            if check["verdict"] != "pass":
                kind = "failure" if check["verdict"] == "fail" else "error"
                ElementTree.SubElement(case, kind, type=check["verdict"], message=_xml_text(check["reason"]))
            ElementTree.SubElement(case, "system-out").text = _xml_text(
                f"value {check['value']}, limit {check['limit']}; {check['reason']}"
            )
    if error:
        node = ElementTree.SubElement(
            root, "testsuite", name=f"edgeprune {command}", tests="1", failures="0", errors="1", skipped="0", time="0"
        )
        case = ElementTree.SubElement(node, "testcase", classname="edgeprune", name=command, time="0")
        ElementTree.SubElement(case, "error", type="error", message=_xml_text(error))
    for count in ("tests", "failures", "errors"):
        root.set(count, str(sum(int(node.get(count, "0")) for node in root)))
    ElementTree.indent(root, " ")
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)


def _xml_text(text: str) -> str:
    """Without the control characters that XML cannot hold."""
    return "".join(c if c in "\t\n" or ord(c) >= 32 else "�" for c in text)


def notices(command: str, suites: Sequence[Suite], error: str = "") -> list[str]:
    """GitHub's workflow commands for every gate that did not pass, and for the command's error."""
    lines = [
        f"::{LEVELS[check['verdict']]} title={_property(_title(suite, check))}::{_data(check['reason'])}"
        for suite in suites for check in suite.checks if check["verdict"] in LEVELS
    ]  # fmt: skip
    if error:
        lines.append(f"::error title={_property(f'edgeprune {command}')}::{_data(error)}")
    return lines


def _title(suite: Suite, check: Mapping[str, Any]) -> str:
    return f"{suite.name}: {check['name']} {check['verdict']}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


def _step_summary(markdown: str) -> None:
    """Appended to the file that GitHub names; outside of GitHub there is none."""
    path = os.environ.get("GITHUB_STEP_SUMMARY")
    if not path:
        return
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(markdown.rstrip("\n") + "\n\n")
    except OSError as error:
        raise StorageError(f"cannot write GITHUB_STEP_SUMMARY '{path}': {error.strerror}") from error
