"""TVM's RPC tracker: the devices of a farm, by name. It is remote code execution in clear text: for trusted networks only."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tvm import rpc
from tvm.rpc import base

from qsparse_export.errors import TargetError, UsageError

ANSWER_SECONDS = 10.0
"""How long a tracker may take to answer anything but a request for a device."""


@dataclass(frozen=True)
class Address:
    """A device that a tracker lent: where its server listens, and the word that it lets us in with, for some seconds."""

    host: str
    port: int
    matchkey: str

    def connect(self, session_seconds: float) -> Any:
        """A TVM RPCSession, which the server ends after so long; TargetError when it does not let us in."""
        try:
            return rpc.connect(self.host, self.port, self.matchkey, session_seconds)
        except (RuntimeError, OSError) as error:
            raise TargetError(
                f"the server at {self.host}:{self.port} does not let us in ({str(error).strip().splitlines()[-1]})"
            ) from error


@dataclass(frozen=True)
class Tracker:
    """Where a tracker listens, and the name under which it has the devices."""

    host: str
    port: int
    key: str

    @staticmethod
    def parse(address: str, key: str) -> Tracker:
        """Of "host:port"; UsageError for anything else."""
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 1 << 16:
            raise UsageError(f"a tracker is HOST:PORT, such as 127.0.0.1:9190; got {address!r}")
        return Tracker(host, int(port), key)

    def require_device(self) -> int:
        """How many devices it has under the name; TargetError when there is none, or no tracker."""
        return len(self.devices())

    def devices(self) -> tuple[str, ...]:
        """ "host:port" of each device under the name, those at work included; TargetError when there is none, or no tracker.

        The tracker keeps to the order in which they came.
        """
        with self._session() as session:
            base.sendjson(session, [base.TrackerCode.SUMMARY])
            servers = _answer(base.recvjson(session))["server_info"]
        found = tuple(":".join(map(str, server["addr"])) for server in servers if server["key"] == f"server:{self.key}")
        if not found:
            names = sorted({server["key"].removeprefix("server:") for server in servers})
            raise TargetError(
                f"the tracker at {self.host}:{self.port} has no device {self.key!r}, only {', '.join(names) or 'none at all'}; "
                f"start a server on it with: python -m tvm.exec.rpc_server --tracker {self.host}:{self.port} --key {self.key}"
            )
        return found

    def request(self, wait_seconds: float) -> Address:
        """Borrows a device that nobody works on; TargetError when none becomes free in that time, or no tracker answers.

        It is lent for some six seconds: connect at once, and it stays ours until the connection ends.
        """
        with self._session() as session:
            session.settimeout(wait_seconds)
            base.sendjson(session, [base.TrackerCode.REQUEST, self.key, "", 1])
            try:
                host, port, matchkey = _answer(base.recvjson(session))
            except TimeoutError:
                raise TargetError(
                    f"no device {self.key!r} became free in {wait_seconds:g} s; end what works on them, or try again later"
                ) from None
        return Address(host, port, matchkey)

    @contextlib.contextmanager
    def _session(self) -> Iterator[socket.socket]:
        """A connection to the tracker, which has said that it is one; TVM's own would wait for an answer forever."""
        try:
            with socket.create_connection((self.host, self.port), ANSWER_SECONDS) as session:
                session.sendall(struct.pack("<i", base.RPC_TRACKER_MAGIC))
                if struct.unpack("<i", base.recvall(session, 4))[0] != base.RPC_TRACKER_MAGIC:
                    raise ValueError("what answers is no TVM tracker")
                yield session
        except (OSError, ValueError, TypeError, LookupError) as error:
            raise TargetError(
                f"no TVM tracker answers at {self.host}:{self.port} ({error}); start one with: "
                f"python -m tvm.exec.rpc_tracker --host {self.host} --port {self.port} --port-end {self.port + 1}"
            ) from error


def _answer(value: Any) -> Any:
    """What a tracker answered beside its code; ValueError when that says that it failed."""
    code, answer = value
    if code != base.TrackerCode.SUCCESS:
        raise ValueError(f"it answered {value!r:.200}")
    return answer
