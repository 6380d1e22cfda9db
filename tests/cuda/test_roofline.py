"""qsparse-bench --roofline measures where a GPU answers: here a stand-in, whose times mean nothing. And the page's tables."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import roofline_page
import stand_in
from counting_models import BITNET, trained
from emulated_kernels import build_emulated_ort

import qsparse_export as qs
from qsparse_export.bench.roofline import GPUS
from qsparse_export.bundle import Bundle
from qsparse_export.runtimes.ort import cuda_build

pytestmark = pytest.mark.usefixtures("build_cache")

COMMAND = str(Path(sys.executable).with_name("qsparse-bench"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("exported") / "bitnet"
    return qs.export(trained(BITNET), target="cuda", out=out, head="int4", verify="none")


@pytest.fixture(scope="module")
def on_stand_in(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which ONNX Runtime has a CUDA provider, and the emulated kernels lie where built ones are kept."""
    target = bundle.manifest["target"]
    built = cuda_build.build(target["name"], target["triple"], target["features"])
    cache = tmp_path_factory.mktemp("cache")
    kept = cache / built.relative_to(os.environ["XDG_CACHE_HOME"])
    kept.parent.mkdir(parents=True)
    shutil.copy2(build_emulated_ort(with_cpu_ops=True), kept)
    return {**stand_in.environment(), "XDG_CACHE_HOME": str(cache)}


def roofline(bundle: Bundle, environment: dict[str, str], name: str = "") -> "subprocess.CompletedProcess[str]":
    command = [COMMAND, bundle.path, "--roofline", "-o", "json"]
    environment = {**environment, "STAND_IN_NAME": name}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("gpu", [GPUS[2].reported, "NVIDIA of tomorrow"])
def test_what_is_measured_on_a_gpu(bundle: Bundle, on_stand_in: dict[str, str], gpu: str) -> None:
    done = roofline(bundle, on_stand_in, gpu)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    measured = found["measured"]
    assert found["not_measured"] is None and measured["gpu"] == gpu and measured["tokens"] == 128
    assert measured["ms_per_token"] > 0
    read = measured["gb_per_s"] * 1e9 * measured["ms_per_token"] / 1e3
    assert read == pytest.approx(found["roofline"]["masked_bytes"])
    if gpu == GPUS[2].reported:
        best = measured["expected"]
        assert best["gpu"] == GPUS[2].name and best["density"] is None
        assert measured["share"] == best["ms_per_token"] / measured["ms_per_token"]
        assert measured["captured_share"] == best["captured_ms_per_token"] / measured["ms_per_token"]
    else:
        assert measured["expected"] is None and measured["share"] is None


def test_a_run_that_fails_is_no_figure(bundle: Bundle, on_stand_in: dict[str, str]) -> None:
    """A GPU answers, and its libraries are none that ONNX Runtime can start."""
    done = roofline(bundle, on_stand_in | {"LD_LIBRARY_PATH": str(stand_in.driver_alone())})
    assert done.returncode == 1 and done.stdout == ""
    assert "has a CUDA provider and cannot start it" in " ".join(done.stderr.split())


def test_without_a_gpu_nothing_is_measured(bundle: Bundle) -> None:
    done = roofline(bundle, dict(os.environ))
    found = json.loads(done.stdout)
    assert done.returncode == 0 and found["measured"] is None
    assert found["not_measured"] == "no NVIDIA GPU answers on this machine"
    assert "note: nothing was measured, since no NVIDIA GPU answers on this machine" in done.stderr


def test_the_page_has_the_tables() -> None:
    assert roofline_page.on_page() == roofline_page.made(), "run python tests/cuda/roofline_page.py"
