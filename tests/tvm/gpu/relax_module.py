"""LIBRARY ARCH: a Relax module with products of ours, an op that TVM schedules, and a cache that is written in place.

    main(x [3, 96], ternary, ternary_scales, nbits, nbits_scales, cache [3, 40])
        -> (ternary [3, 64], nbits [3, 40], probabilities [3, 40], cache)

where ``ternary`` is the first product of x, ``nbits`` the second one of that, ``probabilities`` its softmax, which is added to
the cache. Run as a program, with TVM set up to call nvcc, it exports the module; what can be goes into CUDA graphs.
"""

from __future__ import annotations

import sys
from typing import Any

import tvm
from tvm import relax, tirx
from tvm.relax.backend.gpu_generic import legalize_passes
from tvm.tirx.script.builder import ir as T

from qsparse_export.runtimes.tvm.gpu.program import Program
from qsparse_export.runtimes.tvm.gpu.sparse_matmul_nbits import sparse_matmul_nbits
from qsparse_export.runtimes.tvm.gpu.sparse_ternary_matmul import sparse_ternary_gemv
from qsparse_export.runtimes.tvm.gpu.workgroup import assign, kernel, threads, when

ROWS, WIDTH, MIDDLE, OUTPUTS = 3, 96, 64, 40
K_TERNARY, K_NBITS, BITS, GROUP = 40, 25, 4, 32


def programs() -> tuple[Program, Program]:
    """The two products."""
    return (
        sparse_ternary_gemv(k_in=WIDTH, n=[MIDDLE], k=K_TERNARY),
        sparse_matmul_nbits(k_in=MIDDLE, n=[OUTPUTS], bits=BITS, group=GROUP, k=K_NBITS),
    )


def accumulate() -> tirx.PrimFunc:
    """Adds "given" to "cache", in place."""

    def body() -> None:
        given = T.arg("given", T.buffer((ROWS, OUTPUTS), "float32"))
        cache = T.arg("cache", T.buffer((ROWS, OUTPUTS), "float32"))
        with threads(ROWS) as (row, _, thread), when(thread < OUTPUTS):
            assign(cache, cache[row, thread] + given[row, thread], row, thread)

    return kernel("accumulate", body)


def _emitted(builder: relax.BlockBuilder, program: Program, tensors: dict[str, Any], rows: int) -> Any:
    """Calls of the kernels of a program; its output."""
    tensors, buffers = dict(tensors), program.buffers()
    for function in program.kernels:
        names = [buffer.name for buffer in function.params]
        made = [name for name in names if name not in tensors]
        types = [_type(buffers[name], rows) for name in made]
        variable = builder.add_func(_scheduled(function), str(function.attrs["global_symbol"]))
        inputs = [tensors[name] for name in names if name in tensors]
        result = builder.emit(relax.op.call_tir(variable, inputs, types if len(types) > 1 else types[0]))
        parts = [builder.emit(relax.TupleGetItem(result, i)) for i in range(len(made))] if len(made) > 1 else [result]
        tensors |= dict(zip(made, parts, strict=True))
    return tensors["y"]


def _type(buffer: tirx.Buffer, rows: int) -> relax.TensorType:
    shape = [rows if isinstance(size, tirx.Var) else int(size) for size in buffer.shape]
    return relax.TensorType(shape, str(buffer.dtype))


def _scheduled(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """Left alone by TVM's own schedules; the module names it."""
    return function.without_attr("global_symbol").with_attr("tirx.is_scheduled", True)


def module() -> tvm.IRModule:
    """Of Relax."""
    builder = relax.BlockBuilder()
    first, second = programs()
    x = relax.Var("x", relax.TensorType((ROWS, WIDTH), "float32"))
    weights = []
    for name, program in (("ternary", first), ("nbits", second)):
        for given in ("w", "scales"):
            weights.append(relax.Var(f"{name}_{given}", _type(program.buffers()[given], ROWS)))
    cache = relax.Var("cache", relax.TensorType((ROWS, OUTPUTS), "float32"))
    with builder.function("main", [x, *weights, cache]):
        with builder.dataflow():
            ternary = _emitted(builder, first, {"x": x, "w": weights[0], "scales": weights[1]}, ROWS)
            nbits = _emitted(builder, second, {"x": ternary, "w": weights[2], "scales": weights[3]}, ROWS)
            probabilities = builder.emit(relax.op.nn.softmax(nbits))
            adding = builder.add_func(_scheduled(accumulate()), "accumulate")
            added = builder.emit(relax.op.call_tir_inplace(adding, [probabilities, cache], [1], [cache.ty]))
            results = builder.emit_output(relax.Tuple([ternary, nbits, probabilities, added]))
        builder.emit_func_output(results)
    return builder.get()


def passes(target: tvm.target.Target) -> tvm.transform.Sequential:
    """TVM's own, without the one that looks for reshapes, which our kernels make fail."""
    transform = relax.transform
    return tvm.transform.Sequential(
        [
            *legalize_passes(target),
            transform.ToNonDataflow(),
            transform.RemovePurityChecking(),
            transform.CallTIRRewrite(),
            transform.StaticPlanBlockMemory(),
            transform.RewriteCUDAGraph(),
            transform.LowerAllocTensor(),
            transform.KillAfterLastUse(),
            transform.LowerRuntimeBuiltin(),
            transform.ComputePrimValue(),
            transform.VMShapeLower(),
            transform.AttachGlobalSymbol(),
        ]
    )


if __name__ == "__main__":
    library, arch = sys.argv[1:]
    target = tvm.target.Target({"kind": "cuda", "arch": arch}, host={"kind": "llvm"})
    with (
        target,
        tvm.transform.PassContext(config={"relax.backend.use_cuda_graph": True}),
    ):  # what TVM calls nvcc for is the current target
        built = tvm.compile(module(), target, relax_pipeline=passes(target))
    built.export_library(library)
