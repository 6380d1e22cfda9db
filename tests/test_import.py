"""What `import qsparse_export` costs and leaves behind."""

import statistics
import subprocess
import sys
import time

import pytest


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)


def test_import_is_fast():
    def seconds(code: str) -> float:
        start = time.perf_counter()
        run(code)
        return time.perf_counter() - start

    bare = statistics.median(seconds("pass") for _ in range(5))
    ours = statistics.median(seconds("import qsparse_export") for _ in range(5))
    assert ours - bare < 0.3


@pytest.mark.parametrize("module", ["qsparse_export", "qsparse_export.cli.export", "qsparse_export.cli.run"])
def test_import_pulls_in_nothing_heavy(module):
    heavy = "{'torch', 'onnx', 'onnx_ir', 'onnxruntime', 'transformers', 'tvm', 'numpy'}"
    out = run(f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))").stdout
    assert out.strip() == "[]"


def test_the_core_never_imports_an_extra():
    blocked = "transformers, onnxruntime_genai, tvm, matplotlib"
    code = f"""
import sys
for name in {blocked.split(", ")!r}: sys.modules[name] = None
import qsparse_export.api, qsparse_export.loader, qsparse_export.exporter, qsparse_export.verify
import qsparse_export.nn.decoder, qsparse_export.nn.deploy, qsparse_export.ops, qsparse_export.passes.base
import qsparse_export.runtimes.ort.runtime, qsparse_export.cli.export, qsparse_export.cli.run
print("ok")
"""
    assert run(code).stdout.strip() == "ok"


def test_site_packages_holds_one_package_only():
    code = """
import importlib.util
print([name for name in ("passes", "runtimes", "targets", "samples", "tests") if importlib.util.find_spec(name)])
"""
    result = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert result.stdout.strip() == "[]"
