"""An sshd of our own on this machine: current user, free port, keys made for the occasion, a home folder of its own."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

_CONFIG = """\
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/authorized_keys
PidFile none
PermitRootLogin yes
PasswordAuthentication no
KbdInteractiveAuthentication no
StrictModes no
UsePAM no
SetEnv HOME={home}
"""


@dataclass(frozen=True)
class Sshd:
    """A running server; ``options`` are what a client needs, as ``--ssh-option`` takes them. ``home`` is where logins live."""

    destination: str
    port: int
    options: tuple[str, ...]
    home: Path
    folder: Path

    def flags(self, **replaced: object) -> list[str]:
        """Words for the command line; ``replaced`` by the option's name."""
        options = dict(option.split("=", 1) for option in self.options) | {k: str(v) for k, v in replaced.items()}
        return [word for name, value in options.items() for word in ("--ssh-option", f"{name}={value}")]


def _tool(name: str, package: str) -> str:
    # sshd lies where only the administrator's path leads, and runs by its whole path only.
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if found is None:
        pytest.fail(f"{name} is missing, which this test needs: apt-get install {package}", pytrace=False)
    return found


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def loopback_sshd(folder: Path, more: str = "") -> Iterator[Sshd]:
    """Runs one with its files in ``folder``, and ``more`` lines in its configuration, until the block ends.

    Fails, naming the package, where there is none.
    """
    sshd, keygen = _tool("sshd", "openssh-server"), _tool("ssh-keygen", "openssh-client")
    _tool("ssh", "openssh-client")
    home = folder / "home"
    home.mkdir()
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # it wants an empty folder to lock its children into
    for name in ("host_key", "key", "stranger"):
        subprocess.run([keygen, "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    shutil.copyfile(folder / "key.pub", folder / "authorized_keys")
    port = free_port()
    kind, public = (folder / "host_key.pub").read_text().split()[:2]
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {kind} {public}\n")
    (folder / "config").write_text(_CONFIG.format(port=port, folder=folder, home=home) + more)
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen([sshd, "-D", "-e", "-f", str(folder / "config")], stderr=log)
        try:
            _await(server, port, folder / "log")
            options = (
                f"Port={port}",
                f"IdentityFile={folder / 'key'}",
                "IdentitiesOnly=yes",
                f"UserKnownHostsFile={folder / 'known_hosts'}",
                "StrictHostKeyChecking=yes",
                "GlobalKnownHostsFile=none",
            )
            yield Sshd(f"{getpass.getuser()}@127.0.0.1", port, options, home, folder)
        finally:
            server.terminate()
            server.wait()


def _await(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
            return
        time.sleep(0.05)
    raise AssertionError(f"sshd did not answer: {log.read_text()}")
