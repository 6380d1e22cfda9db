"""The page of what was shown on each backend, from a report that pytest itself wrote."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_a_page_that_falls_behind_is_noticed(files, tmp_path):
    report, bench = files
    run(report, bench, "-o", tmp_path / "old.md")
    assert run(report, bench, "--check", tmp_path / "old.md").returncode == 0
    more = (tmp_path / "old.md").read_text().replace("| Head |", "| Tail | C++ | avx2 | executed |  |\n| Head |")
    (tmp_path / "old.md").write_text(more)
    done = run(report, bench, "--check", tmp_path / "old.md")
    assert done.returncode == 1 and "no longer shown: Tail C++ avx2" in done.stderr
