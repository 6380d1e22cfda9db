"""The tables of docs/cuda.md that say what to expect of a GPU: what the commands on the page print.

They need no weights: the export stops where those would be written.
"""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

import onnx_ir as ir

import qsparse_export as qs
from qsparse_export.bench.roofline import roofline, spell
from qsparse_export.sparsity import parse_sparsity

PAGE = Path(__file__).resolve().parents[2] / "docs" / "cuda.md"
BEGIN, END = "<!-- made by tests/cuda/roofline_page.py -->\n", "<!-- end -->\n"
MODEL, SPARSE_RATIO, HEAD = "shape:bitnet-2b-4t", "0.6", "int4"


class _Lowered(Exception):
    """The graph is made."""


def made() -> str:
    """Markdown, of the graph that ``qsparse-export`` makes with these options."""
    model = qs.load(MODEL, sparsity=parse_sparsity([SPARSE_RATIO]), override=True)
    graphs: list[ir.Model] = []

    def stop(stage: str) -> None:
        if stage == "compile":
            raise _Lowered

    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(_Lowered):
        qs.export(
            model,
            target="cuda",
            out=Path(folder) / "bundle",
            head=HEAD,
            portable=True,
            verify="none",
            on_stage=stop,
            on_pass=lambda _number, _step, graph: graphs.append(graph),
        )
    return spell(roofline(graphs[-1])) + "\n"


def on_page() -> str:
    """What docs/cuda.md holds now."""
    return PAGE.read_text("utf-8").split(BEGIN)[1].split(END)[0]


if __name__ == "__main__":
    page = PAGE.read_text("utf-8")
    PAGE.write_text(page.replace(BEGIN + on_page() + END, BEGIN + made() + END), "utf-8")
