"""The tensors that a configuration implies are those of the decoder itself."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qsparse_export.checkpoints.expected import block_linears, check_config, check_tensors, expected_shapes
from qsparse_export.config import ModelConfig, MoE
from qsparse_export.errors import CheckpointError
from qsparse_export.nn.decoder import Decoder
from qsparse_export.nn.linear import BitLinear, QSparseLinear

CONFIG = ModelConfig("llama", 64, 32, 40, layers=2, heads=2, kv_heads=1, head_dim=16)


@settings(max_examples=60, deadline=None)
@given(
    flags=st.fixed_dictionaries(
        {
            name: st.booleans()
            for name in ("qkv_bias", "o_bias", "mlp_bias", "sub_norms", "linear_norm", "tied_embeddings")
        }
    ),
    quantization=st.sampled_from(["none", "bitnet"]),
    moe=st.sampled_from([None, MoE(3, 1)]),
)
def test_names_and_shapes_are_those_of_the_decoder(flags, quantization, moe):
    config = replace(CONFIG, quantization=quantization, moe=moe, **flags)
    with torch.device("meta"):
        module = Decoder(config)
    assert expected_shapes(config) == {name: tuple(t.shape) for name, t in module.state_dict().items()}
    linears = {
        name: (linear.out_features, linear.in_features)
        for name, linear in module.named_modules()
        if isinstance(linear, QSparseLinear | BitLinear)
        and name.startswith("model.layers.")
        and not name.endswith(".gate")
    }
    assert block_linears(config) == linears


def test_missing_extra_and_misshapen_tensors_are_named():
    shapes = expected_shapes(CONFIG)
    check_tensors(shapes, CONFIG, "x")
    down = "model.layers.1.mlp.down_proj.weight"
    with pytest.raises(
        CheckpointError, match=r"model.layers.1.mlp.down_proj.weight is missing.*did you mean .*downproj"
    ):
        check_tensors({n.replace("1.mlp.down_", "1.mlp.down"): s for n, s in shapes.items()}, CONFIG, "x")
    with pytest.raises(CheckpointError, match=r"and 6 more are missing"):
        check_tensors({n: s for n, s in shapes.items() if "layers.1" not in n}, CONFIG, "x")
    with pytest.raises(CheckpointError, match=r"lora.a is not part of the model"):
        check_tensors({**shapes, "lora.a": (3, 3)}, CONFIG, "x")
    with pytest.raises(CheckpointError, match=r"down_proj.weight has the shape \[32, 41\].*implies \[32, 40\]"):
        check_tensors({**shapes, down: (32, 41)}, CONFIG, "x")


@pytest.mark.parametrize(
    "change",
    [
        {"layers": 10**12},
        {"vocab_size": 2**40},
        {"norm_eps": float("inf")},
        {"norm_eps": "1"},
        {"rope_theta": 0.0},
        {"tied_embeddings": "yes"},
        {"sliding_window": 0},
        {"eos_token_ids": (64,)},
        {"bos_token_id": -1},
        {"moe": MoE(10**9, 1)},
        {"max_positions": 0},
    ],
)
def test_implausible_values_are_refused_before_anything_is_listed(change):
    with pytest.raises(CheckpointError, match="folder"):
        check_config(replace(CONFIG, **change), "folder")
