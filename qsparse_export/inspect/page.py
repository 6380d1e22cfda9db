"""A report as one HTML page: tables and plots as inline SVG, no script, nothing loaded from anywhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from qsparse_export.inspect.report import Layer, Report
from qsparse_export.inspect.table import HEADINGS, cells, nodes_text, parity_lines, totals

_STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } th, td { padding: .2em .7em; text-align: left; white-space: nowrap }
th { border-bottom: 2px solid #888 } td { border-bottom: 1px solid #ddd } td.n { text-align: right }
tr:last-child td { font-weight: bold } svg { max-width: 100%; height: auto } dt { font-weight: bold } dd { margin: 0 0 .4em 1em;
overflow-wrap: anywhere } text { font: 11px system-ui, sans-serif; fill: #222 } .a { fill: #9ecae1 } .b { fill: #3182bd }
.c { fill: #fd8d3c } .axis { stroke: #888 }
"""
_ROW, _LEFT, _WIDTH = 16, 330, 960
_MOST_BARS = 400

Bars = Sequence[tuple[str, Sequence[tuple[float | None, str]]]]
"""Per bar its name, and values with their colours."""


def page(report: Report) -> str:
    """The whole document. All texts of the model are escaped: a name in a file is data, not markup."""
    facts = dict(report.facts) | {f"file {name}": f"{size:,} bytes" for name, size in report.files.items()}
    if nodes := nodes_text(report):
        facts["graph"] = nodes
    facts |= {f"parity {i}": line for i, line in enumerate(parity_lines(report), 1)}
    facts |= {f"left as it was: {name}": reason for name, reason in report.unfused.items()}
    parts = [
        f"<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'><title>{escape(report.name)}</title>",
        f"<style>{_STYLE}</style></head><body><h1>{escape(report.name)}</h1>",
        "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts.items()) + "</dl>",
    ]
    if report.layers:
        parts += ["<h2>Density per layer</h2>", _densities(report.layers)]
        parts += ["<h2>Bytes per layer</h2>", _bytes(report.layers)]
    if any(layer.kernel_error is not None for layer in report.layers):
        parts += ["<h2>Kernels against function bodies</h2>", _errors(report.layers)]
    if report.ops:
        parts += ["<h2>Nodes</h2>", _nodes(report)]
    parts += ["<h2>Layers</h2>", _table(report), "</body></html>\n"]
    return "\n".join(parts)


def _table(report: Report) -> str:
    rows = [_row(cells(layer)) for layer in report.layers] + [_row(totals(report))]
    head = "".join(f"<th>{escape(heading)}</th>" for heading in HEADINGS)
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _row(texts: Sequence[str]) -> str:
    kinds = ["" if column < 4 else " class='n'" for column in range(len(texts))]
    return "<tr>" + "".join(f"<td{kind}>{escape(text)}</td>" for kind, text in zip(kinds, texts, strict=True)) + "</tr>"


def _densities(layers: Sequence[Layer]) -> str:
    """Light: what the mask keeps; dark: what a run found."""
    bars = [(layer.name, [(layer.density, "a"), (layer.measured_density, "b")]) for layer in layers]
    legend = "light: kept by the mask" + (
        "; dark: not 0 in a run" if any(layer.measured_density is not None for layer in layers) else ""
    )
    return _chart(bars, 1.0, legend, lambda share: f"{share:.1%}")


def _bytes(layers: Sequence[Layer]) -> str:
    """Light: stored; dark: read per token at the density that was measured, or else that of the mask."""
    bars: list[tuple[str, list[tuple[float | None, str]]]] = []
    for layer in layers:
        density = layer.density if layer.measured_density is None else layer.measured_density
        bars.append((layer.name, [(float(layer.bytes), "a"), (layer.bytes * (1 if density is None else density), "b")]))
    largest = max((layer.bytes for layer in layers), default=1) or 1
    return _chart(bars, float(largest), "light: stored; dark: read per token", lambda size: f"{size / 1e6:.2f} MB")


def _errors(layers: Sequence[Layer]) -> str:
    shown = [layer for layer in layers if layer.kernel_error is not None]
    largest = max((layer.kernel_error or 0.0 for layer in shown), default=0.0) or 1e-30
    bars: list[tuple[str, list[tuple[float | None, str]]]] = [
        (layer.name, [(layer.kernel_error, "c")]) for layer in shown
    ]
    return _chart(bars, largest, "relative distance (L2) of each output", lambda error: f"{error:.1e}")


def _nodes(report: Report) -> str:
    bars: list[tuple[str, list[tuple[float | None, str]]]] = []
    if report.nodes_after is not None and report.nodes_before is not None:
        bars += [("before lowering", [(float(report.nodes_before), "a")])]
        bars += [("after lowering", [(float(report.nodes_after), "b")])]
    bars += [(op, [(float(count), "c")]) for op, count in report.ops.items()]
    largest = max((value or 0.0 for _, values in bars for value, _ in values), default=1.0) or 1.0
    return _chart(bars, largest, "nodes of the main graph", lambda count: f"{count:.0f}")


def _chart(bars: Bars, largest: float, legend: str, label: Callable[[float], str]) -> str:
    """Horizontal bars, each value over the one before it."""
    shown, left_out = bars[:_MOST_BARS], max(len(bars) - _MOST_BARS, 0)
    height = _ROW * (len(shown) + 2)
    span = _WIDTH - _LEFT - 90
    parts = [f"<svg viewBox='0 0 {_WIDTH} {height}' width='{_WIDTH}' height='{height}' role='img'>"]
    parts.append(f"<text x='{_LEFT}' y='11'>{escape(legend)}</text>")
    for number, (name, values) in enumerate(shown, 1):
        y = number * _ROW
        shown_name = name if len(name) <= 52 else "…" + name[-51:]
        parts.append(f"<text x='{_LEFT - 6}' y='{y + 11}' text-anchor='end'>{escape(shown_name)}</text>")
        texts = []
        for value, colour in values:
            if value is not None:
                width = max(span * min(value / largest, 1.0), 0.0)
                top, thick = (y + 2, _ROW - 4) if colour == "a" else (y + 5, _ROW - 10)
                parts.append(f"<rect class='{colour}' x='{_LEFT}' y='{top}' width='{width:.1f}' height='{thick}'/>")
                texts.append(label(value))
        parts.append(f"<text x='{_LEFT + span + 4}' y='{y + 11}'>{escape(' / '.join(texts))}</text>")
    parts.append(f"<line class='axis' x1='{_LEFT}' x2='{_LEFT}' y1='{_ROW}' y2='{height - _ROW}'/>")
    if left_out:
        parts.append(f"<text x='{_LEFT}' y='{height - 4}'>and {left_out} more, in the table</text>")
    return "".join(parts) + "</svg>"
