"""Shows a graph as it is lowered: as text after a pass, or as one .onnx file without weights per pass."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from qsparse_export.errors import UsageError, near_names
from qsparse_export.passes import PASSES

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

    from qsparse_export.passes.base import OnPass, Pass

SMALL_ELEMENTS = 16
ALL = "all"


@dataclass(frozen=True)
class Watch:
    """What to show: ``print_after`` pass names (or ``all``), each to a file or, for None, to stderr; ``dump`` is a folder."""

    print_after: dict[str, Path | None] = field(default_factory=dict)
    dump: Path | None = None

    @staticmethod
    def parse(print_after: Sequence[str], dump: str | None) -> Watch:
        """From ``PASS`` or ``PASS=FILE`` each, and a folder; UsageError for an unknown pass or a folder with something in it."""
        wanted: dict[str, Path | None] = {}
        for text in print_after:
            name, _, file = text.partition("=")
            if name != ALL and name not in PASSES:
                raise UsageError(f"--print-after {name}: unknown pass; {near_names(name, [*PASSES, ALL])}")
            wanted[name] = Path(file) if file else None
        folder = Path(dump) if dump else None
        if folder is not None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UsageError(f"--dump {folder} exists and is not an empty folder; choose another one")
        return Watch(wanted, folder)

    def on_pass(self) -> OnPass | None:
        """What :func:`qsparse_export.export` takes; None when nothing is to be shown."""
        return self._show if self.print_after or self.dump else None

    def _show(self, number: int, step: Pass, model: ir.Model) -> None:
        for name in (step.name, ALL):
            if name in self.print_after:
                self._print(self.print_after[name], number, step, model)
        if self.dump is not None:
            import onnx

            self.dump.mkdir(parents=True, exist_ok=True)
            onnx.save_model(without_weights(model), self.dump / f"{number:02d}-{step.name}.onnx")

    def _print(self, file: Path | None, number: int, step: Pass, model: ir.Model) -> None:
        import onnx.printer

        text = f"// {number} {step}\n{onnx.printer.to_text(without_weights(model))}\n"
        if file is None:
            _write(sys.stderr, text)
        else:
            with file.open("a", encoding="utf-8") as stream:
                _write(stream, text)


def _write(stream: TextIO, text: str) -> None:
    stream.write(text)
    stream.flush()


def without_weights(model: ir.Model) -> onnx.ModelProto:
    """A valid copy of ``model`` in which every initialiser of more than 16 elements is an input: no weight is read."""
    import onnx_ir as ir

    large = {
        name: value
        for name, value in model.graph.initializers.items()
        if value.const_value is not None and value.const_value.size > SMALL_ELEMENTS
    }
    tensors = {name: value.const_value for name, value in large.items()}
    inputs = list(model.graph.inputs)
    try:
        for name, value in large.items():
            model.graph.initializers.pop(name)
            value.const_value = None
            if value not in inputs:
                model.graph.inputs.append(value)
        return ir.to_proto(model)
    finally:
        for name, value in large.items():
            if value not in inputs:
                model.graph.inputs.remove(value)
            value.const_value = tensors[name]
            model.graph.initializers[name] = value
