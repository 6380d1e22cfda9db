"""nvcc compiles every kernel for every architecture, and nothing spills."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import compiled_kernels
import cuda_cases
import pytest
from compiled_kernels import ARCHITECTURES, ROOT, Build, NoCompiler, resources, run_cmake
from evidence import COMPILED, Evidence, Record
from kernel_runs import tool


@pytest.fixture(scope="module")
def built() -> Build:
    try:
        return compiled_kernels.build()
    except NoCompiler as error:
        pytest.fail(str(error), pytrace=False)


def test_every_kernel_is_compiled_for_every_architecture(built: Build) -> None:
    names = compiled_kernels.kernels_in_sources()
    assert len(names) >= 10
    rows = resources(built.log)
    assert {row.kernel.split("<")[0] for row in rows} == names
    by_architecture = [[row.kernel for row in rows if row.architecture == number] for number in ARCHITECTURES]
    assert len(by_architecture[0]) > len(names), "templates have an instance for each type"
    assert all(kernels == by_architecture[0] for kernels in by_architecture)


def test_there_is_machine_code_for_every_architecture(built: Build, evidence: Record) -> None:
    """By file: the architecture that the ELF header names, and every kernel's name in its symbols."""
    found: dict[int, bytes] = {number: b"" for number in ARCHITECTURES}
    for path in built.cubins:
        content = path.read_bytes()
        found[compiled_kernels.cubin_architecture(content)] += content
    for number, content in found.items():
        missing = [name for name in compiled_kernels.kernels_in_sources() if name.encode() not in content]
        assert not missing, f"sm_{number} lacks {missing}"
        for op in (*cuda_cases.NAMES.values(), "TernaryMatMul"):
            evidence(Evidence(op, "CUDA", f"sm_{number}", COMPILED))
    with pytest.raises(ValueError, match="not machine code"):
        compiled_kernels.cubin_architecture(b"\x7fELF" + bytes(60))


def test_nothing_spills(built: Build) -> None:
    spilling = [row for row in resources(built.log) if row.spill_bytes or row.stack_bytes]
    assert not spilling
    assert max(row.shared_bytes for row in resources(built.log)) <= 48 << 10


def test_calls_allocate_nothing_and_wait_for_nothing(built: Build) -> None:
    """Of CUDA the library names only what launches kernels, asks for an error and counts multiprocessors."""
    archive = built.folder / "runtimes" / "cuda" / "libqsk_cuda.a"
    symbols = subprocess.run([tool("nm", "binutils"), "-u", archive], capture_output=True, text=True, check=True).stdout
    named = set(re.findall(r"U (_*cuda\w+)", symbols))
    assert "__cudaLaunchKernel" in named or "cudaLaunchKernel" in named
    launching = r"_*cuda(LaunchKernel|GetKernel|PushCallConfiguration|PopCallConfiguration)(ExC)?"
    loading = r"__cuda(Un)?[rR]egister(FatBinary|FatBinaryEnd|Function)|__cudaInitModule"
    asking = r"cuda(GetLastError|GetDevice|DeviceGetAttribute)"
    assert not [name for name in named if not re.fullmatch(f"{launching}|{loading}|{asking}", name)]


def test_the_page_has_the_table(built: Build) -> None:
    """Registers depend on the version of nvcc: with another one than the page's, only its kernels are compared."""
    made, written = compiled_kernels.table(built), compiled_kernels.table_on_page()
    kernels = re.compile(r"^\| `(.*?)` ", re.MULTILINE)
    assert kernels.findall(written) == kernels.findall(made), "run python tests/cuda/compiled_kernels.py"
    if f"nvcc {built.nvcc_version}:" in written:
        assert written == made, "run python tests/cuda/compiled_kernels.py"


def test_names_of_kernels() -> None:
    mangled = "_ZN8qsk_cuda49_GLOBAL__N__94997e32_16_sparse_matmul_cu_dd3c89d410nbits_gemvILi8EtEEvPKT0_lPKhPKtllPf"
    assert compiled_kernels.kernel_name(mangled) == "nbits_gemv<8, half>"
    assert compiled_kernels.kernel_name("_ZN8qsk_cuda12ternary_gemvEPKhi") == "ternary_gemv"


@pytest.fixture
def without_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path with what a build of C++ needs, and no more."""
    for name in ("c++", "g++", "cc", "as", "ld", "ar", "ranlib", "make", "uname", "sh"):
        program = shutil.which(name)
        assert program, name
        (tmp_path / name).symlink_to(program)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr("sys.path", [])


def test_without_nvcc_the_message_names_the_extra(without_nvcc: None) -> None:
    with pytest.raises(NoCompiler, match=r"qsparse-export\[cuda\]"):
        compiled_kernels.require_nvcc()


def test_without_nvcc_the_build_leaves_the_kernels_out_or_refuses(without_nvcc: None, tmp_path: Path) -> None:
    def configure(choice: str) -> str:
        arguments = ["-S", str(ROOT), "-B", str(tmp_path / choice), "-DQSK_BUILD_ORT=OFF"]
        return run_cmake([*arguments, f"-DQSK_BUILD_CUDA={choice}"], dict(os.environ))

    assert "The kernels for NVIDIA GPUs are left out, since there is no nvcc: install" in configure("AUTO")
    assert "NVIDIA" not in configure("OFF")
    with pytest.raises(RuntimeError, match="QSK_BUILD_CUDA is ON and there is no nvcc: install"):
        configure("ON")
    with pytest.raises(RuntimeError, match="QSK_BUILD_CUDA is 'yes'; expected ON, OFF or AUTO"):
        configure("yes")
