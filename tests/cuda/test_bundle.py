"""Bundles for cuda targets: built by nvcc, verified on the CPU provider, refused where something is missing."""

import dataclasses
import json
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import compiled_kernels
import onnx
import onnxruntime
import pytest
from counting_models import BITNET, QSPARSE, trained
from evidence import EXECUTED, WHOLE_MODELS, Evidence

import qsparse_export as qs
from qsparse_export.bundle import Bundle
from qsparse_export.cli.export import main as export_main
from qsparse_export.cli.run import main as run_main
from qsparse_export.config import ModelConfig
from qsparse_export.errors import TargetError
from qsparse_export.nn.decoder import Decoder
from qsparse_export.runtimes.ort import cuda_build
from qsparse_export.runtimes.ort.library import CUDA_LIBRARY_NAME, needed_glibc, open_library
from qsparse_export.runtimes.ort.runtime import GRAPH, OrtRuntime
from qsparse_export.targets.detect import host
from qsparse_export.targets.target import load_target

pytestmark = pytest.mark.usefixtures("build_cache")

MODELS = {
    "silu": (QSPARSE, {}, {"TopKSparsify"}),
    "relu2": (dataclasses.replace(QSPARSE, activation="relu2"), {"weights": "fp16"}, {"TopKSparsify"}),
    "bitnet": (BITNET, {"head": "int8"}, {"SparseTernaryMatMul"}),
    "int4": (QSPARSE, {"weights": "int4"}, {"SparseMatMulNBits"}),
}
"""Name to a configuration, options, and the ops of ours that are left in the graph."""
GPU_TARGETS = ("cuda-sm89", "cuda")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """The model called so, trained for some steps and exported for cuda; once."""
    made: dict[str, Bundle] = {}
    decoders: dict[ModelConfig, Decoder] = {}

    def make(name: str) -> Bundle:
        config, options, _ = MODELS[name]
        if config not in decoders:
            decoders[config] = trained(config)
        if name not in made:
            folder = tmp_path_factory.mktemp(name) / "bundle"
            made[name] = qs.export(decoders[config], target="cuda", out=folder, name=name, **options)
        return made[name]

    return make


@pytest.mark.parametrize("name", MODELS)
def test_everything_is_for_the_gpu_and_verified_on_the_cpu(bundle, name, evidence):
    ops = MODELS[name][2]
    manifest = bundle(name).manifest
    assert manifest["dtype"] == "float16", "of its own accord"
    placement = manifest["placement"]
    assert placement["cpu"] == placement["bodies"] == {}
    assert {op for op in placement["gpu"] if op.startswith("ai.qsparse")} == {f"ai.qsparse::{op}" for op in ops}
    assert placement["gpu"]["com.microsoft::GroupQueryAttention"] == QSPARSE.layers
    graph = onnx.load(bundle(name).path / GRAPH, load_external_data=False).graph
    kinds = [node.op_type for node in graph.node if node.op_type != "Constant"]
    assert sum(placement["gpu"].values()) == len(kinds)
    attention = next(node for node in graph.node if node.op_type == "GroupQueryAttention")
    assert len(attention.input) == 7, "no bias, which CUDA's kernel did not take before ONNX Runtime 1.31"

    parity = manifest["parity"]
    assert [path["path"] for path in parity["paths"]] == ["native", "bodies"]
    assert parity["paths"][0]["native_calls"].keys() == ops
    assert all(path["greedy_agreement"] > 0.9 for path in parity["paths"])
    assert parity["ran_on"]["note"] == "verified on the CPU provider; no GPU ran it"
    assert parity["ran_on"]["covers_library"] is False
    assert parity["ran_on"]["library"] == manifest["library"], "the CPU kernels of the bundle's own library"
    assert manifest["library"]["compiler"].startswith("nvcc ")
    assert manifest["library"]["gpus"] == [f"sm_{number}" for number in compiled_kernels.ARCHITECTURES]
    share = max(path["relative_logit_error"] for path in parity["paths"]) / parity["limit"]
    backend = "ONNX Runtime, graph for CUDA"
    evidence(Evidence(WHOLE_MODELS, backend, "any", EXECUTED, "CPU provider, C++ kernels and bodies", share))


def gpus_in(library: Path) -> set[int]:
    """Compute capabilities times ten of the machine code inside ``library``."""
    content = library.read_bytes()
    heads = [content[found.start() : found.start() + 64] for found in re.finditer(b"\x7fELF", content)]
    is_cubin = [struct.unpack_from("<H", head, 18)[0] == compiled_kernels.ELF_MACHINE_CUDA for head in heads]
    return {compiled_kernels.cubin_architecture(head) for head, is_one in zip(heads, is_cubin, strict=True) if is_one}


def test_the_library_holds_code_for_every_gpu_and_loads_without_one(bundle):
    library = bundle("bitnet").path / CUDA_LIBRARY_NAME
    assert gpus_in(library) == set(compiled_kernels.ARCHITECTURES)
    made = OrtRuntime(library=library).open(bundle("bitnet").path, threads=1, native=True)
    assert made.native_calls() == {}
    assert open_library(library).ops == open_library().ops
    assert b"CUDAExecutionProvider" in library.read_bytes()


def test_a_target_of_one_gpu_carries_code_for_that_one():
    """And one of all also what drivers translate for GPUs that came later."""
    of_one, of_all = (cuda_build.require_tools(name, host().triple, load_target(name).features) for name in GPU_TARGETS)
    assert "-DCMAKE_CUDA_ARCHITECTURES=89-real" in of_one.options and of_one.compiler_version.endswith(" for 89-real")
    assert "-DCMAKE_CUDA_ARCHITECTURES=80-real;87-real;89-real;90-real;90-virtual" in of_all.options
    assert cuda_build.architectures_of(load_target("cuda-sm89").features) == ("sm_89",)


def test_genai_opens_it(bundle):
    """On its CPU provider: the options of CUDA's are left out, since this genai is one without."""
    import onnxruntime_genai as og

    plain = json.loads((bundle("bitnet").path / "genai_config.json").read_text())
    session = plain["model"]["decoder"]["session_options"]
    assert session["provider_options"] == [{"cuda": {"enable_cuda_graph": "0"}}]
    assert session["custom_ops_library"] == CUDA_LIBRARY_NAME
    assert plain["search"]["past_present_share_buffer"] is True
    config = og.Config(str(bundle("bitnet").path))
    config.clear_providers()
    model = og.Model(config)
    parity = bundle("bitnet").manifest["parity"]
    prompt, tokens = parity["prompt_ids"], parity["paths"][0]["greedy_ids"]
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(prompt) + len(tokens))
    generator = og.Generator(model, params)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    steady = parity["paths"][0]["steady_greedy_tokens"]
    assert steady > 3
    assert list(generator.get_sequence(0))[len(prompt) :][:steady] == tokens[:steady]
    assert open_library(bundle("bitnet").path / CUDA_LIBRARY_NAME).calls()["SparseTernaryMatMul"]


def test_without_the_cuda_provider_it_says_what_to_install(bundle, capsys):
    assert "CUDAExecutionProvider" not in onnxruntime.get_available_providers()
    reason = (
        r"was made for an NVIDIA GPU, and ONNX Runtime \S+ here has no CUDAExecutionProvider .*"
        "install onnxruntime-gpu in place of onnxruntime, or run it on the CPU with --no-native"
    )
    for refused_here in (bundle("bitnet").open, bundle("bitnet").require_host):  # the second is what qsparse-bench asks
        with pytest.raises(TargetError, match=reason):
            refused_here()
    arguments = [str(bundle("bitnet").path), "--ids", "1,3,5", "-n", "6"]
    assert run_main(arguments) == 1
    assert "install onnxruntime-gpu" in capsys.readouterr().err
    assert run_main([*arguments, "--no-native"]) == 0
    assert capsys.readouterr().out.strip() == "7 9 11 13 15 17"


def test_float32_is_had_by_asking(bundle, tmp_path):
    made = qs.export(trained(QSPARSE), target="cuda", out=tmp_path / "wide", weights="fp32", verify="quick")
    assert made.manifest["dtype"] == "float32" and made.manifest["placement"]["cpu"] == {}


@pytest.fixture
def export(tmp_path: Path) -> Callable[..., Bundle]:
    def run(target: str, **options: object) -> Bundle:
        return qs.export(Decoder(QSPARSE).eval(), target=target, out=tmp_path / "out", **options)

    return run


def refused(export: Callable[..., Bundle], tmp_path: Path, target: str, reason: str, **options: object) -> None:
    with pytest.raises(TargetError, match=reason):
        export(target, **options)
    assert not (tmp_path / "out").exists()


def test_without_nvcc_the_export_names_it(monkeypatch, export, tmp_path):
    monkeypatch.setattr(cuda_build, "find_nvcc", lambda: None)
    reason = r"target cuda: its kernels are compiled by nvcc, which is not here; install CUDA 13, or: "
    refused(export, tmp_path, "cuda", reason + r"pip install 'qsparse-export\[cuda\]', or export with --portable")
    made = export("cuda", portable=True, verify="none")
    assert made.manifest["library"] is None and made.manifest["native"] is False
    assert made.manifest["placement"]["bodies"].keys() == {"ai.qsparse::TopKSparsify"}
    assert not (made.path / CUDA_LIBRARY_NAME).exists()


def test_an_nvcc_that_does_not_run_is_named(monkeypatch, export, tmp_path):
    broken = tmp_path / "nvcc"
    broken.write_text("#!/bin/sh\necho no licence >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(cuda_build, "find_nvcc", lambda: broken)
    refused(export, tmp_path, "cuda", f"{broken} --version failed: no licence; install CUDA again")


def test_a_jetson_without_its_cuda_runtime_is_refused_with_what_to_do(monkeypatch, export, tmp_path):
    monkeypatch.setenv(cuda_build.CROSS_VARIABLE, str(tmp_path))
    reason = (
        f"target cuda-sm87 is aarch64-unknown-linux-gnu: nvcc links for it with CUDA's static runtime of that machine, and "
        f"{tmp_path} has no libcudart_static.a. Install .*manylinux_2_17_aarch64 .*QSPARSE_CUDA_CROSS=DIR; .*--portable"
    )
    refused(export, tmp_path, "cuda-sm87", reason)


def test_a_jetson_with_it_gets_code_for_its_processor_and_its_gpu(monkeypatch, export, tmp_path, capsys):
    runtime = tmp_path / "runtime"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:", "--target", runtime]
    release = re.match(r"nvcc (\d+\.\d+)", cuda_build.require_tools("cuda", host().triple, ["cuda"]).compiler_version)
    assert release
    package = f"nvidia-cuda-runtime=={release[1]}.*"
    subprocess.run([*pip, "--platform", "manylinux_2_17_aarch64", package], check=True)
    monkeypatch.setenv(cuda_build.CROSS_VARIABLE, str(runtime))
    made = export("cuda-sm87", verify="quick")
    library = made.path / CUDA_LIBRARY_NAME
    assert int.from_bytes(library.read_bytes()[18:20], "little") == 183  # EM_AARCH64
    assert gpus_in(library) == {87}
    assert made.manifest["library"]["triple"] == "aarch64-unknown-linux-gnu"
    assert made.manifest["parity"]["ran_on"]["library"]["triple"] == host().triple, (
        "the installed one, of the same sources"
    )
    assert needed_glibc(library) <= "2.35"
    assert run_main([str(made.path), "--ids", "1"]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "was made for cuda-sm87 (aarch64 linux), and this machine is x86_64 linux; export it with --target cpu" in said
    )


def test_a_gpu_that_has_no_target_is_refused_with_those_that_have(tmp_path, capsys):
    assert export_main(["shape:bitnet-2b-4t,layers=1", "--target", "cuda-sm75", "-o", str(tmp_path / "out")]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(r"unknown target 'cuda-sm75'.*did you mean cuda-sm87 or cuda-sm\d\d or cuda-sm\d\d\?", said), said
    assert not list(tmp_path.iterdir())


def test_ops_without_a_cuda_kernel_are_no_native_ops_of_a_gpu(export, tmp_path):
    text = (Path(__file__).parents[2] / "targets" / "cuda.toml").read_text()
    (tmp_path / "mine.toml").write_text(text.replace('"cuda-kernels"', '["TopKSparsify", "AddRmsNorm"]'))
    reason = "names the native ops AddRmsNorm, which the kernel library lacks for GPUs; it has SparseMatMulNBits, "
    refused(export, tmp_path, str(tmp_path / "mine.toml"), reason)


def test_what_runs_on_a_cpu_is_no_part_of_it(export, tmp_path):
    reason = "qsparse-device-bench runs on a device's CPU, and target cuda is a GPU: leave --with-bench out"
    refused(export, tmp_path, "cuda", reason, with_bench=True)
