"""Whole models compiled for ARM: the module of a bundle run under qemu with TVM's own ARM runtime, against ONNX Runtime here."""

import struct
import subprocess
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import tvm_ffi.libinfo
from emulated_host import COMPILER, SYSROOT, tensor_bytes, tool
from evidence import EMULATED, WHOLE_MODELS, Evidence, share_within
from test_export import CONFIGS, decoder
from wheels import ARM, file_of_wheel

import qsparse_export as qs
from qsparse_export.runtimes import get_runtime
from qsparse_export.runtimes.tvm.environment import VERSIONS
from qsparse_export.runtimes.tvm.runtime import GRAPH, MODULE, WEIGHTS
from qsparse_export.runtimes.tvm.session import Program

LANES = {"cortex-a53": "neon", "cortex-a76": "neondot"}
CACHE = Path(__file__).resolve().parents[2] / ".cache" / "arm"
LIBRARIES = {"apache-tvm": "tvm/lib/libtvm_runtime.so", "apache-tvm-ffi": "tvm_ffi/lib/libtvm_ffi.so"}
"""The runtime alone: the compiler, 80 times as large, stays in the wheel."""


def runtime_for_arm() -> Path:
    """A folder with TVM's runtime for 64-bit ARM, from its wheels on PyPI, once into .cache/arm."""
    folder = CACHE / f"tvm-{VERSIONS['apache-tvm']}"
    for package, member in LIBRARIES.items():
        file_of_wheel(f"{package}=={VERSIONS[package]}", member, folder / Path(member).name, *ARM)
    return folder


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """The path of module_host.cc's program, and of the libraries that it needs."""
    libraries, program = runtime_for_arm(), tmp_path_factory.mktemp("host") / "module_host"
    includes = [
        f"-I{path}" for path in (tvm_ffi.libinfo.find_include_path(), tvm_ffi.libinfo.find_dlpack_include_path())
    ]
    command = [tool(COMPILER, "g++-aarch64-linux-gnu (apt)"), "-std=c++17", "-O1", *includes]
    source = str(Path(__file__).with_name("module_host.cc"))
    # The program itself calls nothing of tvm_runtime: it registers the functions that the module asks for.
    linked = [f"-L{libraries}", "-Wl,--no-as-needed", "-ltvm_runtime", "-ltvm_ffi"]
    subprocess.run([*command, source, "-o", str(program), *linked], check=True)
    return program, libraries


def run(host, cpu, module, arguments, folder):
    program, libraries = host
    with (folder / "arguments").open("wb") as file:
        file.write(struct.pack("<i", len(arguments)))
        for array in arguments:
            file.write(tensor_bytes(array))
    emulator = [tool("qemu-aarch64", "qemu-user (apt)"), "-L", SYSROOT, "-cpu", cpu]
    paths = ["-E", f"LD_LIBRARY_PATH={libraries}", "-E", "TVM_NUM_THREADS=2"]
    command = [*emulator, *paths, str(program), str(module), str(folder / "arguments"), str(folder / "results")]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)


def arguments_of(program, feeds, folder):
    """What the module's function takes: inputs, what the prologue makes, weights."""
    session = onnxruntime.InferenceSession(program.cut.prologue.SerializeToString(), providers=["CPUExecutionProvider"])
    made = session.run(None, {name: feeds[name] for name in program.cut.taken})
    values = feeds | dict(zip(program.cut.made, made, strict=True))
    content = (folder / WEIGHTS).read_bytes()
    weights = [
        np.frombuffer(content, w.numpy_dtype, int(np.prod(w.shape)), w.offset_bytes).reshape(w.shape)
        for w in program.weights
    ]
    return [values[value.name] for value in program.cut.rest.graph.input] + weights


@pytest.mark.parametrize(
    ("target", "cpu", "name", "weights"),
    [("arm64", "cortex-a53", "qwen2", "int4"), ("raspberry-pi-5", "cortex-a76", "bitnet", "keep")],
)
def test_a_decode_step_agrees_with_onnx_runtime_here(host, tmp_path, target, cpu, name, weights, evidence):
    config, folder = CONFIGS[name], tmp_path / "bundle"
    qs.export(decoder(config), target=target, runtime="tvm", weights=weights, out=folder, verify="none")
    program = Program.of(onnx.load(folder / GRAPH, load_external_data=False), folder)
    rng = np.random.default_rng(0)
    past, tokens = 5, 3
    feeds = {
        "input_ids": rng.integers(0, config.vocab_size, (1, tokens)),
        "attention_mask": np.ones((1, past + tokens), np.int64),
        "position_ids": np.arange(past, past + tokens)[None],
    }
    shape = (1, config.kv_heads, past + tokens + 2, config.head_dim)
    feeds |= {cache.given: rng.standard_normal(shape).astype(np.float32) for cache in program.caches}
    judge = get_runtime("ort").open(folder, threads=1, native=True)
    expected = {output: judge.to_numpy(value) for output, value in judge.run(feeds).items()}
    done = run(host, cpu, folder / MODULE, arguments_of(program, feeds, folder), tmp_path)
    assert done.returncode == 0, done.stderr
    values = np.fromfile(tmp_path / "results", np.float32)
    assert values.size == sum(array.size for array in expected.values())
    ends = np.cumsum([expected[output].size for output in program.output_names])
    for output, got in zip(program.output_names, np.split(values, ends[:-1]), strict=True):
        wanted = expected[output].ravel()
        share = share_within(got, wanted, 1e-3, 1e-4 * np.abs(wanted).max(), output)
        evidence(Evidence(WHOLE_MODELS, "TVM", f"aarch64 {LANES[cpu]}", EMULATED, f"qemu {cpu}", share))


def test_an_older_processor_refuses_the_dot_product(host, tmp_path):
    """So the module for the newer one does use it."""
    folder = tmp_path / "bundle"
    qs.export(decoder(CONFIGS["bitnet"]), target="raspberry-pi-5", runtime="tvm", out=folder, verify="none")
    program = Program.of(onnx.load(folder / GRAPH, load_external_data=False), folder)
    config = CONFIGS["bitnet"]
    feeds = {"input_ids": np.ones((1, 1), np.int64), "attention_mask": np.ones((1, 1), np.int64)}
    feeds |= {"position_ids": np.zeros((1, 1), np.int64)}
    cache = np.zeros((1, config.kv_heads, 1, config.head_dim), np.float32)
    feeds |= {entry.given: cache for entry in program.caches}
    arguments = arguments_of(program, feeds, folder)
    assert run(host, "cortex-a76", folder / MODULE, arguments, tmp_path).returncode == 0
    assert run(host, "cortex-a53", folder / MODULE, arguments, tmp_path).returncode != 0
