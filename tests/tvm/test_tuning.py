"""Tuning: what is measured is kept, chosen and found again; devices of a tracker; what goes wrong."""

import json
import os
import signal
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import tvm
from loopback_farm import farm, free_port, mortal_farm
from test_export import CONFIGS, decoder

import qsparse_export as qs
from qsparse_export.cli.console import Stages
from qsparse_export.cli.export import main
from qsparse_export.errors import BundleError, TargetError, UsageError
from qsparse_export.runtimes.tvm import tracker as tracker_module
from qsparse_export.runtimes.tvm import tuning as tuning_module
from qsparse_export.runtimes.tvm.kernels.dense_matmul_nbits import dense_matmul_nbits
from qsparse_export.runtimes.tvm.kernels.sparse_ternary_matmul import sparse_ternary_matmul
from qsparse_export.runtimes.tvm.lanes import GENERIC
from qsparse_export.runtimes.tvm.tiling import Tiling, candidates, default_tiling, head_candidates
from qsparse_export.runtimes.tvm.tracker import Tracker
from qsparse_export.runtimes.tvm.tuning import Database, Kernel, RecordedKernels, TunedTilings, tune

STATIC = {"k_in": 64, "n": (128,), "k": 40, "block": 0, "rescale": "none"}
TARGET = {"kind": "llvm"}


def kernel(cores=2):
    return Kernel.of(sparse_ternary_matmul, STATIC, 32, cores)


def database(folder, **target):
    return Database(Path(folder), tvm.target.Target({**TARGET, **target}), GENERIC)


def test_candidates_are_distinct_and_begin_with_the_default():
    for found, default in ((candidates(640, 2), default_tiling(640, 2)), (head_candidates(4), Tiling(4))):
        assert found[0] == default
        assert len(set(found)) == len(found) > 4
    assert all(tiling.rows <= 64 for tiling in candidates(640, 8))  # what int16 sums hold


def test_a_first_import_tells_the_kernels_once_each():
    recorded = RecordedKernels(2)
    head = {"k_in": 64, "n": 100, "bits": 4, "group": 32}
    for _ in range(2):
        assert recorded.choose(sparse_ternary_matmul, STATIC, 32) == default_tiling(32, 2)
        recorded.choose(dense_matmul_nbits, head, 32)
    labels = [found.label for found in recorded.kernels.values()]
    assert labels == ["sparse_ternary_matmul 64x128", "dense_matmul_nbits 64x100"]


def test_what_is_measured_is_kept_and_found_again(tmp_path):
    records = database(tmp_path)
    assert records.best(kernel()) is None
    assert TunedTilings(records, 2).choose(sparse_ternary_matmul, STATIC, 32) == default_tiling(32, 2)
    done = list(tune([kernel()], records, 3, "g++", None))
    assert [(one.number, one.total) for one in done] == [(1, 3), (2, 3), (3, 3)]
    assert [one.tiling for one in done] == list(kernel().tilings[:3])
    assert all(one.microseconds > 0 and not one.problem for one in done)

    again = database(tmp_path)  # another process's view
    assert again.measured(kernel()) == {
        choice: pytest.approx(one.microseconds / 1e6) for choice, one in enumerate(done)
    }
    fastest = min(done, key=lambda one: one.microseconds)
    assert TunedTilings(again, 2).choose(sparse_ternary_matmul, STATIC, 32) == fastest.tiling
    assert not list(tune([kernel()], again, 3, "g++", None))  # as many as were asked for are on record
    assert len(list(tune([kernel()], again, 4, "g++", None))) == 1

    assert database(tmp_path, mcpu="core2").best(kernel()) is None  # of another target
    assert database(tmp_path).best(Kernel.of(sparse_ternary_matmul, STATIC | {"k": 41}, 32, 2)) is None


@pytest.mark.parametrize("content", ["no JSON\n", '{"an": "object"}\n'])
def test_files_that_are_no_database_are_refused(tmp_path, content):
    for name in ("database_workload.json", "database_tuning_record.json"):
        (tmp_path / name).write_text(content)
    with pytest.raises(BundleError, match="no tuning database"):
        database(tmp_path)


def test_a_tracker_and_its_devices(tmp_path):
    with farm(["laptop", "board"]) as tracker:
        assert tracker.require_device() == 1
        with pytest.raises(TargetError, match="no device 'phone', only board, laptop"):
            replace(tracker, key="phone").require_device()
        found = list(tune([kernel()], database(tmp_path), 2, "g++", replace(tracker, key="board")))
        assert [one.problem for one in found] == ["", ""]
        assert database(tmp_path).measured(kernel()).keys() == {0, 1}
        # What a device cannot run is told and left out: here, code for another architecture.
        arm = database(tmp_path, mtriple="aarch64-unknown-linux-gnu")
        failed = list(tune([kernel()], arm, 1, "aarch64-linux-gnu-g++", tracker))
        assert [one.microseconds for one in failed] == [None]
        assert failed[0].line.endswith(f"failed: {failed[0].problem}") and failed[0].problem
        assert not arm.measured(kernel())


def test_a_tracker_that_does_not_answer():
    with pytest.raises(TargetError, match=r"no TVM tracker answers at 127\.0\.0\.1"):
        Tracker("127.0.0.1", free_port(), "board").require_device()


@pytest.mark.parametrize("address", ["farm", "farm:", "farm:port", ":9190", "farm:70000"])
def test_an_address_that_is_none(address):
    with pytest.raises(UsageError, match="a tracker is HOST:PORT"):
        Tracker.parse(address, "board")


def test_an_export_tunes_and_the_next_one_finds_it(tmp_path, capsys):
    command = ["shape:qsparse-300m,layers=1", "--runtime", "tvm", "--weights", "ternary", "--verify", "none"]
    first = [*command, "--tune", "1", "--tune-db", str(tmp_path / "db"), "-o", str(tmp_path / "first")]
    assert main(first) == 0
    measured = [line for line in capsys.readouterr().err.splitlines() if "Tiling(" in line]
    assert measured
    table = json.loads((tmp_path / "first" / "tilings.json").read_text())
    assert all(entry["candidates_measured"] == 1 for entry in table.values())
    assert main([*command, "--tune-db", str(tmp_path / "db"), "-o", str(tmp_path / "second")]) == 0
    assert json.loads((tmp_path / "second" / "tilings.json").read_text()) == table
    assert "Tiling(" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tune", "4"], "tunes nothing at export"),
        (["--runtime", "tvm", "--tune", "0"], "expected 1 or more"),
        (["--runtime", "tvm", "--tune-key", "board"], "give --tune N too"),
    ],
)
def test_wrong_usage(options, message, tmp_path, capsys):
    assert main(["shape:qsparse-300m,layers=1", "-o", str(tmp_path / "out"), *options]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_another_machines_kernels_are_not_measured_here(tmp_path, capsys):
    options = ["--runtime", "tvm", "--target", "raspberry-pi-5", "--tune", "1", "--tune-db", str(tmp_path / "db")]
    command = ["shape:qsparse-300m,layers=1", "--weights", "ternary", "-o", str(tmp_path / "out"), *options]
    assert main(command) == 1
    assert "name a device with --tune-rpc HOST:PORT" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def export_on_a_farm(folder, address, *options):
    """The exit code of an export that measures on the device "board" of a tracker."""
    checkpoint = folder / "model.pt"
    if not checkpoint.exists():
        qs.save(decoder(CONFIGS["bitnet"]), CONFIGS["bitnet"], checkpoint)
    farm_options = ["--tune", "2", "--tune-rpc", address, "--tune-key", "board", "--tune-db", str(folder / "db")]
    command = [str(checkpoint), "--runtime", "tvm", "--verify", "none", "-o", str(folder / "out"), *farm_options]
    return main([*command, *options])


def records(folder):
    file = folder / "db" / "database_tuning_record.json"
    return file.read_text().splitlines() if file.exists() else []


def test_a_farm_that_cannot_be_used_is_refused_before_anything_is_loaded(tmp_path, monkeypatch, capsys):
    def unreachable(*_, **__):
        raise AssertionError("a model is loaded")

    def check(address, reason, code=1):
        assert export_on_a_farm(tmp_path, address) == code
        assert reason in " ".join(capsys.readouterr().err.split())
        assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]

    monkeypatch.setattr(tracker_module, "ANSWER_SECONDS", 0.5)
    monkeypatch.setattr("qsparse_export.loader.load", unreachable)

    check("nowhere", "a tracker is HOST:PORT", code=2)
    check(f"127.0.0.1:{free_port()}", "no TVM tracker answers at 127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        check(f"127.0.0.1:{silent.getsockname()[1]}", "no TVM tracker answers at 127.0.0.1")
    with farm(["phone"]) as tracker:
        check(f"{tracker.host}:{tracker.port}", "has no device 'board', only phone")


def test_a_farm_measures_for_an_export(tmp_path, capsys):
    with farm(["board"]) as tracker:
        assert export_on_a_farm(tmp_path, f"{tracker.host}:{tracker.port}") == 0
    measured = [line for line in capsys.readouterr().err.splitlines() if "Tiling(" in line]
    assert measured and not [line for line in measured if "failed" in line]
    table = json.loads((tmp_path / "out" / "tilings.json").read_text())
    assert sum(entry["candidates_measured"] for entry in table.values()) == len(measured) == len(records(tmp_path))


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")  # of a pool that ends badly
@pytest.mark.parametrize("moment", ["between two", "within one"])
def test_a_board_that_dies_ends_the_export_and_its_records_stay(tmp_path, moment, monkeypatch, capsys):
    step, make_runner = Stages.step, tuning_module._runner
    measured = []

    def kill():
        os.killpg(groups.popitem()[1], signal.SIGKILL)

    def deadly_step(self, done, total, text):
        step(self, done, total, text)
        measured.append(text)
        if moment == "between two":
            kill()

    class DeadlyRunner:
        def __init__(self, tracker):
            self.runner = make_runner(tracker)
            self.pool = self.runner.pool

        def run(self, candidates):
            if measured:  # the tracker has just said that the board is there
                kill()
            return self.runner.run(candidates)

    monkeypatch.setattr(Stages, "step", deadly_step)
    monkeypatch.setattr(tuning_module, "_runner", DeadlyRunner)
    with mortal_farm(["board"]) as (tracker, groups):
        assert export_on_a_farm(tmp_path, f"{tracker.host}:{tracker.port}") == 1
    said = " ".join(capsys.readouterr().err.split())
    assert len(measured) == 1 and "failed" not in measured[0]
    assert "after 1 of " in said and "has no device 'board', only none at all" in said
    assert "what was measured is on record" in said and "Traceback" not in said
    assert len(records(tmp_path)) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["db", "model.pt"]


def test_a_board_that_never_answers_is_left(tmp_path, monkeypatch, capsys):
    """The tracker has it, and its server does not go on: as one whose power is cut."""
    monkeypatch.setattr(tuning_module, "TIMEOUT_SECONDS", 2)
    monkeypatch.setattr(tuning_module, "_GRACE_SECONDS", 1)
    with mortal_farm(["board"]) as (tracker, groups):
        os.killpg(*groups.values(), signal.SIGSTOP)
        assert export_on_a_farm(tmp_path, f"{tracker.host}:{tracker.port}") == 1
    assert "did not finish in 2 s; end what works on it" in " ".join(capsys.readouterr().err.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["db", "model.pt"] and not records(tmp_path)
