"""Who runs a model while it is measured: a process of its own, or any program that speaks the protocol."""

import json
import subprocess
import sys
import textwrap

import pytest

from qsparse_export.bench.measurement import Row
from qsparse_export.bench.plan import Plan, check
from qsparse_export.bench.prompt import first_token, prompt_ids
from qsparse_export.bench.runner import Footprint, Opened, Prefill, local_command, process_runner
from qsparse_export.bench.turns import take_turns
from qsparse_export.errors import BundleError, TargetError, UsageError

PLAN = Plan(prompts=(4, 8), generations=(3,), repetitions=2, threads=(1,), modes=("native", "dense"))


class Recorded:
    """A runner whose times are given, and which notes when it was called."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def opened(self):
        return Opened(load_ms=7.0, rss_before_load_bytes=10)

    def prefill(self, tokens):
        self.log.append((self.name, "prefill", tokens))
        return Prefill(seconds=0.5, first_token_seconds=0.5 + len(self.log) / 1000)

    def generate(self, tokens):
        self.log.append((self.name, "generate", tokens))
        return (0.1, 0.2, 0.3)

    def footprint(self):
        return Footprint(peak_rss_bytes=99, native_calls={"TopKSparsify": {"avx2": 4}})


def test_modes_and_repetitions_take_turns_and_the_first_round_does_not_count():
    log, told = [], []
    runners = {mode: Recorded(mode, log) for mode in PLAN.modes}
    rows, costs = take_turns(runners, PLAN, 1, told.append)
    calls = [("prefill", 4), ("prefill", 8), ("generate", 3)]
    assert log == [(mode, *call) for call in calls for mode in PLAN.modes] * 3
    assert len(told) == len(log) == PLAN.steps - 2 * PLAN.activity_tokens
    assert [(row.test, row.mode) for row in rows] == [(t, m) for t in ("pp4", "pp8", "tg3") for m in PLAN.modes]
    tg = rows[-1]
    assert tg.tokens_per_s_mean == pytest.approx(5.0) and tg.tokens_per_s_std == pytest.approx(0.0)
    assert (tg.p50_ms, tg.p90_ms) == (pytest.approx(200.0), pytest.approx(300.0)) and len(tg.samples_tokens_per_s) == 2
    native = costs[0]
    assert (native.load_ms, native.peak_rss_bytes, native.rss_before_load_bytes) == (7.0, 99, 10)
    assert native.variants == {"TopKSparsify": {"avx2": 4}}
    assert native.first_run_ms == pytest.approx(501)  # the very first prompt, of the warm-up
    assert native.ttft_ms == pytest.approx((509 + 515) / 2)  # the longest prompt's, of the rounds that count


def test_statistics_of_a_row():
    row = Row.of("pp10", "native", 2, 10, [(1.0,), (2.0,), (4.0,)])
    assert row.samples_tokens_per_s == (10.0, 5.0, 2.5)
    assert row.tokens_per_s_mean == pytest.approx(17.5 / 3)
    assert row.tokens_per_s_std == pytest.approx(3.8188, rel=1e-4)  # of a sample: n - 1
    assert row.p50_ms == 2000.0 and row.p90_ms == pytest.approx(3600.0)
    assert Row.of("tg2", "dense", 1, 2, [(0.5, 0.5)]).tokens_per_s_std == 0.0


def test_a_prompt_is_a_formula_and_a_generation_starts_with_the_models_own_first_token():
    assert prompt_ids(100, 3) == [1, 20, 39]
    assert first_token({"bos_token_id": 0, "vocab_size": 9}) == 0
    assert first_token({"bos_token_id": None, "vocab_size": 9}) == 1
    assert first_token({"vocab_size": 1}) == 0


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (Plan((), (), 1, (1,), ("native",)), "nothing to measure"),
        (Plan((41,), (), 1, (1,), ("native",)), "-p 41: the model has 40 positions"),
        (Plan((), (8, 41), 1, (1,), ("native",)), "-n 41: the model has 40 positions"),
        (Plan((8,), (), 0, (1,), ("native",)), "0 repetitions"),
        (Plan((8,), (), 1, (2, 0), ("native",)), r"\[2, 0\] threads"),
    ],
)
def test_impossible_plans_are_refused(plan, words):
    with pytest.raises(UsageError, match=words):
        check(plan, 40)


def program(code):
    """A command that runs ``code`` with ``answer(plain)``."""
    head = "import json, sys\ndef answer(plain): print(json.dumps(plain), flush=True)\n"
    return [sys.executable, "-c", head + textwrap.dedent(code)]


def test_a_devices_own_program_is_measured_like_ours():
    command = program("""
        answer({"load_ms": 5.5, "rss_before_load_bytes": 1000})
        for line in sys.stdin:
            command = json.loads(line)
            if "prefill" in command:
                answer({"seconds": 0.25, "first_token_seconds": 0.26})
            elif "generate" in command:
                answer({"seconds_per_token": [0.5] * command["generate"]})
            else:
                answer({"peak_rss_bytes": 4096, "native_calls": {"TernaryMatMul": {"neondot": 3}}})
    """)
    with process_runner(command, "board") as runner:
        rows, (cost,) = take_turns({"native": runner}, PLAN, 4, lambda _: None)
    assert [row.tokens_per_s_mean for row in rows] == [16.0, 32.0, 2.0]
    assert (cost.load_ms, cost.peak_rss_bytes, cost.threads) == (5.5, 4096, 4)
    assert cost.variants == {"TernaryMatMul": {"neondot": 3}}


OPEN = 'answer({"load_ms": 1.0, "rss_before_load_bytes": 1})\n'


@pytest.mark.parametrize(
    ("code", "error", "words"),
    [
        ("sys.exit(3)", TargetError, "board ended with exit code 3"),
        ("import os; os.kill(os.getpid(), 9)", TargetError, "by signal 9, as a system short of memory"),
        ("print('hello', flush=True)", TargetError, "board answered 'hello.*expected a line of JSON"),
        ("print('[1]', flush=True)", TargetError, "expected a JSON object"),
        ('answer({"load_ms": 1.0})', TargetError, "rss_before_load_bytes"),
        ('answer({"error": "no such op", "kind": "BundleError"})', BundleError, "board: no such op"),
        ('answer({"error": "boom", "kind": "near_names"})', TargetError, "board: boom"),
        (
            OPEN + 'sys.stdin.readline(); answer({"seconds_per_token": [1.0]})',
            TargetError,
            "timed 1 tokens instead of 2",
        ),
        (OPEN, TargetError, "board ended with exit code 0"),
    ],
)
def test_a_program_that_misbehaves_is_named(code, error, words):
    with pytest.raises(error, match=words), process_runner(program(code), "board") as runner:
        runner.generate(2)


def test_a_missing_program_is_named(tmp_path):
    with pytest.raises(TargetError, match="cannot start"), process_runner([str(tmp_path / "none")], "board"):
        raise AssertionError("must not be entered")


def test_the_process_ends_with_the_block_whatever_happens():
    forever = program(OPEN + "import time\nwhile True: time.sleep(1)")
    with pytest.raises(KeyboardInterrupt), process_runner(forever, "board") as runner:
        process = runner._conversation._process
        raise KeyboardInterrupt
    assert process.returncode == -9


def test_the_measured_process_imports_the_runtime_and_nothing_heavier(bundles):
    command = local_command(bundles("unfused").path, None, native=True, threads=1)
    code = (
        "import sys; from qsparse_export.bench.session_process import main; main(); "
        "print(sorted({'torch', 'onnx', 'onnx_ir', 'onnxscript', 'onnxruntime', 'tokenizers'} & set(sys.modules)), "
        "file=sys.stderr)"
    )
    talk = "".join(json.dumps(line) + "\n" for line in ({"prefill": 4}, {"generate": 2}, {"footprint": True}))
    result = subprocess.run([sys.executable, "-P", "-c", code, command[-1]], input=talk, capture_output=True, text=True)
    assert result.stderr.strip() == "['onnxruntime']"
    opened, prefill, generated, footprint = map(json.loads, result.stdout.splitlines())
    assert opened["load_ms"] > 0 and prefill["first_token_seconds"] >= prefill["seconds"] > 0
    assert len(generated["seconds_per_token"]) == 2
    assert (
        footprint["native_calls"]["TopKSparsify"].keys()
        and sum(footprint["native_calls"]["TopKSparsify"].values()) == 24
    )
    assert footprint["peak_rss_bytes"] >= opened["rss_before_load_bytes"] > 1 << 20


def test_memory_of_the_process_that_asks_does_not_count(bundles):
    """A process inherits the high-water mark of the one that forks it, in what getrusage says."""
    ballast = bytearray(b"x") * (400 << 20)
    command = local_command(bundles("float").path, None, native=True, threads=1)
    with process_runner(command, "tiny") as runner:
        runner.generate(2)
        assert 0 < runner.footprint().peak_rss_bytes < len(ballast)


def test_an_error_of_the_measured_process_keeps_its_kind(bundles, tmp_path):
    (tmp_path / "broken.onnx").write_bytes(b"not a graph")
    command = local_command(bundles("float").path, tmp_path / "broken.onnx", native=True, threads=1)
    with pytest.raises(BundleError, match=r"tiny: ONNX Runtime .* refused"), process_runner(command, "tiny"):
        raise AssertionError("must not be entered")
