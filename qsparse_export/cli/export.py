"""qsparse-export: a checkpoint goes in, a verified bundle comes out."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qsparse_export.cli.console import Stages, print_json, run, say
from qsparse_export.errors import UsageError
from qsparse_export.precision import ACTIVATIONS, HEADS, WEIGHTS

if TYPE_CHECKING:
    from qsparse_export.bundle import Bundle
    from qsparse_export.runtimes.base import Tuning

STAGES = 6  # load, export, lower, compile, verify, bundle

_EPILOG = """\
MODEL is one of
  model.pt                 this project's own checkpoint (qsparse_export.save), or a name like shape:bitnet-2b-4t,layers=2
  folder                   a transformers folder: Llama, Mistral, Qwen2 (with or without sparse_ratio) or BitNet, safetensors
  model.onnx               what another exporter wrote, opset 17 to 25: top-k masks and BitNet linears in it are fused
  model.gguf               Llama or Qwen2 architecture, any quantisation that the gguf package reads
  program.pt2              a torch.export program; loading it unpickles, so it needs --trust
  list targets|formats|passes   prints what there is

examples
  qsparse-export model.pt --target cpu
  qsparse-export SmolLM2.gguf --sparse-ratio 0.25 --sparse-ratio down=0.5 -o smollm2
  qsparse-export SmolLM2.gguf --sparse-ratio 0.25 --weights int4
  qsparse-export ./bitnet-2b-4t --head int8 --verify quick
  qsparse-export shape:qsparse-700m,layers=2 --seed 1
  qsparse-export model.pt --runtime tvm --target raspberry-pi-5 --tune 8 --tune-rpc farm:9190

--sparse-ratio is the share of zeros: R for every projection, or PROJECTION=R for qkv, o, gate_up or down; later ones win;
or the path of a TOML file of name patterns. A checkpoint that says its own sparsity keeps it, unless --override.

--passes is a list of passes, name or name{option=value,...}, separated by commas. "default" in it stands for the pipeline
that would run, and what follows edits it: -NAME takes a pass out, +NAME@OTHER puts one before another.
  --passes default,-fuse-sparse-ternary        --passes 'default,+fold-constants{limit=64}@fuse-sparse-ternary'

exit codes: 0 done and verified, 1 failed (nothing is left behind), 2 wrong usage"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run(_command, argv)


def parser() -> argparse.ArgumentParser:
    """The command line of qsparse-export."""
    made = argparse.ArgumentParser(
        prog="qsparse-export",
        description="Compiles a PyTorch Q-Sparse or BitNet model to a self-checking ONNX bundle.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("model", metavar="MODEL", help="checkpoint, folder or shape (see below); or the word list")
    made.add_argument("what", nargs="?", choices=["targets", "formats", "passes"], help="after list: what to print")
    made.add_argument(
        "--target", default="cpu", help="device to compile for: a name or a .toml file (default: cpu, this machine)"
    )
    made.add_argument(
        "--runtime",
        default="ort",
        help="what runs the bundle: ort (default, ONNX Runtime), tvm (compiled to one module, needs the extra [tvm]) or "
        "reference (NumPy)",
    )
    made.add_argument("-o", "--out", metavar="DIR", help="output folder (default: NAME-TARGET here)")
    made.add_argument(
        "--sparse-ratio", action="append", default=[], metavar="[PROJ=]R|FILE", help="share of zeros; may be repeated"
    )
    made.add_argument(
        "--weights",
        default="keep",
        choices=list(WEIGHTS),
        help="of the blocks; " + "; ".join(f"{name}: {text}" for name, text in WEIGHTS.items()) + " (default: keep)",
    )
    made.add_argument(
        "--head",
        choices=HEADS,
        help="of the head, and of an embedding tied to it (default: int8 with int8 or int4 weights)",
    )
    made.add_argument(
        "--activations", choices=list(ACTIVATIONS), help="and cache (default: fp32; with --weights fp16: fp16)"
    )
    made.add_argument("--portable", action="store_true", help="leave the kernel library out: any ONNX Runtime runs it")
    made.add_argument(
        "--with-bench", action="store_true", help="add qsparse-device-bench, which checks and times the bundle there"
    )
    made.add_argument(
        "--verify",
        default="full",
        choices=["full", "quick", "none"],
        help="full: kernels and function bodies, 32 greedy tokens (default); quick: one way, 8 tokens",
    )
    made.add_argument(
        "--passes", metavar="SPEC", help="replace or edit the pass pipeline (see below, and: list passes)"
    )
    made.add_argument(
        "--print-after",
        action="append",
        default=[],
        metavar="PASS|all[=FILE]",
        help="print the graph after a pass to stderr, or append it to FILE; may be repeated",
    )
    made.add_argument(
        "--dump", metavar="DIR", help="write the graph after each pass to DIR/NN-PASS.onnx, without weights"
    )
    made.add_argument(
        "--inputs", metavar="FILE.npz", help="example inputs by name to verify a model.onnx with (default: made up)"
    )
    made.add_argument(
        "--logits",
        choices=("all", "last"),
        default="all",
        help="last: of the prompt's last token alone, which is all that generating needs and makes prompts faster; no "
        "perplexity then (default: all)",
    )
    made.add_argument(
        "--tune",
        type=int,
        metavar="N",
        help="with --runtime tvm: measure up to N ways to cut the work of each product, and take the fastest",
    )
    made.add_argument(
        "--tune-db",
        metavar="DIR",
        help="folder of the measurements, which later exports reuse (default: one in the user's cache)",
    )
    made.add_argument("--tune-rpc", metavar="HOST:PORT", help="measure on a device of this TVM RPC tracker")
    made.add_argument("--tune-key", metavar="KEY", help="the device's name there (default: the target's name)")
    made.add_argument("--trust", action="store_true", help="allow loading a .pt2 file, which executes code from it")
    made.add_argument("--override", action="store_true", help="let --sparse-ratio contradict the checkpoint")
    made.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the random weights of shape:... (default 0)"
    )
    made.add_argument("--force", action="store_true", help="replace an existing bundle")
    made.add_argument("--json", action="store_true", help="print the manifest as JSON on stdout")
    return made


def _command(argv: Sequence[str]) -> None:
    arguments = parser().parse_args(argv)
    if arguments.model == "list":
        _list(arguments.what, arguments.json)
        return
    if arguments.what:
        parser().error(
            f"unexpected argument {arguments.what!r}; lists are printed by: qsparse-export list {arguments.what}"
        )
    from qsparse_export.watch import Watch

    watch = Watch.parse(arguments.print_after, arguments.dump)
    stages = Stages(STAGES - (arguments.verify == "none"), quiet=arguments.json)
    tuning = _tuning(arguments, stages)
    stages("load")
    from qsparse_export.api import export
    from qsparse_export.example_inputs import read_inputs
    from qsparse_export.loader import load
    from qsparse_export.sparsity import parse_sparsity

    model = load(
        arguments.model,
        sparsity=parse_sparsity(arguments.sparse_ratio) if arguments.sparse_ratio else None,
        override=arguments.override,
        trust=arguments.trust,
        seed=arguments.seed,
    )
    bundle = export(
        model,
        target=arguments.target,
        out=arguments.out,
        runtime=arguments.runtime,
        weights=arguments.weights,
        head=arguments.head,
        activations=arguments.activations,
        portable=arguments.portable,
        verify=arguments.verify,
        pipeline=arguments.passes,
        force=arguments.force,
        example_inputs=read_inputs(arguments.inputs) if arguments.inputs else None,
        with_bench=arguments.with_bench,
        logits=arguments.logits,
        tuning=tuning,
        on_stage=stages,
        on_pass=watch.on_pass(),
    )
    stages(None)
    if arguments.json:
        print_json({"path": str(bundle.path), **bundle.manifest})
    else:
        _report(bundle)


def _tuning(arguments: argparse.Namespace, stages: Stages) -> Tuning | None:
    """What the options say; UsageError or TargetError, before a model is loaded, where nothing can be measured."""
    given = (arguments.tune, arguments.tune_db, arguments.tune_rpc, arguments.tune_key)
    if all(value is None for value in given):
        return None
    from qsparse_export.runtimes import get_runtime
    from qsparse_export.runtimes.base import Tuning
    from qsparse_export.targets.target import load_target

    if arguments.tune is not None and arguments.tune < 1:
        raise UsageError(f"--tune {arguments.tune}: expected 1 or more measurements of each product")
    if arguments.tune is None and (arguments.tune_rpc or arguments.tune_key):
        raise UsageError("--tune-rpc and --tune-key say where to measure: give --tune N too")
    database = Path(arguments.tune_db) if arguments.tune_db else None
    tuning = Tuning(arguments.tune or 0, database, arguments.tune_rpc, arguments.tune_key, stages.step)
    get_runtime(arguments.runtime).tuned(tuning).require_target(load_target(arguments.target))
    return tuning


def _report(bundle: Bundle) -> None:
    manifest = bundle.manifest
    say(f"\n{bundle.path}  ({manifest['name']} for {manifest['target']['name']}, {manifest['runtime']})")
    for name, file in manifest["files"].items():
        say(f"  {name:<28}{file['bytes'] / 1e6:10.2f} MB")
    if manifest.get("quantization"):
        from qsparse_export.quantization_report import summary

        say("  " + summary(manifest["quantization"]))
    parity = manifest["parity"]
    if parity is None:
        say("  not verified (--verify none)")
    else:
        for path in parity["paths"]:
            say("  " + _parity_line(path, parity["limit"]))
        if "note" in parity["ran_on"]:
            say("  note: " + parity["ran_on"]["note"])
    if not manifest["native"]:
        say("  no kernel library inside: the function bodies run, slower")
    say(f"\nrun it:  qsparse-run {bundle.path} --prompt 'Once upon a time'" if manifest["kind"] == "decoder" else "")


def _parity_line(path: dict[str, Any], limit: float) -> str:
    error = path.get("relative_logit_error", path.get("relative_error"))
    line = f"parity {path['path']:<7} relative error {error:.2e} (limit {limit:.1e})"
    if "greedy_agreement" in path:
        line += f", argmax {path['argmax_agreement']:.1%}, greedy tokens {path['greedy_agreement']:.1%}"
    calls = {op: sum(variants.values()) for op, variants in path["native_calls"].items()}
    variants = sorted({variant for op in path["native_calls"].values() for variant in op})
    return line + (f", native calls {calls} ({', '.join(variants)})" if calls else "")


def _list(what: str | None, as_json: bool) -> None:
    if what is None:
        parser().error("list what? expected: list targets, list formats or list passes")
    rows = {"targets": _targets, "formats": _formats, "passes": _passes}[what]()
    if as_json:
        print_json(rows)
        return
    width = max(len(name) for name in rows)
    for name, text in rows.items():
        if "\n" in text:  # a paragraph of its own
            print(f"{name}\n{textwrap.indent(text, '    ')}\n")
        else:
            print(f"{name:<{width}}  {text}")


def _targets() -> dict[str, str]:
    from qsparse_export.targets.target import load_target, target_names

    return {name: load_target(name).description for name in target_names()}


def _formats() -> dict[str, str]:
    from qsparse_export.formats import FORMATS as WEIGHT_FORMATS
    from qsparse_export.loader import FORMATS as CHECKPOINT_FORMATS

    checkpoints = {f"checkpoint {name}": text for name, text in CHECKPOINT_FORMATS.items()}
    return checkpoints | {f"weights {name}": text for name, text in WEIGHT_FORMATS.items()}


def _passes() -> dict[str, str]:
    from qsparse_export.passes import PASSES
    from qsparse_export.passes.base import described

    return {name: described(name) for name in PASSES}
