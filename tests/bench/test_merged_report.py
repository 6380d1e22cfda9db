"""qsparse-bench report: many devices in one table and one page; what is no report is refused by name."""

import base64
import builtins
import json
import re
import xml.etree.ElementTree as ElementTree

import pytest

from qsparse_export.bench.merged import read_reports
from qsparse_export.bench.merged_report import html_page, markdown
from qsparse_export.cli.bench import main
from qsparse_export.errors import MeasurementError

ROW = {"test": "tg8", "mode": "native", "threads": 2, "tokens_per_s_mean": 12.5, "tokens_per_s_std": 0.5}
ROW |= {"p50_ms": 80.0, "p90_ms": 90.0}
MINIMAL = {  # what the issue promises, and no more
    "rows": [
        ROW,
        ROW | {"test": "pp32", "tokens_per_s_mean": 99.0},
        ROW | {"mode": "dense", "tokens_per_s_mean": 6.25},
    ],
    "ttft_ms": 320.0,
    "load_ms": 45.0,
    "peak_rss_bytes": 64_000_000,
    "bytes_per_token": 5_000_000,
    "density": {"model.layers.0.self_attn.q_proj": 0.25, "model.layers.0.mlp.down_proj": 0.75, "expert": None},
    "variants": {"TernaryMatMul": {"neondot": 12}},
}


def write(path, plain):
    path.write_text(json.dumps(plain))
    return path


@pytest.fixture
def reports(tmp_path, bundles, capsys):
    """One as a device's own program might write it, one of ours."""
    assert main([str(bundles("bitnet").path), "-p", "8", "-n", "4", "-r", "1", "-t", "1", "--dense", "-o", "json"]) == 0
    ours = json.loads(capsys.readouterr().out)
    ours["machine"]["device"] = "<b>desk</b> $\\frac"
    return [write(tmp_path / "board.json", MINIMAL), write(tmp_path / "ours.json", ours)]


def test_a_report_with_the_promised_keys_alone_is_enough(tmp_path):
    native, prefill, dense = read_reports([write(tmp_path / "board.json", MINIMAL)])
    assert (native.device, native.model, native.test, native.mode, native.threads) == (
        "board",
        "board",
        "tg8",
        "native",
        2,
    )
    assert native.density == 0.5 and native.variants == "neondot" and native.is_decode and not prefill.is_decode
    assert (native.ttft_ms, native.load_ms, native.peak_rss_bytes, native.bytes_per_token) == (320, 45, 64e6, 5e6)
    # The figures at the top are those of the first mode: another one's are not known.
    assert dense.density is dense.peak_rss_bytes is dense.bytes_per_token is None and dense.variants == ""


def test_each_row_of_ours_has_its_own_modes_figures(reports):
    ours = json.loads(reports[1].read_text())
    results = read_reports(reports[1:])
    assert [(r.test, r.mode) for r in results] == [(row["test"], row["mode"]) for row in ours["rows"]]
    for result in results:
        (cost,) = (cost for cost in ours["sessions"] if cost["mode"] == result.mode)
        (activity,) = (activity for activity in ours["activities"] if activity["mode"] == result.mode)
        assert (result.load_ms, result.peak_rss_bytes) == (cost["load_ms"], cost["peak_rss_bytes"])
        assert (result.density, result.bytes_per_token) == (activity["mean_density"], activity["bytes_per_token"])


def test_one_table_of_all_devices(reports, capsys):
    assert main(["report", *map(str, reports)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 3 + 4 and len({line.count("|") for line in lines}) == 1
    assert (
        "| board | board | tg8 | native | 2 | 12.50 ± 0.50 | 80.00 | 90.00 | 0.500 | 5.0 | 64 | 45 | 320 |" in lines[2]
    )


def test_the_page_stands_alone_and_escapes_what_devices_say(reports, tmp_path, capsys):
    page = tmp_path / "report.html"
    assert main(["report", *map(str, reports), "-o", str(page)]) == 0
    text = page.read_text()
    assert "&lt;b&gt;desk&lt;/b&gt;" in text and "<b>" not in text
    assert not re.search(r"(src|href)=\"(?!data:)", text) and "<script" not in text
    images = [base64.b64decode(found).decode() for found in re.findall(r"base64,([^\"]+)\"", text)]
    assert len(images) == 3 == text.count("<h2>")
    for image in images:
        ElementTree.fromstring(image)
        assert "desk" in image
    decode, prefill, memory = images
    assert "tg8, 2 threads: board, board" in decode and "pp32, 2 threads: board, board" in prefill
    assert "64 MB" in memory
    assert sorted(path.name for path in tmp_path.iterdir()) == ["board.json", "ours.json", "report.html"]
    again = tmp_path / "again.html"
    assert main(["report", *map(str, reports), "-o", str(again)]) == 0
    assert again.read_text() == text


def test_plots_without_matplotlib_name_the_extra(reports, tmp_path, capsys, monkeypatch):
    real = builtins.__import__

    def missing(name, *arguments, **named):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", missing)
    assert main(["report", *map(str, reports), "-o", str(tmp_path / "report.html")]) == 1
    captured = capsys.readouterr()
    assert "pip install 'qsparse-export[bench]'" in captured.err and captured.out == ""
    assert not (tmp_path / "report.html").exists()
    assert main(["report", *map(str, reports)]) == 0  # the table alone needs none


@pytest.mark.parametrize(
    ("plain", "words"),
    [
        ([], "has no rows"),
        ({"rows": 7}, "has no rows"),
        ({"rows": [7]}, "row 1 is 7; expected an object"),
        ({"rows": [{"op": "ternary"}]}, "is of qsparse-bench kernels"),
        ({"rows": [ROW | {"test": "_x"}]}, "row 1: test is '_x'"),
        ({"rows": [ROW, ROW | {"mode": "fast"}]}, "row 2: mode 'fast'"),
        ({"rows": [ROW | {"threads": True}]}, "threads True"),
        ({"rows": [ROW | {"p50_ms": None}]}, "row 1: p50_ms is None; expected a finite number"),
        ({"rows": [ROW | {"tokens_per_s_mean": float("nan")}]}, "tokens_per_s_mean is nan"),
        ({"rows": [ROW], "load_ms": "slow"}, "load_ms is 'slow'"),
        ({"rows": [ROW], "density": {"a": "half"}}, "density is 'half'"),
        ({"reports": []}, "no rows"),
        ({"reports": [{"rows": [ROW]}, [ROW]]}, "no rows"),
        ({"reports": [{"rows": [ROW]}, {"rows": [ROW | {"test": "_x"}]}]}, "row 1: test is '_x'"),
    ],
)
def test_what_is_no_report_is_refused(tmp_path, plain, words):
    with pytest.raises(MeasurementError, match=r"no\.json") as raised:
        read_reports([write(tmp_path / "no.json", plain)])
    assert words in str(raised.value)


def test_unreadable_files_and_empty_reports(tmp_path, capsys):
    (tmp_path / "text.json").write_text("{")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    for path, words in (
        (tmp_path / "none.json", "cannot read"),
        (tmp_path / "text.json", "is not JSON"),
        (tmp_path / "deep.json", "is not JSON"),
        (write(tmp_path / "empty.json", {"rows": []}), "have no rows"),
    ):
        assert main(["report", str(path)]) == 1
        captured = capsys.readouterr()
        assert words in captured.err and captured.out == ""


def test_a_page_that_cannot_be_written_leaves_nothing(tmp_path, capsys):
    report = write(tmp_path / "board.json", MINIMAL)
    assert main(["report", str(report), "-o", str(tmp_path / "none" / "report.html")]) == 1
    assert "cannot write" in capsys.readouterr().err
    (tmp_path / "folder").mkdir()
    assert main(["report", str(report), "-o", str(tmp_path / "folder")]) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["board.json", "folder"]


def test_names_cannot_break_the_table(tmp_path):
    named = MINIMAL | {"machine": {"device": "a|b\nc\0" + "x" * 500}}
    results = read_reports([write(tmp_path / "r.json", named)])
    lines = markdown(results).splitlines()
    assert len(lines) == 5 and r"a\|bcxxx" in lines[2] and len(lines[2]) < 400
    assert "\0" not in html_page(results, {})
