"""qsparse-bench kernels: the figures have the promised form and hold together; wrong calls are refused by name."""

import csv
import io
import json

import numpy as np
import pytest

from qsparse_export.bench import graphs, kernels, machine
from qsparse_export.bench.timing import Contender, interleave
from qsparse_export.cli.bench import main
from qsparse_export.formats import ternary
from qsparse_export.runtimes.ort.library import open_library

QUICK = ["--k", "256", "--n", "300", "--seconds", "0.01"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(kernels, "COLD_BYTES", 200_000)
    monkeypatch.setattr(kernels, "TOPK_NODES", 3)


def report(capsys, *arguments):
    assert main(["kernels", *QUICK, "-o", "json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_has_the_promised_form(capsys):
    made = report(capsys, "--density", "0.4", "-t", "1,2", "--peers", "ort")
    assert {"cpu", "cores", "onnxruntime", "supported_variants"} <= set(made["machine"])
    assert [row["threads"] for row in made["rows"]] == [1, 2]
    for row in made["rows"]:
        assert (row["op"], row["m"], row["k"], row["n"], row["density"]) == ("ternary", 1, 256, 300, 0.4)
        assert row["variant"] == open_library().chosen()
        assert 0 < row["min_us"] <= row["median_us"] <= row["p90_us"]
        assert row["active_bytes"] == 102 * ternary.row_bytes(300) and row["total_bytes"] == 256 * 96
        assert row["active_gb_per_s"] == pytest.approx(row["active_bytes"] / row["min_us"] / 1e3)
        assert row["limit_fraction"] == pytest.approx(row["active_gb_per_s"] / row["gather_gb_per_s"])
        assert row["gops"] == pytest.approx(2 * 256 * 300 / row["min_us"] / 1e3)
        assert set(row["peers"]) == {"ort-2bit", "ort-4bit"}
        for peer in row["peers"].values():
            assert peer["ratio"] == pytest.approx(peer["median_us"] / row["median_us"])


@pytest.mark.parametrize("variant", open_library().supported)
def test_every_variant_can_be_forced(capsys, variant):
    rows = report(capsys, "--variant", variant, "--m", "1,5", "--density", "0,1", "--hot")["rows"]
    assert [(row["variant"], row["m"], row["density"]) for row in rows] == [
        (variant, m, density) for m in (1, 5) for density in (0, 1)
    ]
    assert rows[0]["active_bytes"] == 0 and rows[0]["limit_fraction"] is None


def test_top_k(capsys):
    (row,) = report(capsys, "--op", "topk", "--density", "0.25", "--peers", "ort")["rows"]
    assert row["n"] is None and row["gops"] is None and row["active_bytes"] == 1024
    assert set(row["peers"]) == {"ort-topk"}


@pytest.mark.parametrize("op", kernels.OPS)
def test_the_same_op_by_tvm(capsys, op):
    """On the same weights, and judged as ours is: a wrong one raises."""
    (row,) = report(capsys, "--op", op, "--group", "32", "-t", "2", "--peers", "tvm")["rows"]
    ((name, peer),) = row["peers"].items()
    assert name.startswith("tvm-")
    assert peer["ratio"] == pytest.approx(peer["median_us"] / row["median_us"])


def test_table_and_csv(capsys):
    assert main(["kernels", *QUICK, "--peers", "ort", "-o", "md"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.count("|") for line in lines[2:]] == [23] * 3
    assert main(["kernels", *QUICK, "--peers", "ort", "--density", "0.4,1", "-o", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == 2 and float(rows[1]["ort-2bit_ratio"]) > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--op", "softmax"], "--op softmax: this version has no such kernel; known:"),
        (["--op", "ternari"], "--op ternari: this version has no such kernel; did you mean ternary?"),
        (["--peers", "llama"], "--peers llama: unknown peer; known: ort, tvm"),
        (["--density", "1.5"], "--density 1.5; expected a share of active channels, 0 to 1"),
        (["--m", "0"], "m 0, k 2560"),
        (["-t", "0"], "threads 0; expected 1 or more"),
    ],
)
def test_wrong_calls_are_refused(capsys, arguments, words):
    assert main(["kernels", *arguments]) == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_a_variant_of_another_processor_is_refused(capsys):
    foreign = sorted(set(open_library().variants) - set(open_library().supported))
    assert main(["kernels", *QUICK, "--variant", foreign[0]]) == 1
    assert f"QSPARSE_VARIANT={foreign[0]} cannot run on this machine" in capsys.readouterr().err


def test_a_wrong_product_is_not_measured(capsys, monkeypatch):
    monkeypatch.setattr(graphs, "SCALE", 0.02)
    honest = ternary.unpack
    monkeypatch.setattr(ternary, "unpack", lambda packed, n: -honest(packed, n))
    assert main(["kernels", *QUICK]) == 1
    assert "wrong product" in capsys.readouterr().err


def test_copies_have_distinct_contents(tmp_path):
    graph = graphs.ternary_graph(tmp_path, 101, 130, 3)
    assert graph.stride % 64 == 0
    content = np.fromfile(tmp_path / "ternary.data", np.uint8).reshape(3, graph.stride)
    assert len({copy.tobytes() for copy in content}) == 3
    ternary_codes = content[..., None] >> np.array([0, 2, 4, 6], np.uint8) & 3
    assert set(np.unique(ternary_codes)) == {0, 1, 2}


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("ahead", [0, 1, 8, 1000])
@pytest.mark.parametrize("together", [1, 3, 16])
def test_probe_reads_every_row_once(threads, ahead, together):
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 256, (5000, 96), np.uint8)
    index = rng.integers(0, 5000, 4000)
    probe = machine.Probe(open_library(), threads)
    expected = int(rows[index].view(np.uint64).sum(dtype=np.uint64))
    reading = machine.Reading(ahead, together)
    assert probe.read(rows, index, reading) == expected
    assert probe.read(rows, index[:0], reading) == 0
    probe.close()


def test_contenders_take_turns():
    order = []
    timings = interleave({name: Contender(lambda name=name: order.append(name), 2) for name in "abc"}, 0.0)
    assert order == list("abc") * 6  # a warm-up and the least number of rounds
    assert timings["a"].rounds == 5
