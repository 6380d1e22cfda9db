"""The dense mode: nothing is left that selects, and the result is that of an export without sparsity."""

import dataclasses

import numpy as np
import onnx
import onnx_ir
import pytest

from qsparse_export.bench.dense_graph import keep_all_channels, write_dense_graph
from qsparse_export.generate import Generator
from qsparse_export.runtimes import get_runtime

IDS = [3, 1, 4, 1, 5, 9, 2, 6]
PAIRS = {
    "float": "float-dense",
    "unfused": "float-dense",
    "bitnet": "bitnet-dense",
    "bitnet-block": "bitnet-block-dense",
}


def logits(bundle, graph=None, native=True, runtime="ort"):
    session = get_runtime(runtime).open(bundle.path, threads=1, native=native, graph=graph)
    return Generator(session, bundle.decoder_shape()).logits(IDS)


def selections(graph):
    """(op, k, block) of the nodes that have a k."""
    attributes = [
        (node.op_type, {a.name: a for a in node.attribute}) for node in onnx.load(graph, None, False).graph.node
    ]
    return [(op, named["k"].i, named["block"].i) for op, named in attributes if "k" in named]


@pytest.mark.parametrize("native", [True, False], ids=["native", "bodies"])
@pytest.mark.parametrize("name", PAIRS)
def test_logits_are_those_of_a_dense_export(bundles, tmp_path, name, native):
    sparse, dense = bundles(name), bundles(PAIRS[name])
    write_dense_graph(sparse.path / "model.onnx", tmp_path / "dense.onnx")
    ours = logits(sparse, tmp_path / "dense.onnx", native)
    theirs = logits(dense, native=native)
    if name in ("float", "unfused"):  # a node that skips adds up in another order than ONNX Runtime's product
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
    else:
        np.testing.assert_array_equal(ours, theirs)
    assert np.abs(ours - logits(sparse, native=native)).max() > 1e-3


def test_the_reference_runtime_runs_it_too(bundles, tmp_path):
    sparse = bundles("bitnet")
    write_dense_graph(sparse.path / "model.onnx", tmp_path / "dense.onnx")
    ours = logits(sparse, tmp_path / "dense.onnx", runtime="reference")
    np.testing.assert_allclose(ours, logits(bundles("bitnet-dense"), runtime="reference"), rtol=0, atol=0)


def test_without_fusion_no_selection_is_left(bundles, tmp_path):
    write_dense_graph(bundles("unfused").path / "model.onnx", tmp_path / "dense.onnx")
    ours = onnx.load(tmp_path / "dense.onnx", load_external_data=False).graph
    assert "TopKSparsify" not in {node.op_type for node in ours.node}
    assert selections(bundles("unfused").path / "model.onnx") and not selections(tmp_path / "dense.onnx")


@pytest.mark.parametrize("name", ["float", "bitnet", "bitnet-block"])
def test_every_mask_of_a_fused_op_is_open(bundles, tmp_path, name):
    write_dense_graph(bundles(name).path / "model.onnx", tmp_path / "dense.onnx")
    before, after = selections(bundles(name).path / "model.onnx"), selections(tmp_path / "dense.onnx")
    assert len(before) == len(after) >= 6
    assert any(k < 48 for _, k, _ in before)
    assert {(k, block) for _, k, block in after} <= {(48, 0), (130, 0)}


def test_a_second_time_changes_nothing(bundles):
    model = onnx_ir.load(bundles("bitnet").path / "model.onnx")
    assert keep_all_channels(model)
    assert not keep_all_channels(model)


def test_weights_stay_where_they_are(bundles, tmp_path):
    write_dense_graph(bundles("float").path / "model.onnx", tmp_path / "dense.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["dense.onnx"]
    assert (tmp_path / "dense.onnx").stat().st_size < 200_000


def test_configs_differ_in_sparsity_alone(bundles):
    for name, other in PAIRS.items():
        a, b = (dict(bundles(n).manifest["model"], sparsity=None) for n in (name, other))
        assert a == b and dataclasses.is_dataclass(bundles(name))
