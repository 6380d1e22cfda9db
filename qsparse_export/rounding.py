"""Provokes rounding in a PyTorch decoder: what it moves in the logits, and which greedy tokens it leaves alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

    from qsparse_export.verify import Case

RUNS = 3
FLOAT16_OPS = 10


def nudged(case: Case, logits: Callable[[], np.ndarray]) -> Iterator[np.ndarray]:
    """What ``logits`` gives while each layer's input is moved by what its sums may round, and that of each n-bit product by
    what native kernels may round it: ``RUNS`` times."""
    import torch

    from qsparse_export.rounding_noise import ActivationNoise

    # A sum of K terms in random order rounds by about sqrt(K) units of float32, in which float16 products are summed too.
    # What is float16 between a layer's input and the next is rounded once, by half a unit at most, by each of some ten ops.
    sums = case.config.hidden_size**0.5 * torch.finfo(torch.float32).eps
    step = sums if case.dtype == "float32" else max(sums, FLOAT16_OPS**0.5 * torch.finfo(torch.float16).eps / 2)
    for seed in range(RUNS):
        random = torch.Generator().manual_seed(seed)

        def nudge(_: object, inputs: tuple[Any, ...], random: torch.Generator = random) -> tuple[Any, ...]:
            x = inputs[0]
            directions = torch.rand(x.shape, generator=random) * 2 - 1
            return ((x * (1 + directions * step)).to(x.dtype), *inputs[1:])

        hooks = [layer.register_forward_pre_hook(nudge) for layer in layers_of(case.module)]
        try:
            with ActivationNoise(random):
                moved = logits()
        finally:
            for hook in hooks:
                hook.remove()
        yield moved


def steady_tokens(case: Case, ids: tuple[int, ...], tokens: tuple[int, ...]) -> int:
    """How many of the first greedy ``tokens`` PyTorch chooses too, by itself and in every nudged run.

    ``ids`` are the prompt and all tokens but the last. Choices (top-k masks, int8 roundings) flip as rounding makes them,
    as they would on another processor; another correct runtime should give these tokens again.
    """
    first = len(case.prompt) - 1
    steady = np.ones(len(tokens), bool)

    def logits() -> np.ndarray:
        return case.judge().logits(ids)

    for seen in chain([logits()], nudged(case, logits)):
        steady &= seen[first:].argmax(axis=-1) == np.array(tokens)
    return len(tokens) if steady.all() else int(np.argmin(steady))


def layers_of(module: torch.nn.Module) -> Any:
    """The decoder layers of a module with our Decoder's naming, which is Hugging Face's too."""
    return module.get_submodule("model.layers")
