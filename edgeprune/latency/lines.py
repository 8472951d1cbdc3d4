"""Lines: requests as JSON lines on stdin, answers on stdout. The loop of the measuring worker, here or on a device.

Imports the standard library alone, so that it also runs where nothing is installed yet.
"""

from __future__ import annotations

import gc
import json
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

from edgeprune import errors

#: Answers one operation: its name, its arguments; what it returns becomes a JSON line.
Handler = Callable[[str, "dict[str, Any]"], "dict[str, Any]"]


def serve(handle: Handler, greeting: str = "") -> None:
    """Answer every line of stdin until it closes; then the process ends at once, even in the middle of an inference.

    What anything prints goes to stderr: stdout speaks the protocol alone. greeting: the first line of stdout.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the clock decides
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # a library that prints must not speak into the protocol
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(requests.put,), daemon=True).start()
    gc.disable()
    if greeting:
        out.write(greeting + "\n")
        out.flush()
    while True:
        request = json.loads(requests.get())
        try:
            answer = handle(request.pop("op"), request)
        except errors.EdgepruneError as error:
            answer = {"error": str(error), "kind": type(error).__name__}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}", "kind": "EdgepruneError"}
        out.write(json.dumps(answer) + "\n")
        out.flush()


def _read(put: Callable[[str], None]) -> None:
    """Hand over each line of stdin; when it closes, whoever asked is gone: end at once."""
    for line in sys.stdin:
        put(line)
    os._exit(0)
