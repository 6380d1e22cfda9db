"""Spells the merged rows of several reports: one Markdown table, or one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
import html
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from qsparse_export.bench.merged import Failed, Result
from qsparse_export.errors import MeasurementError

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .25em .7em; border-bottom: 1px solid #ddd; text-align: right }
th:nth-child(-n+4), td:nth-child(-n+4) { text-align: left }
tr.failed { color: #a00 }
tr.failed td:nth-child(6) { text-align: left; max-width: 30em }
img { max-width: 100% }
"""


def _optional(value: float | None, spec: str, scale: float = 1.0) -> str:
    return "" if value is None else format(value / scale, spec)


_COLUMNS: Mapping[str, Callable[[Result], str]] = {
    "device": lambda r: r.device,
    "model": lambda r: r.model,
    "test": lambda r: r.test,
    "mode": lambda r: r.mode,
    "threads": lambda r: str(r.threads),
    "tokens/s": lambda r: f"{r.tokens_per_s_mean:.2f} ± {r.tokens_per_s_std:.2f}",
    "p50 ms": lambda r: f"{r.p50_ms:.2f}",
    "p90 ms": lambda r: f"{r.p90_ms:.2f}",
    "density": lambda r: _optional(r.density, ".3f"),
    "read per token, MB": lambda r: _optional(r.bytes_per_token, ".1f", 1e6),
    "peak RSS, MB": lambda r: _optional(r.peak_rss_bytes, ".0f", 1e6),
    "load ms": lambda r: _optional(r.load_ms, ".0f"),
    "TTFT ms": lambda r: _optional(r.ttft_ms, ".0f"),
    "variants": lambda r: r.variants,
}


def markdown(results: Sequence[Result], failures: Sequence[Failed] = ()) -> str:
    """One table of all rows, what failed at its end."""
    lines = [list(_COLUMNS), ["---"] * len(_COLUMNS), *_cells(results, failures)]
    return "\n".join(f"| {' | '.join(_escaped(cell) for cell in line)} |" for line in lines)


def _cells(results: Sequence[Result], failures: Sequence[Failed]) -> list[list[str]]:
    known = [[cell(result) for cell in _COLUMNS.values()] for result in results]
    return known + [_failed_cells(failed) for failed in failures]


def _failed_cells(failed: Failed) -> list[str]:
    texts = {"device": failed.device, "model": failed.model, "mode": failed.mode or "all", "threads": failed.threads}
    texts |= {"test": "all", "tokens/s": f"failed: {failed.reason}"}
    return [texts.get(title, "") for title in _COLUMNS]


def _escaped(cell: str) -> str:
    return cell.replace("|", r"\|").replace("\n", " ")


def html_page(results: Sequence[Result], plots: Mapping[str, str], failures: Sequence[Failed] = ()) -> str:
    """A page with all rows, what failed marked as such, and ``plots`` (title to SVG text).

    Every text in it is escaped, nothing is loaded.
    """
    head = "".join(f"<th>{html.escape(title)}</th>" for title in _COLUMNS)
    rows = "\n".join(
        f"<tr{' class=failed' if number >= len(results) else ''}>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for number, cells in enumerate(_cells(results, failures))
    )
    figures = "\n".join(
        # As an image a plot can run no script, and its ids do not meet those of another one.
        f"<h2>{html.escape(title)}</h2>\n"
        f'<img alt="{html.escape(title)}" src="data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}">'
        for title, svg in plots.items()
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>qsparse-bench</title><style>{_STYLE}</style></head>
<body>
<h1>qsparse-bench</h1>
<p>pp512: prefill of 512 tokens at once. tg128: 128 tokens generated one by one from an empty cache. Tokens per second: mean
± standard deviation; p50 and p90 of one generated token, or of the whole prefill. native: kernels; bodies: function
bodies; dense: the same weights with every mask open. Modes of one file were measured in turn; files were not.</p>
<table>
<thead><tr>{head}</tr></thead>
<tbody>
{rows}
</tbody>
</table>
{figures}
</body>
</html>
"""


def write_text(path: Path, text: str) -> None:
    """Writes ``path`` completely or not at all; MeasurementError when it cannot be written."""
    temporary: str | None = None
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise MeasurementError(f"cannot write {path}: {error.strerror}; choose another file with -o") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
