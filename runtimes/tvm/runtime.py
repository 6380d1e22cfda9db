"""TVM: the graph compiled to one shared library by Relax, for a CPU or an NVIDIA GPU, beside the graph and its weights."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qsparse_export.errors import BundleError, TargetError, UsageError
from qsparse_export.runtimes.base import Tuning
from qsparse_export.runtimes.tvm import environment, made_here
from qsparse_export.runtimes.tvm.codegen import gpu_architectures, is_gpu, lanes_of, runs_here, tvm_target
from qsparse_export.runtimes.tvm.gpu.cubins import cubin_architectures
from qsparse_export.runtimes.tvm.tiling import DefaultTilings, Tilings, cores_of
from qsparse_export.targets.target import load_target, op_sets

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

    from qsparse_export.runtimes.tvm.machine import RemoteMachine
    from qsparse_export.runtimes.tvm.session import Program, TvmSession
    from qsparse_export.targets.target import Target

GRAPH = "model.onnx"
WEIGHTS = "model.onnx.data"
MODULE = "model.so"
TILINGS = "tilings.json"
"""How the work of each product is cut, and the microseconds that this was chosen for where it was measured."""

_ELF_MACHINES = {"x86_64": 62, "aarch64": 183}


@dataclass(frozen=True)
class TvmRuntime:
    """Compiles to ``model.so``, ``model.onnx`` and ``model.onnx.data``; runs the first with the weights of the last.

    ``rebuild``: the graph is compiled again, for this machine, whenever it is opened: how a bundle for another one is
    verified. ``tuning``: see :meth:`tuned`.
    """

    name: str = "tvm"
    dtypes: tuple[str, ...] = ("float32",)
    has_bodies: bool = False
    rebuild: bool = False
    tuning: Tuning = field(default_factory=Tuning)

    def require_target(self, target: Target) -> None:
        """See :class:`qsparse_export.runtimes.base.Runtime`: TVM is installed, has kernels for it, a linker is here, and
        where kernels are to be measured, a device for that.
        """
        environment.require_tvm()
        from qsparse_export.runtimes.tvm.build import linker
        from qsparse_export.targets.detect import host

        if is_gpu(target):
            from qsparse_export.runtimes.tvm.gpu.compile_gpu import require_tools

            if self.tuning.trials or self.tuning.database:
                raise TargetError(
                    f"tuning chooses how CPU kernels cut their work, and target {target.name} is a GPU: leave --tune and its "
                    "like out"
                )
            require_tools()
        else:
            lanes_of(target)
        linker(target.triple, host().triple)
        if self.tuning.trials:
            from qsparse_export.runtimes.tvm.tuning import measuring_tracker

            if tracker := measuring_tracker(target, self.tuning):
                tracker.require_device()

    def with_ops(self, target: Target) -> Target:
        """See :class:`qsparse_export.runtimes.base.Runtime`: all of ours, on a GPU too, and none of ONNX Runtime's.

        NonZero is a NumPy function in TVM's runtime, on the CPU.
        """
        lacking = frozenset({"NonZero"} if is_gpu(target) else ())
        return replace(target, native_ops=op_sets()["cpu-kernels"], provider_ops=frozenset(), lacking_ops=lacking)

    def tuned(self, tuning: Tuning) -> TvmRuntime:
        """See :class:`qsparse_export.runtimes.base.Runtime`: the tilings of products are measured."""
        return replace(self, tuning=tuning)

    def on_this_machine(self, target: Target) -> TvmRuntime:
        """See :class:`qsparse_export.runtimes.base.Runtime`: another machine's module is of no use here."""
        return self if runs_here(target) else replace(self, rebuild=True)

    def code_record(self, target: Target) -> dict[str, Any] | None:
        """See :class:`qsparse_export.runtimes.base.Runtime`: TVM's versions and what it was told of the target."""
        if is_gpu(target):
            architectures = list(gpu_architectures(target))
            return {"triple": target.triple, "kind": "cuda", "architectures": architectures, **environment.VERSIONS}
        described = tvm_target(target)
        return {
            "triple": target.triple,
            "lanes": lanes_of(target).name,
            "llvm_features": sorted(str(attribute) for attribute in described.attrs["mattr"]),
            **environment.VERSIONS,
        }

    def verified_record(self, target: Target) -> dict[str, Any]:
        """See :class:`qsparse_export.runtimes.base.Runtime`."""
        same = runs_here(target)
        record: dict[str, Any] = {"library": self.code_record(load_target("cpu")), "covers_library": same}
        if not same:
            made_for = f"{', '.join(gpu_architectures(target))} on {target.triple}" if is_gpu(target) else target.triple
            record["note"] = (
                f"the module for {made_for} in this bundle was compiled, not run; the same graph compiled for this machine's "
                "CPU was: run qsparse-run on the device"
            )
        return record

    def compile(self, model: ir.Model, target: Target, folder: Path, *, native: bool) -> tuple[str, ...]:
        """Writes the graph, its weights as one external file, and the compiled module.

        Raises TargetError where :meth:`require_target` does, ExportError for a graph that TVM cannot import.
        """
        from qsparse_export.runtimes.graph_file import write_graph

        if not native:
            raise TargetError("the runtime tvm compiles kernels alone, no function bodies: leave --portable out")
        self.require_target(target)
        from qsparse_export.runtimes.tvm.session import Program
        from qsparse_export.runtimes.tvm.tuning import chosen_tilings

        files = write_graph(model, folder, GRAPH, WEIGHTS)
        if is_gpu(target):
            _build_for_gpu(_read(folder / GRAPH), folder, target)
            made_here.remember(folder / MODULE)
            return (*files, MODULE)
        program = Program.of(_read(folder / GRAPH), folder)
        tilings, table = chosen_tilings(program, target, self.tuning)
        _build(program, target, tilings, folder / MODULE)
        made_here.remember(folder / MODULE)
        (folder / TILINGS).write_text(json.dumps(table, indent=2) + "\n", "utf-8")
        return (*files, MODULE, TILINGS)

    def open(
        self, folder: Path, *, threads: int | None, native: bool, taps: Sequence[str] = (), graph: Path | None = None
    ) -> TvmSession:
        """Loads ``folder/model.so``; with ``taps`` or ``graph`` compiles that graph for this machine first.

        Raises UsageError for ``native=False``: there are no bodies; BundleError for a module that is damaged or another
        machine's, or was compiled elsewhere and is not trusted (:mod:`~qsparse_export.runtimes.tvm.made_here`); TargetError
        for one with code for a GPU that is not here, or for such a one and another ``graph``.
        """
        environment.tvm()  # before another module imports it, and PyTorch with it
        from qsparse_export.runtimes.tvm.machine import GpuMachine, LocalMachine
        from qsparse_export.runtimes.tvm.session import Program, TvmSession

        if not native:
            raise UsageError("the runtime tvm runs compiled kernels and has no function bodies: open with native=True")
        model = _with_outputs(_read(graph or folder / GRAPH), taps)
        here = load_target("cpu")
        variant = f"tvm-{lanes_of(here).name}"
        weights = folder / WEIGHTS
        as_compiled = graph is None or (graph.resolve() == (folder / GRAPH).resolve())
        architectures = () if taps or self.rebuild else _require_module(folder / MODULE, here)
        if architectures:
            from qsparse_export.runtimes.tvm.gpu.device import cuda_device
            from qsparse_export.runtimes.tvm.gpu.words import in_words

            if not as_compiled:
                raise TargetError(
                    f"{folder / MODULE} is for a GPU, and an altered graph would be compiled for the CPU, which compares with "
                    "nothing; leave out what alters it (qsparse-bench --dense)"
                )
            made_here.require_trust(folder / MODULE)
            device = cuda_device(folder / MODULE, architectures)
            program = Program.of(in_words(model), folder)
            return TvmSession(GpuMachine(folder / MODULE, program.weights, weights, device), program, "tvm-cuda")
        program = Program.of(model, folder)
        if as_compiled and not taps and not self.rebuild:
            made_here.require_trust(folder / MODULE)
            return TvmSession(LocalMachine(folder / MODULE, program.weights, weights, threads), program, variant)
        with tempfile.TemporaryDirectory(prefix="qsparse-tvm-") as scratch:
            _build(program, here, DefaultTilings(cores_of(here)), Path(scratch) / MODULE)
            machine = LocalMachine(Path(scratch) / MODULE, program.weights, weights, threads)
            return TvmSession(machine, program, variant)

    def open_remote(
        self, folder: Path, remote: Any, lanes: str, on_bytes: Callable[[int, int], object]
    ) -> tuple[TvmSession, RemoteMachine]:
        """Loads ``folder/model.so``, compiled for ``lanes``, on the device of TVM's RPC session ``remote``; with the clock
        of that device. ``on_bytes`` is told how many bytes of the weights are there, and of how many.

        Raises as :class:`~qsparse_export.runtimes.tvm.machine.RemoteMachine` does.
        """
        environment.tvm()
        from qsparse_export.runtimes.tvm.machine import RemoteMachine
        from qsparse_export.runtimes.tvm.session import Program, TvmSession

        program = Program.of(_read(folder / GRAPH), folder)
        machine = RemoteMachine(remote, folder / MODULE, program.weights, folder / WEIGHTS, on_bytes)
        return TvmSession(machine, program, f"tvm-{lanes}"), machine


def _build(program: Program, target: Target, tilings: Tilings, file: Path) -> None:
    from qsparse_export.runtimes.tvm.build import build, linker
    from qsparse_export.runtimes.tvm.importer import imported
    from qsparse_export.runtimes.tvm.kernels.cpu_kernels import CpuKernels
    from qsparse_export.targets.detect import host

    module = imported(program.cut.rest, program.weights, CpuKernels(lanes_of(target), tilings))
    build(module, tvm_target(target), file, linker(target.triple, host().triple))


def _build_for_gpu(model: onnx.ModelProto, folder: Path, target: Target) -> None:
    from qsparse_export.runtimes.tvm.build import linker
    from qsparse_export.runtimes.tvm.gpu.compile_gpu import compile_cuda_module
    from qsparse_export.runtimes.tvm.gpu.cuda_kernels import CudaKernels
    from qsparse_export.runtimes.tvm.gpu.on_device import require_on_device
    from qsparse_export.runtimes.tvm.gpu.words import in_words
    from qsparse_export.runtimes.tvm.importer import imported
    from qsparse_export.runtimes.tvm.session import Program
    from qsparse_export.targets.detect import host

    program = Program.of(in_words(model), folder)
    module = imported(program.cut.rest, program.weights, CudaKernels())
    require_on_device(module, target.name)
    compiler = linker(target.triple, host().triple)
    compile_cuda_module(module, gpu_architectures(target), folder / MODULE, target.triple, compiler)


def _read(graph: Path) -> onnx.ModelProto:
    import onnx

    return onnx.load(graph, load_external_data=False)


def _with_outputs(model: onnx.ModelProto, values: Sequence[str]) -> onnx.ModelProto:
    known = {value.name: value for value in model.graph.value_info}
    model.graph.output.extend(known[name] for name in values)
    return model


def _require_module(file: Path, here: Target) -> tuple[str, ...]:
    """The GPUs that a module has code for; BundleError, before it is loaded, where it is no shared library of this machine,
    or not whole.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise BundleError(f"{file} cannot be read ({error.strerror}); export the bundle again") from error
    if content[:4] != b"\x7fELF" or len(content) < 64:
        raise BundleError(f"{file} is no shared library; the file is damaged: export the bundle again")
    machine = int.from_bytes(content[18:20], "little")
    if machine != _ELF_MACHINES.get(here.arch):
        made_for = next((name for name, number in _ELF_MACHINES.items() if number == machine), f"ELF machine {machine}")
        raise BundleError(
            f"{file} was compiled for {made_for}, and this machine is {here.arch}; export with --target cpu"
        )
    # The section headers are the last thing that the linker writes: a file that was cut short lacks them.
    offset, size, count = (int.from_bytes(content[a:b], "little") for a, b in ((40, 48), (58, 60), (60, 62)))
    if offset + size * count > len(content):
        raise BundleError(f"{file} ends after {len(content)} bytes, too early; the copy is incomplete: copy it again")
    return tuple(sorted(set(cubin_architectures(content))))
