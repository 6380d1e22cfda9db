"""genai_config.json: what onnxruntime-genai must know to run the bundle as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def genai_config(
    model: Mapping[str, Any], graph: str, library: str | None, provider: str | None = None, *, shares_cache: bool
) -> dict[str, Any]:
    """The configuration for onnxruntime-genai 0.18; ``model`` is a ModelConfig as a dict.

    ``library`` is the file name of the kernel library inside the bundle, or None for a portable bundle; ``provider`` is the
    execution provider, by genai's name ("cuda"), None for the CPU's. With
    ``shares_cache`` genai allocates the cache once, for max_length tokens, and binds it as past and present. Unknown keys
    are errors for genai, so that nothing of our own stands here.
    """
    session: dict[str, Any] = {
        "log_id": "onnxruntime-genai",
        # No captured graph: genai 0.18 captures with a mask of max_length slots, and whether this graph stands that, no GPU
        # has shown yet.
        "provider_options": [{provider: {"enable_cuda_graph": "0"}}] if provider == "cuda" else [],
        "session.qdq_matmulnbits_accuracy_level": "1",  # as in runtimes/ort/runtime.py: activations are not rounded
    }
    if library:
        session["custom_ops_library"] = library
    # genai 0.18 stops at id 0 (often a real token) when none is given: the last id is the least likely to be text.
    eos = list(model["eos_token_ids"]) or [model["vocab_size"] - 1]
    config: dict[str, Any] = {
        "model": {
            "type": "llama",  # one of genai's own list; it selects the decoder loop, not the architecture
            "vocab_size": model["vocab_size"],
            "context_length": model["max_positions"],
            "eos_token_id": eos if len(eos) > 1 else eos[0],
            "pad_token_id": eos[0],
            "decoder": {
                "session_options": session,
                "filename": graph,
                "head_size": model["head_dim"],
                "hidden_size": model["hidden_size"],
                "num_attention_heads": model["heads"],
                "num_hidden_layers": model["layers"],
                "num_key_value_heads": model["kv_heads"],
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {"max_length": model["max_positions"], "do_sample": False, "past_present_share_buffer": shares_cache},
    }
    if model["bos_token_id"] is not None:
        config["model"]["bos_token_id"] = model["bos_token_id"]
    return config
