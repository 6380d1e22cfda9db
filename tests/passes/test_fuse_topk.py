"""fuse-topk: every spelling through both exporters, ties included; what it leaves alone and why; twice is once."""

import json

import foreign_models
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from foreign_models import KEPT, SPELLINGS, WIDTH, Masked, QSparseMLP, export

from qsparse_export.passes.base import parse_pipeline, run_pipeline
from qsparse_export.passes.fuse_topk import FuseTopK, explain
from qsparse_export.passes.lower_attach_bodies import AttachBodies
from qsparse_export.passes.original_choices import ORIGINAL

IMPORT = "inline-functions,convert-opset,infer-shapes,eliminate-identity,fold-constants,infer-shapes"
# torch's TorchScript exporter has no scatter of a bool.
TORCHSCRIPT = sorted(set(SPELLINGS) - {"where", "filled"})


def imported(proto: onnx.ModelProto) -> ir.Model:
    model = ir.from_proto(proto)
    run_pipeline(model, parse_pipeline(IMPORT))
    return model


def run(proto: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def rows(dtype=np.float32) -> np.ndarray:
    """Rows with many ties, of both signs, an all-zero row among them."""
    x = np.random.default_rng(0).integers(-6, 7, (2, 3, WIDTH)).astype(dtype)
    x[1, 2] = 0
    return x


def fused(proto: onnx.ModelProto) -> ir.Model:
    model = imported(proto)
    assert FuseTopK()(model).modified
    return model


def masks(model: ir.Model) -> list[dict]:
    return [
        {name: attribute.value for name, attribute in node.attributes.items()}
        for node in model.graph
        if node.op_type == "TopKSparsify"
    ]


def same_results(proto: onnx.ModelProto, model: ir.Model, x: np.ndarray) -> None:
    AttachBodies()(model)
    made = ir.to_proto(model)
    onnx.checker.check_model(made, full_check=True)
    np.testing.assert_array_equal(run(made, x), run(proto, x))


def check(proto: onnx.ModelProto, dtype=np.float32) -> ir.Model:
    model = fused(proto)
    assert masks(model) == [{"k": KEPT, "block": 0, "rescale": "none"}]
    assert not {"TopK", "ScatterElements", "Where", "Sub"} & {node.op_type for node in model.graph}
    assert explain(model.graph) == {}
    same_results(proto, model, rows(dtype))
    return model


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_of_the_dynamo_exporter(name):
    model = check(export(Masked(SPELLINGS[name])))
    assert [node.op_type for node in model.graph] == ["Mul", "TopKSparsify", "MatMul"]


@pytest.mark.parametrize("name", TORCHSCRIPT)
def test_spellings_of_the_torchscript_exporter(name):
    check(export(Masked(SPELLINGS[name]), opset=17, dynamo=False))


@pytest.mark.parametrize("opset", [18, 20, 21, 22, 24, 25])
def test_opsets_of_the_dynamo_exporter(opset):
    model = check(export(Masked(foreign_models.official), opset=opset))
    assert model.opset_imports[""] == 23


@pytest.mark.parametrize("opset", [18, 19, 20])
def test_opsets_of_the_torchscript_exporter(opset):
    check(export(Masked(foreign_models.official), opset=opset, dynamo=False))


@pytest.mark.parametrize("name", ["official", "in_float32", "one_hot", "values"])
def test_half_precision_loses_its_casts(name):
    model = check(export(Masked(SPELLINGS[name], torch.float16), dtype=torch.float16), np.float16)
    assert [node.op_type for node in model.graph] == ["Mul", "TopKSparsify", "MatMul"]


def test_blocks_become_an_attribute():
    for proto in (export(Masked(foreign_models.blocks)), export(Masked(foreign_models.blocks), 18, dynamo=False)):
        model = fused(proto)
        assert masks(model) == [{"k": 16, "block": 32, "rescale": "none"}]
        same_results(proto, model, rows())


def test_normalize_becomes_the_rescale():
    proto = export(Masked(foreign_models.normalised))
    model = fused(proto)
    assert masks(model) == [{"k": KEPT, "block": 0, "rescale": "l2"}]
    AttachBodies()(model)
    x = rows()
    # Norm and quotient round once each in either, the norm over 38 squares in another order.
    np.testing.assert_allclose(run(ir.to_proto(model), x), run(proto, x), rtol=0, atol=64 * 2.0**-24)


def test_another_floor_than_ours_is_not_the_rescale():
    def other(x):
        y = foreign_models.ones(x)
        return y / (y.norm(dim=-1, keepdim=True) + 1e-6)

    proto = export(Masked(other))
    model = fused(proto)
    assert masks(model) == [{"k": KEPT, "block": 0, "rescale": "none"}]
    assert "ReduceL2" in {node.op_type for node in model.graph}
    same_results(proto, model, rows())


@pytest.mark.parametrize("k", [0, 1, WIDTH])
def test_extreme_k(k):
    def mask(x):
        return x * torch.zeros_like(x).scatter(-1, x.abs().topk(k, dim=-1).indices, 1.0)

    proto = export(Masked(mask))
    model = fused(proto)
    assert [attributes["k"] for attributes in masks(model)] == [k]
    same_results(proto, model, rows())


def test_k_computed_from_a_static_dimension_in_the_graph():
    text = f"""
      <ir_version: 9, opset_import: ["" : 18]>
      g (float[B, S, {WIDTH}] x) => (float[B, S, {WIDTH}] y) {{
        two = Constant <value_int = 2> ()
        ratio = Constant <value_float = 0.6> ()
        flat = Constant <value_ints = [1]> ()
        shape = Shape (x)
        dim = Gather (shape, two)
        dim_float = Cast <to = 1> (dim)
        share = Mul (dim_float, ratio)
        count = Cast <to = 7> (share)
        k = Reshape (count, flat)
        magnitude = Abs (x)
        values, indices = TopK (magnitude, k)
        zeros = ConstantOfShape (shape)
        picked = GatherElements <axis = -1> (x, indices)
        y = ScatterElements <axis = -1> (zeros, indices, picked)
      }}
    """
    proto = onnx.parser.parse_model(text)
    model = fused(proto)
    assert [attributes["k"] for attributes in masks(model)] == [KEPT]
    same_results(proto, model, rows())


def test_the_whole_official_model_and_what_is_noted_for_verification():
    proto = export(QSparseMLP())
    model = fused(proto)
    assert [attributes["k"] for attributes in masks(model)] == [38, 120, 38, 120]
    same_results(proto, model, np.random.default_rng(1).normal(size=(2, 3, WIDTH)).astype(np.float32))
    named = {name for node in proto.graph.node for name in node.output} | {value.name for value in proto.graph.input}
    for node in model.graph:
        if node.op_type == "TopKSparsify":
            (choice,) = json.loads(node.metadata_props[ORIGINAL])
            assert {choice["x"], choice["kept"], *choice["masked"]} <= named


def test_twice_changes_nothing():
    model = fused(export(Masked(foreign_models.official)))
    before = ir.to_proto(model).SerializeToString()
    assert not FuseTopK()(model).modified
    assert ir.to_proto(model).SerializeToString() == before


def drop_smallest(x):
    return x.scatter(-1, x.abs().topk(WIDTH - KEPT, dim=-1, largest=False).indices, 0.0)


def drop_largest(x):
    return x.scatter(-1, x.abs().topk(KEPT, dim=-1).indices, 0.0)


def threshold(x):
    kth = x.abs().topk(KEPT, dim=-1).values[..., -1:]
    return torch.where(x.abs() >= kth, x, 0.0)


def signed(x):
    return x * torch.zeros_like(x).scatter(-1, x.topk(KEPT, dim=-1).indices, 1.0)


def squares(x):
    return x * torch.zeros_like(x).scatter(-1, (x * x).topk(KEPT, dim=-1).indices, 1.0)


def of_another(x):
    return (x + 1) * torch.zeros_like(x).scatter(-1, x.abs().topk(KEPT, dim=-1).indices, 1.0)


def other_axis(x):
    return x * torch.zeros_like(x).scatter(-2, x.abs().topk(1, dim=-2).indices, 1.0)


def added(x):
    return x * torch.zeros_like(x).scatter_add(-1, indices_of(x), torch.ones_like(indices_of(x), dtype=x.dtype))


def indices_of(x):
    return x.abs().topk(KEPT, dim=-1).indices


UNLIKE = {
    drop_smallest: "it selects the smallest to drop them",
    drop_largest: "it drops the largest magnitudes",
    threshold: "keeps every tie: a threshold",
    signed: "it ranks the result of Mul, not the magnitude",
    squares: "it ranks the result of Mul, not the magnitude",
    of_another: "another value than the one whose magnitudes were ranked",
    other_axis: "along another axis than the last",
    added: "the scatter adds up",
}


@pytest.mark.parametrize("function", UNLIKE, ids=lambda function: function.__name__)
def test_what_is_not_top_k_stays_and_says_why(function):
    model = imported(export(Masked(function)))
    before = ir.to_proto(model).SerializeToString()
    assert not FuseTopK()(model).modified
    assert ir.to_proto(model).SerializeToString() == before
    (reason,) = explain(model.graph).values()
    assert UNLIKE[function] in reason


def test_k_from_an_input_stays_and_says_why():
    text = f"""
      <ir_version: 9, opset_import: ["" : 23]>
      g (float[B, {WIDTH}] x, int64[1] k) => (float[B, {WIDTH}] y) {{
        magnitude = Abs (x)
        values, indices = TopK (magnitude, k)
        shape = Shape (x)
        zeros = ConstantOfShape (shape)
        picked = GatherElements <axis = -1> (x, indices)
        y = ScatterElements <axis = -1> (zeros, indices, picked)
      }}
    """
    model = imported(onnx.parser.parse_model(text))
    assert not FuseTopK()(model).modified
    assert list(explain(model.graph).values()) == ["k is computed when the model runs; expected a constant"]


def test_a_mask_of_another_shape_stays():
    """Scattered into more rows than were ranked: broadcasting would hide it."""
    text = f"""
      <ir_version: 9, opset_import: ["" : 23]>
      g (float[1, {WIDTH}] x, float[B, {WIDTH}] like) => (float[B, {WIDTH}] y) {{
        k = Constant <value_ints = [{KEPT}]> ()
        one = Constant <value_float = 1.0> ()
        magnitude = Abs (x)
        values, indices = TopK (magnitude, k)
        shape = Shape (like)
        zeros = ConstantOfShape (shape)
        index_shape = Shape (indices)
        ones = Expand (one, index_shape)
        mask = ScatterElements <axis = -1> (zeros, indices, ones)
        y = Mul (x, mask)
      }}
    """
    model = imported(onnx.parser.parse_model(text))
    assert not FuseTopK()(model).modified
    assert "not known to have the shape" in next(iter(explain(model.graph).values()))


def test_masks_inside_a_branch_are_fused_too():
    text = f"""
      <ir_version: 9, opset_import: ["" : 23]>
      g (float[B, {WIDTH}] x, bool sparse) => (float[B, {WIDTH}] y) {{
        y = If (sparse) <
          then_branch = kept () => (float[B, {WIDTH}] masked) {{
            k = Constant <value_ints = [{KEPT}]> ()
            magnitude = Abs (x)
            values, indices = TopK (magnitude, k)
            shape = Shape (x)
            zeros = ConstantOfShape (shape)
            picked = GatherElements <axis = -1> (x, indices)
            masked = ScatterElements <axis = -1> (zeros, indices, picked)
          }},
          else_branch = all () => (float[B, {WIDTH}] same) {{ same = Identity (x) }}
        >
      }}
    """
    model = fused(onnx.parser.parse_model(text))
    assert [node.op_type for node in model.graph.all_nodes()].count("TopKSparsify") == 1
