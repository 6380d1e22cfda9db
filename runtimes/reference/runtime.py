"""Runs a bundle with ``onnx.reference.ReferenceEvaluator``: every standard op and every op of ours in NumPy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qsparse_export.errors import UsageError
from qsparse_export.runtimes.base import NativeCalls, Tuning

if TYPE_CHECKING:
    import onnx_ir as ir
    from onnx.reference.op_run import OpRun

    from qsparse_export.targets.target import Target

GRAPH = "model.onnx"
WEIGHTS = "model.onnx.data"
VARIANT = "numpy"


@dataclass(frozen=True)
class ReferenceRuntime:
    """Compiles to the graph and its weights alone. Its "native kernels" are the NumPy references of the ops."""

    name: str = "reference"
    dtypes: tuple[str, ...] = ("float32", "float16")
    has_bodies: bool = True

    def require_target(self, target: Target) -> None:
        """See :class:`qsparse_export.runtimes.base.Runtime`; NumPy runs wherever Python does."""

    def with_ops(self, target: Target) -> Target:
        """See :class:`qsparse_export.runtimes.base.Runtime`: it has a reference for every op of a target."""
        return target

    def tuned(self, tuning: Tuning) -> ReferenceRuntime:
        """See :class:`qsparse_export.runtimes.base.Runtime`: the kernels choose at run time, by rule."""
        raise UsageError(f"the runtime {self.name} tunes nothing at export; --tune and its like go with --runtime tvm")

    def on_this_machine(self, target: Target) -> ReferenceRuntime:
        """See :class:`qsparse_export.runtimes.base.Runtime`."""
        return self

    def code_record(self, target: Target) -> dict[str, Any] | None:
        """See :class:`qsparse_export.runtimes.base.Runtime`: there is no native code."""
        return None

    def verified_record(self, target: Target) -> dict[str, Any]:
        """See :class:`qsparse_export.runtimes.base.Runtime`."""
        return {}

    def compile(self, model: ir.Model, target: Target, folder: Path, *, native: bool) -> tuple[str, ...]:
        """See :class:`qsparse_export.runtimes.base.Runtime`; runs on every target that has Python."""
        from qsparse_export.runtimes.graph_file import write_graph

        return write_graph(model, folder, GRAPH, WEIGHTS)

    def open(
        self, folder: Path, *, threads: int | None, native: bool, taps: Sequence[str] = (), graph: Path | None = None
    ) -> ReferenceSession:
        """Loads the graph and all weights into memory; ``threads`` is NumPy's own affair and not used."""
        return ReferenceSession(graph or folder / GRAPH, folder, native=native, taps=taps)


class ReferenceSession:
    """A ``ReferenceEvaluator``; tensors are NumPy arrays, and a cache grows."""

    shares_cache = False

    def __init__(self, graph: Path, folder: Path, *, native: bool, taps: Sequence[str]) -> None:
        import onnx
        import onnx.inliner
        from onnx.reference import ReferenceEvaluator

        model = onnx.load(graph, load_external_data=False)
        onnx.load_external_data_for_model(model, str(folder))
        known = {value.name: value for value in model.graph.value_info}
        model.graph.output.extend(known[name] for name in taps)
        self._calls: dict[str, int] = {}
        if native:
            del model.functions[:]
        else:
            model = onnx.inliner.inline_local_functions(model)
        ours = _reference_ops(self._calls) if native else []
        self._evaluator = ReferenceEvaluator(model, new_ops=[_equal(), *ours])
        self.input_names = tuple(value.name for value in model.graph.input)
        self.output_names = tuple(value.name for value in model.graph.output)

    def run(self, feeds: Mapping[str, Any], results: Mapping[str, Any] | None = None) -> dict[str, np.ndarray]:
        """See :class:`qsparse_export.runtimes.base.Session`."""
        assert not results, "no cache is shared here"
        # BitNet's NaN rules and overflowing exponents are defined behaviour, not faults to warn of.
        with np.errstate(all="ignore"):
            outputs = self._evaluator.run(None, dict(feeds))
        return dict(zip(self.output_names, outputs, strict=True))

    def to_tensor(self, array: np.ndarray) -> np.ndarray:
        """See :class:`qsparse_export.runtimes.base.Session`."""
        return array

    def to_numpy(self, tensor: np.ndarray) -> np.ndarray:
        """See :class:`qsparse_export.runtimes.base.Session`."""
        return tensor

    def native_calls(self) -> NativeCalls:
        """See :class:`qsparse_export.runtimes.base.Session`."""
        return {op: {VARIANT: count} for op, count in self._calls.items()}


def _equal() -> type[OpRun]:
    """Equal that takes texts of different lengths, which onnx 1.23's own refuses as different types."""
    from onnx.reference.op_run import OpRun

    class Equal(OpRun):
        op_domain = ""

        def _run(self, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray]:
            return (np.equal(a, b),)

    return Equal


def _reference_ops(calls: dict[str, int]) -> list[type[OpRun]]:
    """One ReferenceEvaluator op per op of ours, which calls its ``reference`` and counts in ``calls``."""
    from onnx.reference.op_run import OpRun

    from qsparse_export import ops

    def make(name: str) -> type[OpRun]:
        reference = ops.op(name).reference

        def _run(self: OpRun, *inputs: np.ndarray, **attributes: Any) -> tuple[np.ndarray, ...]:
            calls[name] = calls.get(name, 0) + 1
            outputs = reference(*inputs, **attributes)
            return outputs if isinstance(outputs, tuple) else (outputs,)

        return type(name, (OpRun,), {"op_domain": ops.DOMAIN, "_run": _run})

    return [make(name) for name in ops.OPS]
