"""BitNet folders in all three storages against transformers' own layers."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import qsparse_export as qs
from qsparse_export.checkpoints.bitnet import unpack_row_blocks
from qsparse_export.checkpoints.expected import block_linears
from qsparse_export.errors import CheckpointError
from qsparse_export.nn.deploy import materialize
from qsparse_export.nn.quantizers import absmean_ternary
from qsparse_export.weights import TernaryWeight

transformers = pytest.importorskip("transformers", reason="the oracle of these tests, from the extra [hf]")
from bitnet_folders import STORAGES, masters, write  # noqa: E402
from transformers.integrations.bitnet import pack_weights  # noqa: E402

DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(autouse=True, scope="module")
def eager():
    """transformers compiles its BitNet functions; here they run as written."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("use_rms_norm", [False, True])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(("model_type", "tied"), [("bitnet", True), ("llama", False)])
def test_logits_are_those_of_transformers(tmp_path, model_type, tied, storage, use_rms_norm):
    theirs = write(tmp_path / "m", masters(model_type, tied), storage, use_rms_norm)
    model = qs.load(tmp_path / "m")
    assert (model.config.architecture, model.config.quantization) == (model_type, "bitnet")
    assert (model.config.linear_norm, model.config.linear_norm_eps) == (use_rms_norm, 1e-3)
    assert (model.config.activation, model.config.sub_norms) == (
        ("relu2", True) if model_type == "bitnet" else ("silu", False)
    )
    ids = torch.randint(0, 64, (1, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = materialize(model.config, model.weights, torch.float32)(ids)[0]
        expected = theirs(ids).logits
    # An activation on the border of two integers may round either way.
    assert (ours - expected).norm() < 1e-3 * expected.norm()
    assert torch.equal(ours.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("storage", ["multiply", "divide"])
def test_packed_linears_are_ternary_weights_of_logical_shape(tmp_path, storage):
    write(tmp_path / "m", masters(), storage)
    model = qs.load(tmp_path / "m")
    source = masters().state_dict()
    for name, shape in block_linears(model.config).items():
        assert model.weights.shapes[f"{name}.weight"] == shape
        weight = model.weights.read(f"{name}.weight")
        values, scale = absmean_ternary(source[f"{name}.weight"])
        assert isinstance(weight, TernaryWeight) and weight.values.dtype == torch.int8
        assert torch.equal(weight.values, values.to(torch.int8)) and weight.scale == pytest.approx(
            float(scale), rel=1e-6
        )


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 23), k=st.integers(1, 9), seed=st.integers(0, 1000))
def test_unpacking_inverts_transformers_packing_for_any_number_of_rows(n, k, seed):
    values = torch.from_numpy(np.random.default_rng(seed).integers(-1, 2, (n, k)).astype(np.int8))
    assert torch.equal(unpack_row_blocks(pack_weights(values.clone()), n, "w"), values)


def test_values_that_transformers_saved_unpacked(tmp_path):
    write(tmp_path / "m", masters(), "multiply")
    packed = qs.load(tmp_path / "m").weights
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.dtype == torch.uint8:
            tensors[name] = packed.read(name).values.to(torch.bfloat16)
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    again = qs.load(tmp_path / "m").weights
    assert torch.equal(again.read(DOWN).values, packed.read(DOWN).values)
    tensors[DOWN][0, 0] = 0.5
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"tensor {DOWN} holds values other than"):
        qs.load(tmp_path / "m").weights.read(DOWN)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (DOWN, torch.full((8, 44), 255, dtype=torch.uint8), "2-bit code 3"),
        (DOWN, torch.zeros((9, 44), dtype=torch.uint8), r"packed as \[9, 44\].*\[8, 44\]"),
        (DOWN, torch.zeros((32, 44), dtype=torch.int32), "I32"),
        (DOWN, torch.zeros((8, 44)), "F32"),
        (f"{DOWN}_scale", torch.tensor([float("nan")]), "weight_scale is nan"),
        (f"{DOWN}_scale", torch.tensor([0.0]), "weight_scale is 0.0"),
        (f"{DOWN}_scale", torch.ones(2), r"weight_scale is F32 \[2\]"),
        (f"{DOWN}_scale", None, "weight_scale is missing"),
        (DOWN, None, "down_proj.weight.*missing"),
    ],
)
def test_damaged_packed_weights_name_the_tensor(tmp_path, name, tensor, message):
    write(tmp_path / "m", masters(), "multiply")
    tensors = load_file(tmp_path / "m" / "model.safetensors") | {name: tensor}
    save_file({n: t for n, t in tensors.items() if t is not None}, tmp_path / "m" / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        qs.load(tmp_path / "m").weights.read(DOWN)


def test_packed_weights_without_or_with_the_wrong_quantization_config(tmp_path):
    write(tmp_path / "m", masters(), "multiply")
    path = tmp_path / "m" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"quantization_config": None}))
    with pytest.raises(CheckpointError, match="weight_scale belongs to ternary weights"):
        qs.load(tmp_path / "m")
    online = {"quant_method": "bitnet"} | STORAGES["online"]
    path.write_text(json.dumps(config | {"quantization_config": online}))
    with pytest.raises(CheckpointError, match="weight_scale belongs to ternary weights"):
        qs.load(tmp_path / "m")
