"""Training form -> deployed form: weights channel-major, ternary and n-bit ones packed; a whole module, or one tensor."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from qsparse_export.config import ModelConfig
from qsparse_export.errors import CheckpointError, near_names
from qsparse_export.formats import nbits, ternary
from qsparse_export.nn.decoder import Decoder, Embedding
from qsparse_export.nn.deployed import DenseLinear, NBitsLinear, TernaryLinear
from qsparse_export.nn.group_quantizer import group_codes, group_scales
from qsparse_export.nn.linear import BitLinear, QSparseLinear
from qsparse_export.nn.nbits_head import NBitsEmbedding, NBitsHead
from qsparse_export.nn.quantizers import absmean_scale, ternary_values
from qsparse_export.weight_formats import AS_IN_THE_MODEL, EMBEDDING, HEAD, GroupFormat, WeightFormats
from qsparse_export.weights import GroupWeight, TernaryWeight, WeightSource

_LEAVES = ("packed", "scale", "scales", "weight_t", "rows", "row_scales")
"""Tensors of deployed modules that are made of a training form's ``weight``."""


def deploy(module: nn.Module, formats: WeightFormats = AS_IN_THE_MODEL) -> nn.Module:
    """A copy of ``module`` in which QSparseLinear became DenseLinear and BitLinear became TernaryLinear.

    Linears that ``formats`` names become NBitsLinear instead, the head NBitsHead, or NBitsEmbedding where it is tied.
    Ternary weights are recomputed from the master weights (``Qw(W) = clip(round(W / mean|W|))``). All other tensors share
    memory with ``module``, which stays as it is. Works on real, meta and fake tensors; the latter two stay abstract.
    """
    # Memory is shared, Parameter objects are not: deploy(module).half() must not cast the original.
    memo: dict[int, Any] = {id(buffer): buffer.detach() for buffer in module.buffers()}
    memo |= {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in module.parameters()}
    clone = copy.deepcopy(module, memo)
    is_tied = isinstance(clone, Decoder) and clone.lm_head is None
    made: dict[int, nn.Module] = {}
    for name, child in list(clone.named_modules(remove_duplicate=False)):
        chosen = formats.of(name, is_tied)
        if not isinstance(child, QSparseLinear | BitLinear) and not (isinstance(child, Embedding) and chosen):
            continue
        if id(child) not in made:
            made[id(child)] = _deployed(name, child, chosen)
        if not name:
            return made[id(child)]
        clone.set_submodule(name, made[id(child)])
    return clone


def _deployed(name: str, module: nn.Module, chosen: GroupFormat | None) -> nn.Module:
    if isinstance(module, BitLinear):
        packed, scale = _ternary(module.weight.detach())
        return TernaryLinear(packed, scale, module.bias, module.topk, module.out_features, module.rms_norm)
    assert isinstance(module, QSparseLinear | Embedding)
    weight = module.weight.detach()
    if chosen is not None and name in (HEAD, EMBEDDING):
        rows, scales = _group_rows(name, weight, chosen)
        if isinstance(module, Embedding):
            return NBitsEmbedding(rows, scales, weight.shape[1], chosen, weight.dtype)
        return NBitsHead(rows, scales, weight.shape[1], chosen)
    assert isinstance(module, QSparseLinear)
    if chosen is not None:
        packed, scales = _group_channels(name, weight, chosen)
        return NBitsLinear(packed, scales, module.bias, module.topk, len(weight), chosen)
    return DenseLinear(_channel_major(weight), module.bias, module.topk)


def _is_abstract(weight: torch.Tensor) -> bool:
    return weight.is_meta or isinstance(weight, FakeTensor)


def _ternary(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if _is_abstract(weight):
        packed = weight.new_empty((weight.shape[1], ternary.row_bytes(weight.shape[0])), dtype=torch.uint8)
        return packed, weight.new_empty((1,), dtype=torch.float32)
    return _packed(weight), absmean_scale(weight).reshape(1)


def _group_rows(name: str, weight: torch.Tensor, chosen: GroupFormat) -> tuple[torch.Tensor, torch.Tensor]:
    if _is_abstract(weight):
        n, k = weight.shape
        rows = weight.new_empty((n, nbits.output_row_bytes(k, chosen.bits)), dtype=torch.uint8)
        return rows, weight.new_empty((n, nbits.group_count(k, chosen.group)), dtype=torch.float16)
    grouped = _grouped(name, weight, chosen)
    return _rows(grouped), grouped.scales


def _group_channels(name: str, weight: torch.Tensor, chosen: GroupFormat) -> tuple[torch.Tensor, torch.Tensor]:
    if _is_abstract(weight):
        k, columns = weight.shape[1], nbits.columns(weight.shape[0])
        packed = weight.new_empty((k, columns * chosen.bits // 8), dtype=torch.uint8)
        return packed, weight.new_empty((nbits.group_count(k, chosen.group), columns), dtype=torch.float16)
    grouped = _grouped(name, weight, chosen)
    return _channels(grouped), _channel_scales(grouped)


def _grouped(name: str, weight: torch.Tensor, chosen: GroupFormat) -> GroupWeight:
    scales, _ = group_scales(f"{name}.weight", weight, chosen)
    return GroupWeight(scales, lambda: group_codes(weight, scales, chosen), chosen)


def _rows(weight: GroupWeight) -> torch.Tensor:
    return torch.from_numpy(nbits.pack_outputs(weight.codes().numpy(), weight.format.bits))


def _channels(weight: GroupWeight) -> torch.Tensor:
    return torch.from_numpy(nbits.pack_channels(weight.codes().numpy(), weight.format.bits))


def _channel_scales(weight: GroupWeight) -> torch.Tensor:
    """[N, groups] to [groups, columns(N)], zeros behind the last output."""
    n, groups = weight.scales.shape
    padded = torch.zeros((groups, nbits.columns(n)), dtype=torch.float16)
    padded[:, :n] = weight.scales.t()
    return padded


def _channel_major(weight: torch.Tensor) -> torch.Tensor:
    """[N, K] to contiguous [K, N] with one copy."""
    return torch.empty_like(weight.t(), memory_format=torch.contiguous_format).copy_(weight.t())


def _packed(weight: torch.Tensor | TernaryWeight) -> torch.Tensor:
    values = weight.values if isinstance(weight, TernaryWeight) else ternary_values(weight)
    return torch.from_numpy(ternary.pack(values.cpu().numpy()))


def deployed_tensor(name: str, source: WeightSource) -> torch.Tensor:
    """The tensor ``name`` of a deployed module, computed from a source of training-form tensors; nothing is kept.

    ``LINEAR.weight`` gives ``LINEAR.weight_t`` [K, N]; where it is ternary, or master weights of a ternary linear,
    ``LINEAR.packed`` uint8 [K, row_bytes(N)] and ``LINEAR.scale`` float32 [1]; where it is in n-bit groups, channel-major
    ``packed`` and ``scales`` or output-major ``rows`` and ``row_scales`` (``formats.nbits``). All other names are the
    source's own. Floating-point tensors keep the dtype that the source stores. Raises CheckpointError for a name that the
    source cannot give.
    """
    owner, _, leaf = name.rpartition(".")
    weight = f"{owner}.weight"
    if name in source.shapes:
        return _floating(source.read(name))
    if leaf not in _LEAVES or weight not in source.shapes:
        raise CheckpointError(f"no tensor for {name}; {near_names(weight, source.shapes)}")
    stored = source.read(weight)
    if leaf == "weight_t":
        return _channel_major(_floating(stored))
    if isinstance(stored, GroupWeight):
        of_groups = {"packed": _channels, "scales": _channel_scales, "rows": _rows, "row_scales": lambda w: w.scales}
        if leaf in of_groups:
            return of_groups[leaf](stored)
    elif leaf == "packed":
        return _packed(stored)
    elif leaf == "scale":
        if isinstance(stored, TernaryWeight):
            return torch.tensor([stored.scale], dtype=torch.float32)
        return absmean_scale(stored).reshape(1)
    raise CheckpointError(f"no tensor for {name}: {weight} is stored as {type(stored).__name__}, which has no {leaf}")


def _floating(stored: torch.Tensor | TernaryWeight | GroupWeight) -> torch.Tensor:
    if isinstance(stored, TernaryWeight):
        return stored.values.to(torch.float32) * stored.scale
    if isinstance(stored, GroupWeight):
        codes = stored.codes()
        scales = stored.scales.to(torch.float32).repeat_interleave(stored.format.group, dim=1)
        return codes * scales[:, : codes.shape[1]]
    return stored


def materialize(
    config: ModelConfig, source: WeightSource, dtype: torch.dtype, formats: WeightFormats = AS_IN_THE_MODEL
) -> nn.Module:
    """The deployed decoder of ``config`` with tensors from ``source``, floating-point ones in ``dtype`` (not the scales).

    What PyTorch runs to verify an export. ``source`` must give the matrices of ``formats`` in their groups
    (``nn.quantized_source``). Raises CheckpointError when a tensor is missing or has another shape.
    """
    with torch.device("meta"):
        module = deploy(Decoder(config).to(dtype), formats).eval()
    tensors = {}
    for name, expected in module.state_dict().items():
        tensor = deployed_tensor(name, source).to(expected.dtype)
        if tensor.shape != expected.shape:
            raise CheckpointError(f"{name} has shape {list(tensor.shape)}; the config says {list(expected.shape)}")
        tensors[name] = tensor
    module.load_state_dict(tensors, assign=True)
    return module.requires_grad_(False)
