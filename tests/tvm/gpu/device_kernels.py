"""Kernels as TVM hands them to a driver: source, arguments in order, and the grid for a number of rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

import tvm
from tvm import tirx
from tvm.tirx.build import codegen_build, split_host_device_mods

from qsparse_export.runtimes.tvm.gpu.program import Program

AXES = ("blockIdx.x", "blockIdx.y", "threadIdx.x")


@dataclass(frozen=True)
class Launch:
    """``arguments``: names of tensors, and numbers."""

    arguments: tuple[str | int, ...]
    blocks_x: int
    blocks_y: int
    threads: int

    @property
    def numbers(self) -> list[int]:
        """What a WebGPU kernel has in its uniform buffer, as TVM's own runtime fills it: numbers, the blocks along x last."""
        return [*(each for each in self.arguments if isinstance(each, int)), self.blocks_x]


@dataclass(frozen=True)
class DeviceKernel:
    """``arguments`` are names of tensors and integers; these and the ``extents`` of AXES are expressions in the sizes that
    are not known before a call, and in what the host function binds before it launches.
    """

    name: str
    source: str
    arguments: tuple[str | tirx.Expr, ...]
    extents: tuple[tirx.Expr, ...]
    bound: tuple[tirx.Bind, ...]

    def launch(self, sizes: Mapping[str, int]) -> Launch:
        """What TVM's host function passes to the driver; ``sizes`` as :meth:`Program.sizes` has them."""
        analyzer = tvm.sym.Analyzer()
        for bind in self.bound:
            known = sizes.get(bind.var.name)
            value = analyzer.simplify(bind.value) if known is None else tirx.const(known, "int32")
            if isinstance(value, tirx.IntImm):
                analyzer.bind(bind.var, value)
        arguments = (each if isinstance(each, str) else int(analyzer.simplify(each)) for each in self.arguments)
        return Launch(tuple(arguments), *(int(analyzer.simplify(extent)) for extent in self.extents))


def device_kernels(program: Program, kind: str) -> list[DeviceKernel]:
    """The program's kernels, lowered and built by TVM for the target ``kind``."""
    return [device_kernel(kernel, kind) for kernel in program.kernels]


@cache  # several devices take the same source
def device_kernel(kernel: tirx.PrimFunc, kind: str) -> DeviceKernel:
    """One of them: what ``tvm.compile`` does, step by step, since it keeps arguments and grid to itself."""
    device = {"kind": kind, "arch": "sm_80"} if kind == "cuda" else {"kind": kind}
    target = tvm.target.Target(device, host={"kind": "llvm"})
    module = tvm.tirx.transform.BindTarget(target)(tvm.IRModule({kernel.attrs["global_symbol"]: kernel}))
    passes, _, device_passes = tvm.tirx.get_default_tir_pipeline(target)
    host, devices = split_host_device_mods(passes(module))
    ((on, lowered),) = devices.items()
    lowered = device_passes()(lowered)
    ((name, function),) = lowered.functions.items()
    ((_, caller),) = host.functions.items()
    inside = list(statements(caller.body))
    (call,) = [each.value for each in inside if isinstance(each, tirx.Evaluate) and is_launch(each.value)]
    assert call.args[0].value == name.name_hint
    numbers = call.args[1 + len(function.params) :]
    axes = dict(zip(function.attrs["tirx.kernel_launch_params"], numbers, strict=True))
    tensors = {buffer.name for buffer in kernel.params}
    arguments = []
    for parameter, passed in zip(function.params, call.args[1:], strict=False):
        named = parameter.name.removesuffix("_ptr")
        arguments.append(named if named in tensors else passed)
    return DeviceKernel(
        name.name_hint,
        codegen_build(lowered, on).inspect_source(),
        tuple(arguments),
        tuple(axes[axis] for axis in AXES),
        tuple(each for each in inside if isinstance(each, tirx.Bind) and isinstance(each.var.ty, tvm.ir.PrimType)),
    )


def is_launch(expression: tirx.Expr) -> bool:
    """Whether it hands a kernel, its arguments and its grid to the driver."""
    return isinstance(expression, tvm.ir.Call) and expression.op.name == "tirx.call_ffi_kernel"


def statements(statement: tirx.Stmt) -> Iterator[tirx.Stmt]:
    """It and all in it, but for branches: launches stand outside of them."""
    yield statement
    for inner in statement.seq if isinstance(statement, tirx.SeqStmt) else [getattr(statement, "body", None)]:
        if inner is not None:
            yield from statements(inner)
