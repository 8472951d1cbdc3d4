"""SSH: how a device is reached: the user's own OpenSSH client, with its configuration, keys and known hosts.

Host keys are always checked, nothing is ever asked for, and no word of an address can become an option or a command.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from edgeprune import errors

SCHEME = "ssh://"
CONNECT_S = 20
#: A connection that is silent for so long is taken for lost.
ALIVE_S, ALIVE_COUNT = 15, 4
#: What ssh itself ends with when there is no connection, or no longer.
LOST = 255
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\Z")
_ADDRESS = re.compile(r"[0-9A-Fa-f:.]+(%[A-Za-z0-9_.-]+)?\Z")  # IPv6, perhaps with a zone
#: What ssh says where trying again would not help, and what to do about it.
FINAL = {
    "REMOTE HOST IDENTIFICATION HAS CHANGED": "its host key has changed; if that is as it should be, remove the old one with ssh-keygen -R",
    "Host key verification failed": "its host key is not known; connect once with ssh and confirm it",
    "Permission denied": "it does not accept your key; check with ssh that you can log in without a password",
    "Could not resolve hostname": "there is no host of this name",
    "Bad owner or permissions": "ssh refuses a file of its configuration",
    "Can't open user config file": "ssh cannot read its configuration",
    "no such identity": "ssh has no such key",
    "Bad configuration option": "ssh does not understand its configuration",
}


@dataclass(frozen=True)
class Address:
    """Where a device is: what `ssh://user@host:port` says, and perhaps a configuration file for ssh."""

    host: str
    user: str = ""
    port: int = 0  # 0 = as ssh's configuration has it
    config: str = ""  # a file for `ssh -F`; "" = the user's and the system's

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{SCHEME}{self.user + '@' if self.user else ''}{host}{f':{self.port}' if self.port else ''}"

    def command(self, script: str, *arguments: str) -> list[str]:
        """The command line that runs a shell script there; `arguments` are its $1, $2 and so on."""
        # What ssh is given as a command goes through the login shell there, whichever that is.
        remote = " ".join(map(shlex.quote, ["/bin/sh", "-c", script, "edgeprune", *arguments]))
        options = ["BatchMode=yes", "StrictHostKeyChecking=yes", f"ConnectTimeout={CONNECT_S}", "ClearAllForwardings=yes",
                   f"ServerAliveInterval={ALIVE_S}", f"ServerAliveCountMax={ALIVE_COUNT}"]  # fmt: skip
        return [
            "ssh", *(["-F", self.config] if self.config else []), "-T", *(f"-o{option}" for option in options),
            *(["-p", str(self.port)] if self.port else []), *(["-l", self.user] if self.user else []),
            "--", self.host, remote,
        ]  # fmt: skip

    def run(self, script: str, *arguments: str, data: bytes = b"", timeout_s: float = 120.0) -> tuple[int, str]:
        """Run a shell script there; returns its exit code and stdout. TargetUnavailable when there is no connection."""
        try:
            done = subprocess.run(
                self.command(script, *arguments), input=data, capture_output=True, timeout=timeout_s, check=False
            )
        except FileNotFoundError:
            raise errors.TargetUnavailable("there is no ssh here; install the OpenSSH client") from None
        except subprocess.TimeoutExpired:
            raise errors.TargetUnavailable(f"{self.url} did not answer within {timeout_s:g} s") from None
        if done.returncode == LOST:
            raise errors.TargetUnavailable(self.why(done.stderr.decode(errors="replace")))
        return done.returncode, done.stdout.decode(errors="replace")

    def why(self, said: str) -> str:
        """Why there is no connection, from what ssh said, with what to do about it."""
        reason = next((f": {fix}" for sign, fix in FINAL.items() if sign in said), "")
        last = next((line for line in reversed(said.strip().splitlines()) if line.strip()), "ssh did not say why")
        return f"{self.url} cannot be reached{reason} ({last.strip()})"

    def final(self, said: str) -> bool:
        """Whether what ssh said means that trying again would not help."""
        return any(sign in said for sign in FINAL)


def parse(text: str, config: str | Path = "") -> Address:
    """`ssh://[user@]host[:port]`; UsageError for anything else."""
    wrong = f"{text!r} is not ssh://[user@]host[:port]"
    if not text.isprintable() or " " in text:  # urlsplit would quietly drop some of it
        raise errors.UsageError(f"{wrong}: a space or a control character is no part of a host name")
    try:
        parts = urlsplit(text)
        port = parts.port or 0
    except ValueError:
        raise errors.UsageError(f"{wrong}: the port must be a number from 1 to 65535") from None
    if not text.startswith(SCHEME) or parts.path.strip("/") or parts.query or parts.fragment:
        raise errors.UsageError(f"{wrong}; write it so, without a path")
    if parts.password is not None:
        raise errors.UsageError("an address holds no password; log in with a key, see ssh-keygen and ssh-copy-id")
    user, _, host = parts.netloc.rpartition("@")
    host = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    if not (_NAME.match(host) or _ADDRESS.match(host)):
        raise errors.UsageError(f"{wrong}: '{host}' is no host name")
    if user and not _NAME.match(user):
        raise errors.UsageError(f"{wrong}: '{user}' is no user name")
    if config and not Path(config).is_file():
        raise errors.UsageError(f"there is no ssh configuration '{config}'")
    return Address(host, user, port, str(Path(config).resolve()) if config else "")
