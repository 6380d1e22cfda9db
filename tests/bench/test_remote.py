"""qsparse-bench --remote against a real sshd on loopback: measured there, nothing left there, every failure named."""

import contextlib
import csv
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bench_bundles import QUICK, altered, installed_onnxruntime, with_other_tokens
from loopback_sshd import free_port, loopback_sshd
from process_tree import is_alive, kill_if_alive

from qsparse_export.bench.device_report import measurement_of
from qsparse_export.bench.merged import read_failures, read_reports
from qsparse_export.bench.ssh import Ssh
from qsparse_export.bundle import Bundle
from qsparse_export.cli.bench import main
from qsparse_export.errors import MeasurementError, TargetError

COMMAND = str(Path(sys.executable).with_name("qsparse-bench"))


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    with loopback_sshd(tmp_path_factory.mktemp("sshd")) as sshd:
        yield sshd


@pytest.fixture(autouse=True)
def nothing_is_left(device):
    """Whatever happened, no folder of ours stays in the home of the login."""
    yield
    assert left(device) == []


def left(device):
    return [path.name for path in device.home.iterdir() if path.name.startswith(".qsparse-bench.")]


def words(device, bundle, *arguments, flags=None):
    runtime = ["--onnxruntime", installed_onnxruntime()]
    flags = device.flags() if flags is None else flags
    return [*map(str, ["--remote", device.destination, *flags, *runtime, bundle, *QUICK, *arguments])]


def measured(capsys, device, bundle, *arguments):
    assert main(words(device, bundle, *arguments)) == 0
    return capsys.readouterr().out


def refused(capsys, device, bundle, *arguments, code=1, flags=None):
    assert main(words(device, bundle, *arguments, flags=flags)) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    return " ".join(captured.err.split())


def program(bundle, to, script):
    """A copy of the bundle with a shell script in place of its program."""
    return altered(bundle, to, files={"qsparse-device-bench": f"#!/bin/sh\n{script}\n".encode()})


@pytest.fixture(scope="module")
def report(device, device_bundle):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        flags = ("--dense", "--no-native", "--device", "Board", "-o", "json")
        assert main(words(device, device_bundle, *flags)) == 0
    return json.loads(printed.getvalue())


def test_json_is_that_of_the_local_bench_with_what_only_a_device_tells(report, capsys, device_bundle):
    assert main([str(device_bundle), *QUICK, "--dense", "--no-native", "-o", "json"]) == 0
    ours = json.loads(capsys.readouterr().out)
    assert report.keys() - ours.keys() == {"program", "checked_tokens", "state_before", "state_after", "energy"}
    assert not ours.keys() - report.keys() and report["machine"]["device"] == "Board"
    assert [(row["test"], row["mode"]) for row in report["rows"]] == [(r["test"], r["mode"]) for r in ours["rows"]]
    assert [row.keys() for row in report["rows"]] == [row.keys() for row in ours["rows"]]
    assert [cost["variants"] for cost in report["sessions"]] == [cost["variants"] for cost in ours["sessions"]]
    assert report["checked_tokens"]["native"]["agree"] == 32 and report["failed"] == ours["failed"] == []


def test_tables_lines_and_csv(capsys, device, device_bundle):
    lines = measured(capsys, device, device_bundle, "--dense").splitlines()
    assert lines[2] == "tokens as recorded at export: native 32 of 32, dense 32 of 32"
    assert lines[4].startswith("| test | mode | threads | tokens/s") and lines[6].startswith("| pp8 | native | 1 | ")
    assert any(line.startswith("| density, native (measured at export) |") for line in lines)
    (row,) = csv.DictReader(io.StringIO(measured(capsys, device, device_bundle, "-p", "0", "-o", "csv")))
    assert row["test"] == "tg4" and float(row["bytes_per_token"]) > 0
    (line,) = measured(capsys, device, device_bundle, "-p", "0", "-o", "jsonl").splitlines()
    assert json.loads(line).keys() == row.keys()


def test_a_login_that_greets_does_not_matter(capsys, device_bundle, tmp_path):
    greeting = 'ForceCommand echo Welcome to this machine; eval "$SSH_ORIGINAL_COMMAND"\n'
    with loopback_sshd(tmp_path, greeting) as device:
        assert "tg4" in measured(capsys, device, device_bundle, "-p", "0")
        assert left(device) == [] and "Welcome" in Ssh(device.destination, device.options).run("true", timeout_s=60).out


def test_threads_are_the_devices_own_unless_given(capsys, device, device_bundle):
    (device.home / "lib").symlink_to(Path(installed_onnxruntime()).parent)
    relative = f"lib/{Path(installed_onnxruntime()).name}"  # to the login's home
    command = words(device, device_bundle, "-p", "0", "-o", "json", "--onnxruntime", relative)
    assert main([word for word in command if word not in ("-t", "1")]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["threads"] == len(os.sched_getaffinity(0))


def test_only_what_is_needed_is_copied_and_a_kept_folder_saves_the_rest(capsys, device, device_bundle, tmp_path):
    arguments = ("--remote-folder", tmp_path / "kept", "-p", "0", "-n", "1")
    measured(capsys, device, device_bundle, *arguments)
    kept = list((tmp_path / "kept").iterdir())
    unchanged = {"model.onnx.data", "qsparse-device-bench", "libqsparse_ort.so"}
    assert {path.name for path in kept} == {"manifest.json", "model.onnx", *unchanged}
    (tmp_path / "kept" / "model.onnx").write_bytes(b"half of")
    for path in kept:
        os.utime(path, (1, 1))
    measured(capsys, device, device_bundle, *arguments, "--dense")
    untouched = {path.name for path in (tmp_path / "kept").iterdir() if path.stat().st_mtime == 1}
    assert untouched == unchanged
    assert (tmp_path / "kept" / "dense.onnx").read_bytes() == (device_bundle / "dense.onnx").read_bytes()


def test_a_bundle_without_the_program_says_how_to_export_it(capsys, device, bundles, device_bundle, tmp_path):
    bundle = bundles("bitnet").path
    nobody = ["--ssh-option", f"Port={free_port()}"]  # it is refused before anybody is asked
    for arguments in ((), ("--dense",)):
        said = refused(capsys, device, bundle, *arguments, flags=nobody)
        assert "has no qsparse-device-bench" in said and "export it again with --with-bench" in said
    nodense = altered(device_bundle, tmp_path / "nodense", files={"dense.onnx": None})
    assert "has no dense.onnx" in refused(capsys, device, nodense, "--dense", flags=nobody)


def test_another_architecture_is_named_before_anything_is_copied(capsys, device, device_bundle, tmp_path):
    target = Bundle.load(device_bundle).manifest["target"] | {"name": "raspberry-pi-5", "arch": "aarch64"}
    said = refused(capsys, device, altered(device_bundle, tmp_path / "arm", target=target))
    assert "was made for raspberry-pi-5 (aarch64 linux), and" in said and f"is {os.uname().machine} linux" in said


def test_other_tokens_end_it(capsys, device, device_bundle, tmp_path):
    said = refused(capsys, device, with_other_tokens(device_bundle, tmp_path / "other"))
    assert "the native path generates other tokens than at export" in said


def test_unrecorded_tokens(capsys, device, device_bundle, tmp_path):
    bundle = altered(device_bundle, tmp_path / "none", parity=None)
    assert "--unchecked" in refused(capsys, device, bundle)
    assert json.loads(measured(capsys, device, bundle, "--unchecked", "-o", "json"))["checked_tokens"] == {
        "native": None
    }


def test_a_missing_runtime_is_named(capsys, device, device_bundle):
    said = refused(capsys, device, device_bundle, "--onnxruntime", "/none/libonnxruntime.so")
    assert "ONNX Runtime cannot be loaded: /none/libonnxruntime.so" in said and "--onnxruntime" in said


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("Port", lambda device: free_port(), "Connection refused"),
        ("IdentityFile", lambda device: device.folder / "stranger", "refused the login"),
        ("UserKnownHostsFile", lambda device: "/dev/null", "connect once with: ssh"),
        ("ProxyCommand", lambda device: "sleep 6", "timed out"),
        ("HostName", lambda device: "name.invalid", "Could not resolve hostname"),
    ],
)
def test_connections_that_fail(capsys, device, device_bundle, name, value, expected):
    flags = device.flags(ConnectTimeout=2, **{name: value(device)})
    said = refused(capsys, device, device_bundle, flags=flags)
    assert expected in said and device.destination in said


def test_a_server_that_never_answers(capsys, device, device_bundle):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        flags = device.flags(ConnectTimeout=2, Port=silent.getsockname()[1])
        assert "the connection to" in refused(capsys, device, device_bundle, flags=flags)


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("exit 0", "printed no report: it said nothing"),
        ("echo hello", "printed no report"),
        ("echo '{}'", "failed is None; expected a list"),
        ("echo '{'", "the report is not JSON"),
        ("kill -9 $$", "was ended on .* by signal 9"),
        ("printf 'a\\033[31mred\\n' >&2; exit 1", "a\\[31mred"),
        ("echo one >&2; echo two >&2; exit 3", "127.0.0.1: two"),
        ("yes '{' ", "printed more than 64 MiB"),
    ],
)
def test_programs_that_misbehave(capsys, device, device_bundle, tmp_path, script, expected):
    said = refused(capsys, device, program(device_bundle, tmp_path / "odd", script))
    assert re.search(expected, said), said


def test_a_program_for_nobody_cannot_be_started(capsys, device, device_bundle, tmp_path):
    bundle = altered(device_bundle, tmp_path / "odd", files={"qsparse-device-bench": b"\x7fELF\1\1\1 of no machine"})
    assert "cannot start qsparse-device-bench" in refused(capsys, device, bundle)


def test_a_device_without_room_is_named(capsys, device, device_bundle):
    said = refused(capsys, device, device_bundle, "--remote-folder", "/proc")
    assert "could not take the files: tar: manifest.json" in said and "--remote-folder" in said


STUCK = 'echo $$ > "$HOME/running"; exec sleep 1000'


def await_end(process_id):
    deadline = time.monotonic() + 60
    while is_alive(process_id) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(process_id)


def test_a_program_that_never_ends_is_ended(capsys, device, device_bundle, tmp_path):
    said = refused(capsys, device, program(device_bundle, tmp_path / "stuck", STUCK), "--timeout", "3")
    assert "was not done after 3 seconds" in said and "--timeout" in said
    await_end(int((device.home / "running").read_text()))


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_ends_the_program_there_and_removes_its_files(device, device_bundle, tmp_path, how):
    (device.home / "running").unlink(missing_ok=True)
    bundle = program(device_bundle, tmp_path / "stuck", STUCK)
    process = subprocess.Popen(
        [COMMAND, *words(device, bundle)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    deadline = time.monotonic() + 120
    running = device.home / "running"
    while not (running.exists() and running.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left(device)
    os.killpg(process.pid, how)
    try:
        out, said = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        kill_if_alive(process.pid)
        raise
    assert process.returncode == 130 and out == b"" and b"Traceback" not in said
    await_end(int(running.read_text()))


def test_without_ssh_the_package_is_named(capsys, device, device_bundle, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "apt-get install openssh-client" in refused(capsys, device, device_bundle)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--timeout", "0"], "--timeout 0; expected seconds"),
        (["-p", "41"], "the model has 40 positions"),
    ],
)
def test_impossible_wishes(capsys, device, device_bundle, arguments, expected):
    assert expected in refused(capsys, device, device_bundle, *arguments, code=2, flags=["--ssh-option", "Port=1"])


def test_options_of_another_machine_need_one(capsys, device_bundle):
    for flag in (["--ssh-option", "Port=1"], ["--onnxruntime", "x"], ["--remote-folder", "x"], ["--unchecked"]):
        assert main([str(device_bundle), *flag]) == 2
        assert f"{flag[0]} needs --remote" in " ".join(capsys.readouterr().err.split())


def test_a_destination_is_no_option():
    for destination in ("-oProxyCommand=touch x", ""):
        with pytest.raises(TargetError, match="is no machine"):
            Ssh(destination)


def test_a_failed_device_is_a_marked_row_among_the_others(report, capsys, device, device_bundle, tmp_path):
    bundle = altered(device_bundle, tmp_path / "broken", files={"dense.onnx": b"no graph"})
    assert main(words(device, bundle, "--dense", "--device", "half", "-o", "json")) == 1
    half = capsys.readouterr()
    assert "some modes have no rows: dense" in " ".join(half.err.split())
    nobody = device.flags(Port=free_port())
    assert main(words(device, device_bundle, "--device", "<gone>", "-o", "json", flags=nobody)) == 1
    gone = capsys.readouterr()
    assert "Connection refused" in gone.err
    paths = [tmp_path / "board.json", tmp_path / "half.json", tmp_path / "gone.json"]
    for path, text in zip(paths, (json.dumps(report), half.out, gone.out), strict=True):
        path.write_text(text)
    assert {result.device for result in read_reports(paths)} == {"Board", "half"}
    failures = read_failures(paths)
    assert [(failed.device, failed.mode) for failed in failures] == [("half", "dense"), ("<gone>", "")]

    page = tmp_path / "report.html"
    assert main(["report", *map(str, paths), "-o", str(page)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 6 + 2 + 2 and len({line.replace(r"\|", "").count("|") for line in lines}) == 1
    assert lines[-1].startswith("| <gone> | bitnet | all | all |  | failed: ") and "Connection refused" in lines[-1]
    assert "failed: " in lines[-2] and lines[-2].startswith("| half | bitnet | all | dense |")
    text = page.read_text()
    assert text.count("class=failed") == 2 and "&lt;gone&gt;" in text and text.count("<h2>") == 3
    # A failed device alone is no plot, and no error either.
    assert main(["report", str(paths[2]), "-o", str(page)]) == 0
    assert page.read_text().count("<h2>") == 0


def without(report, *path):
    """A copy of the report with something missing."""
    copy = json.loads(json.dumps(report))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return copy


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (("rows",), "rows is None; expected a list"),
        (("rows", 0, "p50_ms"), "p50_ms is None; expected a finite number"),
        (("rows", 0, "mode"), "mode is None; expected one of native"),
        (("sessions", 0), "no session and activity of native on 1 threads"),
        (("sessions", 0, "variants"), "variants is None"),
        (("sessions", 0, "peak_rss_bytes"), "peak_rss_bytes is None"),
        (("activities", 1), "no session and activity of bodies"),
        (("activities", 1, "source"), "source is None; expected a text"),
        (("model", "name"), "model of the report has no name"),
        (("machine",), "machine is None"),
        (("repetitions",), "repetitions is None"),
    ],
)
def test_what_is_missing_in_a_report_is_named(report, path, expected):
    with pytest.raises(MeasurementError) as raised:
        measurement_of(json.dumps(without(report, *path)))
    assert expected in str(raised.value)


def test_numbers_that_are_none(report):
    for wrong in (True, "7", [7], 10**400):
        with pytest.raises(MeasurementError, match="p90_ms is"):
            measurement_of(json.dumps(report | {"rows": [report["rows"][0] | {"p90_ms": wrong}]}))
    with pytest.raises(MeasurementError, match="not JSON"):
        measurement_of("[" * 100_000)
    with pytest.raises(MeasurementError, match=r"every mode failed \(all: no memory\)"):
        measurement_of(json.dumps({"sessions": [], "failed": [{"mode": None, "threads": None, "reason": "no memory"}]}))
