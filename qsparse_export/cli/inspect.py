"""qsparse-inspect: what is in a bundle, a model.onnx or a checkpoint."""

from __future__ import annotations

import argparse
import importlib.util
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from qsparse_export.cli.console import print_json, run, say
from qsparse_export.errors import QSparseError, UsageError

_EPILOG = """\
MODEL is a bundle, a model.onnx, or whatever qsparse-export takes. Only headers and the graph are read.

columns: shape is inputs -> outputs (several where matrices share a row); bytes are those of the constants; k of so many
channels are kept at the input, density is that share; with --measure also the share that was not 0 in a run of a short
prompt, and how far the kernels' output is from the function bodies', both with everything before it.

exit codes: 0 done, 1 failed, 2 wrong usage"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run(_command, argv)


def parser() -> argparse.ArgumentParser:
    """The command line of qsparse-inspect."""
    made = argparse.ArgumentParser(
        prog="qsparse-inspect",
        description="Shows layers, shapes, formats, bytes, sparsity and parity of a model or bundle.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("model", metavar="MODEL", help="bundle folder, model.onnx or checkpoint")
    made.add_argument("--measure", action="store_true", help="run a bundle on a short prompt first")
    made.add_argument("--html", metavar="FILE", help="write one self-contained page with plots")
    made.add_argument("--json", action="store_true", help="print the report as JSON on stdout")
    made.add_argument("--netron", action="store_true", help="open the graph in Netron afterwards (pip install netron)")
    return made


def _command(argv: Sequence[str]) -> None:
    arguments = parser().parse_args(argv)
    from qsparse_export.inspect.report import inspect

    if arguments.netron and importlib.util.find_spec("netron") is None:
        raise UsageError("Netron is not installed; install it with: pip install netron")
    report = inspect(arguments.model)
    if arguments.measure:
        from qsparse_export.bundle import Bundle
        from qsparse_export.inspect.measure import measured

        if report.kind != "bundle":
            raise UsageError(
                f"{arguments.model} is no bundle, and only those are run; export it first, then --measure that"
            )
        report = measured(report, Bundle.load(arguments.model))
    if arguments.html:
        from qsparse_export.inspect.page import page

        _write(Path(arguments.html), page(report))
        say(f"wrote {arguments.html}")
    if arguments.json:
        print_json(report.to_dict())
    elif not arguments.html:
        from qsparse_export.inspect.table import table

        print(table(report))
    if arguments.netron:
        _open_netron(report.kind, Path(report.path))


def _write(path: Path, text: str) -> None:
    """Writes a file completely or not at all."""
    try:
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=f".{path.name}.", delete=False, encoding="utf-8"
        ) as file:
            file.write(text)
        os.chmod(file.name, 0o644)
        os.replace(file.name, path)
    except OSError as error:
        raise QSparseError(f"cannot write {path}: {error.strerror or error}") from error


def _open_netron(kind: str, path: Path) -> None:
    import netron

    if kind == "checkpoint":
        raise UsageError(f"{path} is a checkpoint, which Netron shows no graph of; export it first")
    netron.start(str(path / "model.onnx" if kind == "bundle" else path))
