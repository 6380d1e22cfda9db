"""fuse-ternary: transformers' three storages and others' spellings; the bound on what differs; what it leaves alone and why."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from foreign_bitnet import INPUTS, KINDS, OUTPUTS, BitLinears, StraightThroughLinear, linear
from foreign_models import export, indices
from torch import nn

from qsparse_export.formats.ternary import unpack
from qsparse_export.ops import ternary_matmul
from qsparse_export.passes.base import parse_pipeline, run_pipeline
from qsparse_export.passes.fuse_ternary import FuseTernary, explain
from qsparse_export.passes.fuse_ternary_weights import ternary_of
from qsparse_export.passes.lower_attach_bodies import AttachBodies

IMPORT = "inline-functions,convert-opset,infer-shapes,annotate-scope,eliminate-identity,fold-constants,infer-shapes,fuse-topk"
UNIT = 2.0**-24  # of rounding in float32


def imported(proto: onnx.ModelProto) -> ir.Model:
    model = ir.from_proto(proto)
    run_pipeline(model, parse_pipeline(IMPORT))
    return model


def kinds(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def run(proto: onnx.ModelProto, x: np.ndarray, *names: str) -> list[np.ndarray]:
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(copy.SerializeToString(), options)
    return session.run(None, {session.get_inputs()[0].name: x})


def fused(proto: onnx.ModelProto) -> ir.Model:
    model = imported(proto)
    assert FuseTernary()(model).modified
    assert not {"Round", "MatMul", "ReduceMax", "BitwiseAnd", "ScatterND"} & set(kinds(model))
    assert explain(model.graph) == {}
    return model


def activations() -> np.ndarray:
    x = np.random.default_rng(3).normal(size=(2, 3, INPUTS)).astype(np.float32)
    x[0, 1] = 0
    x[1, 0] *= 1e-7  # below the floor of gamma
    return x


class One(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x * 2.0)


def within_bound(proto: onnx.ModelProto, x: np.ndarray, kind: str, weights: np.ndarray, alpha: float) -> None:
    """|y - y'| for one linear: a unit for each integer that the factor's last bit moved, and a few roundings.

    The original scales by fl(fl(1/gamma) * 127) or so, ours by fl(127 / gamma); times x, both are within 3 units in the last
    place of the same real number, so only a value that is 127 * 3 units from a half can round otherwise.
    """
    ((expected,), (got,)) = run(proto, x), run(ir.to_proto(fused_with_bodies(proto)), x)
    h = x * np.float32(2)
    gamma = np.maximum(np.abs(h).max(-1, keepdims=True), np.float32(1e-5))
    exact = 127.0 * h.astype(np.float64) / gamma
    may_move = np.abs(exact - np.floor(exact) - 0.5) <= 127 * 6 * UNIT
    moved = may_move.astype(np.float64) @ np.abs(weights).T.astype(np.float64)
    descale = gamma.astype(np.float64) / 127 * alpha
    rounding = (np.abs(np.rint(exact)) @ np.abs(weights).T.astype(np.float64)) * (INPUTS + 8) * UNIT
    assert np.all(np.abs(got - expected) <= descale * (moved + rounding)), kind
    assert np.abs(expected).max() > 0


def fused_with_bodies(proto: onnx.ModelProto) -> ir.Model:
    model = fused(proto)
    AttachBodies()(model)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return model


@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize("kind", KINDS)
def test_the_storages_of_transformers(kind, opset):
    module = One(linear(kind))
    proto = export(module, opset, width=INPUTS)
    model = fused(proto)
    assert kinds(model) == ["Mul", "TernaryMatMul"]
    assert model.graph.node(1).attributes["n"].as_int() == OUTPUTS
    assert {"inner.packed", "inner.scale"} < set(model.graph.initializers)
    packed = model.graph.initializers["inner.packed"].const_value.numpy()
    alpha = float(model.graph.initializers["inner.scale"].const_value.numpy()[0])
    weights, wanted = stored(module.inner, kind)
    np.testing.assert_array_equal(unpack(packed, OUTPUTS), weights)
    # ONNX Runtime and PyTorch sum the 38,400 magnitudes of master weights in different orders.
    assert abs(alpha / wanted - 1) <= (64 if kind == "online" else 4) * UNIT
    within_bound(proto, activations(), kind, weights, alpha)


def stored(module, kind) -> tuple[np.ndarray, float]:
    """The ternary weights and their scale as transformers' own code computes them."""
    if kind == "packed":
        from transformers.integrations.bitnet import unpack_weights

        with torch.compiler.set_stance("force_eager"):
            return unpack_weights(module.weight, torch.float32).numpy(), 1 / 17.3
    if kind == "offline":
        return module.weight.detach().numpy(), float(np.float32(0.037))
    scale = 1.0 / module.weight.detach().float().abs().mean().clamp(min=1e-5)
    return (module.weight * scale).round().clamp(-1, 1).detach().numpy(), float(1 / scale)


def test_the_torchscript_exporter(monkeypatch):
    from transformers.integrations import bitnet

    for cls in (bitnet.ActQuant, bitnet.WeightQuant):  # that exporter cannot trace what torch.compile wraps
        monkeypatch.setattr(cls, "forward", staticmethod(cls.forward._torchdynamo_orig_callable))
    for kind in ("offline", "online"):
        module = One(linear(kind))
        proto = export(module, 17, dynamo=False, width=INPUTS)
        model = fused(proto)
        assert [op for op in kinds(model) if op != "Constant"] == ["Mul", "TernaryMatMul"]
        weights, alpha = stored(module.inner, kind)
        within_bound(proto, activations(), kind, weights, alpha)


def test_half_precision_keeps_its_type():
    proto = export(One(linear("offline", dtype=torch.float16)), width=INPUTS, dtype=torch.float16)
    model = fused_with_bodies(proto)
    assert kinds(model) == ["Mul", "TernaryMatMul"]
    x = activations()[:1].astype(np.float16)
    (expected,), (got,) = run(proto, x), run(ir.to_proto(model), x)
    assert got.dtype == np.float16
    # The original rounds q / s and the sum of INPUTS products to half precision, ours only the result.
    limit = INPUTS**0.5 * 2.0**-11 * np.abs(expected).max()
    np.testing.assert_allclose(got.astype(np.float32), expected.astype(np.float32), rtol=0, atol=limit)


def test_a_mask_before_the_quantiser_fuses_into_one_node():
    def mask(x):
        return x * torch.zeros_like(x).scatter(-1, indices(x), 1.0)

    model = fused(export(BitLinears("online", mask), width=INPUTS))
    run_pipeline(model, parse_pipeline("eliminate-common,eliminate-dead,fuse-sparse-ternary"))
    assert kinds(model)[0] == "SparseTernaryMatMul"
    assert model.graph.node(0).attributes["n"].as_ints() == (OUTPUTS, OUTPUTS)


class MaskedBetween(nn.Module):
    """Y = (Q(X) * M) Qw(W)^T as the paper writes it: the mask comes from the float magnitudes, after the quantiser."""

    def __init__(self, where, dequantised):
        super().__init__()
        torch.manual_seed(0)
        self.where, self.dequantised = where, dequantised
        self.weight = nn.Parameter(torch.randint(-1, 2, (OUTPUTS, INPUTS)).float() * 0.05)

    def forward(self, x):
        x = x * 2.0
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127.0
        q = (x / scale).round().clamp(-128, 127)
        if self.dequantised:
            q = q * scale
        mask = torch.zeros_like(x, dtype=torch.bool).scatter(-1, indices(x), True)
        masked = torch.where(mask, q, 0.0) if self.where else q * mask.to(q.dtype)
        y = nn.functional.linear(masked, self.weight)
        return y if self.dequantised else y * scale


@pytest.mark.parametrize("dequantised", [False, True])
@pytest.mark.parametrize("where", [False, True])
def test_a_mask_behind_the_quantiser_moves_before_it(where, dequantised):
    proto = export(MaskedBetween(where, dequantised), width=INPUTS)
    model = fused(proto)
    assert [op for op in kinds(model) if op not in ("Constant", "Mul")] == ["TopKSparsify", "TernaryMatMul"]
    AttachBodies()(model)
    x = np.random.default_rng(5).normal(size=(2, 3, INPUTS)).astype(np.float32)
    (expected,), (got,) = run(proto, x), run(ir.to_proto(model), x)
    np.testing.assert_allclose(got, expected, rtol=0, atol=np.abs(expected).max() * INPUTS * UNIT)


def test_straight_through_sums_are_recomputed_not_read():
    module = StraightThroughLinear()
    proto = export(module, width=INPUTS)
    traced = module.weight + ((module.weight * 0 + traced_ternary(module)) - module.weight)
    assert len(np.unique(np.abs(traced.detach().numpy()))) > 2  # the sum itself is not exactly -a, 0, a
    model = imported(proto)
    assert FuseTernary()(model).modified
    assert kinds(model) == ["TernaryMatMul", "Add"]
    AttachBodies()(model)
    x = np.random.default_rng(6).normal(size=(2, 3, INPUTS)).astype(np.float32)
    (expected,), (got,) = run(proto, x), run(ir.to_proto(model), x)
    # Each traced weight and activation is off by the rounding of its sum.
    np.testing.assert_allclose(got, expected, rtol=0, atol=np.abs(expected).max() * INPUTS * 4 * UNIT)


def traced_ternary(module):
    alpha = 1.0 / module.weight.abs().mean().clamp(min=1e-5)
    return (module.weight * alpha).round().clamp(-1, 1) / alpha


def test_packing_is_lazy_and_master_weights_are_gone(monkeypatch):
    from qsparse_export.passes import fuse_ternary_weights

    model = fused(export(One(linear("online")), width=INPUTS))
    calls = []
    monkeypatch.setattr(fuse_ternary_weights, "pack", lambda values: calls.append(values.shape) or ternary_pack(values))
    assert not any(value.const_value.nbytes > INPUTS * 96 for value in model.graph.initializers.values())
    assert not calls
    model.graph.initializers["inner.packed"].const_value.numpy()
    assert calls == [(OUTPUTS, INPUTS)]


def ternary_pack(values):
    from qsparse_export.formats.ternary import pack

    return pack(values)


def test_twice_changes_nothing():
    model = fused(export(One(linear("offline")), width=INPUTS))
    before = ir.to_proto(model).SerializeToString()
    assert not FuseTernary()(model).modified
    assert ir.to_proto(model).SerializeToString() == before


def text_model(quantiser: str, weights: np.ndarray, after: str = "y = Mul (product, descale)") -> onnx.ModelProto:
    made = onnx.parser.parse_model(f"""
      <ir_version: 10, opset_import: ["" : 23]>
      g (float[M, {weights.shape[0]}] x, float other) => (float[M, {weights.shape[1]}] y) {{
        top = Constant <value_float = 127.0> ()
        bottom = Constant <value_float = -128.0> ()
        floor = Constant <value_float = 1e-5> ()
        axis = Constant <value_ints = [-1]> ()
        magnitude = Abs (x)
        largest = ReduceMax (magnitude, axis)
        gamma = Max (largest, floor)
        {quantiser}
        product = MatMul (q, w)
        descale = Div (gamma, top)
        {after}
      }}
    """)
    made.graph.initializer.append(onnx.numpy_helper.from_array(weights, "w"))
    return made


PLAIN = "scale = Div (top, gamma) scaled = Mul (x, scale) rounded = Round (scaled) q = Clip (rounded, bottom, top)"
SPELLINGS = {
    "plain": PLAIN,
    "without a clip": "scale = Div (top, gamma) scaled = Mul (scale, x) q = Round (scaled)",
    "clip first": "scale = Div (top, gamma) scaled = Mul (x, scale) bounded = Clip (scaled, bottom, top) q = Round (bounded)",
    "min and max": "step = Div (gamma, top) scaled = Div (x, step) rounded = Round (scaled) low = Max (rounded, bottom) "
    "q = Min (low, top)",
    "integers": PLAIN.replace("q = Clip", "clipped = Clip")
    + " small = Cast <to = 3> (clipped) q = Cast <to = 1> (small)",
}
TERNARY = (np.random.default_rng(0).integers(-1, 2, (64, 48)) * 0.25).astype(np.float32)


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_of_the_quantiser(name):
    proto = text_model(SPELLINGS[name], TERNARY)
    model = fused(proto)
    assert kinds(model) == ["TernaryMatMul"]
    packed, scale = (model.graph.initializers[f"w.{part}"].const_value.numpy() for part in ("packed", "scale"))
    assert scale.tolist() == [0.25]
    x = np.random.default_rng(1).normal(size=(5, 64)).astype(np.float32)
    AttachBodies()(model)
    (got,) = onnxruntime_run(model, x)
    np.testing.assert_array_equal(got, ternary_matmul.reference(x, packed, scale, 48))


def onnxruntime_run(model: ir.Model, x: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    return session.run(None, {"x": x, "other": np.array(1, np.float32)})


NOT_TERNARY = np.random.default_rng(1).normal(size=(64, 48)).astype(np.float32)
PER_OUTPUT = TERNARY * np.linspace(1, 2, 48, dtype=np.float32)
UNLIKE = {
    "another scale": (PLAIN.replace("top, gamma", "bottom, gamma"), TERNARY, None, "is not scaled by 127"),
    "another maximum": (
        PLAIN.replace("Mul (x, scale)", "Mul (twice, scale)").replace("scale =", "twice = Add (x, x) scale =", 1),
        TERNARY,
        None,
        "the maximum is of another value",
    ),
    "no floor": (PLAIN.replace("top, gamma", "top, largest"), TERNARY, None, "is not floored"),
    "not ternary": (PLAIN, NOT_TERNARY, None, "not -a, 0 and a"),
    "a scale per output": (PLAIN, PER_OUTPUT, None, "not -a, 0 and a"),
    "not scaled back": (PLAIN, TERNARY, "y = Mul (product, other)", "not scaled back"),
    "nan": (PLAIN, np.full_like(TERNARY, np.nan), None, "NaN"),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_what_is_not_a_bitnet_linear_stays_and_says_why(name):
    quantiser, weights, after, reason = UNLIKE[name]
    model = imported(text_model(quantiser, weights, after or "y = Mul (product, descale)"))
    before = ir.to_proto(model).SerializeToString()
    assert not FuseTernary()(model).modified
    assert ir.to_proto(model).SerializeToString() == before
    (given,) = explain(model.graph).values()
    assert reason in given


def test_weights_from_an_input_stay():
    text = text_model(PLAIN, TERNARY)
    value = onnx.helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, TERNARY.shape)
    del text.graph.initializer[:]
    text.graph.input.append(value)
    model = imported(text)
    assert not FuseTernary()(model).modified
    assert list(explain(model.graph).values()) == ["the weights are computed from an input"]


def test_ternary_matrices():
    exact = ternary_of(TERNARY)
    assert exact.amplitude == 0.25
    np.testing.assert_array_equal(exact.values, TERNARY.T * 4)
    assert ternary_of(np.zeros((3, 2), np.float32)).values.shape == (2, 3)
    assert ternary_of(TERNARY * np.float32(1 + 1e-7) + np.float32(1e-9)).amplitude == pytest.approx(0.25)
    assert isinstance(ternary_of(TERNARY + np.float32(1e-5)), str)
    assert isinstance(ternary_of(TERNARY[0]), str)
