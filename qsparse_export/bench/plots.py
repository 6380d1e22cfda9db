"""The plots of a merged report, as SVG text. Needs matplotlib, which the extra [bench] brings."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qsparse_export.bench.merged import Result
from qsparse_export.errors import TargetError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = {"native": "o", "dense": "s", "bodies": "x"}


def plots(results: Sequence[Result]) -> dict[str, str]:
    """Title to SVG: speed against density of decode and prefill, and memory. A plot without points is left out.

    TargetError when matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise TargetError(
            "plots need matplotlib, which is not installed: pip install 'qsparse-export[bench]'"
        ) from error
    # Names are what devices call themselves: no formulas. The salt makes the same bytes of the same figure.
    settings: Any = {"text.parse_math": False, "svg.hashsalt": "qsparse", "svg.fonttype": "none"}
    with matplotlib.rc_context(settings):
        drawn = {
            "Decode: tokens per second against density": _speed([r for r in results if r.is_decode]),
            "Prefill: tokens per second against density": _speed([r for r in results if not r.is_decode]),
            "Memory: most resident at once": _memory(results),
        }
        return {title: _svg_of(figure) for title, figure in drawn.items() if figure is not None}


def _figure(width_inches: float, height_inches: float) -> Figure:
    """An empty one that no window system is needed for."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width_inches, height_inches), layout="constrained")


def _svg_of(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()


def _speed(results: Sequence[Result]) -> Figure | None:
    known = [result for result in results if result.density is not None]
    if not known:
        return None
    lines = _lines(known)
    figure = _figure(7.5, 5.0 + 0.2 * len(lines))
    axes = figure.subplots()
    for number, ((device, model, test, threads), points) in enumerate(lines.items()):
        ordered = sorted(points, key=lambda point: point.density or 0.0)
        x, y = [point.density or 0.0 for point in ordered], [point.tokens_per_s_mean for point in ordered]
        colour = f"C{number % 10}"
        axes.plot(x, y, color=colour, linewidth=1, label=f"{test}, {threads} threads: {device}, {model}")
        for point in ordered:
            marker = _MARKERS[point.mode]
            error = point.tokens_per_s_std
            axes.errorbar(point.density or 0.0, point.tokens_per_s_mean, error, color=colour, marker=marker, capsize=3)
    _finish(axes, {result.mode for result in known})
    figure.legend(loc="outside lower left", fontsize="small")
    return figure


def _lines(results: Sequence[Result]) -> Mapping[tuple[str, str, str, int], list[Result]]:
    """What one line connects: the same model on the same device. Bodies are another program, and have points of their own."""
    lines: dict[tuple[str, str, str, int], list[Result]] = {}
    for result in results:
        model = f"{result.model} (bodies)" if result.mode == "bodies" else result.model
        lines.setdefault((result.device, model, result.test, result.threads), []).append(result)
    return lines


def _memory(results: Sequence[Result]) -> Figure | None:
    sizes = {
        f"{result.device}, {result.model}, {result.mode}": result.peak_rss_bytes / 1e6
        for result in sorted(results, key=lambda result: result.threads)
        if result.peak_rss_bytes is not None
    }
    if not sizes:
        return None
    figure = _figure(7.5, 1.0 + 0.35 * len(sizes))
    axes = figure.subplots()
    bars = axes.barh(list(sizes), list(sizes.values()), color="C0")
    axes.bar_label(bars, fmt="%.0f MB", padding=3)
    axes.invert_yaxis()
    axes.set_xlim(right=1.25 * max(sizes.values()))  # room for the labels
    axes.set_xlabel("MB")
    return figure


def _finish(axes: Axes, modes: set[str]) -> None:
    axes.set_xlabel("density (share of input channels active)")
    axes.set_ylabel("tokens per second")
    axes.set_xlim(0, 1.02)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    for mode in sorted(modes):
        axes.plot([], [], linestyle="", color="grey", marker=_MARKERS[mode], label=mode)
