"""BitNet weights as transformers stores them, in their three forms, read as training-form weights.

==================  =================  ==============================  ==========================
linear_class        quantization_mode  stored                          W equals
==================  =================  ==============================  ==========================
``autobitlinear``   ``offline``        packed, ``weight_scale`` [1]    values * weight_scale
``bitlinear``       (offline)          packed, ``weight_scale`` [1]    values / weight_scale
``autobitlinear``   ``online``         float master weights [N, K]     quantised when exported
==================  =================  ==============================  ==========================

Packed is uint8 ``[ceil(N/4), K]`` in row blocks: bits (2i, 2i+1) of row r hold ``w[i * ceil(N/4) + r] + 1``; code 3
never occurs. Source: transformers ``integrations/bitnet.py`` (``pack_weights``, ``BitLinear``, ``AutoBitLinear``).
A model that transformers saved again after loading holds the values -1, 0, 1 as floats [N, K] in place of packed ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from qsparse_export.checkpoints.safetensors_files import FLOAT_DTYPES, StoredTensor
from qsparse_export.errors import CheckpointError
from qsparse_export.weights import TernaryWeight, require_finite

if TYPE_CHECKING:
    import torch

Storage = Literal["float", "multiply", "divide"]
VALUES_PER_BYTE = 4


@dataclass(frozen=True)
class BitNetLinear:
    """A ternary linear of logical shape [N, K]: ``weight`` packed uint8 or float values, ``scale`` one number."""

    shape: tuple[int, int]
    weight: StoredTensor
    scale: StoredTensor
    divides: bool

    def read(self, name: str) -> TernaryWeight:
        """Unpacked values and the factor of W; CheckpointError for code 3, other values, and a zero or NaN scale."""
        import torch

        module = name.removesuffix(".weight")
        scale = float(self.scale.read(f"{module}.weight_scale").reshape(-1)[0])
        if not math.isfinite(scale) or scale <= 0.0:
            raise CheckpointError(f"tensor {module}.weight_scale is {scale}; expected a positive finite number")
        stored = self.weight.read(name)
        if stored.dtype == torch.uint8:
            values = unpack_row_blocks(stored, self.shape[0], name)
        else:
            require_finite(name, stored)
            values = stored.to(torch.int8)
            if not bool((values == stored).all()) or int(values.abs().max()) > 1:
                raise CheckpointError(
                    f"tensor {name} holds values other than -1, 0 and 1 beside a weight_scale: master weights need "
                    "quantization_mode 'online' in the quantization_config, and no weight_scale"
                )
        return TernaryWeight(values, 1.0 / scale if self.divides else scale)


def unpack_row_blocks(packed: torch.Tensor, n: int, name: str) -> torch.Tensor:
    """uint8 [ceil(N/4), K] row blocks to int8 [N, K]; CheckpointError naming the tensor when a code is 3."""
    import torch

    rows = packed.shape[0]
    values = torch.empty((n, packed.shape[1]), dtype=torch.int8)
    for i in range(VALUES_PER_BYTE):
        block = values[i * rows : (i + 1) * rows]
        codes = (packed[: block.shape[0]] >> (2 * i)) & 3
        if codes.numel() and int(codes.max()) > 2:
            raise CheckpointError(
                f"tensor {name} holds the 2-bit code 3; expected 0, 1 and 2 for -1, 0 and 1: the weights are damaged, or "
                "packed in another way than transformers' row blocks"
            )
        block.copy_(codes)
        block -= 1
    return values


def bitnet_linears(
    tensors: Mapping[str, StoredTensor], linears: Mapping[str, tuple[int, int]], storage: Storage, source: str
) -> dict[str, BitNetLinear]:
    """Name of the weight to its ternary linear, for every block linear that is there; headers only.

    ``linears`` gives the logical (N, K). Raises CheckpointError when a scale is missing or the stored type or shape
    contradicts the storage that the quantization_config names.
    """
    if storage == "float":
        stray = next((name for name in tensors if name.endswith(".weight_scale")), None)
        if stray is not None:
            raise CheckpointError(
                f"{source}: {stray} belongs to ternary weights, and config.json does not say how they are stored; expected a "
                "quantization_config with quant_method 'bitnet', linear_class 'autobitlinear' (the scale multiplies) or "
                "'bitlinear' (it divides), and quantization_mode 'offline'"
            )
        return {}
    found = {}
    for module, (n, k) in linears.items():
        weight, scale = tensors.get(f"{module}.weight"), tensors.get(f"{module}.weight_scale")
        if weight is None:
            continue  # reported with all other missing tensors
        if scale is None or scale.dtype not in FLOAT_DTYPES or math.prod(scale.shape) != 1:
            came = "missing" if scale is None else f"{scale.dtype} {list(scale.shape)}"
            raise CheckpointError(
                f"{source}: {module}.weight_scale is {came}; the quantization_config says that the weights are ternary "
                "with one floating-point scale each. Master weights need quantization_mode 'online'"
            )
        packed = (-(-n // VALUES_PER_BYTE), k)
        if weight.dtype == "U8" and weight.shape != packed:
            raise CheckpointError(
                f"{source}: {module}.weight is packed as {list(weight.shape)}, and the config implies {list(packed)} for "
                f"{n} outputs of {k} inputs: the config and the weights belong to different models"
            )
        if weight.dtype != "U8" and (weight.dtype not in FLOAT_DTYPES or weight.shape != (n, k)):
            raise CheckpointError(
                f"{source}: {module}.weight is {weight.dtype} {list(weight.shape)}; expected packed U8 {list(packed)}, or "
                f"ternary values as floats {[n, k]}"
            )
        found[f"{module}.weight"] = BitNetLinear((n, k), weight, scale, storage == "divide")
    return found
