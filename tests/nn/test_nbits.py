"""The deployed n-bit forms: one matrix at a time from a source, and whole modules, against the floats that they stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qsparse_export.config import TopK
from qsparse_export.errors import CheckpointError, UsageError
from qsparse_export.nn import quantized_source
from qsparse_export.nn.decoder import Decoder
from qsparse_export.nn.deploy import deploy, deployed_tensor, materialize
from qsparse_export.nn.deployed import DenseLinear, NBitsLinear, TernaryLinear
from qsparse_export.nn.linear import QSparseLinear
from qsparse_export.nn.nbits_head import NBitsEmbedding, NBitsHead
from qsparse_export.nn.quantized_source import QuantizedSource
from qsparse_export.ops.dense_matmul_nbits import dequantized_rows
from qsparse_export.ops.sparse_matmul_nbits import dequantized
from qsparse_export.weight_formats import GROUP_FORMATS, GroupFormat, WeightFormats
from qsparse_export.weights import StateDict, TernaryWeight

INT4, INT8 = GROUP_FORMATS["int4"], GROUP_FORMATS["int8"]
BOTH = WeightFormats(INT4, INT8)
CASES = {"llama": BOTH, "qwen2": BOTH, "moe": BOTH, "relu2": WeightFormats(INT8), "bitnet": WeightFormats(None, INT4)}


def source_of(decoder: Decoder, formats: WeightFormats) -> QuantizedSource:
    return QuantizedSource(StateDict(decoder.state_dict()), formats, decoder.config.tied_embeddings)


@torch.no_grad()
def test_linear_is_the_product_with_the_dequantised_matrix_mask_and_bias():
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up_proj = QSparseLinear(70, 131, TopK(0.5), bias=True)

    module = Model()
    deployed: Any = deploy(module, WeightFormats(INT4)).up_proj
    assert isinstance(deployed, NBitsLinear) and deployed.format == INT4
    matrix = dequantized(deployed.packed, deployed.scales, 131, 4, 32)
    expected = QSparseLinear(70, 131, TopK(0.5), bias=True)
    expected.weight.copy_(matrix.t())
    expected.bias.copy_(module.up_proj.bias)
    x, scale = torch.randn(2, 3, 70), torch.rand(2, 3, 1)
    torch.testing.assert_close(deployed(x), expected(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(deployed(x, scale), expected(x, scale), rtol=1e-5, atol=1e-5)
    assert 0.04 < (matrix.t() - module.up_proj.weight).norm() / module.up_proj.weight.norm() < 0.1


@pytest.mark.parametrize("name", CASES)
def test_what_becomes_n_bit_and_what_does_not(configs, tiny_decoder, name):
    formats = CASES[name]
    deployed: Any = deploy(tiny_decoder(configs[name]), formats)
    block = TernaryLinear if name == "bitnet" else NBitsLinear
    assert isinstance(deployed.model.layers[1].self_attn.k_proj, block)
    assert isinstance(deployed.model.embed_tokens, NBitsEmbedding) == configs[name].tied_embeddings
    if not configs[name].tied_embeddings:
        assert isinstance(deployed.lm_head, DenseLinear if formats.head is None else NBitsHead)
    if name == "moe":
        assert isinstance(deployed.model.layers[0].mlp.gate, DenseLinear)  # the router
        assert isinstance(deployed.model.layers[0].mlp.experts[3].down_proj, NBitsLinear)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_meta_form_streamed_tensor_by_tensor_equals_the_deployed_module(configs, tiny_decoder, name):
    formats, decoder = CASES[name], tiny_decoder(configs[name])
    source = source_of(decoder, formats)
    with torch.device("meta"):
        meta = deploy(Decoder(configs[name]), formats)
    expected = deploy(decoder, formats)
    state = expected.state_dict()
    assert {n: (t.shape, t.dtype) for n, t in meta.state_dict().items()} == {
        n: (t.shape, t.dtype) for n, t in state.items()
    }
    for tensor_name, tensor in state.items():
        assert torch.equal(deployed_tensor(tensor_name, source), tensor), tensor_name
    ids = torch.tensor([[1, 2, 3]])
    filled = materialize(configs[name], source, torch.float32, formats)
    torch.testing.assert_close(filled(ids)[0], expected(ids)[0], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_tied_embedding_is_one_matrix_for_both(configs, tiny_decoder):
    deployed: Any = deploy(tiny_decoder(configs["qwen2"]), WeightFormats(None, INT4))
    table = deployed.model.embed_tokens
    assert [n for n in deployed.state_dict() if "embed" in n or "head" in n] == [
        "model.embed_tokens.rows",
        "model.embed_tokens.row_scales",
    ]
    matrix = dequantized_rows(table.rows, table.row_scales, 48, 4, 32)
    torch.testing.assert_close(table(torch.tensor([[5, 7]])), matrix[[5, 7]].unsqueeze(0), rtol=0, atol=0)
    hidden = torch.randn(2, 3, 48)
    torch.testing.assert_close(deployed.head(hidden), hidden @ matrix.t(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_a_cast_leaves_codes_and_scales_and_changes_what_is_embedded(configs, tiny_decoder, dtype):
    deployed: Any = deploy(tiny_decoder(configs["qwen2"]), BOTH).to(dtype)
    table, linear = deployed.model.embed_tokens, deployed.model.layers[0].mlp.up_proj
    assert (table.row_scales.dtype, linear.scales.dtype) == (torch.float16, torch.float16)
    assert (table.rows.dtype, linear.packed.dtype) == (torch.uint8, torch.uint8)
    assert table(torch.tensor([1])).dtype == dtype
    assert deployed(torch.tensor([[1, 2]]))[0].dtype == dtype
    assert deploy(tiny_decoder(configs["qwen2"]).to(dtype), BOTH).model.embed_tokens.dtype == dtype


def test_the_scales_of_a_matrix_are_searched_for_once(configs, tiny_decoder, monkeypatch):
    searched: list[str] = []
    honest = quantized_source.group_scales

    def counted(name, *rest):
        searched.append(name)
        return honest(name, *rest)

    monkeypatch.setattr(quantized_source, "group_scales", counted)
    source = source_of(tiny_decoder(configs["llama"]), BOTH)
    first = [deployed_tensor(f"model.layers.0.mlp.up_proj.{leaf}", source) for leaf in ("packed", "scales")]
    again = [deployed_tensor(f"model.layers.0.mlp.up_proj.{leaf}", source) for leaf in ("packed", "scales")]
    assert searched == ["model.layers.0.mlp.up_proj.weight"]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert source.relative_errors.keys() == {"model.layers.0.mlp.up_proj.weight"}
    assert 0.05 < source.relative_errors["model.layers.0.mlp.up_proj.weight"] < 0.1


def test_a_group_weight_is_the_floats_that_it_stands_for(configs, tiny_decoder):
    source = source_of(tiny_decoder(configs["llama"]), BOTH)
    name = "model.layers.0.mlp.up_proj"
    packed, scales = (deployed_tensor(f"{name}.{leaf}", source) for leaf in ("packed", "scales"))
    matrix = dequantized(packed, scales, 130, 4, 32)
    torch.testing.assert_close(deployed_tensor(f"{name}.weight_t", source), matrix, rtol=0, atol=0)


def test_what_cannot_be_is_refused(configs, tiny_decoder):
    class Ternary:
        def __init__(self) -> None:
            self.shapes = {"a.up_proj.weight": (4, 8)}

        def read(self, name: str) -> TernaryWeight:
            return TernaryWeight(torch.ones(4, 8, dtype=torch.int8), 0.5)

    with pytest.raises(CheckpointError, match=r"a\.up_proj\.weight is quantised already"):
        deployed_tensor("a.up_proj.packed", QuantizedSource(Ternary(), BOTH, False))
    floats = StateDict(tiny_decoder(configs["llama"]).state_dict())
    with pytest.raises(CheckpointError, match="stored as Tensor, which has no scales"):
        deployed_tensor("model.layers.0.mlp.up_proj.scales", floats)
    with pytest.raises(CheckpointError, match="stored as GroupWeight, which has no scale"):
        deployed_tensor("model.layers.0.mlp.up_proj.scale", source_of(tiny_decoder(configs["llama"]), BOTH))
    with pytest.raises(UsageError, match="5 bits"):
        GroupFormat(5, 32)
    with pytest.raises(ValueError, match="are not 9 outputs"):
        NBitsLinear(torch.zeros(8, 64, dtype=torch.uint8), torch.zeros(1, 64).half(), None, TopK(), 9, INT4)
    with pytest.raises(ValueError, match="are not 9 inputs"):
        NBitsHead(torch.zeros(8, 4, dtype=torch.uint8), torch.zeros(8, 1).half(), 9, INT4)
    assert isinstance(GroupFormat(4, 64), GroupFormat)
