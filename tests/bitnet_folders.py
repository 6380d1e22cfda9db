"""Writes BitNet folders in the three storages of transformers, with random weights; needs transformers."""

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers.integrations.bitnet import pack_weights, replace_with_bitnet_linear

from qsparse_export.nn.quantizers import absmean_ternary

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
STORAGES = {
    "multiply": {"linear_class": "autobitlinear", "quantization_mode": "offline"},
    "divide": {"linear_class": "bitlinear", "quantization_mode": "offline"},
    "online": {"linear_class": "autobitlinear", "quantization_mode": "online"},
}


def masters(model_type="bitnet", tied=True, **sizes):
    """A float model of the architecture with random weights, norms and biases."""
    torch.manual_seed(0)
    kind = {"bitnet": "BitNet", "llama": "Llama"}[model_type]
    config = getattr(transformers, f"{kind}Config")(**(SIZES | sizes), tie_word_embeddings=tied)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for tensor in model.parameters():
        tensor.data = torch.randn_like(tensor) * 0.1 + (1.0 if tensor.dim() == 1 else 0.0)
    return model


def write(folder: Path, model, storage, use_rms_norm=False, dtype=torch.float32):
    """The folder as published: packed weights with scales, or masters; returns transformers' own quantised model.

    ``dtype`` is that of all floating-point tensors in the file; the model that is returned computes in float32.
    """
    quantization = STORAGES[storage] | {"use_rms_norm": use_rms_norm, "rms_norm_eps": 1e-3}
    source = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quantized = replace_with_bitnet_linear(model, ["lm_head"], transformers.BitNetQuantConfig(**quantization))
    tensors, live = {}, {}
    for name, tensor in source.items():
        module = name.removesuffix(".weight")
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if not name.endswith("_proj.weight") or storage == "online":
            tensors[name] = live[name] = tensor.to(dtype)
        else:
            values, scale = absmean_ternary(tensor)
            stored = (scale.reshape(1) if storage == "multiply" else 1 / scale.reshape(1)).to(dtype)
            packed = pack_weights(values.clone())
            tensors |= {name: packed, f"{module}.weight_scale": stored}
            live |= {name: packed if storage == "divide" else values, f"{module}.weight_scale": stored}
        if name.endswith("_proj.weight") and use_rms_norm:
            norm = (torch.rand(tensor.shape[1]) + 0.5).to(dtype)
            tensors[f"{module}.rms_norm.weight"] = live[f"{module}.rms_norm.weight"] = norm
    live = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in live.items()}
    quantized.load_state_dict(live, strict=False, assign=True)
    quantized.tie_weights()
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = model.config.to_dict() | {"quantization_config": {"quant_method": "bitnet"} | quantization}
    (folder / "config.json").write_text(json.dumps(config))
    return quantized.eval()
