"""A job in a process of its own: `python -m edgeprune.fleet.job FOLDER` with the job as a JSON line on stdin.

Writes `result.json` to FOLDER: an exit code, an error in words, and the profile; an artifact lies beside it. It ends when
stdin closes: whoever wanted the result is gone. What it prints goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

from edgeprune import api, errors
from edgeprune.console import Console

RESULT = "result.json"
ARTIFACTS = "artifacts"
RECORDED = "recorded.json"


def command(folder: Path) -> list[str]:
    return [sys.executable, "-m", "edgeprune.fleet.job", str(folder)]


def run(given: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Do it; returns what goes to `result.json`. Errors that are not of edgeprune are raised."""
    options = dict(given["options"])
    if given["profile"] is not None:
        path = folder / RECORDED
        path.write_text(json.dumps(given["profile"]), encoding="utf-8")
        options["profile"] = path
    shared: dict[str, Any] = {"cache_dir": given["cache_dir"], "rebuild": given["rebuild"], "console": Console()}
    try:
        if given["profiles"]:
            return {"exit_code": errors.PASSED, "error": "", "profile": api.table(**options, **shared)}
        [built] = api.build(**options, **shared, out=folder / ARTIFACTS)
        return {"exit_code": built.exit_code, "error": "", "artifact": built.folder.name}
    except errors.EdgepruneError as error:
        return {"exit_code": error.exit_code, "error": str(error)}


def _watch() -> None:
    for _ in sys.stdin:
        pass
    os._exit(errors.INTERRUPTED)


def main() -> None:
    folder = Path(sys.argv[1])
    given = json.loads(sys.stdin.readline())
    threading.Thread(target=_watch, daemon=True).start()
    result = run(given, folder)
    (folder / f".{RESULT}").write_text(json.dumps(result), encoding="utf-8")
    (folder / f".{RESULT}").replace(folder / RESULT)
    os._exit(errors.PASSED)  # the watcher still reads


if __name__ == "__main__":
    main()
