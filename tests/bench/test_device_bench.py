"""qsparse-device-bench on this machine: the same form and figures as qsparse-bench, tokens checked before anything is timed."""

import contextlib
import io
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from bench_bundles import QUICK, altered, installed_onnxruntime, with_other_tokens
from process_tree import children, is_alive

from qsparse_export.bench.device_report import measurement_of
from qsparse_export.bench.plan import Plan
from qsparse_export.bench.runner import process_runner
from qsparse_export.bench.turns import take_turns
from qsparse_export.bundle import Bundle
from qsparse_export.cli.bench import main
from qsparse_export.errors import TargetError

ALL = ("native", "bodies", "dense")


def run(bundle, *arguments, options=QUICK):
    command = [bundle / "qsparse-device-bench", *options, "--onnxruntime", installed_onnxruntime(), *arguments, bundle]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, check=False)
    return done.returncode, json.loads(done.stdout) if done.stdout else None, done.stderr


@pytest.fixture(scope="module")
def report(device_bundle):
    code, plain, said = run(device_bundle, "-t", "1,2", "--modes", ",".join(ALL), "--device", "board")
    assert code == 0, said
    return plain


@pytest.fixture(scope="module")
def ours(device_bundle):
    """The same by qsparse-bench; 32 generated tokens, as many as are measured at export."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main([str(device_bundle), "-p", "0", "-n", "32", "-r", "1", "--no-native", "--dense", "-o", "json"]) == 0
    return json.loads(printed.getvalue())


def test_every_key_of_ours_is_there_and_of_the_same_kind(report, ours):
    def same_form(one, other, where):
        assert other is None or one is None or type(one) is type(other) or {type(one), type(other)} == {int, float}, (
            where
        )
        if isinstance(other, dict) and not where.endswith(("variants", "density")):
            missing = other.keys() - one.keys()
            assert not missing, f"{where} lacks {missing}"
            for key in other:
                same_form(one[key], other[key], f"{where}.{key}")
        if isinstance(other, list) and other:
            assert one or where.endswith("failed"), where
            same_form(one[0], other[0], where)

    same_form(report, ours, "report")
    assert json.loads(json.dumps(measurement_of(json.dumps(report)).to_dict())) == report


def test_rows_of_every_test_mode_and_number_of_threads(report):
    expected = [(threads, test, mode) for threads in (1, 2) for test in ("pp8", "tg4") for mode in ALL]
    assert [(row["threads"], row["test"], row["mode"]) for row in report["rows"]] == expected
    for row in report["rows"]:
        rates = row["samples_tokens_per_s"]
        assert len(rates) == 2 and row["tokens_per_s_mean"] == pytest.approx(np.mean(rates), rel=1e-6)
        assert row["tokens_per_s_std"] == pytest.approx(np.std(rates, ddof=1), rel=1e-4, abs=1e-3)
        assert 0 < row["p50_ms"] <= row["p90_ms"]
        if row["test"] == "pp8":  # one time for each repetition
            times_ms = [8000 / rate for rate in rates]
            assert row["p50_ms"] == pytest.approx(np.median(times_ms), rel=1e-5)
            assert row["p90_ms"] == pytest.approx(np.percentile(times_ms, 90), rel=1e-5)
    (headline,) = (cost for cost in report["sessions"] if (cost["mode"], cost["threads"]) == ("native", 2))
    for key in ("ttft_ms", "load_ms", "peak_rss_bytes", "variants"):
        assert report[key] == headline[key]
    assert report["failed"] == [] and report["repetitions"] == 2 and report["machine"]["device"] == "board"


def test_bytes_and_density_are_those_that_our_own_bench_measures(report, ours):
    for mode in ALL:
        (theirs,) = (activity for activity in report["activities"] if activity["mode"] == mode)
        (measured,) = (activity for activity in ours["activities"] if activity["mode"] == mode)
        assert theirs["tokens"] == measured["tokens"] == 32
        assert theirs["density"] == {name: pytest.approx(share) for name, share in measured["density"].items()}
        for key in ("bytes_per_token", "mean_density"):
            wanted = measured[key]
            assert theirs[key] == (None if wanted is None else pytest.approx(wanted)), (mode, key)
        assert theirs["source"] == "measured at export" and measured["source"] == "measured in this run"
    assert report["bytes_per_token"] == report["activities"][0]["bytes_per_token"]
    assert report["bytes_per_token"] < report["activities"][2]["bytes_per_token"]


def test_kernels_ran_where_they_should_and_each_process_has_its_own_memory(report, ours):
    for cost in report["sessions"]:
        calls = cost["variants"].get("SparseTernaryMatMul", {})
        runs = 2 + 1  # repetitions and the warm-up, of a prefill and of 4 tokens each
        assert sum(calls.values()) == (0 if cost["mode"] == "bodies" else runs * (1 + 4) * 6)
        assert 1 << 20 < cost["rss_before_load_bytes"] < cost["peak_rss_bytes"]
        assert cost["peak_rss_bytes"] < min(c["peak_rss_bytes"] for c in ours["sessions"])  # no Python in it
    assert report["machine"]["supported_variants"] == ours["machine"]["supported_variants"]
    assert report["machine"]["cpu"] == ours["machine"]["cpu"] and report["model"] == ours["model"]


def test_tokens_are_checked_in_every_mode(report, device_bundle):
    checked = report["checked_tokens"]
    assert list(checked) == list(ALL)
    for mode in ALL:
        assert checked[mode]["agree"] == checked[mode]["of"] == 32
    recorded = {path["path"]: path for path in Bundle.load(device_bundle).manifest["parity"]["paths"]}
    assert checked["native"]["steady"] == recorded["native"]["steady_greedy_tokens"]
    assert checked["dense"]["steady"] == 0  # told, not judged


def test_other_tokens_end_it_before_anything_is_timed(device_bundle, tmp_path):
    code, plain, said = run(with_other_tokens(device_bundle, tmp_path / "other"))
    assert (code, plain) == (1, None)
    assert "the native path generates other tokens than at export" in said and "pp8" not in said


def test_a_bundle_that_records_no_tokens_must_be_asked_for(device_bundle, tmp_path):
    bundle = altered(device_bundle, tmp_path / "none", parity=None)
    code, plain, said = run(bundle)
    assert (code, plain) == (1, None) and "records no tokens of the native path" in said
    code, plain, said = run(bundle, "--unchecked", "--modes", "native")
    assert code == 0 and plain["checked_tokens"] == {"native": None}


def test_features_that_the_processor_lacks_are_named_and_bodies_still_run(device_bundle, tmp_path):
    target = Bundle.load(device_bundle).manifest["target"] | {"name": "giant", "features": ["of_tomorrow"]}
    bundle = altered(device_bundle, tmp_path / "giant", target=target)
    code, plain, said = run(bundle, "--modes", "native")
    assert (code, plain) == (1, None) and "was made for giant, and this processor lacks of_tomorrow" in said
    assert run(bundle, "--modes", "bodies")[0] == 0


def test_a_mode_that_cannot_run_is_named_and_the_others_are_measured(device_bundle, tmp_path):
    bundle = altered(device_bundle, tmp_path / "broken", files={"dense.onnx": b"no graph"})
    code, plain, said = run(bundle, "--modes", "native,dense")
    assert code == 1 and {row["mode"] for row in plain["rows"]} == {"native"}
    (failed,) = plain["failed"]
    assert (failed["mode"], failed["threads"]) == ("dense", None) and "dense.onnx" in failed["reason"]
    assert "failed" in said
    assert str(measurement_of(json.dumps(plain)).failed[0]).startswith("dense: ")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--modes", "fast"], 2, "expected native, bodies or dense"),
        (["-p", "41"], 2, "the model has 40 positions"),
        (["-p", "0", "-n", "0"], 2, "nothing to measure"),
        (["-t", "many"], 2, "expected a whole number"),
        (["--modes", "dense"], 1, "has no dense.onnx, which the mode dense runs: export with --with-bench"),
    ],
)
def test_wrong_calls(device_bundle, tmp_path, arguments, code, words):
    bundle = altered(device_bundle, tmp_path / "nodense", files={"dense.onnx": None})
    found = run(bundle, *arguments)
    assert found[:2] == (code, None) and words in " ".join(found[2].split())


def test_its_sessions_speak_the_protocol_of_runners(device_bundle):
    command = [str(device_bundle / "qsparse-device-bench"), "--onnxruntime", installed_onnxruntime(), "-t", "1"]
    plan = Plan(prompts=(8,), generations=(4,), repetitions=2, threads=(1,), modes=("native", "dense"))
    with contextlib.ExitStack() as stack:
        runners = {
            mode: stack.enter_context(process_runner([*command, "--session", mode, str(device_bundle)], mode))
            for mode in plan.modes
        }
        rows, costs = take_turns(runners, plan, 1, lambda _: None)
    assert [(row.test, row.mode) for row in rows] == [(t, m) for t in ("pp8", "tg4") for m in plan.modes]
    assert all(sum(cost.variants["SparseTernaryMatMul"].values()) == 3 * 5 * 6 for cost in costs)
    with (
        pytest.raises(TargetError, match="the model has 40 positions"),
        process_runner([*command, "--session", "native", str(device_bundle)], "board") as runner,
    ):
        runner.prefill(41)


def test_an_export_without_the_program_has_nothing_of_it(bundles):
    manifest = bundles("bitnet").manifest
    assert "bench" not in manifest and "dense.onnx" not in manifest["files"]


def test_the_dense_graph_shares_the_weights(device_bundle):
    sizes = {path.name: path.stat().st_size for path in Path(device_bundle).iterdir()}
    assert sizes["dense.onnx"] < 1.1 * sizes["model.onnx"] and list(sizes).count("model.onnx.data") == 1


def timing(bundle, repetitions):
    """The program while it times the kernels and the bodies, and the processes of these."""
    command = [bundle / "qsparse-device-bench", "--onnxruntime", installed_onnxruntime(), "-p", "0", "-n", "16"]
    command += ["-r", repetitions, "-t", "1", "--modes", "native,bodies", bundle]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "tg16 bodies" in line:
            break
    return process, children(process.pid)


def test_a_mode_that_the_system_ends_is_named_and_the_other_is_measured(device_bundle):
    process, (_, bodies) = timing(device_bundle, 300)
    os.kill(bodies, signal.SIGKILL)
    out, _ = process.communicate(timeout=300)
    plain = json.loads(out)
    assert process.returncode == 1
    assert [(row["test"], row["mode"]) for row in plain["rows"]] == [("tg16", "native")]
    (failed,) = plain["failed"]
    assert (failed["mode"], failed["threads"]) == ("bodies", 1)
    assert failed["reason"] == "the process that ran the model ended by signal 9, as a system short of memory ends one"


def test_ended_in_the_middle_it_leaves_no_process(device_bundle):
    process, running = timing(device_bundle, 1_000_000)
    assert len(running) == 2
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM
    deadline = time.monotonic() + 60
    while any(is_alive(child) for child in running) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_alive(child) for child in running)
