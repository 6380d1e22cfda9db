"""The options of ``qsparse-bench BUNDLE`` that measure it on another machine."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from qsparse_export.errors import UsageError

if TYPE_CHECKING:
    from qsparse_export.bench.remote import SshDevice

TIMEOUT_SECONDS = 3600.0


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds them to ``parser``, as a group."""
    far = parser.add_argument_group("on another machine")
    far.add_argument("--remote", metavar="USER@HOST", help="measure there, over ssh")
    far.add_argument(
        "--ssh-option",
        action="append",
        metavar="NAME=VALUE",
        help="as ssh -o takes it, such as Port=2222; may be repeated (more lasting: ~/.ssh/config)",
    )
    far.add_argument("--onnxruntime", metavar="PATH", help="libonnxruntime.so there (default: the system's own)")
    far.add_argument(
        "--remote-folder", metavar="DIR", help="keep the files there, and copy only those that changed the next time"
    )
    far.add_argument("--unchecked", action="store_true", help="measure a bundle that records no tokens to check")
    far.add_argument(
        "--timeout",
        type=float,
        metavar="S",
        help="seconds for copying, and again for measuring; with --rpc for all that a device does (default 3600)",
    )


def require_consistent(arguments: argparse.Namespace) -> None:
    """UsageError when something is said about another machine and none is named, or can never come to pass."""
    if arguments.remote is None:
        for name in (
            "ssh_option",
            "onnxruntime",
            "remote_folder",
            "unchecked",
            *(() if arguments.rpc else ("timeout",)),
        ):
            if getattr(arguments, name):
                raise UsageError(f"--{name.replace('_', '-')} needs --remote USER@HOST: nothing is measured elsewhere")
    if arguments.timeout is not None and not arguments.timeout > 0:
        raise UsageError(f"--timeout {arguments.timeout:g}; expected seconds, more than 0")


def connected(arguments: argparse.Namespace, tell: Callable[[str], object]) -> SshDevice:
    """The device that ``--remote`` names, which has answered; ``tell`` as :class:`SshDevice` has it."""
    from qsparse_export.bench.remote import SshDevice, connect
    from qsparse_export.bench.ssh import Ssh

    ssh = Ssh(arguments.remote, tuple(arguments.ssh_option or ()))
    return SshDevice(
        ssh=ssh,
        machine=connect(ssh),
        folder=arguments.remote_folder,
        onnxruntime=arguments.onnxruntime,
        unchecked=arguments.unchecked,
        timeout_s=arguments.timeout or TIMEOUT_SECONDS,
        tell=tell,
    )
