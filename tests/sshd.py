"""An OpenSSH server of one's own on loopback: host key, port, client key and configuration in one folder."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

NEEDED = ("sshd", "ssh", "ssh-keygen")


def found(program: str) -> str | None:
    """Where a program is; daemons are often outside of PATH."""
    return shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin:/usr/local/sbin")


def missing() -> str:
    """Why there can be no server, in words; "" when there can."""
    names = [name for name in NEEDED if found(name) is None]
    return f"{', '.join(names)} not installed (Debian: openssh-server, openssh-client)" if names else ""


@dataclass
class Server:
    """A running server, and how a client reaches it: `ssh -F <config> device`."""

    root: Path
    port: int
    process: subprocess.Popen[bytes]

    @property
    def config(self) -> Path:
        return self.root / "ssh_config"

    @property
    def home(self) -> Path:
        """What is sent to the device lies here."""
        return self.root / "home" / "edgeprune-device"

    @property
    def url(self) -> str:
        return "ssh://device"

    def new_host_key(self) -> None:
        """Another host key than the client knows; connections from now on get it."""
        self.stop()
        for path in self.root.glob("host_key*"):
            path.unlink()
        keygen(self.root / "host_key")
        self.process = serve(self.root, self.port)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()


def keygen(path: Path) -> str:
    program = found("ssh-keygen")
    assert program is not None
    subprocess.run([program, "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
    return path.with_suffix(".pub").read_text()


def start(root: Path) -> Server:
    """Start a server that keeps everything in `root`."""
    root.mkdir()
    host = keygen(root / "host_key").split()
    (root / "authorized_keys").write_text(keygen(root / "client_key"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (root / "known_hosts").write_text(f"[127.0.0.1]:{port} {host[0]} {host[1]}\n")
    (root / "ssh_config").write_text(
        f"Host device\n  HostName 127.0.0.1\n  Port {port}\n  User {getpass.getuser()}\n  IdentityFile {root}/client_key\n"
        f"  IdentitiesOnly yes\n  UserKnownHostsFile {root}/known_hosts\n  GlobalKnownHostsFile /dev/null\n"
    )
    (root / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1:{port}\nHostKey {root}/host_key\nAuthorizedKeysFile {root}/authorized_keys\n"
        f"PidFile none\nStrictModes no\nUsePAM no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
        f"PermitRootLogin prohibit-password\nSetEnv XDG_CACHE_HOME={root}/home\nMaxStartups 100\n"
    )
    return Server(root, port, serve(root, port))


def serve(root: Path, port: int) -> subprocess.Popen[bytes]:
    program = found("sshd")
    assert program is not None
    if os.geteuid() == 0:  # its empty folder, which a service manager would make
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    log = root / "sshd.log"
    process = subprocess.Popen([program, "-D", "-f", str(root / "sshd_config"), "-E", str(log)])
    for _ in range(200):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return process
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    raise AssertionError(f"sshd does not listen: {log.read_text()}")
