"""qsparse-bench BUNDLE: the promised JSON and tables, their figures hold together, wrong calls are refused."""

import csv
import dataclasses
import io
import json
import shutil

import pytest

from qsparse_export.bench.density import Activity
from qsparse_export.bench.model import _of_mode, _Way
from qsparse_export.cli.bench import main
from qsparse_export.runtimes.ort.library import open_library

QUICK = ["-p", "8", "-n", "4", "-r", "2", "-t", "1"]
PROMISED = {"rows", "ttft_ms", "load_ms", "peak_rss_bytes", "bytes_per_token", "density", "variants"}
PROMISED_OF_ROWS = {
    "test",
    "mode",
    "threads",
    "tokens_per_s_mean",
    "tokens_per_s_std",
    "p50_ms",
    "p90_ms",
}


def bench(capsys, bundle, *arguments):
    assert main([str(bundle.path), *QUICK, *arguments]) == 0
    return capsys.readouterr().out


def refused(capsys, code, *arguments):
    assert main([*map(str, arguments)]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    return " ".join(captured.err.split())


@pytest.fixture(scope="module")
def report(bundles):
    """All modes on two numbers of threads, once."""
    import contextlib

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main([str(bundles("bitnet").path), *QUICK, "-t", "1,2", "--no-native", "--dense", "-o", "json"]) == 0
    return json.loads(printed.getvalue())


def test_json_has_the_promised_form(report):
    assert set(report) >= PROMISED
    expected = [(t, test, m) for t in (1, 2) for test in ("pp8", "tg4") for m in ("native", "bodies", "dense")]
    assert [(row["threads"], row["test"], row["mode"]) for row in report["rows"]] == expected
    for row in report["rows"]:
        assert set(row) >= PROMISED_OF_ROWS
        assert row["tokens_per_s_mean"] > 0 and row["tokens_per_s_std"] >= 0
        assert 0 < row["p50_ms"] <= row["p90_ms"]
        assert len(row["samples_tokens_per_s"]) == 2
    assert report["ttft_ms"] > 0 and report["load_ms"] > 0 and report["peak_rss_bytes"] > 1 << 20
    assert {"cpu", "cores", "memory_bytes", "onnxruntime"} <= set(report["machine"])
    assert report["model"]["name"] == "bitnet" and report["repetitions"] == 2


def test_every_mode_ran_what_it_says(report, bundles):
    chosen = open_library().chosen()
    runs = 2 + 1  # repetitions and the warm-up, of a prefill and of 4 tokens each
    for cost in report["sessions"]:
        if cost["mode"] == "bodies":
            assert cost["variants"] == {}
        else:
            layer_ops = {"CachedAttention", "GatedActivation", "AddRmsNorm"}
            assert {op for op in cost["variants"]} - layer_ops <= {"SparseTernaryMatMul", "TernaryMatMul"}
            assert sum(cost["variants"]["SparseTernaryMatMul"].values()) == runs * (1 + 4) * 6
            assert {variant for calls in cost["variants"].values() for variant in calls} == {chosen}
    native, bodies, dense = report["activities"]
    assert (native["mode"], bodies["mode"], dense["mode"]) == ("native", "bodies", "dense")
    assert report["density"] == native["density"] == bodies["density"]
    assert list(native["density"]) == [row["name"] for row in bundles("bitnet").manifest["sparsity"]]
    assert report["bytes_per_token"] == native["bytes_per_token"] < dense["bytes_per_token"]
    assert bodies["bytes_per_token"] is None  # a runtime rewrites bodies as it likes
    assert native["mean_density"] < dense["mean_density"] < 1  # the squared ReLU keeps its zeros
    assert {tuple(activity["not_native"]) for activity in report["activities"]} == {()}


def test_the_headline_is_the_first_mode_on_the_most_threads(report):
    (cost,) = (cost for cost in report["sessions"] if (cost["mode"], cost["threads"]) == ("native", 2))
    for key in ("ttft_ms", "load_ms", "peak_rss_bytes", "variants"):
        assert report[key] == cost[key]


def test_default_rows_are_native_alone(capsys, bundles):
    plain = json.loads(bench(capsys, bundles("float"), "-o", "json"))
    assert {row["mode"] for row in plain["rows"]} == {"native"}
    assert plain["activities"][0]["mean_density"] < 0.6


def test_without_a_kernel_that_skips_a_token_reads_every_weight(capsys, bundles):
    plain = json.loads(bench(capsys, bundles("unfused"), "--no-native", "-o", "json"))
    native, bodies = plain["activities"]
    assert native["mean_density"] < 0.6
    assert native["bytes_per_token"] == bodies["bytes_per_token"] > 4 * 2 * 48 * (48 * 3 + 130 * 3)


def test_json_lines_and_csv_have_a_row_each(capsys, bundles):
    lines = bench(capsys, bundles("float"), "--dense", "-o", "jsonl").splitlines()
    rows = [json.loads(line) for line in lines]
    assert [(row["test"], row["mode"]) for row in rows] == [
        (test, mode) for test in ("pp8", "tg4") for mode in ("native", "dense")
    ]
    assert set(rows[0]) >= PROMISED_OF_ROWS | {"model", "cpu", "peak_rss_bytes", "bytes_per_token", "mean_density"}
    table = list(csv.DictReader(io.StringIO(bench(capsys, bundles("float"), "--dense", "-o", "csv"))))
    assert [set(row) for row in table] == [set(rows[0])] * 4
    assert float(table[0]["tokens_per_s_mean"]) > 0 and table[0]["model"] == "float"


def test_tables(capsys, bundles):
    lines = bench(capsys, bundles("float"), "--dense", "-p", "0").splitlines()
    assert lines[2].startswith("| test | mode | threads | tokens/s")
    assert [line.split(" | ")[:2] for line in lines[4:6]] == [["| tg4", "native"], ["| tg4", "dense"]]
    assert lines[5].endswith("| 1.00 |") and " ± " in lines[4]
    tables = [line for line in lines if line.startswith("| density")]
    assert [table.split(" | ")[0] for table in tables] == ["| density, native", "| density, dense"]
    assert any(line.startswith("| down_proj | 0.") for line in lines)


def test_a_portable_bundle_runs_its_bodies_and_says_so(capsys, bundles):
    assert main([str(bundles("portable").path), *QUICK, "--dense", "-o", "json"]) == 0
    captured = capsys.readouterr()
    plain = json.loads(captured.out)
    assert [row["mode"] for row in plain["rows"]] == ["bodies", "dense"] * 2
    assert plain["variants"] == {} and "portable" in captured.err
    assert plain["bytes_per_token"] is None


def test_ops_without_a_kernel_are_named():
    activity = Activity({}, 0.5, 100.0, 4, frozenset({"TernaryMatMul"}), frozenset({"TernaryMatMul", "TopKSparsify"}))
    made = _of_mode(_Way("native", None, True), activity, [])
    assert made.not_native == ("TernaryMatMul", "TopKSparsify") and made.bytes_per_token is None


def copy(bundle, tmp_path, **changes):
    """A copy of the bundle with another manifest, whose checksums hold."""
    path = tmp_path / "copy"
    shutil.copytree(bundle.path, path)
    manifest = json.loads((path / "manifest.json").read_text()) | changes
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def test_what_is_no_bundle_or_damaged_is_refused(capsys, bundles, tmp_path):
    assert "is no bundle" in refused(capsys, 1, tmp_path)
    assert "is no bundle" in refused(capsys, 1, tmp_path / "none")
    path = copy(bundles("float"), tmp_path)
    raw = bytearray((path / "model.onnx.data").read_bytes())
    raw[len(raw) // 2] ^= 1
    (path / "model.onnx.data").write_bytes(raw)
    assert "the checksum of model.onnx.data differs" in refused(capsys, 1, path)
    (path / "model.onnx.data").unlink()
    assert "model.onnx.data is missing" in refused(capsys, 1, path)


def test_strange_manifests_are_refused(capsys, bundles, tmp_path):
    for changes, words in (
        ({"kind": "module"}, "holds a module, which does not generate text"),
        ({"model": {}}, "does not describe a decoder"),
        ({"sparsity": [7]}, "has no table of the sparsity"),
        ({"runtime": "orts"}, "unknown runtime 'orts'"),
    ):
        path = copy(bundles("float"), tmp_path, **changes)
        assert words in refused(capsys, 2 if "runtime" in changes else 1, path, *QUICK)
        shutil.rmtree(path)


def test_a_bundle_for_another_machine_runs_its_bodies_only(capsys, bundles, tmp_path):
    target = dataclasses.asdict(bundles("float"))["manifest"]["target"] | {"name": "giant", "features": ["of_tomorrow"]}
    path = copy(bundles("float"), tmp_path, target=target)
    assert "giant" in refused(capsys, 1, path, *QUICK)
    assert main([str(path), *QUICK, "--no-native", "-o", "json"]) == 0
    captured = capsys.readouterr()
    assert {row["mode"] for row in json.loads(captured.out)["rows"]} == {"bodies"}
    assert "no native rows" in captured.err and "of_tomorrow" in captured.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-p", "41"], "-p 41: the model has 40 positions"),
        (["-n", "41"], "-n 41: the model has 40 positions"),
        (["-p", "0", "-n", "0"], "nothing to measure"),
        (["-r", "0"], "0 repetitions"),
        (["-t", "0"], "[0] threads"),
    ],
)
def test_impossible_wishes_are_refused(capsys, bundles, arguments, words):
    assert words in refused(capsys, 2, bundles("float").path, *QUICK, *arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-p", "many"], "'many'; expected whole numbers separated by commas"),
        (["-n", "-3"], "expected numbers from 0"),
        (["-o", "xml"], "invalid choice: 'xml'"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_wrong_flags_are_refused(capsys, bundles, arguments, words):
    with pytest.raises(SystemExit) as ended:
        main([str(bundles("float").path), *arguments])
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert words in " ".join(captured.err.split()) and captured.out == ""


def test_help_teaches(capsys):
    for arguments in (["--help"], ["kernels", "--help"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 0
        text = capsys.readouterr().out
        assert "examples" in text and "qsparse-bench kernels" in text
