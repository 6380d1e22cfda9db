"""A report as text for a terminal."""

from __future__ import annotations

from typing import Any

from qsparse_export.inspect.report import Layer, Report

HEADINGS = ("layer", "op", "shape", "format", "bytes", "k", "density", "measured", "kernels/bodies")


def table(report: Report) -> str:
    """The facts, one line per layer, and the totals."""
    lines = [f"{report.name}  ({report.kind}, {report.path})"]
    lines += [f"  {name}: {text}" for name, text in report.facts.items()]
    lines += [f"  file {name}: {size / 1e6:.2f} MB" for name, size in report.files.items()]
    if nodes := nodes_text(report):
        lines.append(f"  {nodes}")
    lines += [f"  {line}" for line in parity_lines(report)]
    lines += [f"  left as it was: {name}: {reason}" for name, reason in report.unfused.items()]
    rows = [HEADINGS, *(cells(layer) for layer in report.layers), totals(report)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    lines.append("")
    for number, row in enumerate(rows):
        text = "  ".join(
            cell.ljust(width) if column < 4 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append(text.rstrip())
        if number == 0:
            lines.append("-" * len(text.rstrip()))
    return "\n".join(lines)


def cells(layer: Layer) -> tuple[str, ...]:
    """One text per heading; empty where nothing is known."""
    outputs = "+".join(map(str, layer.outputs)) or "?"
    return (
        layer.name,
        layer.op,
        f"{layer.inputs if layer.inputs is not None else '?'} -> {outputs}",
        layer.format,
        f"{layer.bytes:,}",
        "" if layer.k is None else f"{layer.k}" + (f"/{layer.out_of}" if layer.out_of != layer.inputs else ""),
        percent(layer.density),
        percent(layer.measured_density),
        "" if layer.kernel_error is None else f"{layer.kernel_error:.1e}",
    )


def totals(report: Report) -> tuple[str, ...]:
    """The last row: all bytes, and the share of them that is read per token as the masks say."""
    total = sum(layer.bytes for layer in report.layers)
    read = sum(layer.bytes * (1.0 if layer.density is None else layer.density) for layer in report.layers)
    share = percent(read / total) if total else ""
    return ("total", "", f"{len(report.layers)} layers", "", f"{total:,}", "", share, "", "")


def percent(share: float | None) -> str:
    """``40.0 %``; empty for None."""
    return "" if share is None else f"{share:.1%}"


def nodes_text(report: Report) -> str:
    """Node counts before and after lowering, as far as they are known."""
    if report.nodes_after is None:
        return f"nodes: {report.nodes_before}" if report.nodes_before is not None else ""
    before = "" if report.nodes_before is None else f"{report.nodes_before} before lowering, "
    return f"nodes: {before}{report.nodes_after} after" if before else f"nodes: {report.nodes_after}"


def parity_lines(report: Report) -> list[str]:
    """What verification measured on each way to run the model."""
    if report.parity is None:
        return ["not verified"] if report.kind == "bundle" else []
    return [_parity(path, report.parity) for path in report.parity.get("paths", [])]


def _parity(path: dict[str, Any], parity: dict[str, Any]) -> str:
    error = path.get("relative_logit_error", path.get("relative_error"))
    judge = parity.get("judge", "PyTorch")
    measured = f"relative error {error:.2e} of {parity['limit']:.1e} allowed" if error is not None else "no figure"
    return f"parity {path.get('path')}: {measured}, {path.get('flipped_choices', 0)} flipped choices, against {judge}"
