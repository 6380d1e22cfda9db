"""Targets are data: every file parses, the host is detected, mistakes and contradictions are named with the reason."""

import os
import platform
import re
import subprocess
from pathlib import Path

import pytest

from qsparse_export.errors import TargetError
from qsparse_export.runtimes.ort.library import open_library
from qsparse_export.targets.detect import host
from qsparse_export.targets.target import load_target, op_sets, target_names

EXPECTED = {
    *("cpu", "x86-64-v3", "x86-64-v4", "arm64", "arm64-dotprod", "raspberry-pi-4", "raspberry-pi-5", "jetson-orin"),
    *("android-arm64", "apple-silicon", "graviton3", "web", "node"),
    *("cuda", "cuda-sm80", "cuda-sm87", "cuda-sm89", "cuda-sm90"),
}
EDGE = {"raspberry-pi-4", "raspberry-pi-5", "jetson-orin", "graviton3", "apple-silicon"}


def test_the_promised_targets_are_there():
    assert set(target_names()) == EXPECTED


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_every_target_parses_under_its_own_name(name):
    target = load_target(name)
    assert target.name == name
    assert target.description
    assert "ort" in target.runtimes


@pytest.mark.parametrize("name", sorted(EDGE))
def test_a_device_that_one_can_buy_says_all_its_sizes(name):
    target = load_target(name)
    assert 0 < target.threads <= target.cores
    assert target.memory_bytes > target.l2_cache_bytes > target.l1d_cache_bytes > 0


def test_native_ops_of_every_processor_are_those_of_the_library():
    ops = frozenset(open_library().ops)
    assert op_sets()["cpu-kernels"] == ops
    native = {name: load_target(name).native_ops for name in target_names() if load_target(name).native_ops}
    assert native.keys() == EXPECTED - {"web", "node"}
    gpus = {name for name in native if name.startswith("cuda")}
    assert {native[name] for name in native.keys() - gpus} == {ops}
    assert {native[name] for name in gpus} == {op_sets()["cuda-kernels"]}


def test_native_ops_of_gpus_are_those_of_the_library():
    """As its source registers them: each type of an op is one entry."""
    source = (Path(__file__).parents[2] / "runtimes" / "cuda" / "ort_ops.cc").read_text()
    registered = set(re.findall(r"static const CudaOp<\w+<(?:k(\w+), )?", source))
    named = {"TopK": "kTopKSparsify", "NBits": "kSparseMatMulNBits"}
    ops = {op for op in registered if op.endswith("MatMul")}
    for traits, op in named.items():
        assert re.search(rf"struct {traits}Traits .*?kOp = {op};", source, re.DOTALL)
        ops.add(op.removeprefix("k"))
    assert op_sets()["cuda-kernels"] == ops


def test_gpus_compute_in_float16_where_nothing_is_asked_and_say_what_onnx_runtime_runs():
    for name in target_names():
        target = load_target(name)
        is_gpu = "cuda" in target.features
        assert target.dtypes[0] == ("float16" if is_gpu else "float32")
        assert bool(target.provider_ops) == is_gpu
    assert not load_target("cuda").provider_ops & {"BitShift", "BitwiseAnd"}, "ONNX Runtime 1.31 has no CUDA kernels"


def test_dotprod_is_where_the_processor_has_it():
    having = {name for name in target_names() if "asimddp" in load_target(name).features and name != "cpu"}
    assert having == {"arm64-dotprod", "raspberry-pi-5", "jetson-orin", "apple-silicon", "graviton3"}


def test_cpu_is_this_machine():
    target = load_target("cpu")
    assert target.arch == platform.machine()
    assert target.system == platform.system().lower()
    assert target.features  # every CPU that runs PyTorch has SSE4.2 or ASIMD
    assert target.cores == os.cpu_count()
    total = re.search(r"MemTotal: +(\d+) kB", Path("/proc/meminfo").read_text())
    assert target.memory_bytes == int(total[1]) * 1024


def test_detected_caches_are_what_getconf_says():
    found = host()
    said = subprocess.run(["getconf", "-a"], capture_output=True, text=True, check=True).stdout
    # Not the third level: on AMD getconf adds up the caches of all core complexes, of which a core sees one.
    for level, size in ((1, found.l1d_cache_bytes), (2, found.l2_cache_bytes)):
        name = f"LEVEL{level}_{'DCACHE' if level == 1 else 'CACHE'}_SIZE"
        value = re.search(rf"^{name}\s+(\d+)$", said, re.MULTILINE)
        if value and size:  # virtual machines tell of some levels here and of others there
            assert size == int(value[1])


def test_unknown_target_offers_near_names():
    with pytest.raises(TargetError, match="did you mean raspberry-pi-5"):
        load_target("raspberrypi5")


def test_own_file_is_a_target(board):
    target = load_target(board(threads="2", cores="4", memory_bytes="1_000_000"))
    assert (target.arch, target.system, target.threads, target.memory_bytes) == ("aarch64", "linux", 2, 1_000_000)
    assert target.native_ops == op_sets()["cpu-kernels"]
    assert load_target(board(native_ops='["TopKSparsify"]')).native_ops == {"TopKSparsify"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": ""}, "not TOML"),
        ({"triple": None}, "lacks triple"),
        ({"thread": "4"}, "unknown field 'thread'; did you mean threads"),
        ({"threads": '"4"'}, "threads is '4'; expected an integer"),
        ({"threads": "true"}, "threads is True; expected an integer"),
        ({"features": '"asimd"'}, "expected a list of texts"),
        ({"runtimes": "[]"}, "runtimes is empty"),
        ({"name": '"../x"'}, "the name '../x' becomes a folder's"),
        ({"triple": '"pdp11-dec-unix"'}, "triple is 'pdp11-dec-unix'; expected an architecture of x86_64"),
        ({"triple": '"aarch64"'}, "triple is 'aarch64'; expected"),
        ({"features": '["asimd", "avx2"]'}, "feature 'avx2' is none of aarch64"),
        ({"features": '["asimd", "asimdd"]'}, "feature 'asimdd' is none of aarch64; did you mean"),
        ({"features": '["asimddp"]'}, "asimddp without asimd: every device with the first has the second"),
        ({"native_ops": '"gpu-kernels"'}, "native_ops is 'gpu-kernels'"),
        ({"native_ops": "[]"}, "library is 'built' and native_ops lists no ops: an op runs natively exactly where"),
        ({"provider_ops": '"onnxruntime"'}, "provider_ops is 'onnxruntime'; did you mean onnxruntime-cuda"),
        ({"provider_ops": '["Add"]'}, "provider_ops lists ops without the feature cuda"),
        ({"provider_ops": '["Add"]', "lacking_ops": '["Add"]'}, "provider_ops and lacking_ops both list Add"),
        ({"features": '["cuda"]'}, "provider_ops lists no ops with the feature cuda"),
        ({"features": '["cuda", "sm_75"]'}, "feature 'sm_75' is none of aarch64"),
        ({"library": '"impossible"'}, "library is 'impossible' and native_ops lists ops"),
        ({"library": '"yes"'}, "library is 'yes'; expected one of built, impossible, missing"),
        ({"runtimes": '["reference"]'}, "the library is one for the runtime ort, which runtimes does not list"),
        ({"triple": '"any"', "features": "[]"}, "a library is machine code, name the machine"),
        ({"dtypes": '["bfloat16"]'}, "dtypes is .*'bfloat16'.*; expected some of float32, float16"),
        ({"dtypes": "[]"}, "dtypes is"),
        ({"memory_bytes": "-1"}, "memory_bytes is -1"),
        ({"cores": "4", "threads": "5"}, "threads is 5 on 4 cores: more threads than cores wait"),
        ({"l1d_cache_bytes": "65536", "l2_cache_bytes": "32768"}, "one closer to the core is never the larger one"),
        ({"memory_bytes": "10", "largest_file_bytes": "11"}, "a file that is loaded must fit into memory"),
    ],
)
def test_wrong_files_are_refused_with_the_reason(board, changes, message):
    with pytest.raises(TargetError, match=message):
        load_target(board(**changes))


def test_missing_and_unreadable_files_are_refused(tmp_path):
    with pytest.raises(TargetError, match="does not exist"):
        load_target(str(tmp_path / "none.toml"))
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    for name in ("folder.toml", "binary.toml"):
        with pytest.raises(TargetError, match="cannot be read as UTF-8 text"):
            load_target(str(tmp_path / name))


def test_unknown_runtime_is_refused_with_what_there_is():
    with pytest.raises(TargetError, match="runs ort, tvm, not reference"):
        load_target("raspberry-pi-5").require_runtime("reference")
