"""The page of what was shown on each backend, from a report that pytest itself wrote."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qsparse_export.runtimes.tvm.codegen import is_gpu, lanes_of
from qsparse_export.targets.target import load_target, target_names

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "samples" / "06_report_backends" / "report_backends.py"
TESTS = """
import json
import pytest

def say(record_property, **more):
    entry = {"op": "TopKSparsify", "backend": "C++", "code": "avx2", "how": "executed", "by": "", "error_share": 0.0}
    record_property("evidence", json.dumps(entry | more))

def test_exact(record_property):
    say(record_property)

def test_twice(record_property):
    say(record_property, op="Head", error_share=0.25)
    say(record_property, op="Head", how="emulated", by="qemu", error_share=0.5)

def test_compiled(record_property):
    say(record_property, code="sm_80", how="compiled", error_share=None)

def test_target(record_property):
    say(record_property, op="SparseMatMul", code="neondot", how="emulated", by="qemu")
    say(record_property, op="GatedActivation", code="avx512vnni")
    say(record_property, op="GatedActivation", code="avx512vnni", how="emulated", by="SIMDe")
    say(record_property, op="GatedActivation", backend="TVM", code="avx512vnni")
    for code in ("sm_80", "sm_87"):
        say(record_property, op="AddRmsNorm", backend="CUDA", code=code, how="compiled", error_share=None)
    say(record_property, op="AddRmsNorm", backend="CUDA", code="any", how="emulated")
    models = {"op": "whole models", "error_share": None}
    say(record_property, **models, backend="ONNX Runtime, C++ kernels", code="aarch64 neondot", how="emulated", by="qemu")
    say(record_property, **models, backend="ONNX Runtime, function bodies", code="Node")
    say(record_property, **models, backend="ONNX Runtime, CUDA kernels", code="any", how="launched")

def test_failed(record_property):
    say(record_property, op="Broken")
    assert False

def test_skipped(record_property):
    say(record_property, op="Skipped")
    pytest.skip("for this test")
"""
ROW = {"op": "topk", "m": 1, "k": 2560, "n": None, "bits": None, "density": 0.4, "threads": 1, "median_us": 2.0}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    (folder / "test_it.py").write_text(TESTS)
    report = folder / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", "--rootdir", str(folder), str(folder)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 1  # one of them fails
    bench = folder / "topk.json"
    peers = {"ort-topk": {"median_us": 10.0, "ratio": 5.0}}
    bench.write_text(json.dumps({"machine": {"cpu": "a processor"}, "rows": [{**ROW, "peers": peers}]}))
    return report, bench


def run(*arguments):
    return subprocess.run(
        [sys.executable, str(SAMPLE), *map(str, arguments)], capture_output=True, text=True, check=False
    )


def test_only_what_passed_is_on_the_page(files, tmp_path):
    report, bench = files
    out = tmp_path / "backends.md"
    assert run(report, bench, "-o", out).returncode == 0
    lines = out.read_text().splitlines()
    assert "| Head | C++ | avx2 | executed; emulated (qemu) | 50% |" in lines
    assert "| TopKSparsify | C++ | avx2 | executed | the reference's bits |" in lines
    assert "| TopKSparsify | C++ | sm_80 | compiled only |  |" in lines
    assert "| topk | 1 | 2560 |  |  | 0.4 | 1 | 2 | ort-topk | 10 | 5.00 |" in lines
    assert not [line for line in lines if "Broken" in line or "Skipped" in line]


def cells(page, target, runtime):
    """Of the table of targets, by column."""
    table = [line for line in page.splitlines() if line.count("|") == 15]
    header, row = (
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in (table[0], next(line for line in table if line.startswith(f"| {target} | {runtime} |")))
    )
    return {name: cell for name, cell in zip(header, row, strict=True) if cell}


def test_targets(files):
    page = run(*files).stdout
    pi = {"target": "raspberry-pi-5", "runtime": "ort", "code": "neondot", "whole models": "E"}
    assert cells(page, "raspberry-pi-5", "ort") == pi | {"SparseMatMul": "E"}
    assert cells(page, "raspberry-pi-5", "tvm") == {"target": "raspberry-pi-5", "runtime": "tvm", "code": "neondot"}
    this = {"target": "cpu", "runtime": "ort", "code": "avx2", "TopKSparsify": "X"}
    assert cells(page, "cpu", "ort") == this
    assert cells(page, "cuda-sm80", "ort")["AddRmsNorm"] == "EC"
    assert cells(page, "cuda-sm90", "ort")["AddRmsNorm"] == "E"
    assert cells(page, "cuda", "ort")["AddRmsNorm"] == "E", "not compiled for all of them"
    assert cells(page, "cuda", "ort")["whole models"] == "L"
    node = cells(page, "node", "ort")
    assert node["whole models"] == "X" and node["CachedAttention"] == "B"
    assert "CachedAttention" not in cells(page, "web", "ort")


def test_every_target_and_runtime_has_a_row_for_code_that_there_is(files):
    """What the package itself says of its targets."""
    page = run(*files).stdout
    for name in target_names():
        target = load_target(name)
        for runtime in {"ort", "tvm"} & set(target.runtimes):
            code = cells(page, name, runtime)["code"]
            if runtime == "tvm" and not is_gpu(target) and name != "cpu":
                assert code == lanes_of(target).name


def test_a_page_of_other_tests_is_noticed(files, tmp_path):
    report, bench = files
    page = tmp_path / "old.md"
    run(report, bench, "-o", page)
    assert run(report, "--check", page).returncode == 0, "times are not compared"
    text = page.read_text()
    page.write_text(text.replace("| Head |", "| Tail | C++ | avx2 | executed |  |\n| Head |"))
    done = run(report, "--check", page)
    assert done.returncode == 1 and "no longer shown: Tail | C++ | avx2 | executed" in done.stderr
    page.write_text(text.replace("executed; emulated (qemu) | 50% |", "executed; emulated (qemu) | 51% |"))
    assert run(report, "--check", page).returncode == 0, "an error may differ"
    page.write_text(text.replace("executed; emulated (qemu) |", "emulated (qemu) |"))
    done = run(report, "--check", page)
    assert done.returncode == 1 and "not on the page: Head | C++ | avx2 | executed; emulated (qemu)" in done.stderr
    page.write_text(text.replace("| cpu | ort | avx2 | X |", "| cpu | ort | avx2 |  |"))
    assert run(report, "--check", page).returncode == 1


def test_what_only_some_processors_execute_is_not_compared(files, tmp_path):
    report, _ = files
    page = tmp_path / "old.md"
    run(report, "-o", page)
    text = page.read_text()
    without = text.replace("executed; emulated (SIMDe)", "emulated (SIMDe)")
    without = without.replace("| GatedActivation | TVM | avx512vnni | executed | the reference's bits |\n", "")
    assert without.count("avx512vnni") == text.count("avx512vnni") - 1
    page.write_text(without)
    assert run(report, "--check", page).returncode == 0
    page.write_text(text.replace("executed; emulated (SIMDe)", "executed"))
    done = run(report, "--check", page)
    assert (
        done.returncode == 1 and "not on the page: GatedActivation | C++ | avx512vnni | emulated (SIMDe)" in done.stderr
    )
