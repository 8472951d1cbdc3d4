"""The archive: the worker as one file that any Python from 3.9 on runs: what it needs of edgeprune, and nothing else."""

from __future__ import annotations

import hashlib
import io
import zipfile
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parent.parent
#: Of edgeprune. The tests run the archive outside of it, so that nothing is missing.
FILES = (
    "errors.py", "types.py", "onnxfile.py", "latency/__init__.py", "latency/agent.py", "latency/device.py", "latency/lines.py",
    "latency/machine.py", "latency/noise.py", "latency/statistics.py", "latency/worker.py", "runtimes/*.py",
)  # fmt: skip
MAIN = """\
import sys
if sys.version_info < (3, 9):
    sys.exit("edgeprune's worker needs Python 3.9 or newer, and this is " + sys.version.split()[0])
from edgeprune.latency import agent
agent.main(sys.argv[1:])
"""
EPOCH = (1980, 1, 1, 0, 0, 0)  # the same files make the same archive


@cache
def worker() -> tuple[str, bytes]:
    """The name of the archive, which has its hash, and its bytes."""
    paths = sorted(path for pattern in FILES for path in PACKAGE.glob(pattern))
    entries = {f"edgeprune/{path.relative_to(PACKAGE).as_posix()}": path.read_bytes() for path in paths}
    entries |= {"edgeprune/__init__.py": b"", "__main__.py": MAIN.encode()}
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in sorted(entries.items()):
            archive.writestr(zipfile.ZipInfo(name, EPOCH), content, zipfile.ZIP_DEFLATED)
    found = packed.getvalue()
    return f"worker-{hashlib.sha256(found).hexdigest()[:16]}.pyz", found
