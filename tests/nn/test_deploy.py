from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from qsparse_export.config import TopK
from qsparse_export.errors import CheckpointError
from qsparse_export.formats.ternary import row_bytes, unpack
from qsparse_export.nn.decoder import Decoder
from qsparse_export.nn.deploy import deploy, deployed_tensor, materialize
from qsparse_export.nn.deployed import DenseLinear, TernaryLinear
from qsparse_export.nn.linear import BitLinear, QSparseLinear
from qsparse_export.weights import StateDict, TernaryWeight


class Ternary:
    """A source whose linears are stored ternary, as BitNet's packed checkpoints."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self.shapes = {name: tuple(t.shape) for name, t in tensors.items()}

    def read(self, name: str) -> torch.Tensor | TernaryWeight:
        tensor = self.tensors[name]
        if not name.endswith("_proj.weight"):
            return tensor
        values = torch.randint(-1, 2, tensor.shape, generator=torch.Generator().manual_seed(len(name)))
        return TernaryWeight(values.to(torch.int8), 0.125)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@torch.no_grad()
def test_ternary_form_is_bit_equal_to_the_training_form(dtype):
    linear = BitLinear(70, 131, TopK(0.5), bias=True, linear_norm_eps=1e-5).to(dtype)
    deployed = deploy(linear)
    assert isinstance(deployed, TernaryLinear)
    assert deployed.packed.shape == (70, row_bytes(131)) and deployed.packed.dtype == torch.uint8
    assert deployed.scale.shape == (1,) and deployed.scale.dtype == torch.float32
    x = torch.randn(4, 70).to(dtype)
    assert torch.equal(deployed(x), linear(x))
    scale = torch.rand(4, 1) * 100
    assert torch.equal(deployed(x, scale), linear(x, scale))


@torch.no_grad()
def test_dense_form_is_channel_major_and_contiguous():
    linear = QSparseLinear(7, 5, TopK(0.5), bias=True)
    deployed = deploy(linear)
    assert isinstance(deployed, DenseLinear)
    assert deployed.weight_t.is_contiguous() and torch.equal(deployed.weight_t, linear.weight.t())
    x = torch.randn(2, 3, 7)
    torch.testing.assert_close(deployed(x), linear(x))


@torch.no_grad()
def test_the_original_stays_as_it_is(configs, tiny_decoder):
    decoder = tiny_decoder(configs["bitnet"])
    before = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    deployed: Any = deploy(decoder).half()
    assert deployed.model.embed_tokens.weight.dtype == torch.float16
    assert deployed.model.layers[0].mlp.up_proj.scale.dtype == torch.float32
    after = decoder.state_dict()
    assert all(after[n].dtype == t.dtype and torch.equal(after[n], t) for n, t in before.items())
    assert all(p.requires_grad for p in decoder.parameters())


def test_deploying_twice_changes_nothing_more(configs, tiny_decoder):
    once = deploy(tiny_decoder(configs["llama"]))
    twice = deploy(once)
    assert once.state_dict().keys() == twice.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(once.state_dict().values(), twice.state_dict().values(), strict=True))


def test_packed_weights_unpack_to_the_rounded_master_weights():
    weight = torch.randn(10, 6)
    packed = deployed_tensor("a.packed", StateDict({"a.weight": weight}))
    alpha = weight.abs().mean()
    expected = (weight / alpha).round().clamp(-1, 1)
    np.testing.assert_array_equal(unpack(packed.numpy(), 10), expected.numpy().astype(np.int8))
    torch.testing.assert_close(deployed_tensor("a.scale", StateDict({"a.weight": weight})), alpha.reshape(1))


@pytest.mark.parametrize("name", ["llama", "qwen2", "bitnet", "bitnet-linear-norm", "moe", "bitnet-moe"])
@torch.no_grad()
def test_meta_form_streamed_tensor_by_tensor_equals_the_deployed_module(configs, tiny_decoder, name):
    decoder = tiny_decoder(configs[name])
    source = StateDict(decoder.state_dict())
    with torch.device("meta"):
        meta = deploy(Decoder(configs[name]))
    expected = deploy(decoder).state_dict()
    assert {n: (t.shape, t.dtype) for n, t in meta.state_dict().items()} == {
        n: (t.shape, t.dtype) for n, t in expected.items()
    }
    for tensor_name, tensor in expected.items():
        assert torch.equal(deployed_tensor(tensor_name, source), tensor), tensor_name
    ids = torch.tensor([[1, 2, 3]])
    filled = materialize(configs[name], source, torch.float32)
    torch.testing.assert_close(filled(ids)[0], decoder(ids)[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_weights_that_are_ternary_already_are_taken_as_they_are(configs, tiny_decoder):
    """alpha is the stored scale; recomputing mean|W| would shrink it by the share of zeros."""
    source = Ternary(tiny_decoder(configs["bitnet"]).state_dict())
    name = "model.layers.0.mlp.down_proj"
    stored = source.read(f"{name}.weight")
    assert isinstance(stored, TernaryWeight)
    assert deployed_tensor(f"{name}.scale", source).tolist() == [0.125]
    np.testing.assert_array_equal(unpack(deployed_tensor(f"{name}.packed", source).numpy(), 48), stored.values.numpy())
    torch.testing.assert_close(deployed_tensor(f"{name}.weight_t", source), stored.values.t() * 0.125)
    module: Any = materialize(configs["bitnet"], source, torch.float16)
    assert module.model.layers[0].mlp.down_proj.scale.dtype == torch.float32
    assert module(torch.tensor([[1, 2, 3]]))[0].dtype == torch.float16


def test_missing_and_misshapen_tensors_are_named(configs, tiny_decoder):
    state = tiny_decoder(configs["llama"]).state_dict()
    with pytest.raises(CheckpointError, match=r"no tensor for a\.packed; did you mean b\.weight"):
        deployed_tensor("a.packed", StateDict({"b.weight": torch.zeros(1, 1)}))
    missing = {n: t for n, t in state.items() if n != "model.norm.weight"}
    with pytest.raises(CheckpointError, match=r"no tensor for model\.norm\.weight"):
        materialize(configs["llama"], StateDict(missing), torch.float32)
    state["model.layers.1.mlp.up_proj.weight"] = torch.zeros(131, 48)
    with pytest.raises(CheckpointError, match=r"up_proj\.weight_t has shape \[48, 131\]; the config says \[48, 130\]"):
        materialize(configs["llama"], StateDict(state), torch.float32)
