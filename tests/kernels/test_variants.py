"""Every variant that this machine supports, in this process, against NumPy."""

import ctypes
import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from evidence import EXECUTED, OP_NAMES, Evidence, Record
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from kernel_call import Case
from kernel_cases import OPS, cases_of, threaded_cases_of
from kernel_inputs import KINDS, as_type, magnitudes
from kernel_runs import Kernels
from quantize_cases import Quantize
from sparse_ternary_cases import SparseTernary
from ternary_cases import Ternary, ternary_weights
from topk_cases import TopK

from qsparse_export.errors import TargetError
from qsparse_export.runtimes.ort.library import open_library

SUPPORTED = open_library().supported
DEPEND_ON_THE_VARIANT = {"sparse_matmul"}  # float weights, and the GEMM: the generic one has no fused multiply-add
PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)


@pytest.mark.parametrize("variant", SUPPORTED)
@pytest.mark.parametrize("op", OPS)
def test_all_cases(kernels: Kernels, variant: str, op: str, evidence: Record) -> None:
    cases = cases_of(op)
    assert len(cases) >= OPS[op].LEAST_CASES
    share = max(kernels.check(variant, case) for case in cases)
    evidence(Evidence(OP_NAMES[op], "C++", variant, EXECUTED, error_share=share))


def test_every_op_has_a_module() -> None:
    """An op that the library exports but no case calls would be untested."""
    listed = exported_names(open_library().path)
    ops = {name.removesuffix("_scratch_bytes") for name in listed if name.endswith("_scratch_bytes")}
    assert ops == {cases_of(op)[0].call().function for op in OPS}


@pytest.mark.parametrize("op", OPS)
def test_threads_and_variants_give_the_same_bits(kernels: Kernels, op: str) -> None:
    """Also where a reference allows an error: what differs in the last bit would make two machines disagree."""
    groups = [[variant] for variant in SUPPORTED] if op in DEPEND_ON_THE_VARIANT else [SUPPORTED]
    threaded = threaded_cases_of(op)[-6:]
    assert len(threaded) >= 3
    for case, variants in itertools.product(threaded, groups):
        results = {
            tuple(y.tobytes() for y in kernels.run(variant, replace(case, workers=workers)))
            for variant in variants
            for workers in (1, 2, 3, 7, 64)
        }
        assert len(results) == 1, case


@pytest.mark.parametrize("dtype", (np.float32, np.float16))
@pytest.mark.parametrize(("block", "k"), ((0, 90), (32, 16), (0, 257)))
@pytest.mark.parametrize("rescale", (False, True))
def test_fused_is_bit_equal_to_its_parts(kernels: Kernels, dtype: type, block: int, k: int, rescale: bool) -> None:
    """Also where the sums of the L2 norm round: the same kernels add them in the same order."""
    rng = np.random.default_rng(8)
    for kind in ("normal", "nan", "inf", "tiny", "huge"):
        x = as_type(magnitudes(rng, 3, 257, kind), dtype)
        matrices = tuple(ternary_weights(rng, n, 257, "normal") for n in (130, 5, 300))
        case = SparseTernary(x, matrices, k, block, rescale)
        for variant in SUPPORTED:
            (masked,) = kernels.run(variant, TopK(x, k, block, rescale))
            parts = [
                kernels.run(variant, Ternary(masked, weights, scale))[0]
                for weights, scale in zip(matrices, case.scales, strict=True)
            ]
            np.testing.assert_array_equal(kernels.run(variant, case)[0], np.concatenate(parts, axis=1))


@PROPERTY
@given(
    m=st.integers(0, 12),
    k=st.integers(1, 300),
    split=st.lists(st.integers(0, 300), max_size=4),
    kept=st.floats(0, 1),
    workers=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_fused_properties(
    kernels: Kernels, m: int, k: int, split: list[int], kept: float, workers: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    x = as_type(magnitudes(rng, m, k, KINDS[seed % len(KINDS)]), np.float16 if seed % 2 else np.float32)
    matrices = tuple(ternary_weights(rng, n, k, "normal") for n in split)
    case = SparseTernary(x, matrices, int(kept * k), workers=workers)
    for variant in SUPPORTED:
        kernels.check(variant, case)


def test_top_k_in_place(kernels: Kernels) -> None:
    """y may be x, as ONNX Runtime reuses the buffer."""
    case = TopK(magnitudes(np.random.default_rng(4), 4, 513, "ties"), 100)
    for variant in SUPPORTED:
        call = case.call()
        y = call.inputs["x"] = call.outputs["y"] = case.x.copy()
        assert kernels.status(call, variant) == 0
        case.check(y)


def test_half_conversions_are_exact(kernels: Kernels) -> None:
    """All 65536 halves survive, and floats between halves round to nearest even: top-k of k = width converts twice."""
    every = np.arange(65536, dtype=np.uint16).view(np.float16)[None]
    for variant in SUPPORTED:
        (result,) = kernels.run(variant, TopK(every, 65536))
        np.testing.assert_array_equal(result, every)
    x = magnitudes(np.random.default_rng(5), 64, 3, "mixed").astype(np.float16)
    weights = ternary_weights(np.random.default_rng(6), 300, 3, "normal")
    for variant in SUPPORTED:
        for scale in (1e-7, 1e-6, 0.01, 1.0, 300.0, 60000.0):
            kernels.check(variant, Ternary(x, weights, scale))


@PROPERTY
@given(data=st.data())
def test_top_k_properties(kernels: Kernels, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([np.float32, np.float16]))
    shape = data.draw(st.tuples(st.integers(0, 4), st.integers(0, 70)))
    x = data.draw(hnp.arrays(dtype, shape, elements=st.floats(width=16 if dtype == np.float16 else 32)))
    block = data.draw(st.integers(0, 40))
    k = data.draw(st.integers(0, block or shape[1]))
    for variant in SUPPORTED:
        (y,) = kernels.run(variant, TopK(x, k, block))
        TopK(x, k, block).check(y)
        (again,) = kernels.run(variant, TopK(y, k, block))
        np.testing.assert_array_equal(again, y, err_msg="selecting twice changes nothing")


@PROPERTY
@given(
    m=st.integers(0, 20),
    k=st.integers(0, 600),
    n=st.integers(0, 600),
    density=st.sampled_from([0.0, 0.05, 0.4, 0.9, 1.0]),
    workers=st.integers(1, 4),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**32 - 1),
)
def test_ternary_properties(
    kernels: Kernels, m: int, k: int, n: int, density: float, workers: int, kind: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    x = as_type(magnitudes(rng, m, k, kind), np.float16 if seed % 2 else np.float32)
    x[:, rng.random(k) >= density] = 0
    case = Ternary(x, ternary_weights(rng, n, k, kind), 0.5, workers)
    for variant in SUPPORTED:
        kernels.check(variant, case)


@PROPERTY
@given(
    groups=st.lists(st.sampled_from([0, 1, 15, 16, 31, 63, 64, 127]), min_size=1, max_size=24),
    signs=st.sampled_from(["plus", "minus", "both"]),
    weight=st.sampled_from([-1, 1]),
    workers=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_sums_stay_exact_however_large_their_activations_are(
    kernels: Kernels, groups: list[int], signs: str, weight: int, workers: int, seed: int
) -> None:
    """Kernels that keep int16 sums must move them on in time: groups of 32 channels have int8 magnitudes of this size."""
    rng = np.random.default_rng(seed)
    q = np.repeat(groups, 32).astype(np.float32)
    q *= {"plus": 1, "minus": -1, "both": rng.choice([-1, 1], q.size)}[signs]
    q[rng.integers(q.size)] = 127  # which makes the others as they are
    weights = np.full((130, q.size), weight, np.int8)
    for variant in SUPPORTED:
        kernels.check(variant, Ternary(q[None], weights, 0.5, workers))


def test_padding_of_weights_is_never_seen(kernels: Kernels) -> None:
    """What the pad bits of a row hold changes no output."""
    rng = np.random.default_rng(7)
    case = Ternary(magnitudes(rng, 5, 64, "normal"), ternary_weights(rng, 130, 64, "normal"), pad_byte=0xAA)
    for variant in SUPPORTED:
        kernels.check(variant, case)


@pytest.mark.parametrize("variant", ("axv2", "AVX2", "sse"))
def test_unknown_variant_is_refused(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QSPARSE_VARIANT", variant)
    with pytest.raises(TargetError, match=f"{variant} names no kernel variant; supported here: generic"):
        open_library().chosen()


def test_variants_of_other_processors_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    library = open_library()
    assert library.variants == ("generic", "avx2", "avxvnni", "avx512vnni", "neon", "neondot", "neoni8mm")
    for variant in set(library.variants) - set(library.supported):
        monkeypatch.setenv("QSPARSE_VARIANT", variant)
        with pytest.raises(TargetError, match=f"{variant} cannot run on this machine; supported here: generic"):
            library.chosen()
    for variant in library.supported:
        monkeypatch.setenv("QSPARSE_VARIANT", variant)
        assert library.chosen() == variant
    monkeypatch.setenv("QSPARSE_VARIANT", "")
    assert library.chosen() == library.supported[-1]


def test_bad_arguments_have_a_status(kernels: Kernels) -> None:
    handle = kernels.library.handle
    handle.qsk_status_message.restype = ctypes.c_char_p
    x = np.zeros((2, 8), np.float32)

    def status(case: Case, scratch_bytes: int | None = None, **fields: int) -> int:
        call = case.call()
        for name, value in fields.items():
            setattr(call.args, name, value)
        return kernels.status(call, scratch_bytes=scratch_bytes)

    assert status(TopK(x, 9)) == 4
    assert status(TopK(x, -1)) == 4
    assert status(TopK(x, 5, block=4)) == 4
    assert status(TopK(x, 4, block=4)) == 0
    assert status(TopK(x, 4), scratch_bytes=0) == 5
    assert status(TopK(x, 4), type=3) == 3
    assert status(Quantize(x), rows=-1) == 2
    dense = Ternary(x, np.zeros((3, 8), np.int8))
    assert status(dense, scratch_bytes=64) == 5
    assert status(dense, k=-1) == 2
    assert status(dense, k=9_000_000) == 2
    sparse = SparseTernary(x, (np.zeros((3, 8), np.int8),) * 2, 8)
    assert status(sparse) == 0
    assert status(sparse, scratch_bytes=64) == 5
    for k, block in ((9, 0), (-1, 0), (5, 4)):
        assert status(sparse, top_k=k, block=block) == 4
    assert status(sparse, top_k=2, block=-1) == 2
    assert status(SparseTernary(x, sparse.matrices * 40, 8)) == 2
    messages = [handle.qsk_status_message(status) for status in range(9)]
    assert len(set(messages)) == 9


def exported_names(path: Path) -> set[str]:
    command = ["nm", "-D", "--defined-only", str(path)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {line.split()[-1] for line in listed.splitlines()}


def test_only_the_c_interface_is_exported() -> None:
    names = exported_names(open_library().path)
    assert "RegisterCustomOps" in names
    strangers = [name for name in names if not name.startswith(("RegisterCustomOps", "qsk_", "qsparse_ort_"))]
    assert strangers == []


def test_loading_needs_no_onnxruntime() -> None:
    code = "from qsparse_export.runtimes.ort.library import open_library; print(open_library().supported)"
    done = subprocess.run([sys.executable, "-P", "-c", code + "; import sys; assert 'onnxruntime' not in sys.modules"],
                          env=dict(os.environ), capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "generic" in done.stdout
