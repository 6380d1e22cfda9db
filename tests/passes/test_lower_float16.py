"""float16: what it narrows and what not, that twice is once, that no weight is read, and that squares do not overflow."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graph_text import graph_of, kinds, on_onnx, run, spelled

from qsparse_export.errors import ExportError
from qsparse_export.formats.ternary import pack
from qsparse_export.passes.lower_attach_bodies import AttachBodies
from qsparse_export.passes.lower_float16 import Float16

RNG = np.random.default_rng(0)
DOWN = {"w": RNG.standard_normal((6, 4)).astype(np.float32)}
RELU2 = "r = Relu (gate) p = Mul (r, r) h = Mul (p, up)"
GATED = "(float[M, 6] gate, float[M, 6] up) => (float[M, 4] y)"


def gated(product: str, initializers: dict[str, np.ndarray] | None = None) -> ir.Model:
    return graph_of(GATED, f"{RELU2} {product}", DOWN if initializers is None else initializers)


def with_bodies(graph: ir.Model) -> onnx.ModelProto:
    AttachBodies()(graph)
    return ir.to_proto(graph)


def halves(**arrays: np.ndarray) -> dict[str, np.ndarray]:
    return {name: array.astype(np.float16) for name, array in arrays.items()}


def test_inputs_weights_and_outputs_are_narrow_and_the_numbers_are_near():
    text = "h = MatMul (x, w) s = Sigmoid (h) y = Mul (h, s)"
    signature, weight = "(float[M, 6] x) => (float[M, 4] y)", DOWN
    x = RNG.standard_normal((3, 6)).astype(np.float32)
    (expected,) = run(graph_of(signature, text, weight), {"x": x}, False)
    graph = graph_of(signature, text, weight)
    assert Float16()(graph).modified
    values = [*graph.graph.inputs, *graph.graph.outputs, *graph.graph.initializers.values()]
    assert {value.dtype for value in values} == {ir.DataType.FLOAT16} and "Cast" not in kinds(graph)
    (got,) = run(graph, halves(x=x), False)
    assert got.dtype == np.float16
    np.testing.assert_allclose(got, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    "product",
    [
        "y = MatMul (h, w)",
        'm = ai.qsparse.TopKSparsify <k = 4, block = 0, rescale = "none"> (h) y = MatMul (m, w)',
        "two = Constant <value = float {2.0}> () q = Pow (r, two) g = Mul (q, up) y = MatMul (g, w)",
    ],
)
def test_gates_of_some_hundred_overflow_without_the_guard_and_not_with_it(product):
    """600^2 * 3 is 1,080,000: float16 ends at 65,504, and the product of the row's scale comes back in float32."""
    gate = np.array([[600, 2, -5, 0, 30, 1], [0.01, -1, 0.5, 0.25, 0.1, 2]], np.float32)
    up = np.array([[3, 1, 1, 1, -2, 5], [1, 1, -2, 3, 0.5, -1]], np.float32)
    small = {"w": DOWN["w"] / 1000}
    (expected,) = run(gated(product, small), {"gate": gate, "up": up}, False)
    naive = gated(product, small)
    for value in (*naive.graph.inputs, *naive.graph.outputs, *naive.graph.initializers.values()):
        value.type = ir.TensorType(ir.DataType.FLOAT16)
        if value.const_value is not None:
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float16), name=value.name)
    for node in naive.graph:
        if node.op_type == "Constant":
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(np.float16(2)))
        for output in node.outputs:
            output.type = ir.TensorType(ir.DataType.FLOAT16)
    # On ONNX's evaluator: ONNX Runtime's CPU would compute it in float32, a GPU would not.
    (overflown,) = on_onnx(with_bodies(naive), halves(gate=gate, up=up))
    assert not np.isfinite(overflown).all(), "the overflow that is guarded against"
    graph = gated(product, small)
    assert Float16()(graph).modified
    for got in (
        run(graph, halves(gate=gate, up=up), False)[0],
        on_onnx(with_bodies(graph), halves(gate=gate, up=up))[0],
    ):
        np.testing.assert_allclose(got.astype(np.float32), expected, rtol=1e-2, atol=1e-2)


def test_a_ternary_product_gets_the_rows_scale_back_and_keeps_its_own_scale_in_float32():
    weights = {"w": pack(RNG.integers(-1, 2, (4, 6)).astype(np.int8)), "s": np.array([0.001], np.float32)}
    product = "y = ai.qsparse.TernaryMatMul <n = 4> (h, w, s)"
    gate, up = (np.abs(RNG.standard_normal((2, 6))).astype(np.float32) * 400 for _ in range(2))
    (expected,) = run(gated(product, weights), {"gate": gate, "up": up / 100}, True)
    graph = gated(product, weights)
    Float16()(graph)
    assert graph.graph.initializers["s"].dtype == ir.DataType.FLOAT
    (got,) = run(graph, halves(gate=gate, up=up / 100), True)
    # Each activation of 127 steps may round the other way.
    np.testing.assert_allclose(got.astype(np.float32), expected, rtol=2e-2, atol=2 * 0.001 / 127 * 400**2 * 12)


def test_behind_l2_rescaling_the_scale_is_gone_already():
    product = 'm = ai.qsparse.TopKSparsify <k = 4, block = 0, rescale = "l2"> (h) y = MatMul (m, w)'
    gate, up = (RNG.standard_normal((2, 6)).astype(np.float32) * 300 for _ in range(2))
    (expected,) = run(gated(product), {"gate": gate, "up": up}, False)
    graph = gated(product)
    Float16()(graph)
    (got,) = run(graph, halves(gate=gate, up=up), False)
    np.testing.assert_allclose(got.astype(np.float32), expected, rtol=2e-2, atol=2e-2)


def test_a_norm_reads_the_product_in_float32():
    product = "n = RMSNormalization <axis = -1> (h, g) y = MatMul (n, w)"
    initializers = DOWN | {"g": np.ones(6, np.float32)}
    gate, up = (RNG.standard_normal((2, 6)).astype(np.float32) * 300 for _ in range(2))
    (expected,) = run(gated(product, initializers), {"gate": gate, "up": up}, False)
    graph = gated(product, initializers)
    Float16()(graph)
    assert "Div" not in kinds(graph) and graph.graph.initializers["g"].dtype == ir.DataType.FLOAT
    (got,) = run(graph, halves(gate=gate, up=up), False)
    np.testing.assert_allclose(got.astype(np.float32), expected, rtol=2e-2, atol=2e-2)


def test_angles_of_far_positions_stay_float32():
    """float16 holds no odd number above 2048: the cosine of position 8191 would be that of another."""
    text = "p = Cast <to = 1> (position) a = Mul (p, f) c = Cos (a) y = Mul (c, x)"
    frequencies = np.array([1, 0.1, 0.01, 0.001], np.float32)
    graph = graph_of("(int64[M, 1] position, float[M, 4] x) => (float[M, 4] y)", text, {"f": frequencies})
    assert Float16()(graph).modified
    position, x = np.array([[8191], [3]]), np.ones((2, 4), np.float16)
    (got,) = run(graph, {"position": position, "x": x}, False)
    np.testing.assert_allclose(got, np.cos(position * frequencies), atol=2e-3)


def test_a_product_through_which_no_scale_can_be_carried_is_refused():
    with pytest.raises(ExportError, match="is read by Sigmoid; expected a norm, a top-k mask or a matrix product"):
        Float16()(graph_of("(float[M, 6] gate, float[M, 6] up) => (float[M, 6] y)", f"{RELU2} y = Sigmoid (h)"))
    with pytest.raises(ExportError, match="has 2 readers"):
        two = "y = MatMul (h, w) z = MatMul (h, w)"
        Float16()(graph_of(GATED.replace("4] y", "4] y, float[M, 4] z"), f"{RELU2} {two}", DOWN))


def test_twice_changes_nothing_no_weight_is_read_and_integers_are_left_alone():
    graph = gated("y = MatMul (h, w)")

    def read() -> ir.TensorProtocol:
        raise AssertionError("a weight was read")

    weight = graph.graph.initializers["w"]
    weight.const_value = ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=ir.Shape([6, 4]), name="w")
    assert Float16()(graph).modified and weight.const_value.dtype == ir.DataType.FLOAT16
    weight.const_value = ir.tensor(np.zeros((6, 4), np.float16), name="w")
    before = spelled(graph)
    assert not Float16()(graph).modified and spelled(graph) == before
    integers = graph_of("(int64[M] x) => (int64[M] y)", "y = Neg (x)")
    before = spelled(integers)
    assert not Float16()(integers).modified and spelled(integers) == before
