"""The ops between a layer's products: kernel, function body on ONNX Runtime and on ONNX's evaluator, against the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from graph_text import on_onnx
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from qsparse_export import ops
from qsparse_export.errors import UsageError
from qsparse_export.ops import add_rms_norm, cached_attention, gated_activation
from qsparse_export.runtimes.ort.library import library_path

OUTPUTS = {
    "CachedAttention": ("y", "present_key", "present_value"),
    "GatedActivation": ("y",),
    "AddRmsNorm": ("sum", "y"),
}
Runner = Callable[..., list[np.ndarray]]


def model_of(name: str, inputs: dict[str, np.ndarray], **attributes: Any) -> onnx.ModelProto:
    """The op with its body, every dimension symbolic that may differ."""
    ops.register()
    node = helper.make_node(name, list(inputs), list(OUTPUTS[name]), domain=ops.DOMAIN, **attributes)

    def info(label: str, array: np.ndarray) -> onnx.ValueInfoProto:
        fixed = {0} if array.ndim == 1 else {array.ndim - 1} - ({3} if label == "visible" else set())
        dims = [size if axis in fixed or size == 1 else f"{label}{axis}" for axis, size in enumerate(array.shape)]
        return helper.make_tensor_value_info(label, helper.np_dtype_to_tensor_dtype(array.dtype), dims)

    kind = next(iter(inputs.values())).dtype
    out_kind = np.dtype(np.float32) if name == "GatedActivation" else kind
    shaped = [helper.make_tensor_value_info(o, helper.np_dtype_to_tensor_dtype(out_kind), None) for o in OUTPUTS[name]]
    graph = helper.make_graph([node], "one_op", [info(label, a) for label, a in inputs.items()], shaped)
    opsets = [helper.make_opsetid("", ops.BODY_OPSET), helper.make_opsetid(ops.DOMAIN, ops.VERSION)]
    made = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    made = onnx.shape_inference.infer_shapes(made, strict_mode=True)
    made = ir.to_proto(ops.attach_functions(ir.from_proto(made)))
    onnx.checker.check_model(made, full_check=True)
    return made


def on_ort(model: onnx.ModelProto, inputs: dict[str, np.ndarray], native: bool) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 2
    if native:
        options.register_custom_ops_library(str(library_path()))
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


WAYS: dict[str, Runner] = {
    "native": lambda model, inputs: on_ort(model, inputs, True),
    "body": lambda model, inputs: on_ort(model, inputs, False),
    "onnx": on_onnx,
}


def attention_inputs(
    batch: int, tokens: int, past: int, room: int, heads: int, kv_heads: int, width: int, dtype: type, seed: int = 0
) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    total = past + tokens
    queries = np.arange(past, total)[:, None]
    visible = np.arange(total) <= queries
    visible = visible & (np.arange(total) >= rng.integers(0, past + 1, (batch, 1, 1, 1)))  # left padding
    angles = rng.uniform(0, 6, (batch, tokens, width // 2))
    cache = (batch, kv_heads, past + room, width)
    return {
        "qkv": rng.standard_normal((batch, tokens, (heads + 2 * kv_heads) * width)).astype(dtype),
        "cos": np.cos(angles).astype(dtype),
        "sin": np.sin(angles).astype(dtype),
        "visible": visible | (np.arange(total) == queries),
        "past_key": rng.standard_normal(cache).astype(dtype),
        "past_value": rng.standard_normal(cache).astype(dtype),
    }


@pytest.mark.parametrize("way", ["native", "body", "onnx"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(
    "sizes", [(1, 1, 0, 0, 2, 1, 8), (2, 3, 5, 0, 4, 2, 16), (1, 1, 40, 9, 6, 2, 6), (2, 4, 7, 2, 3, 3, 4)]
)
def test_attention_and_its_cache_are_the_reference(way, dtype, sizes):
    inputs = attention_inputs(*sizes, dtype)
    heads = {"heads": sizes[4], "kv_heads": sizes[5]}
    expected = cached_attention.reference(*inputs.values(), **heads)
    got = WAYS[way](model_of("CachedAttention", inputs, **heads), inputs)
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.shape == theirs.shape and mine.dtype == dtype
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=2e-6 if dtype == np.float32 else 4e-3)


def test_what_lies_behind_the_filled_part_is_not_read_and_stays():
    inputs = attention_inputs(1, 2, 5, 6, 2, 1, 8, np.float32)
    plain = cached_attention.reference(*inputs.values(), heads=2, kv_heads=1)
    model = model_of("CachedAttention", inputs, heads=2, kv_heads=1)
    for name in ("past_key", "past_value"):
        inputs[name][:, :, 7:] = np.nan  # the new tokens take 5 and 6
    for way in ("native", "body"):
        y, key, value = WAYS[way](model, inputs)
        np.testing.assert_allclose(y, plain[0], rtol=0, atol=2e-6)
        assert np.isnan(key[:, :, 7:]).all() and np.isnan(value[:, :, 7:]).all() and not np.isnan(key[:, :, :7]).any()


@pytest.mark.parametrize("native", [True, False])
def test_one_buffer_may_be_past_and_present(native):
    """Bound as input and output at once, on both ways to run: only the rows of the new tokens change."""
    inputs = attention_inputs(1, 2, 5, 6, 4, 2, 8, np.float32)
    expected = cached_attention.reference(*inputs.values(), heads=4, kv_heads=2)
    model = model_of("CachedAttention", inputs, heads=4, kv_heads=2)
    options = ort.SessionOptions()
    if native:
        options.register_custom_ops_library(str(library_path()))
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in inputs.items()}
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_output("y", "cpu")
    binding.bind_ortvalue_output("present_key", values["past_key"])
    binding.bind_ortvalue_output("present_value", values["past_value"])
    session.run_with_iobinding(binding)
    got = [binding.get_outputs()[0].numpy(), values["past_key"].numpy(), values["past_value"].numpy()]
    for mine, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=2e-6)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 6), st.integers(0, 20), st.integers(0, 5), st.integers(1, 3), st.integers(1, 3)
)
def test_property_attention_is_the_reference(batch, tokens, past, room, group, kv_heads):
    inputs = attention_inputs(batch, tokens, past, room, group * kv_heads, kv_heads, 4, np.float32)
    heads = {"heads": group * kv_heads, "kv_heads": kv_heads}
    expected = cached_attention.reference(*inputs.values(), **heads)
    for way in ("native", "body"):
        for mine, theirs in zip(WAYS[way](model_of("CachedAttention", inputs, **heads), inputs), expected, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=0, atol=2e-6)


def test_a_query_that_sees_nothing_is_nan():
    inputs = attention_inputs(1, 2, 3, 0, 2, 1, 8, np.float32)
    inputs["visible"][0, 0, 1] = False
    y = WAYS["native"](model_of("CachedAttention", inputs, heads=2, kv_heads=1), inputs)[0]
    assert np.isnan(y[0, 1]).all() and np.isfinite(y[0, 0]).all()
    assert np.isnan(cached_attention.reference(*inputs.values(), heads=2, kv_heads=1)[0][0, 1]).all()


@pytest.mark.parametrize("way", ["native", "body", "onnx"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("activation", ["relu2", "silu"])
def test_the_gated_activation_is_the_reference(way, dtype, activation):
    x = (np.random.default_rng(1).standard_normal((2, 3, 2 * 37)) * 20).astype(dtype)
    (got,) = WAYS[way](model_of("GatedActivation", {"x": x}, activation=activation), {"x": x})
    expected = gated_activation.reference(x, activation)
    assert got.dtype == np.float32 and got.shape == (2, 3, 37)
    if activation == "relu2":
        np.testing.assert_array_equal(got, expected)
    else:
        np.testing.assert_allclose(got, expected, rtol=2e-6, atol=1e-30)


@pytest.mark.parametrize("way", ["native", "body"])
def test_a_squared_gate_beyond_float16_stays_finite(way):
    """300^2 * 2 is 180000, and float16 ends at 65504: computed there, the product would be infinite."""
    x = np.array([[300.0, -300.0, 2.0, 2.0]], np.float16)
    with np.errstate(over="ignore"):
        assert np.isinf(np.float16(300) * np.float16(300))
    (got,) = WAYS[way](model_of("GatedActivation", {"x": x}, activation="relu2"), {"x": x})
    np.testing.assert_array_equal(got, [[180000.0, 0.0]])


@pytest.mark.parametrize("way", ["native", "body", "onnx"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_sum_and_norm_are_the_reference(way, dtype):
    rng = np.random.default_rng(2)
    inputs = {name: rng.standard_normal((2, 3, 50)).astype(dtype) for name in ("x", "residual")}
    inputs["weight"] = rng.standard_normal(50).astype(dtype)
    epsilon = float(np.float32(1e-5))
    total, y = WAYS[way](model_of("AddRmsNorm", inputs, epsilon=epsilon), inputs)
    expected_total, expected = add_rms_norm.reference(*inputs.values(), epsilon=epsilon)
    np.testing.assert_array_equal(total, expected_total)
    np.testing.assert_allclose(y, expected, rtol=2e-6 if dtype == np.float32 else 2e-3, atol=1e-6)


def test_schemas_infer_shapes_through_the_graph():
    inputs = attention_inputs(2, 3, 5, 0, 4, 2, 8, np.float32)
    model = model_of("CachedAttention", inputs, heads=4, kv_heads=2)
    shapes = [
        [dim.dim_param or dim.dim_value for dim in output.type.tensor_type.shape.dim] for output in model.graph.output
    ]
    assert shapes[0] == ["qkv0", "qkv1", 32]
    assert [dim if axis != 2 else None for axis, dim in enumerate(shapes[1])] == ["past_key0", "past_key1", None, 8]
    x = np.zeros((2, 3, 14), np.float16)
    (output,) = model_of("GatedActivation", {"x": x}, activation="silu").graph.output
    assert [d.dim_param or d.dim_value for d in output.type.tensor_type.shape.dim] == ["x0", "x1", 7]
    assert output.type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def test_wrong_operands_are_refused_by_reference_and_kernel():
    inputs = attention_inputs(1, 2, 3, 0, 2, 1, 8, np.float32)
    model = model_of("CachedAttention", inputs, heads=2, kv_heads=1)
    short = inputs | {"past_key": inputs["past_key"][:, :, :2]}
    with pytest.raises(UsageError, match="past_value is"):
        cached_attention.reference(*short.values(), heads=2, kv_heads=1)
    with pytest.raises(Exception, match=r"past_key is .* expected room for 3 past tokens"):
        on_ort(model, short, True)
    blind = inputs | {"visible": inputs["visible"][..., :1]}
    with pytest.raises(Exception, match="visible is"):
        on_ort(model, blind, True)
    with pytest.raises(UsageError, match="gelu"):
        gated_activation.reference(np.zeros((1, 4)), "gelu")
    with pytest.raises(Exception, match='activation is "gelu"'):
        on_ort(model_of("GatedActivation", {"x": np.zeros((1, 4), np.float32)}, activation="gelu"), {}, True)
    with pytest.raises(UsageError, match=r"expected \[..., N\] twice"):
        add_rms_norm.reference(np.zeros((1, 4)), np.zeros((1, 1)), np.zeros(4), 1e-5)


def test_no_torch_op_and_no_translation():
    for name in OUTPUTS:
        assert ops.op(name).torch_op is None and ops.op(name).translate is None
