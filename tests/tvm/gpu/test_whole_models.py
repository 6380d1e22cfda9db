"""Whole models compiled for NVIDIA GPUs: Relax's virtual machine and all kernels on a stand-in for CUDA, against the references.

And what is refused: on a machine without a GPU, and at export.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from evidence import EMULATED, WHOLE_MODELS, Evidence, Record, share_within
from executing_cuda import StandIn
from test_export import CONFIGS, decoder

import qsparse_export as qs
from qsparse_export.bundle import Bundle
from qsparse_export.cli import run
from qsparse_export.errors import ExportError, TargetError
from qsparse_export.runtimes import get_runtime
from qsparse_export.runtimes.base import Tuning
from qsparse_export.runtimes.tvm import build
from qsparse_export.runtimes.tvm.gpu import compile_gpu, device
from qsparse_export.runtimes.tvm.gpu.cubins import cubin_architectures
from qsparse_export.runtimes.tvm.gpu.failures import gpu_failures
from qsparse_export.runtimes.tvm.gpu.quantize_rows import quantize_rows
from qsparse_export.runtimes.tvm.runtime import GRAPH, MODULE, TvmRuntime
from qsparse_export.targets.target import load_target

HERE = Path(__file__).parent
MODELS = {"qwen2": "int4", "bitnet": "keep", "moe": "keep", "bitnet-moe": "keep"}
LENGTHS = [(1, 11, 0), (2, 5, 3), (2, 1, 70), (1, 1, 5)]
"""Batch, tokens and past: the first two are many rows, for which other kernels run."""
FEW, MANY = r"(attention_slices|(ternary|nbits)_gemv\d*)", r"(attention_slices1|(ternary|nbits)_gemm\d*)"


@dataclass(frozen=True)
class OnStandIn:
    bundle: Bundle
    feeds: list[dict[str, np.ndarray]]
    folder: Path
    native_calls: dict[str, dict[str, int]]

    def made(self, name: int | str) -> dict[str, np.ndarray]:
        with np.load(self.folder / f"{name}.npz") as loaded:
            return dict(loaded)

    def counts(self, name: int | str) -> dict[str, int]:
        return json.loads((self.folder / f"{name}.json").read_text("utf-8"))


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> OnStandIn:
    """Exported, and run on all lengths."""
    name = request.param
    stand_in = StandIn(tmp_path_factory.mktemp(name))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", stand_in.compiling()["PATH"])
        bundle = exported(name, stand_in.folder / "bundle", weights=MODELS[name], verify="none")
    stand_in.build()
    folder = stand_in.folder / "feeds"
    folder.mkdir()
    shapes = {value.name: value.type.tensor_type.shape.dim for value in graph_of(bundle).input}
    feeds = [feeds_of(shapes, *lengths) for lengths in LENGTHS]
    for number, each in enumerate(feeds):
        np.savez(folder / str(number), **each)
    calls = json.loads(stand_in.python(HERE / "run_session.py", bundle.path, folder))
    return OnStandIn(bundle, feeds, folder, calls)


def exported(name: str, out: Path, target: str = "cuda-sm80", **options: object) -> Bundle:
    return qs.export(decoder(CONFIGS[name]), out=out, name=name, runtime="tvm", target=target, **options)


def graph_of(bundle: Bundle) -> onnx.GraphProto:
    return onnx.load(bundle.path / GRAPH, load_external_data=False).graph


def feeds_of(shapes: dict[str, object], batch: int, tokens: int, past: int) -> dict[str, np.ndarray]:
    """Random tokens behind a random past; the first key of the last sequence is hidden."""
    rng = np.random.default_rng(tokens + past)
    mask = np.ones((batch, past + tokens), np.int64)
    mask[-1, 0] = 0
    feeds = {
        "input_ids": rng.integers(0, 90, (batch, tokens)),
        "attention_mask": mask,
        "position_ids": np.tile(np.arange(past, past + tokens), (batch, 1)),
    }
    for name, dims in shapes.items():
        if name.startswith("past_key_values."):
            feeds[name] = rng.standard_normal((batch, dims[1].dim_value, past, dims[3].dim_value)).astype(np.float32)
    return {name: array for name, array in feeds.items() if name in shapes}


def test_every_value_is_the_references(model: OnStandIn, evidence: Record) -> None:
    judge = get_runtime("reference").open(model.bundle.path, threads=1, native=True)
    for number, feeds in enumerate(model.feeds):
        expected, made = judge.run(feeds), model.made(f"{number}-made")
        assert set(made) == set(judge.output_names)
        for name, array in made.items():
            # As the CPU's modules against ONNX Runtime: tests/tvm/test_runtime.py.
            share = share_within(array, judge.to_numpy(expected[name]), 1e-4, 1e-5, name)
            evidence(Evidence(WHOLE_MODELS, "TVM GPU", "CUDA source", EMULATED, "stand-in for CUDA", share))
    nodes = [node.op_type for node in graph_of(model.bundle).node if node.domain == "ai.qsparse"]
    runs = len(LENGTHS) + 1
    assert model.native_calls == {name: {"tvm-cuda": runs * nodes.count(name)} for name in set(nodes)}


def test_few_rows_and_many_take_other_kernels(model: OnStandIn) -> None:
    launched = [{name.removesuffix("_kernel") for name in model.counts(i)} for i in range(len(LENGTHS))]
    for number, names in enumerate(launched):
        few, many = ({name for name in names if re.fullmatch(pattern, name)} for pattern in (FEW, MANY))
        assert (few, many) == ((set(), many), (few, set()))[number >= 2] and few | many, names


def test_a_step_in_place_copies_nothing(model: OnStandIn) -> None:
    """But ids, cosines, sines and the mask, to the device."""
    last = len(LENGTHS) - 1
    counts, expected, made = model.counts("in-place"), model.made(f"{last}-made"), model.made("in-place")
    assert counts["host to device"] == len({"input_ids", "cos", "sin", "visible"})
    assert "device to device" not in counts and "device to host" not in counts
    np.testing.assert_array_equal(made["logits"], expected["logits"])
    for name in expected.keys() - {"logits"}:
        filled = expected[name].shape[2]
        np.testing.assert_array_equal(made[name][:, :, :filled], expected[name])
        assert not made[name][:, :, filled:].any()


def test_the_manifest_says_what_was_compiled(model: OnStandIn) -> None:
    library = model.bundle.manifest["library"]
    assert (library["kind"], library["architectures"]) == ("cuda", ["sm_80"])
    assert list(cubin_architectures((model.bundle.path / MODULE).read_bytes())) == ["sm_80"]
    assert "placement" not in model.bundle.manifest
    ran_on = TvmRuntime().verified_record(load_target("cuda-sm87"))
    assert ran_on["covers_library"] is False
    assert "sm_87 on aarch64-unknown-linux-gnu in this bundle was compiled, not run" in ran_on["note"]


def test_without_a_gpu_the_bundle_says_so(model: OnStandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main([str(model.bundle.path), "--ids", "1"]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "was compiled for NVIDIA GPUs (sm_80), and TVM finds none here" in said
    assert "--target cpu" in said


def said_by_a_failing_gpu(model: OnStandIn, **environment: str) -> str:
    """In place of text; TVM's own warnings left out."""
    command = (model.bundle.path, "--ids", "1,2,3,4,5,6,7,8,9,10,11", "-n", "1", "--json")
    done = StandIn(model.bundle.path.parent).qsparse_run(*command, **environment)
    lines = [line for line in done.stderr.splitlines() if ": Warning: " not in line]
    assert (done.returncode, done.stdout, lines[0][:23]) == (1, "", "error: the GPU failed: "), done.stderr
    assert len(lines) <= 3, "one paragraph"
    return " ".join(lines)


@pytest.mark.parametrize("model", ["bitnet"], indirect=True)
def test_a_gpu_that_dies_is_one_error(model: OnStandIn) -> None:
    """While kernels are launched; and behind the last one, which nothing tells but waiting for it. Memory of a GPU that is
    gone must not be freed: TVM ends the process where that fails.
    """
    launches = sum(count for name, count in model.counts(0).items() if name.endswith("_kernel"))
    for after, failed in ((0, "CUDA"), (launches // 2, "CUDA"), (launches - 1, "CUDA Runtime Error")):
        said = said_by_a_failing_gpu(model, STAND_IN_FAIL_AFTER=str(after))
        assert failed in said and "unspecified launch failure" in said
        assert "look at nvidia-smi" in said and "or export the model with --target cpu" in said
    whole = StandIn(model.bundle.path.parent).qsparse_run(
        model.bundle.path, "--ids", "1,2,3,4,5,6,7,8,9,10,11", "-n", "1", STAND_IN_FAIL_AFTER=str(launches)
    )
    assert whole.returncode == 0, whole.stderr


@pytest.mark.parametrize("model", ["bitnet"], indirect=True)
@pytest.mark.parametrize("share", [0.1, 0.5, 1.5, 3])
def test_a_gpu_without_memory_is_one_error(model: OnStandIn, share: float) -> None:
    """For a module's constants, for weights, for caches, for what a run computes."""
    weights = (model.bundle.path / "model.onnx.data").stat().st_size
    said = said_by_a_failing_gpu(model, STAND_IN_MEMORY=str(int(weights * share)))
    assert "out of memory; its memory is too small for the model and its cache" in said


def test_what_a_module_does_not_take_is_no_failure_of_the_gpu() -> None:
    with pytest.raises(RuntimeError, match="expected 3 dimensions"), gpu_failures():
        raise RuntimeError("argument 1: expected 3 dimensions on cuda:0")
    with (
        pytest.raises(TargetError, match=r"^the GPU failed: CUDA Runtime Error: \S+ \(700\): illegal access; look at"),
        gpu_failures(),
    ):
        raise RuntimeError("CUDA Runtime Error: cudaErrorIllegalAddress (700): illegal access\n grid=(1,1,1)")


def test_an_altered_graph_is_not_compiled_for_the_cpu(model: OnStandIn, tmp_path: Path) -> None:
    altered = tmp_path / GRAPH
    altered.write_bytes((model.bundle.path / GRAPH).read_bytes())
    with pytest.raises(TargetError, match=r"an altered graph would be compiled for the CPU.*--dense"):
        TvmRuntime().open(model.bundle.path, threads=1, native=True, graph=altered)


@dataclass(frozen=True)
class Gpu:
    compute_version: str
    exist: bool = True


@pytest.mark.parametrize(("found", "runs"), [("8.0", True), ("8.6", True), ("7.5", False), ("9.0", False)])
def test_code_for_another_gpu(monkeypatch: pytest.MonkeyPatch, found: str, runs: bool) -> None:
    class Tvm:
        def cuda(self, number: int) -> Gpu:
            return Gpu(found)

    monkeypatch.setattr(device, "tvm", Tvm)
    if runs:
        assert device.cuda_device(Path("model.so"), ["sm_80"]).compute_version == found
        return
    with pytest.raises(TargetError, match=rf"compiled for NVIDIA GPUs \(sm_80\), and the one here is .* {found}"):
        device.cuda_device(Path("model.so"), ["sm_80"])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"portable": True}, TargetError, "has no function bodies"),
        ({"weights": "fp16"}, TargetError, "computes in float32, not in float16"),
        ({"tuning": Tuning(trials=1)}, TargetError, "target cuda-sm80 is a GPU: leave --tune and its like out"),
        (
            {"name": "moe", "pipeline": "default,-lower-experts"},
            ExportError,
            "nonzero.* on the CPU.*pass lower-experts",
        ),
    ],
)
def test_what_it_cannot_do_is_refused_and_leaves_nothing(
    tmp_path: Path, options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        exported(**{"name": "llama", "out": tmp_path / "bundle", "verify": "none", **options})
    assert not list(tmp_path.iterdir())


def test_places_that_are_no_experts_are_refused(tmp_path: Path) -> None:
    """Another's graph: rows that are chosen by their content, and mixed."""
    text = """<ir_version: 11, opset_import: ["": 23]> g (float[T, 6] x, float[T] w) => (float[N, 6] y) {
        found = NonZero (w) turned = Transpose <perm = [1, 0]> (found) last = Constant <value = int64[1] {-1}> ()
        rows = Squeeze (turned, last) h = Gather <axis = 0> (x, rows) y = Softmax <axis = 0> (h) }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "chosen.onnx")
    with pytest.raises(ExportError, match=r"TVM computes nonzero.* on the CPU.*--runtime ort, or for a CPU"):
        qs.export(qs.load(tmp_path / "chosen.onnx"), out=tmp_path / "bundle", runtime="tvm", target="cuda-sm80")
    assert not (tmp_path / "bundle").exists()


def test_missing_programs_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(build.shutil, "which", lambda program: None if "aarch64" in program else f"/usr/bin/{program}")
        with pytest.raises(TargetError, match=r"apt-get install g\+\+-aarch64-linux-gnu"):
            exported("llama", tmp_path / "bundle", "cuda-sm87", verify="none")
    monkeypatch.setenv("PATH", os.devnull)
    monkeypatch.setattr(compile_gpu.sys, "path", [])
    with pytest.raises(TargetError, match=r"nvcc is missing.*qsparse-export\[cuda\]"):
        compile_gpu.require_tools()
    assert not list(tmp_path.iterdir())


def test_one_library_for_several_architectures(tmp_path: Path) -> None:
    """As the target ``cuda`` has it, for all of them."""
    import tvm

    (kernel,) = quantize_rows(k_in=8).kernels
    module = tvm.IRModule({"quantize_rows": kernel})
    compile_gpu.compile_cuda_module(module, ("sm_90", "sm_80"), tmp_path / "kernels.so", "", "g++")
    assert set(cubin_architectures((tmp_path / "kernels.so").read_bytes())) == {"sm_80", "sm_90"}
