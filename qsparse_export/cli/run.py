"""qsparse-run: generates text from a bundle, or measures its perplexity on a file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from qsparse_export.cli.console import print_json, run, say
from qsparse_export.errors import UsageError

if TYPE_CHECKING:
    from qsparse_export.generate import Generator

_EPILOG = """\
examples
  qsparse-run smollm2 --prompt "The capital of France is" -n 32
  qsparse-run smollm2 --perplexity handbook.txt --json
  qsparse-run smollm2 --ids 1,2,3 -n 8 --no-native

Text goes to stdout as it is generated (greedy: the most likely token each time), figures to stderr; --json prints one
document with both. Perplexity: windows of 512 tokens, each from an empty cache; every token but a window's first counts."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run(_command, argv)


def parser() -> argparse.ArgumentParser:
    """The command line of qsparse-run."""
    made = argparse.ArgumentParser(
        prog="qsparse-run",
        description="Runs a bundle that qsparse-export wrote.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("bundle", metavar="BUNDLE", help="folder that qsparse-export wrote")
    what = made.add_mutually_exclusive_group()
    what.add_argument("--prompt", metavar="TEXT", help="text to continue (default: read from stdin)")
    what.add_argument("--ids", metavar="I,I,...", help="token ids to continue, for bundles without a tokenizer")
    what.add_argument("--perplexity", metavar="FILE", help="measure perplexity on a UTF-8 text file instead")
    made.add_argument("-n", "--tokens", type=int, default=64, metavar="N", help="tokens to generate (default 64)")
    made.add_argument("-t", "--threads", type=int, metavar="N", help="threads (default: all cores)")
    made.add_argument(
        "--no-native", action="store_true", help="run the function bodies instead of the kernels (slower)"
    )
    made.add_argument("--ignore-eos", action="store_true", help="go on after an end-of-text token")
    made.add_argument("--window", type=int, default=512, metavar="N", help="perplexity window in tokens (default 512)")
    made.add_argument("--limit", type=int, metavar="N", help="perplexity on the first N tokens only")
    made.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    return made


def _command(argv: Sequence[str]) -> None:
    arguments = parser().parse_args(argv)
    for name in ("tokens", "threads", "window", "limit"):
        value = getattr(arguments, name)
        if value is not None and value < (0 if name == "tokens" else 1):
            parser().error(f"--{name} is {value}; expected a positive number")
    from qsparse_export.bundle import Bundle

    bundle = Bundle.load(arguments.bundle)
    generator = bundle.open(threads=arguments.threads, native=False if arguments.no_native else None)
    if arguments.no_native or not bundle.manifest["native"]:
        say("note: running the function bodies, not the native kernels")
    if arguments.perplexity:
        _perplexity(generator, arguments)
    else:
        _generate(generator, arguments)


def _perplexity(generator: Generator, arguments: argparse.Namespace) -> None:
    from tqdm import tqdm

    ids = generator.encode(_read_text(arguments.perplexity))[: arguments.limit]
    with tqdm(total=len(ids), unit="tok", desc="perplexity", disable=None, leave=False) as bar:
        result = generator.perplexity(ids, arguments.window, on_window=bar.update)
    if arguments.json:
        print_json(asdict(result))
    else:
        print(f"perplexity {result.perplexity:.4f} over {result.tokens} predicted tokens")


def _generate(generator: Generator, arguments: argparse.Namespace) -> None:
    if arguments.ids is not None:
        ids = _parse_ids(arguments.ids)
    else:
        ids = generator.encode(sys.stdin.read() if arguments.prompt is None else arguments.prompt)
    has_text = arguments.ids is None
    shown = ""
    tokens: list[int] = []

    def stream(token: int) -> None:
        nonlocal shown
        tokens.append(token)
        text = generator.decode(tokens) if has_text else " ".join(map(str, tokens))
        # A token can end within a UTF-8 character; what decodes to U+FFFD now may be whole with the next token.
        if not text.endswith("\ufffd"):
            print(text[len(shown) :], end="", flush=True)
            shown = text

    result = generator.generate(
        ids, arguments.tokens, on_token=None if arguments.json else stream, stop_at_eos=not arguments.ignore_eos
    )
    if arguments.json:
        plain = asdict(result)
        text = generator.decode(result.tokens) if has_text else ""
        print_json({"text": text, **plain})
        return
    print()
    calls = ", ".join(
        f"{op} {variant} x{n}" for op, variants in result.native_calls.items() for variant, n in variants.items()
    )
    say(
        f"prefill {result.prefill_tokens_per_s:.1f} tok/s, decode {result.decode_tokens_per_s:.1f} tok/s; "
        f"native calls: {calls or 'none'}"
    )


def _parse_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--ids {text!r}; expected token ids separated by commas, such as 1,2,3") from None


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path} as UTF-8 text: {error}") from error
