"""ONNX Runtime's own CUDA provider takes every node of our bundles, with no copy between, and gets as far as the launches."""

import dataclasses
from pathlib import Path

import pytest
import stand_in
from counting_models import BITNET, QSPARSE, trained
from emulated_kernels import build_emulated_ort

import qsparse_export as qs
from qsparse_export.targets.target import op_sets

pytestmark = pytest.mark.usefixtures("build_cache")

CPU, GPU = "CPUExecutionProvider", "CUDAExecutionProvider"
SHAPE_ARITHMETIC = {"Cast", "Concat", "Mul", "Reshape", "Squeeze"}
"""What ONNX Runtime puts on the CPU of its own accord: lengths, which are there already."""
CASES = {
    "silu": (QSPARSE, {}, {"TopKSparsify": 8}),
    "relu2": (dataclasses.replace(QSPARSE, activation="relu2"), {"weights": "fp16"}, {"TopKSparsify": 8}),
    "bitnet": (BITNET, {"head": "int4"}, {"SparseTernaryMatMul": 8}),
    "bitnet-dense": (dataclasses.replace(BITNET, sparsity=()), {}, {"SparseTernaryMatMul": 4, "TernaryMatMul": 4}),
    "int4": (QSPARSE, {"weights": "int4", "head": "int8"}, {"SparseMatMulNBits": 8}),
}
"""Configuration, options, and calls of our kernels in one run of the model."""
FUSED = {"QuickGelu"}
"""What ONNX Runtime makes of Sigmoid and Mul."""


@pytest.mark.parametrize("name", CASES)
def test_no_node_and_no_copy_is_left_to_the_cpu(name: str, tmp_path: Path) -> None:
    config, options, calls = CASES[name]
    made = qs.export(trained(config), target="cuda", out=tmp_path / "bundle", verify="none", **options)
    report = stand_in.run(made.path, build_emulated_ort(with_cpu_ops=True))
    ran = report["placed"]
    assert not [op for op in (*ran[GPU], *ran[CPU]) if op.startswith("Memcpy")]
    assert set(ran[CPU]) <= SHAPE_ARITHMETIC
    assert report["tokens"] == 6
    assert report["calls"] == {op: {"cuda": count * 6} for op, count in calls.items()}
    on_gpu = made.manifest["placement"]["gpu"]
    assert set(ran[GPU]) <= {op.rpartition(":")[2] for op in on_gpu} | FUSED, "as the manifest says"
    assert set(calls) | {"GroupQueryAttention", "RMSNormalization", "RotaryEmbedding"} <= set(ran[GPU])


def test_in_float32_one_length_is_copied(tmp_path: Path) -> None:
    """Attention in place of GroupQueryAttention, whose mask is computed on the GPU from a length on the CPU."""
    made = qs.export(trained(BITNET), target="cuda", out=tmp_path / "bundle", verify="none", activations="fp32")
    ran = stand_in.run(made.path, build_emulated_ort(with_cpu_ops=True))["placed"]
    assert "Attention" in ran[GPU] and "GroupQueryAttention" not in made.manifest["placement"]["gpu"]
    assert [op for op in ran[GPU] if op.startswith("Memcpy")] == ["MemcpyFromHost"]
    assert set(ran[CPU]) <= SHAPE_ARITHMETIC | {"Sub"}


def test_a_provider_that_cannot_start_is_said(tmp_path: Path) -> None:
    """ONNX Runtime only warns, and would run on the CPU."""
    made = qs.export(trained(BITNET), target="cuda", out=tmp_path / "bundle", verify="none")
    said = stand_in.refusal(made.path, build_emulated_ort(with_cpu_ops=True))
    assert "has a CUDA provider and cannot start it: look at nvidia-smi, and for CUDA 13 and cuDNN 9" in said
    assert "or run it on the CPU with --no-native" in said


def test_the_provider_has_the_ops_that_targets_say() -> None:
    registered = set(stand_in.registered_ops())
    assert registered >= op_sets("provider_ops")["onnxruntime-cuda"]
    assert registered & {"BitShift", "BitwiseAnd", "com.microsoft::GroupQueryAttention"} == {
        "com.microsoft::GroupQueryAttention"
    }
