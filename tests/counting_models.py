"""Small models that learn to count, so that their tokens are choices and not noise."""

import dataclasses

import torch
from torch.nn import functional

from qsparse_export.config import ModelConfig, SparsityRule, TopK
from qsparse_export.nn.decoder import Decoder

QSPARSE = ModelConfig(
    architecture="llama",
    vocab_size=96,
    hidden_size=128,
    intermediate_size=344,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=32,
    max_positions=256,
    sparsity=(SparsityRule("*", TopK(0.4)), SparsityRule("*.down_proj", TopK(0.6))),
)
BITNET = dataclasses.replace(
    QSPARSE, architecture="bitnet", quantization="bitnet", activation="relu2", sub_norms=True, tied_embeddings=True
)
MODELS = {"qsparse": QSPARSE, "bitnet": BITNET}
STEPS = 60


def trained(config: ModelConfig) -> Decoder:
    """A decoder that has learnt, more or less, that a token is followed by itself plus a step that stays the same."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    decoder = Decoder(config).train()
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=3e-3)
    random = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        start = torch.randint(config.vocab_size, (16, 1), generator=random)
        step = torch.randint(1, 5, (16, 1), generator=random)
        ids = (start + step * torch.arange(24)) % config.vocab_size
        logits = decoder(ids)
        logits = logits[0] if isinstance(logits, tuple) else logits
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.set_num_threads(threads)
    return decoder.eval()
