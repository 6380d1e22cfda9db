"""TVM's RPC tracker: the devices of a farm, by name. It is remote code execution in clear text: for trusted networks only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import rpc

from qsparse_export.errors import TargetError, UsageError


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

    def connect(self) -> Any:
        """A TVM TrackerSession; TargetError when nothing answers."""
        try:
            return rpc.connect_tracker(self.host, self.port)
        except (RuntimeError, OSError) as error:
            raise TargetError(
                f"no TVM tracker answers at {self.host}:{self.port} ({str(error).splitlines()[0]}); start one with: "
                f"python -m tvm.exec.rpc_tracker --host {self.host} --port {self.port} --port-end {self.port + 1}"
            ) from error

    def require_device(self) -> int:
        """How many devices it has under the name; TargetError when there is none, or no tracker."""
        servers = self.connect().summary()["server_info"]
        count = sum(server["key"] == f"server:{self.key}" for server in servers)
        if not count:
            names = sorted({server["key"].removeprefix("server:") for server in servers})
            raise TargetError(
                f"the tracker at {self.host}:{self.port} has no device {self.key!r}, only {', '.join(names) or 'none at all'}; "
                f"start a server on it with: python -m tvm.exec.rpc_server --tracker {self.host}:{self.port} --key {self.key}"
            )
        return count
