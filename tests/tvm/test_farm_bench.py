"""qsparse-bench --rpc on a farm of loopback: every device once, merged reports, and what goes wrong on the way."""

import contextlib
import csv
import io
import json
import os
import shutil
import signal
import socket
from dataclasses import replace

import pytest
import torch
from loopback_farm import farm, free_port, mortal_farm

import qsparse_export as qs
from qsparse_export.bench import farm as bench_farm
from qsparse_export.bench.farm import activity_here, borrowed, require_bundle
from qsparse_export.bench.farm_report import spell
from qsparse_export.bench.plan import Plan
from qsparse_export.cli.bench import main
from qsparse_export.cli.bench_progress import Progress
from qsparse_export.config import ModelConfig, SparsityRule, TopK
from qsparse_export.errors import BundleError, MeasurementError, TargetError
from qsparse_export.nn.decoder import Decoder
from qsparse_export.runtimes.tvm import tracker as tracker_module

TINY = ModelConfig(
    architecture="bitnet",
    vocab_size=96,
    hidden_size=48,
    intermediate_size=130,
    layers=1,
    heads=4,
    kv_heads=2,
    head_dim=12,
    max_positions=40,
    activation="relu2",
    quantization="bitnet",
    tied_embeddings=True,
    sparsity=(SparsityRule("*", TopK(0.5)),),
)
PLAN = Plan(prompts=(8,), generations=(4,), repetitions=2, threads=(1,), modes=("native",))
QUICK = ("-p", "8", "-n", "4", "-r", "2", "-t", "1")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    torch.manual_seed(0)
    return qs.export(
        Decoder(TINY), out=tmp_path_factory.mktemp("farm") / "tiny", name="tiny", verify="none", runtime="tvm"
    )


@pytest.fixture(scope="module")
def ort_bundle(tmp_path_factory):
    torch.manual_seed(0)
    return qs.export(Decoder(TINY), out=tmp_path_factory.mktemp("ort") / "tiny", name="tiny", verify="none")


@pytest.fixture(scope="module")
def activity(bundle):
    return activity_here(bundle, PLAN, lambda _: None)


@pytest.fixture(scope="module")
def boards():
    with farm(["board", "board"]) as tracker:
        yield tracker


def command(bundle, tracker, *options):
    return [str(bundle.path), "--rpc", f"{tracker.host}:{tracker.port}", "--key", tracker.key, *QUICK, *options]


def said(capsys):
    return " ".join(capsys.readouterr().err.split())


def ignore(_):
    pass


def test_every_device_is_measured_once_and_the_reports_merge(bundle, boards, tmp_path):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(command(bundle, boards, "-o", "json")) == 0
    reports = json.loads(printed.getvalue())["reports"]
    names = [report["machine"]["device"] for report in reports]
    assert sorted(names) == sorted(f"board {address}" for address in boards.devices())
    for report in reports:
        assert [(row["test"], row["mode"], row["threads"]) for row in report["rows"]] == [
            ("pp8", "native", 1),
            ("tg4", "native", 1),
        ]
        assert all(len(row["samples_tokens_per_s"]) == 2 and row["tokens_per_s_mean"] > 0 for row in report["rows"])
        assert report["checked_tokens"] == {"native": {"agree": 4, "of": 4}}
        assert 0 < report["activities"][0]["mean_density"] < 0.6 and report["bytes_per_token"] > 0
        assert report["load_ms"] is None and report["peak_rss_bytes"] is None
        assert set(report["variants"]["SparseTernaryMatMul"]) == {f"tvm-{bundle.manifest['library']['lanes']}"}
    together, alone = tmp_path / "all.json", tmp_path / "one.json"
    together.write_text(printed.getvalue())
    alone.write_text(json.dumps(reports[0]))
    for path, devices in ((together, names), (alone, names[:1])):
        merged = io.StringIO()
        with contextlib.redirect_stdout(merged):
            assert main(["report", str(path)]) == 0
        lines = merged.getvalue().splitlines()[2:]
        assert [line.split(" | ")[0].strip("| ") for line in lines] == [name for name in devices for _ in range(2)]


@pytest.mark.parametrize("moment", ["copy", "pp8"])
def test_a_device_that_dies_has_a_failed_row_and_the_other_one_its_figures(bundle, moment, monkeypatch, capsys):
    killed = []
    step = Progress.step

    def deadly(self, name):
        step(self, name)
        if not killed and f": {moment}" in name:
            address = name.removeprefix("board ").rpartition(": ")[0]
            killed.append(f"board {address}")
            os.killpg(groups[address], signal.SIGKILL)

    monkeypatch.setattr(Progress, "step", deadly)
    with mortal_farm(["board", "board"]) as (tracker, groups):
        assert main(command(bundle, tracker, "-o", "csv")) == 1
    printed = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(printed.out)))
    (dead,) = killed
    assert {row["device"] for row in rows if row["failed"]} == {dead}
    assert "went away" in next(row["failed"] for row in rows if row["failed"])
    alive = [row for row in rows if not row["failed"]]
    assert [row["test"] for row in alive] == ["pp8", "tg4"] and dead not in {row["device"] for row in alive}
    assert "1 of 2 devices were measured" in " ".join(printed.err.split())


def test_a_device_that_computes_otherwise_is_not_timed(bundle, boards, activity):
    first, *others = activity.greedy_ids
    other = replace(activity, greedy_ids=((first + 1) % 96, *others))
    steps = []
    with (
        borrowed(boards, bundle, other, 60, ignore) as held,
        pytest.raises(MeasurementError, match=r"chose token \d+ after 1 tokens"),
    ):
        held.devices[0].measure(bundle, PLAN, steps.append)
    assert not [step for step in steps if "tg4" in step or "pp8" in step]


def test_a_module_that_the_device_cannot_load(bundle, boards, activity, tmp_path):
    shutil.copytree(bundle.path, tmp_path / "other")
    content = bytearray((bundle.path / "model.so").read_bytes())
    content[18:20] = (183).to_bytes(2, "little") if content[18] == 62 else (62).to_bytes(2, "little")
    (tmp_path / "other" / "model.so").write_bytes(content)
    other = replace(bundle, path=tmp_path / "other")
    with (
        borrowed(boards, other, activity, 60, ignore) as held,
        pytest.raises(TargetError, match=r"cannot load model\.so: .*; export the bundle with the --target"),
    ):
        held.devices[0].measure(other, PLAN, ignore)


def test_more_threads_than_a_server_has(bundle, boards, activity):
    with (
        borrowed(boards, bundle, activity, 60, ignore) as held,
        pytest.raises(TargetError, match="4096 threads, and the device's pool has"),
    ):
        held.devices[0].measure(bundle, replace(PLAN, threads=(4096,)), ignore)


def test_a_device_that_others_work_on_is_told(bundle, boards, activity, monkeypatch):
    monkeypatch.setattr(bench_farm, "WAIT_SECONDS", 2.0)
    busy = boards.request(30)
    session = busy.connect(60)
    with borrowed(boards, bundle, activity, 60, ignore) as held:
        measured = [device.measure(bundle, PLAN, ignore) for device in held.devices]
        assert [absent.name for absent in held.absent] == [f"board {busy.host}:{busy.port}"]
    del session
    failed = {absent.name: absent.reason for absent in held.absent}
    assert "became free in 2 s" in failed[f"board {busy.host}:{busy.port}"]
    lines = spell("tiny", measured, failed, "md").splitlines()
    assert len(lines) == 5 and "failed: " in lines[-1] and len([line for line in lines if "failed" in line]) == 1
    rows = [json.loads(line) for line in spell("tiny", measured, failed, "jsonl").splitlines()]
    assert [bool(row["failed"]) for row in rows] == [False, False, True]


def test_a_device_that_is_too_slow_is_left(bundle, boards, activity):
    with (
        borrowed(boards, bundle, activity, 0.001, ignore) as held,
        pytest.raises(TargetError, match=r"did not finish in 0\.001 s"),
    ):
        held.devices[0].measure(bundle, PLAN, ignore)


def test_a_tracker_without_the_name_or_none_at_all(bundle, boards, capsys):
    assert main(command(bundle, replace(boards, key="phone"))) == 1
    assert "has no device 'phone', only board" in said(capsys)
    assert main(command(bundle, replace(boards, port=free_port()))) == 1
    assert "no TVM tracker answers at 127.0.0.1" in said(capsys)


def test_what_listens_and_never_answers_is_left(bundle, monkeypatch, capsys):
    monkeypatch.setattr(tracker_module, "ANSWER_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        tracker = tracker_module.Tracker("127.0.0.1", silent.getsockname()[1], "board")
        assert main(command(bundle, tracker)) == 1
    printed = capsys.readouterr()
    assert "no TVM tracker answers" in " ".join(printed.err.split()) and not printed.out


def test_a_bundle_for_a_gpu(bundle):
    target = {"name": "cuda-sm87", "features": ["cuda", "sm_87"]}
    with pytest.raises(BundleError, match=r"exported for cuda-sm87, .* on the CPU of a device"):
        require_bundle(replace(bundle, manifest={**bundle.manifest, "target": target}))


def test_a_bundle_of_another_runtime(ort_bundle, capsys):
    assert main([str(ort_bundle.path), "--rpc", "127.0.0.1:9190", "--key", "board"]) == 1
    assert "exported for the runtime ort" in (text := said(capsys)) and "--runtime tvm" in text and "--remote" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rpc", "127.0.0.1:9190"], "--rpc needs --key"),
        (["--key", "board"], "--key needs --rpc"),
        (["--rpc", "nowhere", "--key", "board"], "a tracker is HOST:PORT"),
        (["--rpc", "127.0.0.1:9190", "--key", "board", "--remote", "pi@pi"], "--remote and --rpc exclude each other"),
        (["--rpc", "127.0.0.1:9190", "--key", "board", "--dense"], "compiled kernels alone"),
        (["--rpc", "127.0.0.1:9190", "--key", "board", "--timeout", "0"], "more than 0"),
        (["--timeout", "5"], "--timeout needs --remote"),
    ],
)
def test_wrong_usage(bundle, options, message, capsys):
    assert main([str(bundle.path), *QUICK, *options]) == 2
    assert message in said(capsys)
