"""What a target cannot do is refused at export, before or instead of work, with the reason; nothing is left behind."""

import dataclasses
from pathlib import Path

import pytest
import torch

import qsparse_export as qs
from qsparse_export.checkpoints.model import Model
from qsparse_export.checkpoints.shapes import RandomWeights
from qsparse_export.config import ModelConfig, SparsityRule, TopK
from qsparse_export.errors import BundleError, TargetError, UsageError
from qsparse_export.nn.decoder import Decoder
from qsparse_export.runtimes.ort.library import LIBRARY_NAME
from qsparse_export.targets.detect import host

TINY = ModelConfig(
    "llama", 64, 32, 44, layers=1, heads=2, kv_heads=1, head_dim=16, sparsity=(SparsityRule("*", TopK(0.5)),)
)


@pytest.fixture(scope="module")
def decoder():
    torch.manual_seed(0)
    return Decoder(TINY).eval()


@pytest.fixture
def export(decoder, tmp_path):
    def run(target, **options):
        return qs.export(decoder, target=target, out=tmp_path / "out", **({"verify": "none"} | options))

    return run


def refused(export, tmp_path: Path, message: str, target: str, error: type[Exception] = TargetError, **options) -> None:
    with pytest.raises(error, match=message):
        export(target, **options)
    assert not list(tmp_path.glob("*out*"))


def test_cuda_is_exported_where_bodies_are_asked_for(export):
    bundle = export("cuda-sm87", portable=True)
    assert bundle.manifest["native"] is False
    assert bundle.manifest["library"] is None
    assert bundle.manifest["target"]["features"] == ["cuda", "sm_87"]


@pytest.mark.parametrize(
    ("name", "tool"), [("android-arm64", "compiler and C library of the Android NDK"), ("apple-silicon", "Apple's SDK")]
)
def test_systems_out_of_reach_name_what_it_would_take(export, tmp_path, name, tool):
    refused(export, tmp_path, f"target {name}: its native code needs .*{tool}.*--portable", name)
    assert export(name, portable=True).manifest["target"]["name"] == name


@pytest.mark.parametrize("name", ["web", "node"])
def test_where_no_library_can_be_loaded_the_bodies_are_the_bundle(export, name):
    bundle = export(name, verify="full")
    assert bundle.manifest["native"] is False
    assert LIBRARY_NAME not in bundle.manifest["files"]
    assert "custom_ops_library" not in (bundle.path / "genai_config.json").read_text()
    assert [path["path"] for path in bundle.manifest["parity"]["paths"]] == ["bodies"]


def test_a_number_format_that_is_missing(export, board, tmp_path):
    target = board(triple=f'"{host().triple}"', features="[]", dtypes='["float32"]')
    refused(
        export, tmp_path, "target board computes in float32, not in float16: --weights keep", target, weights="fp16"
    )
    assert export(target).manifest["dtype"] == "float32"


def test_a_bundle_larger_than_memory(export, board, tmp_path):
    target = board(triple=f'"{host().triple}"', features="[]", memory_bytes="20_000")
    refused(export, tmp_path, r"the bundle has [\d,]+ bytes, and target board has a memory of 20,000", target)


def test_memory_holds_the_library_too(export, board, tmp_path):
    size = sum(file["bytes"] for file in export("cpu", portable=True).manifest["files"].values())
    target = board(triple=f'"{host().triple}"', features="[]", memory_bytes=str(size + 100))
    with pytest.raises(TargetError, match=r"has a memory of"):
        export(target, force=True)
    assert export(target, force=True, portable=True).manifest["native"] is False


def test_a_file_larger_than_the_target_loads(export, board, tmp_path):
    target = board(triple='"any"', features="[]", native_ops="[]", library='"impossible"', largest_file_bytes="10_000")
    refused(
        export, tmp_path, "the weights' file has [0-9,]+ bytes, and target board loads files of at most 10,000", target
    )


def test_the_browsers_limit_is_chromes_largest_array():
    from qsparse_export.targets.target import load_target

    web = load_target("web")
    web.require_room({"model.onnx.data": 0x7FE00000})
    with pytest.raises(TargetError, match="loads files of at most"):
        web.require_room({"model.onnx.data": 0x7FE00001})


def test_weights_beyond_the_browsers_limit(tmp_path):
    """An embedding and a head of 1 GiB each, neither of which is ever made."""
    config = dataclasses.replace(TINY, vocab_size=1 << 23)
    model = Model.in_memory("wide", config, RandomWeights(config, 0))
    with pytest.raises(
        TargetError, match=r"the weights' file has 2,147,\d{3},\d{3} bytes, and target web loads files of"
    ):
        qs.export(model, target="web", out=tmp_path / "out", verify="none")
    assert not list(tmp_path.glob("*out*"))


def test_ternary_bodies_that_unpack_more_than_memory_holds(board, tmp_path):
    """Only with kernels does nothing become larger than it is in the file."""
    config = dataclasses.replace(TINY, architecture="bitnet", quantization="bitnet", intermediate_size=1408)
    model = Model.in_memory("ternary", config, RandomWeights(config, 0))
    target = board(triple=f'"{host().triple}"', features="[]", memory_bytes="1_000_000")
    with pytest.raises(
        TargetError, match=r"opening the weights, ternary ones unpacked, takes 1,[\d,]+ bytes, and target"
    ):
        qs.export(model, target=target, out=tmp_path / "out", verify="none", portable=True)
    assert not list(tmp_path.glob("*out*"))
    assert qs.export(model, target=target, out=tmp_path / "out", verify="none").manifest["native"] is True


def test_native_ops_that_the_library_lacks(export, board, tmp_path):
    target = board(triple=f'"{host().triple}"', features="[]", native_ops='["TopKSparsify", "FlashSparse"]')
    refused(export, tmp_path, "names the native ops FlashSparse, which the kernel library lacks; it has", target)


def test_the_bench_program_is_native(export, tmp_path):
    refused(export, tmp_path, "there is none for target web with ort", "web", with_bench=True)
    refused(
        export, tmp_path, "there is none for target cpu with reference", "cpu", runtime="reference", with_bench=True
    )


def test_the_bench_program_needs_a_decoder(tmp_path):
    with pytest.raises(UsageError, match="qsparse-device-bench generates tokens, which a module does not"):
        qs.export(torch.nn.Linear(4, 4), example_inputs=(torch.ones(1, 4),), out=tmp_path / "out", with_bench=True)


def test_a_bundle_for_another_machine_is_not_opened_but_for_its_bodies(export):
    bundle = export("arm64" if host().arch == "x86_64" else "x86-64-v3", portable=True)
    bundle.manifest["native"] = True  # as a bundle with a library says
    with pytest.raises(
        TargetError, match=r"was made for (arm64 \(aarch64|x86-64-v3 \(x86_64) linux with .*this machine is"
    ):
        bundle.open()
    assert bundle.open(native=False).generate([1, 2], 3, stop_at_eos=False).tokens


def test_features_that_this_machine_lacks_are_named_with_those_that_it_has(export, board):
    bundle = export("cpu", portable=True)
    bundle.manifest["native"] = True
    bundle.manifest["target"]["features"] = [*bundle.manifest["target"]["features"], "avx10_of_tomorrow"]
    have = ", ".join(sorted(host().features))
    with pytest.raises(TargetError, match=rf"with avx10_of_tomorrow\), .* without that: it has {have}; "):
        bundle.open()


def test_a_damaged_target_record_is_refused(export):
    bundle = export("cpu")
    bundle.manifest["target"] = {"name": "cpu"}
    with pytest.raises(BundleError, match=r"manifest\.json.*target"):
        bundle.open()
