"""TVM compiles every kernel to machine code for every NVIDIA architecture, exactly, without a GPU; or says what is missing."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from evidence import COMPILED, Evidence, Record
from gpu_kernels import compiled, every_kernel, name_of, nvcc_version, resources, table, table_on_page
from tvm import tirx

from qsparse_export.errors import TargetError, UsageError
from qsparse_export.runtimes.tvm import environment
from qsparse_export.runtimes.tvm.codegen import GPU_ARCHITECTURES
from qsparse_export.runtimes.tvm.gpu import compile_gpu as module
from qsparse_export.runtimes.tvm.gpu.compile_gpu import compile_gpu, cuda_environment, find_nvcc
from qsparse_export.runtimes.tvm.gpu.cubins import cubin_architectures
from qsparse_export.runtimes.tvm.gpu.quantize_rows import quantize_rows
from qsparse_export.runtimes.tvm.gpu.sparse_ternary_matmul import sparse_ternary_gemv
from qsparse_export.runtimes.tvm.gpu.workgroup import SHARED_BYTES


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("arch", GPU_ARCHITECTURES)
def test_machine_code_of_every_kernel(arch: str, dtype: str, evidence: Record) -> None:
    content = compiled(arch, dtype)
    assert list(cubin_architectures(content)) == [arch]
    assert b"__global__" not in content, "there is source in it"
    taken = resources(content)
    assert set(taken) == {name_of(kernel) for kernel in every_kernel(dtype)}
    assert not any(each.stack_bytes for each in taken.values()), "registers spill"
    assert 0 < max(each.shared_bytes for each in taken.values()) <= SHARED_BYTES
    between = ("AddRmsNorm", "CachedAttention", "DenseMatMulNBits", "GatedActivation", "GatherNBits", "SparseMatMul")
    products = ("TopKSparsify", "quantiser", "SparseTernaryMatMul", "SparseMatMulNBits")
    for op in products + (between if dtype == "float32" else ()):
        evidence(Evidence(op, "TVM GPU", arch, COMPILED))


def test_the_page_has_the_table() -> None:
    """Registers depend on the version of nvcc: with another one than the page's, only its kernels are compared."""
    made, written = table(), table_on_page()
    kernels = re.compile(r"^\| `(.*?)` ", re.MULTILINE)
    assert kernels.findall(written) == kernels.findall(made), "run python tests/tvm/gpu/gpu_kernels.py"
    if f"nvcc {nvcc_version()}:" in written:
        assert written == made, "run python tests/tvm/gpu/gpu_kernels.py"


def test_only_the_library_is_written(tmp_path: Path) -> None:
    compile_gpu(quantize_rows(k_in=100).kernels, "cuda", "sm_80", tmp_path / "kernels.so")
    assert [path.name for path in tmp_path.iterdir()] == ["kernels.so"]


def test_the_host_may_be_another_machine(tmp_path: Path) -> None:
    library = tmp_path / "kernels.so"
    compile_gpu(quantize_rows(k_in=100).kernels, "cuda", "sm_87", library, "aarch64-linux-gnu")
    content = library.read_bytes()
    assert int.from_bytes(content[18:20], "little") == 183, "AArch64 in the library's own ELF header"
    assert list(cubin_architectures(content)) == ["sm_87"]


def test_opencl_goes_into_a_library_as_source(tmp_path: Path) -> None:
    library = tmp_path / "kernels.so"
    compile_gpu(quantize_rows(k_in=100).kernels, "opencl", "", library)
    assert b"__kernel void quantize_rows_kernel" in library.read_bytes()


@pytest.fixture
def recorded_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file in which the calls of nvcc are written down."""
    calls, program = tmp_path / "calls", tmp_path / "bin" / "nvcc"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@ $NVCC_APPEND_FLAGS" >> {calls}\nexec {find_nvcc()} "$@"\n', "utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    yield calls


def test_arithmetic_is_exact(tmp_path: Path, recorded_nvcc: Path) -> None:
    """TVM's default is --use_fast_math: approximate divisions, and subnormal numbers as zero."""
    compile_gpu(quantize_rows(k_in=100).kernels, "cuda", "sm_89", tmp_path / "kernels.so")
    (compiling,) = [line for line in recorded_nvcc.read_text("utf-8").splitlines() if "tvm_kernels" in line]
    assert "sm_89" in compiling
    assert "fast_math" not in compiling
    assert "prec-div=false" not in compiling


def test_this_process_stays_as_it_was(tmp_path: Path) -> None:
    before = dict(os.environ)
    compile_gpu(quantize_rows(k_in=100).kernels, "cuda", "sm_90", tmp_path / "kernels.so")
    assert dict(os.environ) == before
    assert "libcuda.so" not in Path("/proc/self/maps").read_text("utf-8")


def test_source_in_place_of_machine_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a libcuda.so.1 TVM embeds source, and does not say so."""
    monkeypatch.setattr(module, "cuda_environment", lambda folder, more: dict(os.environ))
    with pytest.raises(TargetError, match="holds machine code for no GPU"):
        compile_gpu(quantize_rows(k_in=100).kernels, "cuda", "sm_80", tmp_path / "kernels.so")
    assert not list(tmp_path.iterdir())


def test_what_nvcc_refuses_is_shown(tmp_path: Path) -> None:
    def undefined(codes: tirx.Expr, values: tirx.Expr, total: tirx.Expr) -> tirx.Expr:
        return tirx.call_pure_extern("int32", "no_such_function", total)

    program = sparse_ternary_gemv(k_in=100, n=[8], k=10, dot=undefined)
    with pytest.raises(TargetError, match="no_such_function"):
        compile_gpu(program.kernels, "cuda", "sm_80", tmp_path / "kernels.so")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "arch", "triple", "message"),
    [
        ("cuda", "sm_86", "", "'sm_86' is no architecture.*sm_8"),
        ("cuda", "", "", "'' is no architecture"),
        ("opencl", "sm_80", "", "opencl has none"),
        ("vulkan", "", "", "'vulkan' is no kind"),
        ("cuda", "sm_87", "riscv64-linux-gnu", "no host known here"),
    ],
)
def test_unknown_targets(tmp_path: Path, kind: str, arch: str, triple: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        compile_gpu(quantize_rows(k_in=100).kernels, kind, arch, tmp_path / "kernels.so", triple)


def test_names_that_are_not_single(tmp_path: Path) -> None:
    kernels = quantize_rows(k_in=100).kernels
    for wrong in ((), kernels * 2):
        with pytest.raises(UsageError, match="expected at least one, each another name"):
            compile_gpu(wrong, "cuda", "sm_80", tmp_path / "kernels.so")


@pytest.fixture
def only_a_compiler(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that is the whole path: g++, without nvcc."""
    folder = tmp_path_factory.mktemp("bin")
    for name in ("cc", "g++"):
        program = shutil.which(name)
        assert program, name
        (folder / name).symlink_to(program)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(module.sys, "path", [])
    monkeypatch.setattr(module, "require_tvm", lambda: None)  # which looks for packages on that path
    return folder


def test_without_nvcc(tmp_path: Path, only_a_compiler: Path) -> None:
    with pytest.raises(TargetError, match=r"nvcc is missing.*qsparse-export\[cuda\]"):
        compile_gpu(quantize_rows(k_in=100).kernels, "cuda", "sm_80", tmp_path / "kernels.so")
    assert not list(tmp_path.iterdir())


def test_without_a_linker(tmp_path: Path, only_a_compiler: Path) -> None:
    (only_a_compiler / "g++").unlink()
    with pytest.raises(TargetError, match=r"g\+\+ is missing.*apt-get install g\+\+"):
        compile_gpu(quantize_rows(k_in=100).kernels, "opencl", "", tmp_path / "kernels.so")


def test_without_tvm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(environment, "version", version)
    with pytest.raises(TargetError, match=r"apache-tvm, which is not installed.*qsparse-export\[tvm\]"):
        compile_gpu([], "cuda", "sm_80", tmp_path / "kernels.so")


def test_tvm_finds_the_functions_in_the_library(tmp_path: Path) -> None:
    """In a process with the stub of the driver, which is not asked for anything before the first launch."""
    library = tmp_path / "kernels.so"
    compile_gpu(quantize_rows(k_in=100).kernels, "cuda", "sm_80", library)
    program = f"import tvm; module = tvm.runtime.load_module({str(library)!r}); print(module['quantize_rows'])"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=cuda_environment(tmp_path), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Function" in done.stdout
