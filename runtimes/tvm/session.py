"""A compiled module, open: weights from the mapped file, masks and positions from the prologue, caches written in place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from qsparse_export.errors import ExportError, UsageError
from qsparse_export.runtimes.base import NativeCalls
from qsparse_export.runtimes.tvm.machine import Machine
from qsparse_export.runtimes.tvm.prologue import Cut, cut
from qsparse_export.runtimes.tvm.weights import Weight, weights_of

if TYPE_CHECKING:
    import onnxruntime

DOMAIN = "ai.qsparse"


@dataclass(frozen=True)
class Cache:
    """One buffer that a CachedAttention writes in place: the graph's input and output, and the mask that says how far."""

    given: str
    made: str
    visible: str


@dataclass(frozen=True)
class Program:
    """What a graph becomes: its two parts, the weights of the second, and the caches that it writes over."""

    cut: Cut
    weights: tuple[Weight, ...]
    caches: tuple[Cache, ...]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]

    @staticmethod
    def of(model: onnx.ModelProto, folder: Path) -> Program:
        """Of a graph whose weights are in ``folder``; ExportError for a cache that is not an input and an output."""
        parts = cut(model, str(folder))
        taken = {value.name for value in parts.rest.graph.input}
        outputs = {value.name for value in model.graph.output}
        caches: list[Cache] = []
        for node in parts.rest.graph.node:
            if node.op_type != "CachedAttention":
                continue
            for given, made in zip(node.input[4:6], node.output[1:3], strict=True):
                cache = Cache(given, made, node.input[3])
                if given not in taken or made not in outputs or cache.visible not in taken:
                    raise ExportError(
                        f"CachedAttention {node.name!r} reads the cache {given!r} with the mask {cache.visible!r} and gives "
                        f"{made!r}; the runtime tvm writes caches in place: it wants the cache as an input and an output of "
                        "the graph, and a mask that depends on inputs alone; leave the pass fuse-attention out "
                        "(--passes default,-fuse-attention)"
                    )
                caches.append(cache)
        return Program(
            parts,
            weights_of(parts.rest.graph),
            tuple(caches),
            tuple(value.name for value in model.graph.input),
            tuple(value.name for value in model.graph.output),
        )

    @property
    def native_nodes(self) -> dict[str, int]:
        """Op of ours to its nodes, each of which a run calls once."""
        nodes = [node.op_type for node in self.cut.rest.graph.node if node.domain == DOMAIN]
        return {name: nodes.count(name) for name in sorted(set(nodes))}


class TvmSession:
    """A Relax virtual machine with its weights. Tensors are TVM's; a cache with room is written in place."""

    def __init__(self, machine: Machine, program: Program, variant: str) -> None:
        """``machine`` has the compiled module of ``program`` and its weights; ``variant`` names its kernels."""
        self._machine = machine
        self._program = program
        self._variant = variant
        self._prologue = _open_prologue(program.cut.prologue) if program.cut.made else None
        self._taken = tuple(value.name for value in program.cut.rest.graph.input)
        self.input_names = program.input_names
        self.output_names = program.output_names
        self.shares_cache = bool(program.caches)

    def run(self, feeds: Mapping[str, Any], results: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """See :class:`qsparse_export.runtimes.base.Session`.

        A cache is written in place where ``results`` names the tensor that is fed; else a copy of it, with room for the new
        tokens, is.
        """
        results = results or {}
        values = {name: self._tensor(value) for name, value in feeds.items() if name in self._taken}
        values |= self._positions(feeds)
        in_place = {c.made for c in self._program.caches if c.made in results and results[c.made] is feeds[c.given]}
        for cache in self._program.caches:
            total = values[cache.visible].shape[-1]
            if cache.made not in in_place:
                values[cache.given] = self._copy_with_room(values[cache.given], total)
            elif values[cache.given].shape[2] < total:
                raise UsageError(
                    f"{cache.given} has room for {values[cache.given].shape[2]} tokens and is to hold {total}; feed a larger "
                    "one, or do not name it among the results"
                )
        made = self._machine.call([values[name] for name in self._taken])
        outputs = dict(results)
        for number, name in enumerate(self.output_names):
            # Taking a tensor out of what TVM returns takes microseconds, and there are 60 of these.
            if name in in_place and not self._machine.copies_inputs:
                continue
            value = made[number]
            if name in results:
                self._machine.copy(value, results[name])
            else:
                outputs[name] = value
        return outputs

    def to_tensor(self, array: np.ndarray) -> Any:
        """See :class:`qsparse_export.runtimes.base.Session`."""
        return self._machine.tensor(array)

    def to_numpy(self, tensor: Any) -> np.ndarray:
        """See :class:`qsparse_export.runtimes.base.Session`."""
        return self._machine.numpy(tensor)

    def native_calls(self) -> NativeCalls:
        """See :class:`qsparse_export.runtimes.base.Session`: a compiled module has no other way to run an op of ours."""
        if not self._machine.runs:
            return {}
        return {name: {self._variant: nodes * self._machine.runs} for name, nodes in self._program.native_nodes.items()}

    def _tensor(self, value: Any) -> Any:
        return self.to_tensor(value) if isinstance(value, np.ndarray) else value

    def _positions(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """What the prologue makes of the inputs."""
        if self._prologue is None:
            return {}
        taken = {
            name: value if isinstance(value, np.ndarray) else self.to_numpy(value)
            for name, value in feeds.items()
            if name in self._program.cut.taken
        }
        made = self._prologue.run(None, taken)
        return {name: self.to_tensor(array) for name, array in zip(self._program.cut.made, made, strict=True)}

    def _copy_with_room(self, cache: Any, total: int) -> Any:
        """``cache`` [B, heads, C, D] in a new tensor of max(C, total) tokens; what was not filled is 0."""
        old = self.to_numpy(cache)
        batch, heads, room, width = old.shape
        new = np.zeros((batch, heads, max(room, total), width), old.dtype)
        new[:, :, :room] = old
        return self.to_tensor(new)


def _open_prologue(prologue: onnx.ModelProto) -> onnxruntime.InferenceSession:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1  # some twenty ops on a few numbers
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(prologue.SerializeToString(), options, providers=["CPUExecutionProvider"])
