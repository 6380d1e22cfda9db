"""eliminate-identity where onnx-ir's own pass would lose a value: outputs of outputs, and of graphs inside others."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from qsparse_export.passes.clean_eliminate import EliminateIdentity


def after(text: str) -> ir.Model:
    model = ir.from_proto(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 23]> {text}'))
    EliminateIdentity()(model)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert not EliminateIdentity()(model).modified
    return model


def kinds(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph.all_nodes()]


def test_an_alias_is_gone():
    model = after("g (float[N] x) => (float[N] y) { a = Neg (x) b = Identity (a) y = Abs (b) }")
    assert kinds(model) == ["Neg", "Abs"]


def test_an_output_that_is_another_output_stays():
    model = after("g (float[N] x) => (float[N] y, float[N] z) { y = Neg (x) z = Identity (y) }")
    assert [value.name for value in model.graph.outputs] == ["y", "z"]
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    for array in session.run(None, {"x": np.ones(2, np.float32)}):
        assert array.tolist() == [-1, -1]


def test_a_branch_that_returns_a_value_of_the_graph_around_it_stays():
    model = after("""
      g (float[N] x, bool flag) => (float[N] y) {
        a = Neg (x)
        y = If (flag) <
          then_branch = same () => (float[N] same_a) { same_a = Identity (a) },
          else_branch = other () => (float[N] other_a) { other_a = Abs (a) }
        >
      }
    """)
    assert sorted(kinds(model)) == ["Abs", "Identity", "If", "Neg"]
