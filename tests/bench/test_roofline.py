"""--roofline: figures by hand for a graph of three products, its command, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from graph_text import graph_of

import qsparse_export as qs
from qsparse_export.bench.roofline import GPUS, GRAPH_LAUNCH_US, LAUNCH_US, roofline, spell
from qsparse_export.config import ModelConfig, SparsityRule, TopK
from qsparse_export.nn.decoder import Decoder

COMMAND = str(Path(sys.executable).with_name("qsparse-bench"))
K, N = 4096, 8192


@pytest.fixture(scope="module")
def graph():
    """Two sparse float products that share a name, and one that reads all: 128 MB each."""
    sparse = 'SparseMatMul <k = 2048, block = 0, rescale = "none", n = [8192]>'
    weights = {name: np.zeros((K, N), np.float32) for name in ("a.up.weight_t", "b.up.weight_t")}
    text = (
        f'u = ai.qsparse.{sparse} (x, "a.up.weight_t") v = ai.qsparse.{sparse} (x, "b.up.weight_t") '
        'w = Add (u, v) y = MatMul (w, "head.weight_t")'
    )
    return graph_of(
        f"(float[1, {K}] x) => (float[1, {K}] y)", text, weights | {"head.weight_t": np.zeros((N, K), np.float32)}
    )


def test_bytes_and_operations_by_projection(graph):
    found = roofline(graph)
    assert [(work.name, work.products, work.skips) for work in found.work] == [("up", 2, True), ("head", 1, False)]
    assert [work.bytes for work in found.work] == [2 * K * N * 4, K * N * 4]
    assert [work.operations for work in found.work] == [4 * K * N, 2 * K * N]
    assert found.kernels == 4 and found.other_bytes == 0


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_time_is_bytes_over_bandwidth_and_launches_of_what_is_no_product(graph, gpu):
    rows = {row.density: row for row in roofline(graph, (0.25, 1.0)).expected if row.gpu == gpu.name}
    for density, row in rows.items():
        own = K * N * 4 * (2 * density + 1) / (gpu.gb_per_s * 1e9)
        assert row.ms_per_token == pytest.approx((own + LAUNCH_US * 1e-6) * 1e3)
        assert row.captured_ms_per_token == pytest.approx((own + GRAPH_LAUNCH_US * 1e-6) * 1e3)
        assert row.tokens_per_s == pytest.approx(1e3 / row.ms_per_token)
        assert row.launch_share == pytest.approx(LAUNCH_US * 1e-6 / (own + LAUNCH_US * 1e-6))


def test_a_product_takes_at_least_a_launch(graph):
    """At a density of almost nothing the two sparse products are launches, and no more."""
    row = roofline(graph, (1e-6,)).expected[0]
    head = K * N * 4 / (GPUS[0].gb_per_s * 1e9)
    assert row.ms_per_token == pytest.approx((head + 3 * LAUNCH_US * 1e-6) * 1e3)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    config = ModelConfig("llama", 64, 32, 48, 1, 2, 1, 16, max_positions=32, sparsity=(SparsityRule("*", TopK(0.5)),))
    return qs.export(Decoder(config), verify="none", out=tmp_path_factory.mktemp("bundles") / "tiny").path


def test_the_command(bundle):
    done = subprocess.run([COMMAND, bundle, "--roofline"], capture_output=True, text=True, check=True)
    assert "| q_proj+k_proj+v_proj | 1 |" in done.stdout and "Not measured" in done.stdout
    plain = json.loads(
        subprocess.run([COMMAND, bundle, "--roofline", "-o", "json"], capture_output=True, check=True).stdout
    )
    assert plain["measured"] is False and plain["assumed"]["launch_us"] == LAUNCH_US
    assert len(plain["roofline"]["expected"]) == 4 * len(GPUS)
    assert spell(roofline(qs_graph(bundle))) + "\n" == done.stdout


def qs_graph(bundle):
    import onnx_ir

    return onnx_ir.load(bundle / "model.onnx")


@pytest.mark.parametrize("option", [["--dense"], ["--no-native"], ["-o", "csv"]])
def test_it_goes_alone(bundle, option):
    done = subprocess.run([COMMAND, bundle, "--roofline", *option], capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "--roofline measures nothing" in done.stderr and done.stdout == ""
