#!/usr/bin/env python3
r"""Whole models against their peers, in turns on one machine: a page of ratios.

    qsparse-export shape:bitnet-2b-4t --sparse-ratio 0.6 --head int4 --logits last --verify none --with-bench -o bitnet
    python samples/05_whole_models/compare.py --title "BitNet 2B4T" --bundle bitnet \
        --llama-bench build/bin/llama-bench --gguf tq2_0.gguf -t 1,2 -o bitnet.json
    python samples/05_whole_models/compare.py --page docs/whole-models.md bitnet.json smollm2.json

    qsparse-export SmolLM2.gguf --sparse-ratio 0.25 --sparse-ratio down=0.5 --weights int4 --head int4 --logits last \
        --with-bench -o smollm2
    llama-quantize --allow-requantize SmolLM2.gguf smollm2-q4_0.gguf q4_0
    python -m onnxruntime_genai.models.builder -i smollm2-hf -o smollm2-genai -p int4 -e cpu --extra_options int4_accuracy_level=4

The page in docs/ had -n 48 -r 3 for BitNet and -n 64 -r 5 for SmolLM2. tq2_0.gguf is the same shape with random weights, its head
q6_K; smollm2-hf the GGUF's tensors as a transformers folder.

--bundle: a folder of qsparse-export, timed by the program that --with-bench put into it, else by qsparse-bench, whose Python
takes 0.3 ms of each token. --gguf: a file for llama-bench of llama.cpp. --genai: a folder of onnxruntime-genai's model
builder, timed by the loop of its own model benchmark (one token fed, one chosen). Each may be repeated.

Rounds take turns, so that a machine that slows down does so for all; ratios are of the means. Threads spin between kernels
in all of them, which is everyone's default (ours: for a millisecond at most).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import onnxruntime

GENAI = """
import json, sys, time
import onnxruntime_genai as og
folder, prompt, new, threads = sys.argv[1], *map(int, sys.argv[2:])
config = og.Config(folder)
config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
model = og.Model(config)

def run(length, tokens):
    params = og.GeneratorParams(model)
    params.set_search_options(min_length=length + tokens, max_length=length + tokens)
    generator = og.Generator(model, params)
    start = time.perf_counter()
    generator.append_tokens([(7919 * i + 1) % 1000 for i in range(length)])
    generator.generate_next_token()
    first = time.perf_counter()
    for _ in range(tokens - 1):
        generator.generate_next_token()
    return length / (first - start), (tokens - 1) / max(time.perf_counter() - first, 1e-9)

run(prompt, 2)
print(json.dumps({"pp": run(prompt, 1)[0], "tg": run(1, new + 1)[1]}))
"""


@dataclass(frozen=True)
class Contender:
    """``kind`` is bundle, gguf or genai; ``path`` what it runs."""

    kind: str
    path: Path

    @property
    def label(self) -> str:
        names = {"bundle": "ours", "gguf": "llama.cpp", "genai": "ONNX Runtime (genai)"}
        return f"{names[self.kind]}: {self.path.name}"

    def run(self, options: argparse.Namespace, threads: int) -> dict[str, float]:
        """Tokens per second of one round: pp (a prompt at once) and tg (one by one)."""
        prompt, new = options.prompt, options.generate
        if self.kind == "bundle":
            bench = [*_bench_of(self.path), "-r", "1"]
            rows = _json([*bench, "-p", str(prompt), "-n", str(new), "-t", str(threads)])["rows"]
            return {row["test"][:2]: row["tokens_per_s_mean"] for row in rows if row["mode"] == "native"}
        if self.kind == "gguf":
            bench = [options.llama_bench, "-m", str(self.path), "-o", "json", "-r", "1"]
            rows = _json([*bench, "-p", str(prompt), "-n", str(new), "-t", str(threads)])
            return {"pp" if row["n_prompt"] else "tg": row["avg_ts"] for row in rows}
        return _json([sys.executable, "-c", GENAI, str(self.path), str(prompt), str(new), str(threads)])


def _bench_of(bundle: Path) -> list[str]:
    """The program inside the bundle where there is one: without Python, as the peers are."""
    program = bundle / "qsparse-device-bench"
    if not program.is_file():
        return [str(Path(sys.executable).with_name("qsparse-bench")), str(bundle), "-o", "json"]
    (library,) = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*")
    return [str(program), str(bundle), "--onnxruntime", str(library), "--modes", "native", "--unchecked"]


def _json(command: list[str]) -> dict | list:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout[min(i for i in (done.stdout.find("["), done.stdout.find("{")) if i >= 0) :])


def measure(options: argparse.Namespace) -> dict:
    """Every contender in every round, for each number of threads."""
    contenders = [
        Contender(kind, Path(path)) for kind in ("bundle", "gguf", "genai") for path in getattr(options, kind)
    ]
    if not contenders or contenders[0].kind != "bundle":
        raise SystemExit("give at least one --bundle")
    rows = []
    load = os.getloadavg()[0]
    for threads in options.threads:
        seen: dict[str, list[dict[str, float]]] = {contender.label: [] for contender in contenders}
        for number in range(options.rounds):
            for contender in contenders:
                print(f"round {number + 1} of {options.rounds}, {threads} threads: {contender.label}", file=sys.stderr)
                seen[contender.label].append(contender.run(options, threads))
        for label, rounds in seen.items():
            for test, count in (("pp", options.prompt), ("tg", options.generate)):
                figures = [figure[test] for figure in rounds]
                spread = statistics.stdev(figures) if len(figures) > 1 else 0.0
                rows.append(
                    {"label": label, "test": f"{test}{count}", "threads": threads}
                    | {"mean": statistics.mean(figures), "std": spread, "rounds": figures}
                )
    sizes = {contender.label: _bytes(contender.path) for contender in contenders}
    machine = {"cpu": _cpu(), "cores": os.cpu_count(), "load_before": load, "date": time.strftime("%Y-%m-%d")}
    return {"title": options.title, "machine": machine, "ours": contenders[0].label, "bytes": sizes, "rows": rows}


def _bytes(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.glob("*.data"))


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def page(reports: list[dict]) -> str:
    """Markdown: a table per report, ratios of the first bundle to each peer."""
    parts = ["# Whole models and their peers\n"]
    parts.append(
        "Made by [samples/05_whole_models/compare.py](../samples/05_whole_models/compare.py), which has the commands. All run in "
        "turns, with threads that spin between kernels (ours for 1 ms at most), each driven by a program in C++ (genai: by "
        "its loop, called from Python)."
    )
    for report in reports:
        machine = report["machine"]
        parts.append(f"\n## {report['title']}\n")
        parts.append(
            f"{machine['cpu']}, {machine['cores']} cores, load before {machine['load_before']:.1f}, {machine['date']}.\n"
        )
        parts.append("| model | weights MB | test | threads | tokens/s | ours / this |\n|---|---|---|---|---|---|")
        ours = {(row["test"], row["threads"]): row["mean"] for row in report["rows"] if row["label"] == report["ours"]}
        for row in sorted(report["rows"], key=lambda row: (row["test"], row["threads"])):
            ratio = ours[row["test"], row["threads"]] / row["mean"]
            shown = "" if row["label"] == report["ours"] else f"**{ratio:.2f}x**"
            parts.append(
                f"| {row['label']} | {report['bytes'][row['label']] / 1e6:.0f} | {row['test']} | {row['threads']} | "
                f"{row['mean']:.1f} ± {row['std']:.1f} | {shown} |"
            )
    return "\n".join(parts) + "\n"


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("reports", nargs="*", help="with --page: what -o wrote")
    made.add_argument("--title", default="model")
    for kind in ("bundle", "gguf", "genai"):
        made.add_argument(f"--{kind}", action="append", default=[], metavar="PATH")
    made.add_argument("--llama-bench", default="llama-bench", metavar="PROGRAM")
    made.add_argument("-p", "--prompt", type=int, default=128)
    made.add_argument("-n", "--generate", type=int, default=64)
    made.add_argument("-r", "--rounds", type=int, default=5)
    made.add_argument("-t", "--threads", type=lambda text: [int(part) for part in text.split(",")], default=[1, 2])
    made.add_argument("-o", "--out", type=Path)
    made.add_argument("--page", type=Path, help="write this page from reports")
    options = made.parse_args()
    if options.page:
        options.page.write_text(page([json.loads(Path(name).read_text()) for name in options.reports]))
        return
    report = measure(options)
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(page([report]))


if __name__ == "__main__":
    main()
