"""Bundles with qsparse-device-bench, and altered copies of them whose checksums hold."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime

QUICK = ("-p", "8", "-n", "4", "-r", "2", "-t", "1")


def installed_onnxruntime() -> str:
    """libonnxruntime.so of the installed wheel: a device would have its own."""
    (library,) = Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*")
    return str(library)


def altered(bundle: Path, to: Path, files: Mapping[str, bytes | None] | None = None, **manifest: Any) -> Path:
    """A copy with other content of ``files`` (None: left out) and other entries of the manifest."""
    shutil.copytree(bundle, to)
    plain = json.loads((to / "manifest.json").read_text()) | manifest
    for name, content in (files or {}).items():
        if content is None:
            del plain["files"][name]
            (to / name).unlink()
        else:
            (to / name).write_bytes(content)
            plain["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (to / "manifest.json").write_text(json.dumps(plain))
    return to


def with_other_tokens(bundle: Path, to: Path) -> Path:
    """A copy whose manifest records another first token of the kernels than they generate."""
    parity = json.loads((bundle / "manifest.json").read_text())["parity"]
    (native,) = (path for path in parity["paths"] if path["path"] == "native")
    native["greedy_ids"][0] = (native["greedy_ids"][0] + 1) % 96
    return altered(bundle, to, parity=parity)
