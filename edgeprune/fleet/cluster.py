"""The engine on a Ray cluster: one job per node at a time, its artifact sent back; a job whose node is lost runs elsewhere.

Cards, weights, data and the cache must be where every node finds them under the same path.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import socket
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeprune import errors, extras
from edgeprune.fleet.matrix import Job
from edgeprune.fleet.schedule import Outcome, Slot, measures_there

CONNECT_S = 60.0
LISTEN_S = 10.0
POLL_S = 1.0


def describe() -> dict[str, Any]:
    """On a node: its fingerprint, as a profile has it."""
    from edgeprune.latency.machine import here

    return dict(here().fingerprint)


def work(given: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    """On a node: run a job in a process of its own; returns what it said, and a tar of what it wrote."""
    from edgeprune.fleet import local

    with tempfile.TemporaryDirectory(prefix="edgeprune-") as name:
        folder = Path(name)
        child = local.begin(given, folder)
        try:
            child.wait()
        finally:
            child.kill()
        said = local.ended(child, folder)
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as archive:
            archive.add(folder, ".")
        return said, packed.getvalue()


def _must_listen(address: str) -> None:
    """Raise OSError unless something listens at host:port; Ray tries for minutes, and then ends this process."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=LISTEN_S).close()


class Cluster:
    """The nodes of a running Ray cluster: $RAY_ADDRESS, or the one on this machine.

    Raises UsageError without ray, TargetUnavailable when there is no cluster.
    """

    def __init__(self, work_folder: Path, common: Mapping[str, Any]) -> None:
        extras.need("--engine ray", {"ray": "ray"}, "pip install 'edgeprune[ray]'")
        import ray

        self._ray, self._work, self._common = ray, work_folder, common
        address = os.environ.get("RAY_ADDRESS") or "auto"
        self._mine = not ray.is_initialized()
        try:
            if self._mine:
                _must_listen(address)
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, RuntimeError, ValueError) as error:
            raise errors.TargetUnavailable(
                f"there is no Ray cluster at '{address}'; start one with `ray start --head`, or set RAY_ADDRESS ({error})"
            ) from error
        self._fingerprints: dict[str, Mapping[str, Any]] = {}
        self._doubtful: set[str] = set()  # nodes on which a job was lost
        self._running: dict[Any, tuple[Job, str, float]] = {}  # by Ray's reference: job, node, when it began

    def __enter__(self) -> Cluster:
        self._stdout = contextlib.redirect_stdout(
            sys.stderr
        )  # Ray reports lost nodes on stdout, which is for the result
        self._stdout.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        for reference in self._running:
            with contextlib.suppress(Exception):
                self._ray.cancel(reference, force=True)
        if self._mine:
            self._ray.shutdown()
        self._stdout.__exit__(None, None, None)

    def slots(self) -> list[Slot]:
        """Nodes that have lost a job are left out while there are others: Ray takes a dead node for alive until it has missed its heartbeats."""
        found = []
        alive = self._nodes()
        for node in [node for node in alive if node["NodeID"] not in self._doubtful] or alive:
            name = node["NodeID"]
            if name not in self._fingerprints:
                try:
                    self._fingerprints[name] = self._ray.get(self._on(describe, name, 0).remote(), timeout=CONNECT_S)
                except self._ray.exceptions.RayError:
                    continue  # lost, or not ready yet
            found.append(Slot(name, node["NodeManagerHostname"], self._fingerprints[name]))
        return found

    def start(self, job: Job, slot: Slot, profile: Mapping[str, Any] | None) -> None:
        from edgeprune.fleet import local

        # A job that measures here takes all CPUs of its node, so that Ray puts nothing beside it.
        cpus = next((node["Resources"]["CPU"] for node in self._nodes() if node["NodeID"] == slot.name), 0)
        task = self._on(work, slot.name, cpus if measures_there(job, slot) else min(1, cpus))
        reference = task.remote(local.document(job, profile, self._common))
        self._running[reference] = (job, slot.name, time.monotonic())

    def wait(self) -> Outcome:
        while True:
            ready, _ = self._ray.wait(list(self._running), timeout=POLL_S)
            if ready:
                break
            alive = {node["NodeID"] for node in self._nodes()}
            if lost := [reference for reference, (_, node, _) in self._running.items() if node not in alive]:
                return self._lost(lost[0])
        job, _, began = self._running[ready[0]]
        try:
            said, packed = self._ray.get(ready[0])
        except self._ray.exceptions.RayTaskError as error:
            del self._running[ready[0]]
            return Outcome(job, {"exit_code": errors.EdgepruneError.exit_code, "error": str(error.cause)})
        except self._ray.exceptions.RayError:
            return self._lost(ready[0])
        del self._running[ready[0]]
        folder = Path(tempfile.mkdtemp(prefix=".job-", dir=self._work))
        try:
            with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
                archive.extractall(folder, filter="data")
        except (OSError, tarfile.TarError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise errors.StorageError(f"cannot unpack what {job.name} made: {error}") from error
        return Outcome(job, said, folder, time.monotonic() - began)

    def _lost(self, reference: Any) -> Outcome:
        job, node, _ = self._running.pop(reference)
        self._doubtful.add(node)
        return Outcome(job, None)

    def _nodes(self) -> list[dict[str, Any]]:
        """Those that are there and lend CPUs; a head node often lends none."""
        return [node for node in self._ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) > 0]

    def _on(self, function: Any, node: str, cpus: float) -> Any:
        """The function as a task on that very node. The schedule tries again, not Ray: it knows what else runs where."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        strategy = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
        return self._ray.remote(function).options(num_cpus=cpus, max_retries=0, scheduling_strategy=strategy)
