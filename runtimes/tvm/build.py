"""A Relax module -> machine code: the order of TVM's passes, and the file that they make."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tvm import relax
from tvm.support import cc

from qsparse_export.errors import TargetError
from qsparse_export.runtimes.tvm.environment import tvm

COMPILERS = {
    "x86_64-unknown-linux-gnu": ("g++", "g++"),
    "aarch64-unknown-linux-gnu": ("aarch64-linux-gnu-g++", "g++-aarch64-linux-gnu"),
}
"""Triple to the program that links for it on another machine, and the Debian package that brings it."""


def pipeline(schedule: Sequence[Any] = ()) -> Any:
    """TVM's own build pipeline, with a reshape that is a view and standard ops fused; ``schedule`` are the passes that
    schedule what TVM makes of standard ops, on a device where that must be done.

    TVM tells reshapes from other kernels by a pattern (RewriteDataflowReshape), and fails on kernels that are no blocks: so
    the op itself is left for the virtual machine.
    """
    transform = relax.transform
    return tvm().transform.Sequential(
        [
            relax.backend.DispatchSampling(),
            relax.backend.DispatchSortScan(),
            transform.LegalizeOps(skip_ops=["relax.reshape"]),
            transform.AnnotateTIROpPattern(),
            transform.FoldConstant(),
            transform.FuseOps(),
            transform.FuseTIR(),
            *schedule,
            transform.ToNonDataflow(),
            transform.RemovePurityChecking(),
            transform.CallTIRRewrite(),
            transform.StaticPlanBlockMemory(),
            transform.LowerAllocTensor(),
            transform.KillAfterLastUse(),
            transform.LowerRuntimeBuiltin(),
            transform.ComputePrimValue(),
            transform.VMShapeLower(),
            transform.AttachGlobalSymbol(),
        ]
    )


def linker(triple: str, here: str) -> str:
    """The program that links for ``triple`` on a machine that is ``here``; TargetError naming what to install."""
    own = triple == here
    compiler, package = COMPILERS.get(triple, (None, None))
    found = cc.get_cc() if own else compiler and shutil.which(compiler)
    if found:
        return str(found)
    if own:
        raise TargetError(
            "the runtime tvm links its module with the system's C++ compiler, and there is none: apt-get install g++"
        )
    if package is None:
        known = ", ".join(COMPILERS)
        raise TargetError(f"the runtime tvm knows no linker for {triple}; it has one for {known}, or for this machine")
    raise TargetError(
        f"the runtime tvm links for {triple} with {compiler}, which is not here: apt-get install {package}"
    )


def build(module: Any, target: Any, file: Path, compiler: str) -> None:
    """Compiles ``module`` for the TVM target ``target`` and writes the shared library ``file``, linked by ``compiler``."""
    executable = tvm().compile(module, target, relax_pipeline=pipeline())
    executable.export_library(str(file), fcompile=cc.cross_compiler(compiler))
