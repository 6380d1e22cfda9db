"""Counts instructions per generated token under emulation; as a program, prints the table of docs/targets.md.

    python tests/arm/instructions.py BUNDLE [BUNDLE...]

where each BUNDLE was exported with ``--target arm64 --with-bench``.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from emulation import PROCESSORS, Emulator, onnxruntime_for_arm

from qsparse_export.runtimes.ort.library import DEVICE_BENCH_NAME

STEPS = 12


def per_token(emulator: Emulator, bundle: Path, onnxruntime: Path, mode: str, steps: int = STEPS) -> float:
    """Instructions of one decode step on one thread: what ``steps`` more tokens cost, after a prompt of 16 tokens.

    Start, loading and prompt are in both runs, and fall out of the difference.
    """
    ids = ",".join(str(token) for token in range(1, 17))

    def executed(tokens: int) -> int:
        words = ("--ids", ids, "-n", tokens, "-t", 1, "--modes", mode, "--onnxruntime", onnxruntime, bundle)
        result = emulator.run(bundle / DEVICE_BENCH_NAME, *words, count=True)
        assert result.exit_code == 0, result.said
        assert result.instructions is not None
        return result.instructions

    return (executed(1 + steps) - executed(1)) / steps


def main(bundles: list[str]) -> None:
    """Prints a Markdown table: one row per bundle and way to run it, one column per processor."""
    onnxruntime = onnxruntime_for_arm()
    print("| bundle | path | " + " | ".join(PROCESSORS) + " |")
    print("|---|---|" + "---|" * len(PROCESSORS))
    with tempfile.TemporaryDirectory() as folder:
        emulators = []
        for cpu in PROCESSORS:
            root = Path(folder) / cpu
            root.mkdir()
            emulators.append(Emulator.of(cpu, root))
        for bundle in map(Path, bundles):
            for mode in ("native", "bodies"):
                counts = [per_token(emulator, bundle, onnxruntime, mode) / 1e6 for emulator in emulators]
                print(
                    f"| {bundle.name} | {mode} | " + " | ".join(f"{count:,.2f} M" for count in counts) + " |",
                    flush=True,
                )


if __name__ == "__main__":
    main(sys.argv[1:])
