#!/usr/bin/env python3
"""What skipping gains: time against density for three matrices of a 2B ternary model, ONNX Runtime's dense ones as lines.

Runs `qsparse-bench kernels` and makes a page of it: commands, machine, figures, plots.

    python samples/03_plot_sparsity/plot_sparsity.py                     # 10 minutes on a machine that does nothing else
    python samples/03_plot_sparsity/plot_sparsity.py --reuse             # the page again, from the figures kept
    python samples/03_plot_sparsity/plot_sparsity.py --models a.json     # with whole models: qsparse-bench BUNDLE -o json
    python samples/03_plot_sparsity/plot_sparsity.py --quick             # a minute, into out/: no figures to be quoted

Needs matplotlib: pip install 'qsparse-export[bench]'.
"""

import argparse
import io
import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
DENSITIES = "0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1.0"
PEERS = {"ort-2bit": "ONNX Runtime, 2 bits", "ort-4bit": "ONNX Runtime, 4 bits"}


@dataclass(frozen=True)
class Case:
    """One run of `qsparse-bench kernels`, whose figures are kept in ``name``.json."""

    name: str
    title: str
    arguments: tuple[str, ...]

    def command(self, threads: int, quick: bool) -> list[str]:
        count = "1" if "--hot" in self.arguments else str(threads)
        words = ["kernels", *self.arguments, "-t", count, "--peers", "ort", "-o", "json"]
        if not quick:
            return [*words, "--density", DENSITIES]
        # From the cache, since making 256 MB of weights for every case takes longer than all the rest.
        hot = [] if "--hot" in words else ["--hot"]
        return [*words, *hot, "--density", "0.2,0.6,1.0", "--seconds", "0.05"]


CASES = (
    Case("gate-up", "gate and up in one row: K = 2560, N = 13824", ("--k", "2560", "--n", "13824")),
    Case("down", "down: K = 6912, N = 2560", ("--k", "6912", "--n", "2560")),
    Case("qkv", "q, k and v in one row: K = 2560, N = 3840", ("--k", "2560", "--n", "3840")),
    Case("hot", "from the cache, one thread: K = 2560, N = 6912", ("--k", "2560", "--n", "6912", "--hot")),
)


def measure(case: Case, threads: int, quick: bool) -> dict:
    """The report of one case, with its command and the machine's load average before it."""
    words = case.command(threads, quick)
    before = os.getloadavg()[0]
    bench = [
        sys.executable,
        "-P",
        "-c",
        "import sys; from qsparse_export.cli.bench import main; sys.exit(main())",
        *words,
    ]
    printed = subprocess.run(bench, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(printed) | {"command": shlex.join(["qsparse-bench", *words]), "load_before": round(before, 1)}


def figure(title: str, rows: list[dict]) -> str:
    """Time of one product against density, as SVG: ours, the dense peers, and the machine's limit."""
    import matplotlib
    from matplotlib.figure import Figure

    density = [row["density"] for row in rows]
    drawn = Figure(figsize=(7, 4.2), layout="constrained")
    axes = drawn.subplots()
    axes.plot(density, [row["median_us"] for row in rows], "o-", color="C0", label="qsparse, median")
    spread = [row["min_us"] for row in rows], [row["p90_us"] for row in rows]
    axes.fill_between(density, *spread, color="C0", alpha=0.2, label="qsparse, minimum to p90")
    for number, (peer, name) in enumerate(PEERS.items(), 1):
        axes.plot(density, [row["peers"][peer]["median_us"] for row in rows], "--", color=f"C{number}", label=name)
    limits = [row["active_bytes"] / row["gather_gb_per_s"] / 1e3 for row in rows]
    axes.plot(density, limits, ":", color="grey", label="reading the active rows alone")
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel("density (share of input channels active)")
    axes.set_ylabel("microseconds")
    axes.set_xlim(0, 1.02)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "qsparse", "svg.fonttype": "none"}):
        drawn.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()


def table(rows: list[dict]) -> list[str]:
    headings = ["density", "median us", "min us", "times ORT 2 bit", "times ORT 4 bit", "active GB/s", "of the limit"]
    lines = ["| " + " | ".join(headings) + " |", "|" + " --- |" * len(headings)]
    for row in rows:
        ratios = [f"{row['peers'][peer]['ratio']:.2f}" for peer in PEERS]
        cells = [f"{row['density']:g}", f"{row['median_us']:.1f}", f"{row['min_us']:.1f}", *ratios]
        cells += [f"{row['active_gb_per_s']:.1f}", f"{row['limit_fraction']:.0%}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def page(reports: dict[str, dict], models: list[Path], quick: bool) -> str:
    machine = next(iter(reports.values()))["machine"]
    load = reports[CASES[0].name]["load_before"]  # that of the later ones is partly our own
    lines = [
        "# Results",
        "",
        "Made by `python samples/03_plot_sparsity/plot_sparsity.py`; [benchmarks](benchmarks.md) says what each figure means.",
        "",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}, ONNX Runtime {machine['onnxruntime']}, library "
        f"{machine['library']}. Load average before the first run: {load:g}"
        + ("." if load < 0.5 else ": other work shared the cores."),
    ]
    if quick:
        lines += [
            "",
            "**A quick run: few rounds, weights in the cache. It shows that the script works, and nothing else.**",
        ]
    for case in CASES:
        rows = reports[case.name]["rows"]
        lines += [
            "",
            f"## {case.title[0].upper()}{case.title[1:]}",
            "",
            "```bash",
            reports[case.name]["command"],
            "```",
        ]
        variant = rows[0]["variant"]
        lines += ["", f"Variant {variant}.", "", f"![time against density](results/{case.name}.svg)", "", *table(rows)]
    if models:
        from qsparse_export.bench.merged import read_reports
        from qsparse_export.bench.merged_report import markdown

        lines += ["", "## Whole models", "", "```bash", "qsparse-bench BUNDLE -t 1,2 --dense -o json", "```", ""]
        lines.append(markdown(read_reports(models)))
    return "\n".join(lines) + "\n"


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="few rounds from the cache, into out/")
    made.add_argument("--reuse", action="store_true", help="measure nothing: use the figures of the last run")
    made.add_argument("--threads", type=int, default=2, metavar="T", help="threads of the cold runs (default 2)")
    made.add_argument("--models", nargs="*", default=[], type=Path, metavar="FILE", help="reports of whole models")
    arguments = made.parse_args()
    folder = DOCS.parent / "out" / "plot-sparsity" if arguments.quick else DOCS
    results = folder / "results"
    results.mkdir(parents=True, exist_ok=True)
    reports = {}
    for case in CASES:
        kept = results / f"{case.name}.json"
        if arguments.reuse:
            reports[case.name] = json.loads(kept.read_text())
        else:
            print(f"measuring {case.title}", file=sys.stderr, flush=True)
            reports[case.name] = measure(case, arguments.threads, arguments.quick)
            kept.write_text(json.dumps(reports[case.name], indent=1) + "\n")
        (results / f"{case.name}.svg").write_text(figure(case.title, reports[case.name]["rows"]))
    (folder / "results.md").write_text(page(reports, arguments.models, arguments.quick))
    print(f"wrote {folder / 'results.md'}")


if __name__ == "__main__":
    main()
