"""What a kernel must not do while a model runs is what its library cannot do: allocate, lock, throw."""

import subprocess
from pathlib import Path

from kernel_runs import build_runner, tool

# Everything that the library takes from elsewhere.
MEMORY_AND_ARITHMETIC = {"memchr", "memcpy", "memmove", "memset", "nearbyintf", "sqrt", "sqrtf", "__popcountdi2"}
CHOICE_OF_A_VARIANT = {"getauxval", "getenv", "snprintf", "strcmp", "__cxa_guard_acquire", "__cxa_guard_release"}
LINKING = {"_GLOBAL_OFFSET_TABLE_"}


def undefined_symbols(compiled: Path) -> set[str]:
    command = [tool("nm", "binutils"), "--undefined-only", "--format=posix", str(compiled)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = {line.split()[0] for line in listed.splitlines()}
    return {name for name in names if not name.startswith(("_ZN3qsk", "_ZNK3qsk", "_ZTVN3qsk", "qsk_"))}


def test_nothing_is_allocated_locked_or_thrown() -> None:
    folder = build_runner("release").parents[2] / "runtimes" / "kernels"
    objects = {compiled.name.removesuffix(".cc.o"): compiled for compiled in folder.glob("**/*.o")}
    assert {"ternary_product", "ternary_avx2", "quantized_row", "sparse_matmul", "variants"} <= set(objects)
    for name, compiled in objects.items():
        allowed = MEMORY_AND_ARITHMETIC | LINKING | (CHOICE_OF_A_VARIANT if name in ("variants", "cpu") else set())
        assert undefined_symbols(compiled) <= allowed, name
