"""Density and bytes per token: what the masks say, and what a count by hand gives."""

import numpy as np
import onnx_ir
import pytest
import torch
from onnx import TensorProto
from onnx.helper import make_graph, make_model, make_node, make_tensor_value_info

from qsparse_export.bench.dense_graph import keep_all_channels
from qsparse_export.bench.density import measure_activity
from qsparse_export.bench.prompt import first_token
from qsparse_export.bench.weight_reads import linears_of, weight_reads
from qsparse_export.formats.ternary import row_bytes
from qsparse_export.generate import Generator, greedy
from qsparse_export.guided import choice_taps
from qsparse_export.nn.quantizers import absmax_int8
from qsparse_export.runtimes import get_runtime

TOKENS = 9
FLOAT = 4


def activity(bundle, native=True):
    told = []
    measured = measure_activity(
        bundle, bundle.path / "model.onnx", native=native, tokens=TOKENS, on_token=lambda: told.append(1)
    )
    assert len(told) == measured.tokens == TOKENS
    return measured


def chosen(bundle):
    """Tap to what its op chose for each generated token, [TOKENS, K]: masks made again by PyTorch's own definition."""
    taps = choice_taps(onnx_ir.load(bundle.path / "model.onnx"))
    names = tuple(dict.fromkeys(tap.value for tap in taps))
    session = get_runtime("ort").open(bundle.path, threads=1, native=True, taps=names)
    values = {name: [] for name in names}
    run = session.run

    def recording(feeds, results=None):
        outputs = run(feeds, results)
        for name in names:
            values[name].append(outputs[name].numpy().reshape(-1, outputs[name].numpy().shape[-1]))
        return outputs

    session.run = recording
    steps = Generator(session, bundle.decoder_shape()).steps([first_token(bundle.manifest["model"])])
    for count, (logits, choose) in enumerate(steps, 1):
        if count < TOKENS:
            choose(greedy(logits[-1]))
    return [(tap, tap.choice(np.concatenate(values[tap.value]))) for tap in taps]


def linears(bundle):
    return [row["name"] for row in bundle.manifest["sparsity"]]


@pytest.mark.parametrize("name", ["float", "unfused"])
def test_density_of_a_float_model_is_its_k_and_its_natural_zeros(bundles, name):
    bundle = bundles(name)
    density = activity(bundle).density
    assert list(density) == linears(bundle)
    masks = [masked for tap, masked in chosen(bundle) if tap.op == "TopKSparsify"]
    for layer in range(2):
        block = {name.rpartition(".")[2]: density[name] for name in density if f"layers.{layer}." in name}
        shares = [float((masked != 0).mean()) for masked in masks[4 * layer : 4 * layer + 4]]
        assert [block["q_proj"], block["o_proj"], block["gate_proj"], block["down_proj"]] == shares
        assert block["q_proj"] == block["k_proj"] == block["v_proj"] == 28 / 48  # int(0.6 * 48)
        assert block["gate_proj"] == block["up_proj"] == 28 / 48
        assert block["down_proj"] <= 25 / 130  # the squared ReLU may leave fewer than k


@pytest.mark.parametrize("name", ["bitnet", "bitnet-block", "bitnet-dense"])
def test_density_of_a_ternary_model_counts_what_int8_leaves(bundles, name):
    bundle = bundles(name)
    measured = activity(bundle)
    masked = [values for tap, values in chosen(bundle) if tap.op == "TernaryMatMul"]  # q k v o gate up down, per layer
    assert list(measured.density) == linears(bundle) and len(masked) == 14
    shares = [float((absmax_int8(torch.from_numpy(values))[0] != 0).float().mean()) for values in masked]
    assert list(measured.density.values()) == pytest.approx(shares, abs=1e-7)
    assert min(shares) < 0.6  # the squared ReLU's own zeros, or the mask


@pytest.mark.parametrize("name", ["bitnet", "bitnet-block", "bitnet-dense"])
def test_bytes_per_token_of_a_ternary_model(bundles, name):
    measured = activity(bundles(name))
    by_hand = FLOAT * (48 + 96 * 48 + 12 // 2)  # last norm, head (the tied embedding's row is one of its), rotary
    for layer in range(2):
        by_hand += FLOAT * (2 * 48 + 7)  # two norms, one scale per matrix
        for projection, width, rows in (
            ("self_attn.q_proj", 48, row_bytes(48) + 2 * row_bytes(24)),
            ("self_attn.o_proj", 48, row_bytes(48)),
            ("mlp.gate_proj", 48, 2 * row_bytes(130)),
            ("mlp.down_proj", 130, row_bytes(48)),
        ):
            by_hand += measured.density[f"model.layers.{layer}.{projection}"] * width * rows
    assert measured.bytes_per_token == pytest.approx(by_hand + shape_bytes(bundles(name)), rel=1e-9)


def test_bytes_per_token_of_a_float_model(bundles):
    """Rows of active channels where masks and matrices are one node; everything but the embedding table where not."""
    fixed = FLOAT * (48 + 48 + 96 * 48 + 12 // 2)  # embedding row, last norm, head, rotary frequencies
    fixed += 2 * FLOAT * 2 * 48  # two norms in each layer
    matrices = {"q_proj": 48 * (48 + 24 + 24), "o_proj": 48 * 48, "gate_proj": 48 * 2 * 130, "down_proj": 130 * 48}
    for name in ("unfused", "float-dense"):
        by_hand = fixed + 2 * FLOAT * sum(matrices.values())
        assert activity(bundles(name)).bytes_per_token == by_hand + shape_bytes(bundles(name))
    measured = activity(bundles("float"))
    by_hand = fixed + FLOAT * sum(
        share * matrices[linear.rpartition(".")[2]]
        for linear, share in measured.density.items()
        if linear.rpartition(".")[2] in matrices
    )
    assert measured.bytes_per_token == pytest.approx(by_hand + shape_bytes(bundles("float")), rel=1e-9)


def shape_bytes(bundle):
    """Bytes of the integers (shapes, axes) that the graph has as initialisers: a few, and not part of the count by hand."""
    initializers = onnx_ir.load(bundle.path / "model.onnx").graph.initializers.values()
    return sum(v.const_value.nbytes for v in initializers if v.dtype == onnx_ir.DataType.INT64)


@pytest.mark.parametrize("name", ["moe", "float-moe"])
def test_an_expert_that_no_token_reaches_is_not_read(bundles, name):
    bundle = bundles(name)
    measured = activity(bundle)
    assert set(measured.density) == set(linears(bundle))
    reads = weight_reads(onnx_ir.load(bundle.path / "model.onnx").graph)
    everything = sum(product.weight_bytes for product in reads.products) + reads.other_bytes
    experts = {p.linears: p.weight_bytes for p in reads.products if "mlp.experts." in p.linears[0]}
    # One of three experts per token: two thirds of their bytes at least are not read.
    assert measured.bytes_per_token <= everything - 2 / 3 * sum(experts.values()) + 1
    assert measured.bytes_per_token > reads.other_bytes


def test_function_bodies_have_the_same_density(bundles):
    bundle = bundles("bitnet")
    assert activity(bundle, native=False).density == pytest.approx(activity(bundle).density, abs=0.02)


def test_nothing_is_written_into_the_bundle(bundles):
    bundle = bundles("float")
    before = bundle.path.stat().st_mtime_ns
    activity(bundle)
    assert bundle.path.stat().st_mtime_ns == before


def test_quantised_products_and_a_tied_head(tmp_path):
    """Channel-major int4 is read by active channel, an output-major head whole, its embedding by row."""
    k, n, vocab, group = 32, 64, 32, 16  # as many outputs as inputs: shapes alone do not tell which is which
    domain = "ai.qsparse"
    constants = {
        "head.codes": (TensorProto.UINT8, [vocab, k // 2]),
        "head.scales": (TensorProto.FLOAT16, [vocab, k // group]),
        "block.up.codes": (TensorProto.INT4, [k, n]),
        "block.up.scales": (TensorProto.FLOAT16, [k // group, n]),
    }
    nbits = {"bits": 4, "group": group}
    nodes = [
        make_node("GatherNBits", ["ids", "head.codes", "head.scales"], ["x"], domain=domain, k=k, dtype=1, **nbits),
        make_node(
            "SparseMatMulNBits",
            ["x", "block.up.codes", "block.up.scales"],
            ["h"],
            domain=domain,
            **{"k": 8, "block": 0, "rescale": "none", "n": [n]} | nbits,
        ),
        make_node("Slice", ["h", "zero", "width", "last"], ["z"]),
        make_node("DenseMatMulNBits", ["z", "head.codes", "head.scales"], ["y"], domain=domain, n=vocab, k=k, **nbits),
    ]
    graph = make_graph(
        nodes,
        "g",
        [make_tensor_value_info("ids", TensorProto.INT64, [1, 1])],
        [make_tensor_value_info("y", TensorProto.FLOAT, [1, 1, vocab])],
        value_info=[make_tensor_value_info(name, TensorProto.FLOAT, [1, 1, k]) for name in ("x", "z")],
    )
    for name, (kind, shape) in constants.items():
        size = int(np.prod(shape)) * {TensorProto.UINT8: 8, TensorProto.FLOAT16: 16, TensorProto.INT4: 4}[kind] // 8
        graph.initializer.append(TensorProto(name=name, data_type=kind, dims=shape, raw_data=bytes(size)))
    model = onnx_ir.from_proto(make_model(graph))
    up, head = weight_reads(model.graph).products
    assert (up.linears, up.weight_bytes, up.skips, up.kept) == (("block.up",), k * n // 2, True, 8)
    assert (head.linears, head.weight_bytes, head.skips) == (("head",), vocab * (k // 2 + 2 * (k // group)), False)
    assert weight_reads(model.graph).other_bytes == 2 * n * (k // group)  # scales; the embedding's row is the head's
    x = np.ones((1, k), np.float32)
    x[0, 4:] = 0
    assert up.bytes_read(up.active(x)) == 4 * n // 2 and head.bytes_read(head.active(x)) == head.weight_bytes
    assert keep_all_channels(model) and not keep_all_channels(model)
    (opened,) = (node for node in model.graph if node.op_type == "SparseMatMulNBits")
    assert (opened.attributes["k"].as_int(), opened.attributes["block"].as_int()) == (k, 0)
    assert all("block" not in node.attributes for node in model.graph if node.op_type != "SparseMatMulNBits")


def test_names_of_fused_weights():
    assert linears_of("model.layers.0.mlp.down_proj.packed") == ("model.layers.0.mlp.down_proj",)
    assert linears_of("a.0.q_proj+k_proj+v_proj.packed") == ("a.0.q_proj", "a.0.k_proj", "a.0.v_proj")
    assert linears_of("a.0+1.gate.packed") == ("a.0.gate", "a.1.gate")
    assert linears_of("a.gate.packed+b.c.up.packed") == ("a.gate", "b.c.up")
