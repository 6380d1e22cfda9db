"""The cut of a graph into what positions and masks need, and the rest."""

import numpy as np
import onnx
import onnxruntime
from onnx import parser

from qsparse_export.runtimes.tvm.prologue import cut

DECODER = """
<ir_version: 10, opset_import: ["" : 23, "ai.qsparse" : 1]>
decoder (int64[batch, sequence] ids, int64[batch, total] mask, float[batch, past, 4] cache)
  => (float[batch, sequence, 4] y, float[batch, sequence] extra)
  <float[10, 4] embedding = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26,
     27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39},
   int64[1] last = {2}, float[2] frequencies = {1.0, 0.5},
   bool[batch, total] seen, float[batch, total] weight, float[batch, total, 2] angles, float[batch, sequence, 4] x,
   int64[2] shape, float[batch, sequence, 4] y0, int64[3] full>
{
  seen = Cast <to = 9> (mask)
  weight = Cast <to = 1> (mask)
  column = Unsqueeze (weight, last)
  angles = Mul (column, frequencies)
  x = ai.qsparse.Lookup (embedding, ids)
  full = Shape (ids)
  y0 = ai.qsparse.Use (x, seen, angles, cache)
  y = ai.qsparse.Reshape2 (y0, full)
  extra = Cast <to = 1> (ids)
}
"""


def decoder() -> onnx.ModelProto:
    return parser.parse_model(DECODER)


def test_floats_and_masks_are_cut_and_integers_stay(tmp_path):
    parts = cut(decoder(), str(tmp_path))
    assert set(parts.made) == {"seen", "angles"}
    assert parts.taken == ("mask",)
    assert [node.op_type for node in parts.rest.graph.node] == ["Lookup", "Shape", "Use", "Reshape2", "Cast"]
    assert [value.name for value in parts.rest.graph.input] == ["ids", "cache", *parts.made]
    assert [tensor.name for tensor in parts.rest.graph.initializer] == ["embedding"]
    assert [node.op_type for node in parts.prologue.graph.node] == ["Cast", "Cast", "Unsqueeze", "Mul"]


def test_the_prologue_computes_what_the_graph_did(tmp_path):
    parts = cut(decoder(), str(tmp_path))
    session = onnxruntime.InferenceSession(parts.prologue.SerializeToString(), providers=["CPUExecutionProvider"])
    mask = np.array([[1, 0, 1]])
    made = dict(zip(parts.made, session.run(None, {"mask": mask}), strict=True))
    np.testing.assert_array_equal(made["seen"], mask.astype(bool))
    np.testing.assert_array_equal(made["angles"], mask[..., None] * np.array([1, 0.5], np.float32))


def test_a_sum_of_lengths_becomes_a_length_of_its_own(tmp_path):
    """A cache with room is longer than "past", so a mask of "past + sequence" is not tied to it."""
    model = decoder()
    seen = next(value for value in model.graph.value_info if value.name == "seen")
    seen.type.tensor_type.shape.dim[1].dim_param = "past + sequence"
    parts = cut(model, str(tmp_path))
    dims = next(value for value in parts.rest.graph.input if value.name == "seen").type.tensor_type.shape.dim
    assert [dim.dim_param for dim in dims] == ["batch", "seen_1"]


def test_a_graph_of_floats_alone_is_left_whole(tmp_path):
    model = parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 23]> g (float[n, 4] x) => (float[n, 4] y) { a = Abs (x) y = Neg (a) }'
    )
    parts = cut(model, str(tmp_path))
    assert parts.made == () and parts.taken == ()
    assert [node.op_type for node in parts.rest.graph.node] == ["Abs", "Neg"]
