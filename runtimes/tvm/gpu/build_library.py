"""The child process of :mod:`~qsparse_export.runtimes.tvm.gpu.compile_gpu`: a module as JSON to a shared library."""

from __future__ import annotations

import sys
from pathlib import Path

import tvm


def build(module: Path, kind: str, arch: str, host_triple: str, compiler: str, library: Path) -> None:
    """Compile the functions in ``module`` and link ``library`` with ``compiler``."""
    device = {"kind": kind, "arch": arch} if arch else {"kind": kind}
    host = {"kind": "llvm", "mtriple": host_triple} if host_triple else {"kind": "llvm"}
    target = tvm.target.Target(device, host=host)
    with target:  # what TVM calls nvcc for is the current target
        built = tvm.compile(tvm.ir.load_json(module.read_text("utf-8")), target=target)
    built.export_library(str(library), fcompile=tvm.support.cc.cross_compiler(compiler))


if __name__ == "__main__":
    build(Path(sys.argv[1]), *sys.argv[2:6], Path(sys.argv[6]))
