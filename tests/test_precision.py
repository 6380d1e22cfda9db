"""--weights, --head and --activations: what each choice means, and why some are refused."""

from __future__ import annotations

import dataclasses

import pytest

from qsparse_export.config import ModelConfig
from qsparse_export.errors import UsageError
from qsparse_export.precision import precision
from qsparse_export.weight_formats import GROUP_FORMATS, WeightFormats

LLAMA = ModelConfig("llama", 96, 48, 130, 1, 4, 2, 12)
BITNET = dataclasses.replace(LLAMA, architecture="bitnet", quantization="bitnet")
INT4, INT8 = GROUP_FORMATS["int4"], GROUP_FORMATS["int8"]


@pytest.mark.parametrize(
    ("config", "choices", "formats", "dtype"),
    [
        (LLAMA, {}, WeightFormats(), "float32"),
        (LLAMA, {"weights": "fp16"}, WeightFormats(), "float16"),
        (LLAMA, {"weights": "fp16", "activations": "fp16"}, WeightFormats(), "float16"),
        (LLAMA, {"weights": "int8"}, WeightFormats(INT8, INT8), "float32"),
        (LLAMA, {"weights": "int4"}, WeightFormats(INT4, INT8), "float32"),
        (LLAMA, {"weights": "int4", "activations": "fp16"}, WeightFormats(INT4, INT8), "float16"),
        (LLAMA, {"weights": "int4", "head": "keep"}, WeightFormats(INT4, None), "float32"),
        (LLAMA, {"head": "int4"}, WeightFormats(None, INT4), "float32"),
        (LLAMA, {"weights": "ternary", "activations": "fp16"}, WeightFormats(), "float16"),
        (BITNET, {"head": "int4"}, WeightFormats(None, INT4), "float32"),
        (BITNET, {"weights": "fp16", "head": "int8"}, WeightFormats(None, INT8), "float16"),
        (BITNET, {"activations": "fp16"}, WeightFormats(), "float16"),
    ],
)
def test_choices(config, choices, formats, dtype):
    chosen = precision(config, **choices)
    assert (chosen.formats, chosen.dtype) == (formats, dtype)
    assert chosen.is_quantized == (formats != WeightFormats())
    wanted = "bitnet" if config is BITNET or choices.get("weights") == "ternary" else "none"
    assert chosen.config.quantization == wanted


@pytest.mark.parametrize(
    ("config", "choices", "reason"),
    [
        (BITNET, {"weights": "int4"}, "ternary, which is 2 bits without any loss"),
        (BITNET, {"weights": "int8"}, "--head int8"),
        (BITNET, {"weights": "fp32"}, "ternary weights and int8 activations"),
        (LLAMA, {"weights": "fp16", "activations": "fp32"}, "use --weights fp32"),
        (LLAMA, {"activations": "fp16"}, "use --weights fp16"),
        (BITNET, {"weights": "fp16", "activations": "fp32"}, "type of the activations"),
        (LLAMA, {"weights": "int5"}, "did you mean int"),
        (LLAMA, {"head": "fp16"}, "head is 'fp16'"),
        (LLAMA, {"activations": "int8"}, "activations is 'int8'"),
    ],
)
def test_contradictions_are_refused_with_the_reason(config, choices, reason):
    with pytest.raises(UsageError, match=reason):
        precision(config, **choices)
