"""Training form -> deployed form: weights channel-major, ternary ones packed; whole modules, or one tensor at a time."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from qsparse_export.config import ModelConfig
from qsparse_export.errors import CheckpointError, near_names
from qsparse_export.formats import ternary
from qsparse_export.nn.decoder import Decoder
from qsparse_export.nn.deployed import DenseLinear, TernaryLinear
from qsparse_export.nn.linear import BitLinear, QSparseLinear
from qsparse_export.nn.quantizers import absmean_scale, ternary_values
from qsparse_export.weights import TernaryWeight, WeightSource


def deploy(module: nn.Module) -> nn.Module:
    """A copy of ``module`` in which QSparseLinear became DenseLinear and BitLinear became TernaryLinear.

    Ternary weights are recomputed from the master weights (``Qw(W) = clip(round(W / mean|W|))``). All other tensors share
    memory with ``module``, which stays as it is. Works on real, meta and fake tensors; the latter two stay abstract.
    """
    # Memory is shared, Parameter objects are not: deploy(module).half() must not cast the original.
    memo: dict[int, Any] = {id(buffer): buffer.detach() for buffer in module.buffers()}
    memo |= {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in module.parameters()}
    clone = copy.deepcopy(module, memo)
    made: dict[int, nn.Module] = {}
    for name, child in list(clone.named_modules(remove_duplicate=False)):
        if not isinstance(child, QSparseLinear | BitLinear):
            continue
        if id(child) not in made:
            made[id(child)] = _deployed(child)
        if not name:
            return made[id(child)]
        clone.set_submodule(name, made[id(child)])
    return clone


def _deployed(linear: QSparseLinear | BitLinear) -> nn.Module:
    weight = linear.weight.detach()
    if isinstance(linear, QSparseLinear):
        return DenseLinear(_channel_major(weight), linear.bias, linear.topk)
    if weight.is_meta or isinstance(weight, FakeTensor):
        packed = weight.new_empty((linear.in_features, ternary.row_bytes(linear.out_features)), dtype=torch.uint8)
        scale = weight.new_empty((1,), dtype=torch.float32)
    else:
        packed, scale = _packed(weight), absmean_scale(weight).reshape(1)
    return TernaryLinear(packed, scale, linear.bias, linear.topk, linear.out_features, linear.rms_norm)


def _channel_major(weight: torch.Tensor) -> torch.Tensor:
    """[N, K] to contiguous [K, N] with one copy."""
    return torch.empty_like(weight.t(), memory_format=torch.contiguous_format).copy_(weight.t())


def _packed(weight: torch.Tensor | TernaryWeight) -> torch.Tensor:
    values = weight.values if isinstance(weight, TernaryWeight) else ternary_values(weight)
    return torch.from_numpy(ternary.pack(values.cpu().numpy()))


def deployed_tensor(name: str, source: WeightSource) -> torch.Tensor:
    """The tensor ``name`` of a deployed module, computed from a source of training-form tensors; nothing is kept.

    ``LINEAR.packed`` uint8 [K, row_bytes(N)] and ``LINEAR.scale`` float32 [1] come from ``LINEAR.weight`` (ternary
    already, or master weights), ``LINEAR.weight_t`` [K, N] too; all other names are the source's own. Floating-point
    tensors keep the dtype that the source stores. Raises CheckpointError for a name that the source cannot give.
    """
    owner, _, leaf = name.rpartition(".")
    weight = f"{owner}.weight"
    if name not in source.shapes and leaf in ("packed", "scale", "weight_t") and weight in source.shapes:
        stored = source.read(weight)
        if leaf == "packed":
            return _packed(stored)
        if leaf == "scale":
            if isinstance(stored, TernaryWeight):
                return torch.tensor([stored.scale], dtype=torch.float32)
            return absmean_scale(stored).reshape(1)
        return _channel_major(_floating(stored))
    if name not in source.shapes:
        raise CheckpointError(f"no tensor for {name}; {near_names(weight, source.shapes)}")
    return _floating(source.read(name))


def _floating(stored: torch.Tensor | TernaryWeight) -> torch.Tensor:
    if isinstance(stored, TernaryWeight):
        return stored.values.to(torch.float32) * stored.scale
    return stored


def materialize(config: ModelConfig, source: WeightSource, dtype: torch.dtype) -> nn.Module:
    """The deployed decoder of ``config`` with tensors from ``source``, floating-point ones in ``dtype`` (not the scales).

    What PyTorch runs to verify an export. Raises CheckpointError when a tensor is missing or has another shape.
    """
    with torch.device("meta"):
        module = deploy(Decoder(config).to(dtype)).eval()
    tensors = {}
    for name, expected in module.state_dict().items():
        tensor = deployed_tensor(name, source).to(expected.dtype)
        if tensor.shape != expected.shape:
            raise CheckpointError(f"{name} has shape {list(tensor.shape)}; the config says {list(expected.shape)}")
        tensors[name] = tensor
    module.load_state_dict(tensors, assign=True)
    return module.requires_grad_(False)
