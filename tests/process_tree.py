"""Which processes a process has started, from Linux's /proc."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path


def children(process_id: int) -> list[int]:
    """Ids of the processes that ``process_id`` started and that still run, from the oldest to the youngest."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        fields = _fields(int(status.parent.name))
        if fields and int(fields[1]) == process_id:
            found.append(int(status.parent.name))
    return sorted(found)


def is_alive(process_id: int) -> bool:
    """Whether it runs: one that ended and waits for its parent to notice does not."""
    return bool(_fields(process_id))


def kill_if_alive(process_id: int) -> None:
    """So that a test that failed leaves nothing that takes the processor from the next ones."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process_id, signal.SIGKILL)


def _fields(process_id: int) -> list[str]:
    """What /proc says after the name: state, parent, and so on; empty once it has ended."""
    try:
        fields = Path(f"/proc/{process_id}/stat").read_text("utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return []
    return fields if fields[0] != "Z" else []
