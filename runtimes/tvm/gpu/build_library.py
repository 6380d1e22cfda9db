"""The child process of :mod:`~qsparse_export.runtimes.tvm.gpu.compile_gpu`: a module as JSON to a shared library."""

from __future__ import annotations

import sys
from pathlib import Path


def build(module: Path, kind: str, arch: str, host_triple: str, compiler: str, library: Path) -> None:
    """Compile the functions in ``module``, of Relax too, and link ``library`` with ``compiler``."""
    from qsparse_export.runtimes.tvm import environment

    tvm = environment.tvm()
    from tvm.s_tir import dlight

    from qsparse_export.runtimes.tvm.build import pipeline

    device = {"kind": kind, "arch": arch} if arch else {"kind": kind}
    host = {"kind": "llvm", "mtriple": host_triple} if host_triple else {"kind": "llvm"}
    target = tvm.target.Target(device, host=host)
    gpu = dlight.gpu
    schedule = dlight.ApplyDefaultSchedule(
        gpu.Matmul(), gpu.GEMV(), gpu.Reduction(), gpu.GeneralReduction(), gpu.Fallback()
    )
    with target:  # what TVM calls nvcc for, and schedules for, is the current target
        built = tvm.compile(
            tvm.ir.load_json(module.read_text("utf-8")), target=target, relax_pipeline=pipeline([schedule])
        )
    built.export_library(str(library), fcompile=tvm.support.cc.cross_compiler(compiler))


if __name__ == "__main__":
    given, kind, arch, host_triple, compiler, made = sys.argv[1:]
    build(Path(given), kind, arch, host_triple, compiler, Path(made))
