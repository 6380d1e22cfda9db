"""ONNX Runtime on a CPU or an NVIDIA GPU: the graph as it is, with our custom-op library beside it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qsparse_export.errors import BundleError, TargetError, UsageError
from qsparse_export.ops.cached_attention import SHARED_CACHE
from qsparse_export.runtimes import switches
from qsparse_export.runtimes.base import NativeCalls, Tuning, subtract_calls
from qsparse_export.runtimes.gpu_failure import gpu_failure, is_out_of_memory
from qsparse_export.runtimes.ort import bundled, library
from qsparse_export.targets.detect import host

if TYPE_CHECKING:
    import onnx_ir as ir
    import onnxruntime

    from qsparse_export.targets.target import Target

GRAPH = "model.onnx"
WEIGHTS = "model.onnx.data"
CUDA_PROVIDER = "CUDAExecutionProvider"
ON_CPU = "or run it on the CPU with --no-native (function bodies, slower)"
# How long a thread spins while it waits for the next kernel, before it sleeps (docs/adr/threads-spin-briefly.md).
_SPIN_US = 1000

_OF_CUDA = re.compile("CUDA (failure|error) ")


@dataclass(frozen=True)
class OrtRuntime:
    """Compiles to ``model.onnx`` + ``model.onnx.data`` (+ the kernel library), and runs them.

    ``library`` is the kernel library to register (None: the installed one); ``on_gpu``: on the CUDA provider.
    """

    name: str = "ort"
    dtypes: tuple[str, ...] = ("float32", "float16")
    has_bodies: bool = True
    library: Path | None = None
    on_gpu: bool = False

    def require_target(self, target: Target) -> None:
        """See :class:`qsparse_export.runtimes.base.Runtime`: the installed library serves, or a cross compiler makes one."""
        bundled.require_target(target)

    def with_ops(self, target: Target) -> Target:
        """See :class:`qsparse_export.runtimes.base.Runtime`: a target's description speaks of ONNX Runtime."""
        return target

    def tuned(self, tuning: Tuning) -> OrtRuntime:
        """See :class:`qsparse_export.runtimes.base.Runtime`: the kernels choose at run time, by rule."""
        raise UsageError(f"the runtime {self.name} tunes nothing at export; --tune and its like go with --runtime tvm")

    def on_this_machine(self, target: Target) -> OrtRuntime:
        """See :class:`qsparse_export.runtimes.base.Runtime`: the graph runs anywhere, with the installed library, or with
        the CPU's kernels in the one that was built for a GPU."""
        built = bundled.verifying_library(target)
        return OrtRuntime(library=built) if built else self

    def code_record(self, target: Target) -> dict[str, Any] | None:
        """See :class:`qsparse_export.runtimes.base.Runtime`."""
        return bundled.record(target)

    def verified_record(self, target: Target) -> dict[str, Any]:
        """See :class:`qsparse_export.runtimes.base.Runtime`."""
        same, built = bundled.is_installed(target), bundled.verifying_library(target)
        library = bundled.record(target) if built else bundled.installed_record()
        record: dict[str, Any] = {"library": library, "covers_library": same}
        if not same:
            record["note"] = (
                f"the library for {target.triple} in this bundle was not run at export; {host().triple}'s build of the same "
                "sources was: run qsparse-device-bench on the device"
            )
        return record

    def compile(self, model: ir.Model, target: Target, folder: Path, *, native: bool) -> tuple[str, ...]:
        """Writes the graph, its weights as one external file, and the kernel library when ``native``.

        Raises TargetError when there is no library for ``target``, or bodies that unpack more than it has memory for.
        """
        from qsparse_export.runtimes.graph_file import write_graph
        from qsparse_export.runtimes.ort.unpacking import unpacked_bytes

        if not native and (unpacked := unpacked_bytes(model)):
            constants = [value.const_value for value in model.graph.initializers.values()]
            weights = sum(constant.nbytes for constant in constants if constant is not None)
            target.require_memory("opening the weights, ternary ones unpacked, takes", weights + unpacked)
        files = [*write_graph(model, folder, GRAPH, WEIGHTS)]
        if native:
            files.append(bundled.add_library(target, folder))
        return tuple(files)

    def open(
        self, folder: Path, *, threads: int | None, native: bool, taps: Sequence[str] = (), graph: Path | None = None
    ) -> OrtSession:
        """Loads ``graph`` (None: ``folder/model.onnx``); with ``native`` the installed kernel library is registered, or the
        one of ``self.library``, which was built from the installed sources.

        The library inside a bundle is for other programs to embed: this one never loads code that a model brings.
        """
        source = folder / GRAPH if graph is None and not taps else _with_outputs(graph or folder / GRAPH, taps)
        chosen = (self.library or library.library_path()) if native else None
        return OrtSession(source, folder, threads=threads, kernels=chosen, on_gpu=self.on_gpu)


def _with_outputs(graph: Path, values: Sequence[str]) -> bytes:
    if not values:
        return graph.read_bytes()
    import onnx

    model = onnx.load(graph, load_external_data=False)
    known = {value.name: value for value in model.graph.value_info}
    model.graph.output.extend(known[name] for name in values)
    return model.SerializeToString()


def require_cuda_provider(folder: Path) -> None:
    """Raises TargetError, about the bundle in ``folder``, when the installed ONNX Runtime is one without CUDA."""
    import onnxruntime

    if CUDA_PROVIDER not in (there := onnxruntime.get_available_providers()):
        raise TargetError(
            f"{folder} was made for an NVIDIA GPU, and ONNX Runtime {onnxruntime.__version__} here has no {CUDA_PROVIDER} "
            f"(it has {', '.join(there)}): install onnxruntime-gpu in place of onnxruntime, {ON_CPU}"
        )


class OrtSession:
    """An ``onnxruntime.InferenceSession`` whose tensors stay in the runtime between runs."""

    def __init__(
        self, graph: Path | bytes, folder: Path, *, threads: int | None, kernels: Path | None, on_gpu: bool = False
    ) -> None:
        """``graph`` is a file in ``folder``, or a serialised model whose external data lie there; ``kernels`` the library to
        register, None to run the function bodies. TargetError ``on_gpu`` where ONNX Runtime reaches none."""
        import onnxruntime

        self._device = "cuda" if on_gpu else "cpu"
        providers = ["CPUExecutionProvider"]
        if on_gpu:
            require_cuda_provider(folder)
            providers.insert(0, CUDA_PROVIDER)

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if isinstance(graph, bytes):
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        spins = switches.is_on(switches.SPIN, otherwise=True)
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spins)))
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(_SPIN_US))
        # In the bodies of n-bit products ONNX Runtime would round the activations to 8 bits, of its own accord: half a percent
        # of error in each product. 1: products in float32, as the ops are defined.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        if threads is not None:
            options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        self._library: library.Library | None = None
        if kernels:
            switches.is_on(
                switches.HUGE_PAGES, otherwise=True
            )  # which the library reads itself: a wrong word is refused here
            self._library = library.open_library(kernels)
            self._library.chosen()  # a forced variant that this CPU lacks is refused here, by name
            options.register_custom_ops_library(str(kernels))
        try:
            self._session = onnxruntime.InferenceSession(graph, options, providers=providers)
        except Exception as error:  # onnxruntime raises a class per status code, without a common base of their own
            if on_gpu and (_OF_CUDA.search(str(error)) or is_out_of_memory(str(error))):
                raise _gpu_failure(error) from error
            raise BundleError(
                f"ONNX Runtime {onnxruntime.__version__} refused the graph of {folder}: {error}"
            ) from error
        if on_gpu and CUDA_PROVIDER not in self._session.get_providers():  # it only warns, and runs on the CPU
            raise TargetError(
                f"{folder}: ONNX Runtime {onnxruntime.__version__} has a CUDA provider and cannot start it: look at nvidia-smi, "
                f"and for CUDA 13 and cuDNN 9 (pip install 'onnxruntime-gpu[cuda,cudnn]'), {ON_CPU}"
            )
        self.input_names = tuple(value.name for value in self._session.get_inputs())
        self.output_names = tuple(value.name for value in self._session.get_outputs())
        self.input_types = {value.name: value.type for value in self._session.get_inputs()}
        metadata = self._session.get_modelmeta().custom_metadata_map
        self.shares_cache = metadata.get(SHARED_CACHE) == "true"
        self._binding = self._session.io_binding()
        self._bound: dict[str, onnxruntime.OrtValue] = {}
        self._before = self._library.calls() if self._library else {}

    def run(
        self, feeds: Mapping[str, Any], results: Mapping[str, onnxruntime.OrtValue] | None = None
    ) -> dict[str, onnxruntime.OrtValue]:
        """See :class:`qsparse_export.runtimes.base.Session`; BundleError, or TargetError on a GPU, where ONNX Runtime fails."""
        with self._failures():
            values = {
                name: self._tensor(value) if isinstance(value, np.ndarray) else value for name, value in feeds.items()
            }
            if results:
                return self._run_into(values, results)
            outputs = self._session.run_with_ort_values(list(self.output_names), values)
            return dict(zip(self.output_names, outputs, strict=True))

    def _run_into(
        self, feeds: Mapping[str, onnxruntime.OrtValue], results: Mapping[str, onnxruntime.OrtValue]
    ) -> dict[str, onnxruntime.OrtValue]:
        # What is bound stays bound: a cache of 60 tensors is named once, not at every token.
        for name, value in feeds.items():
            if self._bound.get(name) is not value:
                self._binding.bind_ortvalue_input(name, value)
                self._bound[name] = value
        for name in self.output_names:
            value = results.get(name)
            if value is None:
                self._binding.bind_output(name, "cpu")
            elif self._bound.get(name) is not value:
                self._binding.bind_ortvalue_output(name, value)
                self._bound[name] = value
        self._session.run_with_iobinding(self._binding)
        return {name: self._output(name) for name in self.output_names if name not in results} | dict(results)

    def _output(self, name: str) -> onnxruntime.OrtValue:
        """One result of the last run with bindings; wrapping all 60 of them takes a twentieth of a small model's token."""
        import onnxruntime

        return onnxruntime.OrtValue(self._binding.get_outputs_as_ortvaluevector()[self.output_names.index(name)])

    def to_tensor(self, array: np.ndarray) -> onnxruntime.OrtValue:
        """See :class:`qsparse_export.runtimes.base.Session`; errors as of :meth:`run`."""
        with self._failures():
            return self._tensor(array)

    def to_numpy(self, tensor: onnxruntime.OrtValue) -> np.ndarray:
        """See :class:`qsparse_export.runtimes.base.Session`; errors as of :meth:`run`."""
        with self._failures():
            return tensor.numpy()

    def _tensor(self, array: np.ndarray) -> onnxruntime.OrtValue:
        import onnxruntime

        return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self._device, 0)

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        """Turns what ONNX Runtime raises inside into an error of ours."""
        try:
            yield
        except Exception as error:  # a class per status code, as above
            if self._device == "cuda" and not _is_of_arguments(error):
                raise _gpu_failure(error) from error
            import onnxruntime

            raise BundleError(
                f"ONNX Runtime {onnxruntime.__version__} cannot run the graph: {error}; feed what its inputs say, or export "
                "the bundle again"
            ) from error

    def native_calls(self) -> NativeCalls:
        """See :class:`qsparse_export.runtimes.base.Session`; counts of the whole process since this session opened."""
        return subtract_calls(self._library.calls(), self._before) if self._library else {}


def _gpu_failure(error: Exception) -> TargetError:
    """Without the node that was at work when it showed, and the line of ONNX Runtime's source."""
    return gpu_failure(str(error).rpartition("Status Message: ")[2].partition(" ; GPU=")[0], ON_CPU)


def _is_of_arguments(error: Exception) -> bool:
    """Whether a run was refused for what it was given, before it began."""
    from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

    return isinstance(error, (InvalidArgument, TypeError, ValueError))
