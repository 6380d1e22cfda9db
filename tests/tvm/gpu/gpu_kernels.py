"""Every GPU kernel of TVM once, of the sizes of a model of 2B parameters, and what each takes of an NVIDIA GPU.

``python tests/tvm/gpu/gpu_kernels.py`` compiles them anew and puts the table into docs/tvm-gpu.md.
"""

from __future__ import annotations

import struct
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tvm import tirx

from qsparse_export.runtimes.tvm.codegen import GPU_ARCHITECTURES
from qsparse_export.runtimes.tvm.gpu.cached_attention import MANY_SLICES, cached_attention
from qsparse_export.runtimes.tvm.gpu.compile_gpu import compile_gpu, find_nvcc
from qsparse_export.runtimes.tvm.gpu.cubins import ELF_MAGIC, cubin_architectures
from qsparse_export.runtimes.tvm.gpu.dense_matmul import MANY_ROWS, dense_matmul, dense_matmul_nbits
from qsparse_export.runtimes.tvm.gpu.gated_activation import gated_activation
from qsparse_export.runtimes.tvm.gpu.gather_nbits import gather_nbits
from qsparse_export.runtimes.tvm.gpu.nbits_gemm import sparse_matmul_nbits_gemm
from qsparse_export.runtimes.tvm.gpu.packed_bytes import dp4a
from qsparse_export.runtimes.tvm.gpu.program import Program
from qsparse_export.runtimes.tvm.gpu.quantize_rows import quantize_rows
from qsparse_export.runtimes.tvm.gpu.rms_norm import add_rms_norm, rms_norm
from qsparse_export.runtimes.tvm.gpu.sparse_matmul import sparse_matmul
from qsparse_export.runtimes.tvm.gpu.sparse_matmul_nbits import sparse_matmul_nbits
from qsparse_export.runtimes.tvm.gpu.sparse_ternary_matmul import sparse_ternary_gemm, sparse_ternary_gemv
from qsparse_export.runtimes.tvm.gpu.topk_sparsify import topk_sparsify

PAGE = Path(__file__).parents[3] / "docs" / "tvm-gpu.md"
BEGIN, END = "<!-- made by tests/tvm/gpu/gpu_kernels.py -->\n", "<!-- end -->\n"
FRAME_BYTES, REGISTERS = 0x11, 0x2F
"""EIATTR_FRAME_SIZE and EIATTR_REGCOUNT in .nv.info of a cubin: pairs of a symbol and a number (as cuobjdump -elf shows)."""
WITH_PAYLOAD = 4
"""EIFMT_SVAL: an attribute with that many bytes behind it; others have their value in place."""


@dataclass(frozen=True)
class Resources:
    """Of a thread the registers and the bytes of its stack, into which registers spill; of a block the shared bytes."""

    registers: int
    stack_bytes: int
    shared_bytes: int


@dataclass(frozen=True)
class Section:
    name: str
    content: bytes
    size: int


def every_kernel(dtype: str) -> list[tirx.PrimFunc]:
    """One of each name; of float16 only the products: whole models compute in float32."""
    programs = [
        topk_sparsify(k_in=2560, k=16, block=32, rescale="l2", dtype=dtype),
        quantize_rows(k_in=2560, dtype=dtype),
        sparse_ternary_gemv(k_in=2560, n=[2560, 640, 640], k=1024, dtype=dtype, dot=dp4a),
        sparse_ternary_gemm(k_in=2560, n=[6912, 6912], k=1024, dtype=dtype, dot=dp4a),
        sparse_matmul_nbits(k_in=2560, n=[2560, 640, 640], bits=4, group=32, k=1024, dtype=dtype),
    ]
    if dtype == "float32":
        programs += _between()
    return list({name_of(kernel): kernel for program in programs for kernel in program.kernels}.values())


def _between() -> list[Program]:
    """What whole models take besides."""
    return [
        sparse_matmul(k_in=2560, n=[2560, 640, 640], k=1024),
        sparse_matmul_nbits_gemm(k_in=2560, n=[6912, 6912], bits=4, group=32, k=1024),
        dense_matmul(k_in=2560, n=128256, rows=MANY_ROWS),
        dense_matmul_nbits(k_in=2560, n=128256, bits=4, group=32, rows=MANY_ROWS),
        gather_nbits(n=128256, k=2560, bits=4, group=32),
        rms_norm(n=6912, epsilon=1e-5),
        add_rms_norm(n=2560, epsilon=1e-5),
        gated_activation(n=6912, activation="silu"),
        cached_attention(heads=20, kv_heads=5, width=128, slices=MANY_SLICES),
    ]


def name_of(kernel: tirx.PrimFunc) -> str:
    return str(kernel.attrs["global_symbol"])


def resources(library: bytes) -> dict[str, Resources]:
    """By kernel, of the first cubin in a library."""
    begin = next(at for at in _places(library, ELF_MAGIC) if list(cubin_architectures(library[at : at + 64])))
    sections = {section.name: section for section in _sections(library[begin:])}
    names, symbols = sections[".strtab"].content, sections[".symtab"].content
    found: dict[str, dict[int, int]] = {}
    for attribute, symbol, value in _numbers(sections[".nv.info"].content):
        name = _text(names, struct.unpack_from("<I", symbols, 24 * symbol)[0])
        found.setdefault(name.removesuffix("_kernel"), {})[attribute] = value
    return {
        name: Resources(values[REGISTERS], values[FRAME_BYTES], _size(sections, f".nv.shared.{name}_kernel"))
        for name, values in found.items()
        if REGISTERS in values
    }


def _size(sections: dict[str, Section], name: str) -> int:
    return sections[name].size if name in sections else 0


def _places(content: bytes, wanted: bytes) -> Iterator[int]:
    at = content.find(wanted)
    while at >= 0:
        yield at
        at = content.find(wanted, at + 1)


def _sections(elf: bytes) -> Iterator[Section]:
    table, entry_bytes, count, names_at = (
        *struct.unpack_from("<Q", elf, 40),
        *struct.unpack_from("<HHH", elf, 58),
    )
    rows = [struct.unpack_from("<IIQQQQ", elf, table + entry_bytes * i) for i in range(count)]
    names = elf[rows[names_at][4] : rows[names_at][4] + rows[names_at][5]]
    for name, _, _, _, offset, size in rows:
        yield Section(_text(names, name), elf[offset : offset + size], size)


def _text(strings: bytes, at: int) -> str:
    return strings[at : strings.index(b"\0", at)].decode()


def _numbers(attributes: bytes) -> Iterator[tuple[int, int, int]]:
    """(attribute, symbol, value) of those that are such."""
    at = 0
    while at < len(attributes):
        form, attribute, length = struct.unpack_from("<BBH", attributes, at)
        at += 4
        if form == WITH_PAYLOAD:
            if length == 8:
                yield attribute, *struct.unpack_from("<II", attributes, at)
            at += length


@cache
def compiled(arch: str, dtype: str) -> bytes:
    """The library of every kernel."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "kernels.so"
        compile_gpu(every_kernel(dtype), "cuda", arch, library)
        return library.read_bytes()


def nvcc_version() -> str:
    """As ``13.0.88``."""
    said = subprocess.run([find_nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    return said.rpartition(", V")[2].split()[0]


def table() -> str:
    """Markdown: every kernel for float32 on every architecture."""
    columns = [resources(compiled(arch, "float32")) for arch in GPU_ARCHITECTURES]
    stack = max(each.stack_bytes for column in columns for each in column.values())
    lines = [
        f"nvcc {nvcc_version()}: registers of a thread (of the 255 there can be). Blocks have 256 threads. Most bytes of stack: "
        f"{stack}.",
        "",
        f"| kernel | {' | '.join(GPU_ARCHITECTURES)} | shared memory, bytes |",
        f"|---|{'---:|' * (len(GPU_ARCHITECTURES) + 1)}",
    ]
    for name in sorted(columns[0]):
        numbers = " | ".join(str(column[name].registers) for column in columns)
        lines.append(f"| `{name}` | {numbers} | {columns[0][name].shared_bytes} |")
    return "\n".join(lines) + "\n"


def table_on_page() -> str:
    """What docs/tvm-gpu.md holds now."""
    return PAGE.read_text("utf-8").split(BEGIN)[1].split(END)[0]


if __name__ == "__main__":
    page = PAGE.read_text("utf-8")
    PAGE.write_text(page.replace(BEGIN + table_on_page() + END, BEGIN + table() + END), "utf-8")
