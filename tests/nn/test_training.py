from __future__ import annotations

import dataclasses

import pytest
import torch

from qsparse_export.nn.decoder import Decoder
from qsparse_export.nn.deploy import deploy


@pytest.mark.parametrize("name", ["llama", "block-l2", "bitnet", "moe"])
def test_some_steps_lower_the_loss_and_the_trained_model_deploys(configs, name):
    torch.manual_seed(0)
    decoder = Decoder(dataclasses.replace(configs[name], layers=1)).train()
    ids = torch.randint(0, 96, (4, 16))
    optimiser = torch.optim.AdamW(decoder.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        logits, _ = decoder(ids[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert all(
        p.grad is not None and p.grad.isfinite().all() for n, p in decoder.named_parameters() if "expert" not in n
    )
    assert losses[0] == pytest.approx(torch.log(torch.tensor(96.0)).item(), rel=0.1)
    assert losses[-1] < 0.5 * losses[0]
    with torch.no_grad():
        torch.testing.assert_close(deploy(decoder.eval())(ids)[0], decoder(ids)[0], rtol=1e-3, atol=1e-3)
