"""ONNX Runtime's own CUDA provider takes every node of our bundles, with no copy between, and gets as far as the launches."""

import dataclasses
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
import stand_in
from counting_models import BITNET, QSPARSE, trained
from emulated_kernels import build_emulated_ort
from evidence import LAUNCHED, WHOLE_MODELS, Evidence, Record

import qsparse_export as qs
from qsparse_export.bench.launches import OWN, launches
from qsparse_export.bundle import Bundle
from qsparse_export.generate import Generator, greedy
from qsparse_export.runtimes.ort.library import CUDA_LIBRARY_NAME
from qsparse_export.runtimes.ort.runtime import OrtRuntime
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


IN_LIBRARIES = {"Gemm", "MatMul", "ReduceMax"}
"""What the provider has cuBLAS or cuDNN compute."""
WARM_UPS = 2
"""Runs of ONNX Runtime 1.31 before it captures, all within the first call."""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    @cache
    def make(name: str) -> Bundle:
        config, options, _ = CASES[name]
        out = tmp_path_factory.mktemp("exported") / name
        return qs.export(trained(config), target="cuda", out=out, verify="none", **options)

    return make


@pytest.mark.parametrize("name", CASES)
def test_no_node_and_no_copy_is_left_to_the_cpu(name: str, exported: Callable[[str], Bundle], evidence: Record) -> None:
    made, (_, _, calls) = exported(name), CASES[name]
    report = stand_in.run(made.path, build_emulated_ort(with_cpu_ops=True))
    ran = report["placed"]
    assert not [op for op in (*ran[GPU], *ran[CPU]) if op.startswith("Memcpy")]
    assert set(ran[CPU]) <= SHAPE_ARITHMETIC
    assert report["tokens"] == 6
    assert report["calls"] == {op: {"cuda": count * 6} for op, count in calls.items()}
    on_gpu = made.manifest["placement"]["gpu"]
    assert set(ran[GPU]) <= {op.rpartition(":")[2] for op in on_gpu} | FUSED, "as the manifest says"
    assert set(calls) | {"GroupQueryAttention", "RMSNormalization", "RotaryEmbedding"} <= set(ran[GPU])
    evidence(Evidence(WHOLE_MODELS, "ONNX Runtime, CUDA kernels", "any", LAUNCHED, "stand-in for CUDA"))


@pytest.fixture(scope="module")
def captured(exported: Callable[[str], Bundle]) -> Callable[[str], list[dict[str, Any]]]:
    return cache(lambda name: stand_in.captured(exported(name).path, build_emulated_ort(with_cpu_ops=True)))


@pytest.mark.parametrize("name", CASES)
def test_the_roofline_counts_what_is_launched(name: str, exported: Callable, captured: Callable) -> None:
    """Every kernel of ours and of the provider; those inside cuBLAS and cuDNN the stand-in does not see."""
    counted = launches(onnx_ir.load(exported(name).path / "model.onnx").graph)
    found = captured(name)[0]
    assert found["own kernels"] == sum(kernels for op, kernels in counted.items() if op in OWN)
    in_sight = {op: kernels for op, kernels in counted.items() if op not in OWN and op not in IN_LIBRARIES}
    assert found["provider's kernels"] == sum(in_sight.values()), in_sight


@pytest.mark.parametrize("name", CASES)
def test_a_step_can_be_captured(name: str, captured: Callable[[str], list[dict[str, Any]]]) -> None:
    """With fixed shapes and addresses: after the first run each is one launch of a graph that holds every kernel. Runs that
    are left out, as prompts are, launch their kernels themselves, before and after.
    """
    runs = captured(name)
    left_out, first, second, left_out_again, third = runs
    _, _, calls = CASES[name]
    assert not any(run["problem"] for run in runs), "what may not be called while a stream captures"
    for run in (left_out, left_out_again):
        assert run["calls"] == calls
        assert "graphs" not in run
    for run in (second, third):
        assert run["calls"] == dict.fromkeys(calls, 0)
        assert run["graphs"] == 1
    assert first["calls"] == {op: count * (WARM_UPS + 1) for op, count in calls.items()}
    for kernels in ("own kernels", "provider's kernels"):
        assert left_out[kernels] > 0
        assert {run[kernels] for run in runs if run is not first} == {left_out[kernels]}
        assert first[kernels] == left_out[kernels] * (WARM_UPS + 1), "while it captures, nothing runs"


@pytest.mark.parametrize("name", CASES)
def test_genai_generates_by_the_configuration_in_the_bundle(
    name: str, exported: Callable[[str], Bundle], tmp_path: Path
) -> None:
    """onnxruntime-genai-cuda, with genai_config.json as it was written; in the library that it names kernels are emulated."""
    bundle, (_, _, calls) = tmp_path / "bundle", CASES[name]
    shutil.copytree(exported(name).path, bundle)
    shutil.copy(build_emulated_ort(with_cpu_ops=True), bundle / CUDA_LIBRARY_NAME)
    report = stand_in.generated_by_genai(bundle)
    assert (report["device"], report["tokens"]) == ("CUDA", 6)
    assert report["calls"] == {op: {"cuda": count * 6} for op, count in calls.items()}


@pytest.mark.parametrize("name", CASES)
def test_a_step_with_fixed_shapes_gives_the_same_logits(name: str, exported: Callable[[str], Bundle]) -> None:
    """On the CPU provider: a mask as long as the cache, zero behind the last token, so that a captured graph stays right."""
    made, prompt, room = exported(name), [1, 3, 5, 7, 9], 64
    session, shape = OrtRuntime().open(made.path, threads=1, native=True), made.decoder_shape()
    expected, tokens = [], list(prompt)
    for logits, choose in Generator(session, shape).steps(prompt):
        expected.append(logits[-1])
        if len(expected) < 7:
            tokens.append(greedy(logits[-1]))
            choose(tokens[-1])
    size = (1, shape.kv_heads, room, shape.head_dim)
    names = [name for name in session.input_names if name.startswith("past_key_values.")]
    caches = {name: session.to_tensor(np.zeros(size, shape.dtype)) for name in names}
    presents = {name.replace("past_key_values.", "present."): cache for name, cache in caches.items()}
    found = []
    for position, ids in [(0, prompt), *((at, [tokens[at]]) for at in range(len(prompt), len(tokens)))]:
        end = position + len(ids)
        mask = np.zeros((1, room if position else end), np.int64)
        mask[:, :end] = 1
        feeds = {"input_ids": [ids], "attention_mask": mask, "position_ids": np.arange(position, end)[None]}
        outputs = session.run({name: np.array(value) for name, value in feeds.items()} | caches, presents)
        found.append(session.to_numpy(outputs["logits"])[0, -1])
    np.testing.assert_array_equal(np.float32(found), expected)


def test_in_float32_one_length_is_copied(tmp_path: Path) -> None:
    """Attention in place of GroupQueryAttention, whose mask is computed on the GPU from a length on the CPU."""
    made = qs.export(trained(BITNET), target="cuda", out=tmp_path / "bundle", verify="none", activations="fp32")
    ran = stand_in.run(made.path, build_emulated_ort(with_cpu_ops=True))["placed"]
    assert "Attention" in ran[GPU] and "GroupQueryAttention" not in made.manifest["placement"]["gpu"]
    assert [op for op in ran[GPU] if op.startswith("Memcpy")] == ["MemcpyFromHost"]
    assert set(ran[CPU]) <= SHAPE_ARITHMETIC | {"Sub"}


def test_what_falls_back_to_the_cpu_is_what_the_manifest_says(tmp_path: Path) -> None:
    """A head that the pipeline leaves to an op of ours without a CUDA kernel; with a copy each way."""
    without = {"head": "int4", "pipeline": "default,-lower-nbits"}
    made = qs.export(trained(BITNET), target="cuda", out=tmp_path / "bundle", verify="none", **without)
    on_cpu = made.manifest["placement"]["cpu"]
    assert on_cpu == {"ai.qsparse::DenseMatMulNBits": 1, "ai.qsparse::GatherNBits": 1}
    report = stand_in.run(made.path, build_emulated_ort(with_cpu_ops=True))
    ran = report["placed"]
    left = [op for op in ran[CPU] if op not in SHAPE_ARITHMETIC]
    assert left == sorted(op.rpartition(":")[2] for op in on_cpu)
    assert {"MemcpyFromHost", "MemcpyToHost"} <= set(ran[GPU])
    assert all("cuda" not in report["calls"][op] for op in left)


@pytest.mark.parametrize(
    ("when", "said"),
    [
        ({"STAND_IN_FAIL_AFTER": "0"}, "unspecified launch failure; look at nvidia-smi"),
        ({"STAND_IN_FAIL_AFTER": "40"}, "unspecified launch failure; look at nvidia-smi"),
        ({"STAND_IN_MEMORY": "1000"}, "Failed to allocate memory for requested buffer of size"),
        ({"STAND_IN_MEMORY": "1200000"}, "Failed to allocate memory for requested buffer of size"),
    ],
)
def test_a_gpu_that_fails_is_one_error(when: dict[str, str], said: str, exported: Callable[[str], Bundle]) -> None:
    """While the model is opened, and while it runs."""
    arguments = (exported("bitnet").path, "--ids", ",".join(["1"] * 200), "-n", "3", "--json")
    done = stand_in.qsparse_run(build_emulated_ort(with_cpu_ops=True), *arguments, **when)
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    ours = done.stderr[done.stderr.index("error: the GPU failed: ") :]  # behind what ONNX Runtime has logged
    text = " ".join(ours.split())
    assert said in text and text.endswith("or run it on the CPU with --no-native (function bodies, slower)")
    assert "Traceback" not in done.stderr and "onnxruntime_src" not in text.partition("; ")[2]


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
