"""A whole module of Relax on ``tvm.cuda(0)`` without a GPU; and what the stand-in for CUDA does not let pass."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import relax_module
from executing_cuda import Call, Done, StandIn, StandInError
from gpu_cases import EPS
from sparse_matmul_cases import SparseMatMul, Weights, integer_weights
from ternary_cases import ternary_weights

from qsparse_export.formats import ternary
from qsparse_export.ops import ternary_matmul
from qsparse_export.ops import topk_sparsify as topk_op
from qsparse_export.runtimes.tvm.gpu.compile_gpu import cuda_environment

HERE = Path(__file__).parent
CALLS = [
    Call(("x", "w", "scales", "nbits_w", "nbits_scales", "cache"), ("ternary", "nbits", "p", "sum"), ("cache",))
] * 3
SAID = {
    "nothing": "",
    "freed argument": "store_kernel: argument 0 is byte 0 of a freed allocation of 400 bytes",
    "freed twice": "what is freed is byte 0 of a freed allocation of 400 bytes",
    "kept address": "store_kernel: an access to byte 0 of a freed allocation of 400 bytes",
    "host memory": "store_kernel: argument 0 is no device memory",
    "null": "store_kernel: an access to a null pointer",
    "misaligned": "store_kernel: argument 0 is a misaligned address",
    "just behind": "store_kernel: argument 0: bytes behind an allocation of 400 bytes changed",
    "far behind": "store_kernel: an access to 48 bytes behind the end of an allocation of 400 bytes",
    "in front": "store_kernel: argument 0: bytes in front of an allocation of 400 bytes changed",
    "read behind": "bytes behind the end of an allocation of 400 bytes",
    "large block": "copy_kernel: a block of 1025 x 1 x 1 threads",
    "larger block than compiled for": "some_wait_kernel: a block of 65 threads of a kernel that was compiled for 64",
    "empty grid": "some_wait_kernel: a grid without blocks",
    "missed barrier": "waits in __syncthreads for others that have ended",
    "shared memory": "large_kernel: 65536 bytes of shared memory",
    "dynamic shared memory": "dynamic_kernel: 49153 bytes of shared memory",
    "beyond a copy": "a copy to 404 bytes of which an allocation of 400 bytes has 400",
    "memory in a capture": "cudaMalloc while a stream captures",
    "default stream in a capture": "work on the default stream while another one captures",
    "unknown image": "an image that nvcc did not make while its sources were kept",
}


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    weights = ternary_weights(rng, relax_module.MIDDLE, relax_module.WIDTH, "normal")
    nbits = nbits_weights()
    return {
        "x": rng.standard_normal((relax_module.ROWS, relax_module.WIDTH)).astype(np.float32),
        "w": np.ascontiguousarray(ternary.pack(weights)).view(np.uint32),
        "scales": np.array([0.25], np.float32),
        "nbits_w": nbits.rows.view(np.uint32),
        "nbits_scales": nbits.scales.view(np.uint32),
        "cache": rng.standard_normal((relax_module.ROWS, relax_module.OUTPUTS)).astype(np.float32),
    }


def nbits_weights() -> Weights:
    rng = np.random.default_rng(8)
    return integer_weights(rng, (relax_module.OUTPUTS,), relax_module.MIDDLE, relax_module.BITS, relax_module.GROUP)


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> StandIn:
    return StandIn(tmp_path_factory.mktemp("stand-in"))


def exported(stand_in: StandIn) -> Path:
    """The module, compiled once, while the stand-in keeps the sources."""
    library = stand_in.folder / "module.so"
    if library.exists():
        return library
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", stand_in.compiling()["PATH"])
        environment = cuda_environment(stand_in.folder)
    command = [sys.executable, "-P", HERE / "relax_module.py", library, "sm_80"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    stand_in.build()
    return library


def check(arrays: dict[str, np.ndarray], runs: list[Done]) -> None:
    """Against the references: bit for bit, but for sums of floats."""
    cache = arrays["cache"]
    for run in runs:
        masked = topk_op.reference(arrays["x"], relax_module.K_TERNARY, 0, "none")
        packed = arrays["w"].view(np.uint8)
        expected = ternary_matmul.reference(masked, packed, arrays["scales"], relax_module.MIDDLE)
        np.testing.assert_array_equal(run.arrays["ternary"], expected)
        truth = SparseMatMul(expected, nbits_weights(), relax_module.K_NBITS, 0, False, fixed_point=False)
        truth.check(run.arrays["nbits"])
        exact = run.arrays["nbits"].astype(np.float64)
        exponentials = np.exp(exact - exact.max(axis=1, keepdims=True))
        probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
        # A float32 difference of x and the maximum is off by EPS of it, and so is the exponential, and twice by two units
        # in the last place; the sum by EPS a term.
        spread = np.abs(exact - exact.max(axis=1, keepdims=True)).max()
        allowed = probabilities * EPS * (2 * spread + relax_module.OUTPUTS + 16) + np.finfo(np.float32).tiny
        assert (np.abs(run.arrays["p"] - probabilities) <= allowed).all()
        cache = cache + run.arrays["p"]
        np.testing.assert_array_equal(run.arrays["cache"], cache)
        np.testing.assert_array_equal(run.arrays["sum"], cache)


def test_a_relax_module(stand_in: StandIn, arrays: dict[str, np.ndarray]) -> None:
    runs = stand_in.run(exported(stand_in), arrays, CALLS)
    check(arrays, runs)
    names = {str(kernel.attrs["global_symbol"]) for each in relax_module.programs() for kernel in each.kernels}
    kernels = {f"{name}_kernel": 1 for name in (*names, "softmax", "accumulate")}
    assert [run.launches for run in runs] == [kernels] * 3, "also where a graph launches them"
    graphs = [run.counts.get("graphs", 0) for run in runs]
    assert graphs[0] == 0 and graphs[1] == graphs[2] > 0, "the first run captures"
    assert not any(copies in run.counts for run in runs for copies in ("host to device", "device to host"))
    assert runs[1].counts["allocated_bytes"] == runs[2].counts["allocated_bytes"]


def test_an_overrun_reaches_the_caller(stand_in: StandIn, arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    """The same module on kernels of which one reads far beyond its argument."""
    library, broken = exported(stand_in), StandIn(tmp_path)
    for kept in stand_in.folder.glob("kernels-*"):
        copy = tmp_path / kept.name
        copy.mkdir()
        (copy / "image").write_bytes((kept / "image").read_bytes())
        source = (kept / "source.cu").read_text("utf-8")
        assert "given_ptr[(" in source
        (copy / "source.cu").write_text(source.replace("given_ptr[(", "given_ptr[4000 + ("), "utf-8")
    broken.build()
    with pytest.raises(
        StandInError, match=r"accumulate_kernel: an access to .* behind the end of an allocation of 480"
    ):
        broken.run(library, arrays, CALLS)


def test_a_module_whose_sources_were_not_kept(stand_in: StandIn, arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    with pytest.raises(StandInError, match="an image that nvcc did not make while its sources were kept"):
        StandIn(tmp_path).run(exported(stand_in), arrays, CALLS)


@pytest.fixture(scope="module")
def misused(tmp_path_factory: pytest.TempPathFactory) -> StandIn:
    """Has kernels of the test's own; no machine code is loaded."""
    stand_in = StandIn(tmp_path_factory.mktemp("misused"))
    kept = stand_in.folder / "kernels"
    kept.mkdir()
    (kept / "image").write_bytes(b"an image of these kernels")
    (kept / "source.cu").write_bytes((HERE / "misused_kernels.cu").read_bytes())
    stand_in.build()
    return stand_in


@pytest.mark.parametrize("name", SAID)
def test_what_the_stand_in_says(misused: StandIn, name: str) -> None:
    said = misused.python(HERE / "misuses.py", name).strip()
    assert SAID[name] in said
    assert bool(said) == (name != "nothing")
