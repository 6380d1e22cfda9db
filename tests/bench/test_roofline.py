"""--roofline: figures by hand for a graph of three products, kernels that a step launches, the page, and its command."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir
import pytest
from graph_text import graph_of

import qsparse_export as qs
from qsparse_export.bench.launches import launches
from qsparse_export.bench.roofline import GPUS, GRAPH_LAUNCH_US, LAUNCH_US, roofline, spell
from qsparse_export.bench.weight_reads import weight_reads
from qsparse_export.config import ModelConfig, SparsityRule, TopK
from qsparse_export.nn.decoder import Decoder

COMMAND = str(Path(sys.executable).with_name("qsparse-bench"))
K, N, OUT = 8192, 65536, 512
MATRIX_BYTES = K * N // 4
"""Of each product: two bits of a ternary weight, or as many bytes of floats."""
KERNELS = 4 + 4 + 1 + 1
"""Of two products behind a mask (mask, quantiser, product, sum of the slices), their sum, and the last product."""


@pytest.fixture(scope="module")
def graph():
    """Two sparse ternary products that share a name, and one that reads all: 128 MB each."""
    sparse = 'SparseTernaryMatMul <k = 4096, block = 0, rescale = "none", n = [65536]>'
    packed = np.zeros((K, N // 4), np.uint8)
    scale = np.ones(1, np.float32)
    weights = {"a.up.packed": packed, "b.up.packed": packed, "a.up.scale": scale, "b.up.scale": scale}
    text = (
        f'u = ai.qsparse.{sparse} (x, "a.up.packed", "a.up.scale") v = ai.qsparse.{sparse} (x, "b.up.packed", "b.up.scale") '
        'w = Add (u, v) y = MatMul (w, "head.weight_t")'
    )
    weights["head.weight_t"] = np.zeros((N, OUT), np.float32)
    return graph_of(f"(float[1, {K}] x) => (float[1, {OUT}] y)", text, weights)


def test_bytes_and_operations_by_projection(graph):
    found = roofline(graph)
    assert [(work.name, work.products, work.skips) for work in found.work] == [("up", 2, True), ("head", 1, False)]
    assert [work.bytes for work in found.work] == [2 * MATRIX_BYTES, MATRIX_BYTES]
    assert [work.operations for work in found.work] == [4 * K * N, 2 * N * OUT]
    assert found.other_bytes == 8, "two scales"
    assert found.masked_bytes == 2 * MATRIX_BYTES + 8, "half of two, all of the third"
    assert found.kernels == {"SparseTernaryMatMul": 8, "Add": 1, "MatMul": 1}


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_time_is_bytes_over_bandwidth_and_launches_of_what_is_no_product(graph, gpu):
    rows = {row.density: row for row in roofline(graph, (0.25, 1.0)).expected if row.gpu == gpu.name}
    for density, row in rows.items():
        own = MATRIX_BYTES * (2 * density + 1) / (gpu.gb_per_s * 1e9)
        others = (KERNELS - 3) * 1e-6
        assert row.ms_per_token == pytest.approx((own + LAUNCH_US * others) * 1e3)
        assert row.captured_ms_per_token == pytest.approx((own + GRAPH_LAUNCH_US * others) * 1e3)
        assert row.tokens_per_s == pytest.approx(1e3 / row.ms_per_token)
        assert row.launch_share == pytest.approx(LAUNCH_US * others / (own + LAUNCH_US * others), 1e-5)


def test_the_masks_of_the_graph_are_a_density(graph):
    given, masked = roofline(graph, (0.5, None), GPUS[:1]).expected
    assert masked.density is None and masked.ms_per_token == given.ms_per_token


def test_a_product_takes_at_least_a_launch(graph):
    """At a density of almost nothing the two sparse products are launches, and no more."""
    row = roofline(graph, (1e-6,)).expected[0]
    head = MATRIX_BYTES / (GPUS[0].gb_per_s * 1e9)
    assert row.ms_per_token == pytest.approx((head + (KERNELS - 1) * LAUNCH_US * 1e-6) * 1e3)


VIEW = "r = Reshape (x, shape) y = Relu (r)"
SWISH = "s = Sigmoid (x) y = Mul (x, s)"
OTHER_GATE = "s = Sigmoid (x) r = Relu (x) y = Mul (r, s)"
LENGTH = "l = Shape <start = 1> (x) c = Cast <to = 1> (l) y = Add (x, c)"
CONSTANT = "c = Constant <value_float = 2.0> () f = Neg (c) y = Mul (x, f)"
EMBEDDING = "e = Relu (x) t = Cast <to = 7> (e) y = Gather (table, t)"


def selecting(op: str, k: int, rescale: str = "none", block: int = 0) -> str:
    more, inputs = {
        "TopKSparsify": ("", "x"),
        "SparseTernaryMatMul": (", n = [128]", "x, packed, scale"),
        "SparseMatMulNBits": (", n = [128], bits = 8, group = 32", "x, codes, scales"),
    }[op]
    return f'y = ai.qsparse.{op} <k = {k}, block = {block}, rescale = "{rescale}"{more}> ({inputs})'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (selecting("TopKSparsify", 64), {"TopKSparsify": 1}),
        (selecting("TopKSparsify", 128), {"TopKSparsify": 1}),
        (selecting("TopKSparsify", 64, "l2"), {"TopKSparsify": 2}),
        (selecting("SparseTernaryMatMul", 64), {"SparseTernaryMatMul": 4}),
        (selecting("SparseTernaryMatMul", 128), {"SparseTernaryMatMul": 3}),
        (selecting("SparseTernaryMatMul", 32, block=32), {"SparseTernaryMatMul": 3}),
        (selecting("SparseTernaryMatMul", 31, block=32), {"SparseTernaryMatMul": 4}),
        (selecting("SparseTernaryMatMul", 128, "l2"), {"SparseTernaryMatMul": 5}),
        (selecting("SparseMatMulNBits", 64), {"SparseMatMulNBits": 3}),
        (selecting("SparseMatMulNBits", 128), {"SparseMatMulNBits": 2}),
        ("y = ai.qsparse.TernaryMatMul <n = 128> (x, packed, one)", {"TernaryMatMul": 3}),
        ('y = ai.qsparse.GatedActivation <activation = "silu"> (x, x)', {}),
        (VIEW, {"Relu": 1}),
        (SWISH, {"Mul": 1}),
        (OTHER_GATE, {"Sigmoid": 1, "Relu": 1, "Mul": 1}),
        (LENGTH, {"Add": 1}),
        (CONSTANT, {"Mul": 1}),
        (EMBEDDING, {"Relu": 1, "Cast": 1, "Gather": 1}),
    ],
)
def test_kernels_of_a_step(text, expected):
    """tests/cuda/test_on_provider.py counts those of whole models."""
    constants = {
        "packed": np.zeros((128, 32), np.uint8),
        "scale": np.ones(1, np.float32),
        "one": np.float32(1),
        "codes": np.zeros((128, 128), np.int8),
        "scales": np.ones((4, 128), np.float16),
        "shape": np.array([1, 128], np.int64),
        "table": np.zeros(8, np.float32),
    }
    used = {name: value for name, value in constants.items() if f"{name})" in text or f"{name}," in text}
    assert launches(graph_of("(float[1, 128] x) => (float[a, b] y)", text, used).graph) == expected


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_of_the_provider_is_a_product_and_its_embedding_a_row(tied):
    """On the same bytes, or on its own, as lower-nbits makes them."""
    vocabulary, group, groups = 512, 64, 4
    k = group * groups
    blocks, scales = np.zeros((vocabulary, groups, group // 2), np.uint8), np.ones((vocabulary, groups), np.float32)
    rows = "embed" if tied else "other"
    weights = {"embed.rows.blocks": blocks, "embed.row_scales.float": scales, "flat": np.array([0, -1], np.int64)}
    if not tied:
        weights |= {"other.rows.blocks": blocks, "other.row_scales.float": scales}
    text = (
        f'r = Reshape ("{rows}.rows.blocks", flat) '
        "e = com.microsoft.GatherBlockQuantized <bits = 4, block_size = 64, gather_axis = 0, quantize_axis = 1> "
        f'(r, ids, "{rows}.row_scales.float") '
        f"y = com.microsoft.MatMulNBits <K = {k}, N = {vocabulary}, bits = 4, block_size = 64> "
        '(e, "embed.rows.blocks", "embed.row_scales.float")'
    )
    model = graph_of(f"(int64[1] ids) => (float[1, {vocabulary}] y)", text, weights)
    widths = {"e": k, "y": vocabulary}
    for value in (output for node in model.graph for output in node.outputs):
        if value.name in widths:
            value.shape = onnx_ir.Shape([1, widths[value.name]])
    reads = weight_reads(model.graph)
    row_bytes = groups * (group // 2 + 4)
    (head,) = reads.products
    assert (head.linears, head.weight_bytes, head.outputs) == (("embed",), vocabulary * row_bytes, vocabulary)
    # The whole product, and of an embedding of its own one row beside it.
    assert reads.other_bytes == (0 if tied else row_bytes) + 16
    assert launches(model.graph) == {"GatherBlockQuantized": 1, "MatMulNBits": 1}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    config = ModelConfig("llama", 64, 32, 48, 1, 2, 1, 16, max_positions=32, sparsity=(SparsityRule("*", TopK(0.5)),))
    out = tmp_path_factory.mktemp("bundles")
    return {
        target: qs.export(Decoder(config), target=target, portable=True, verify="none", out=out / target).path
        for target in ("cuda", "cpu")
    }


def test_the_command(bundles):
    done = subprocess.run([COMMAND, bundles["cuda"], "--roofline"], capture_output=True, text=True, check=True)
    assert "| q_proj | 1 |" in done.stdout
    assert spell(roofline(onnx_ir.load(bundles["cuda"] / "model.onnx"))) + "\n" == done.stdout
    assert "note: nothing was measured, since" in done.stderr and "was exported with --portable" in done.stderr


def test_the_command_as_json(bundles):
    done = subprocess.run([COMMAND, bundles["cuda"], "--roofline", "-o", "json"], capture_output=True, check=True)
    plain = json.loads(done.stdout)
    assert plain["measured"] is None and "was exported with --portable" in plain["not_measured"]
    assert plain["assumed"]["launch_us"] == LAUNCH_US
    assert len(plain["roofline"]["expected"]) == 4 * len(GPUS)


@pytest.mark.parametrize("option", [["--dense"], ["--no-native"], ["-o", "csv"]])
def test_it_goes_alone(bundles, option):
    command = [COMMAND, bundles["cuda"], "--roofline", *option]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "it goes with -o md or -o json alone" in done.stderr and done.stdout == ""


def test_a_bundle_for_a_cpu_is_refused(bundles):
    """Its graph is fused for kernels that no GPU has."""
    done = subprocess.run([COMMAND, bundles["cpu"], "--roofline"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "export it with --target cuda" in done.stderr and done.stdout == ""
