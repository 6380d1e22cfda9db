"""The deployed decoder through torch.onnx, run by stock ONNX Runtime on the function bodies."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch.export import Dim

from qsparse_export import ops
from qsparse_export.nn.deploy import deploy


def export(module: torch.nn.Module, config, dtype: torch.dtype) -> onnx.ModelProto:
    def cache(prefix: str) -> list[str]:
        return [f"{prefix}.{i}.{part}" for i in range(config.layers) for part in ("key", "value")]

    batch, sequence, past = 2, 3, 5
    shape = (batch, config.kv_heads, past, config.head_dim)
    pairs = [(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)) for _ in range(config.layers)]
    # Distinct tensors: one object passed twice would be exported as one input.
    ids, positions = torch.zeros(batch, sequence, dtype=torch.int64), torch.zeros(batch, sequence, dtype=torch.int64)
    mask = torch.ones(batch, past + sequence, dtype=torch.int64)
    tokens, grown = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, {0: Dim.DYNAMIC, 2: Dim.DYNAMIC}
    logging.disable(logging.WARNING)
    try:
        with torch.no_grad():
            program = torch.onnx.export(
                module,
                (ids, mask, positions, pairs),
                dynamo=True,
                opset_version=23,
                dynamic_shapes=(tokens, tokens, tokens, [(grown, grown)] * config.layers),
                input_names=["input_ids", "attention_mask", "position_ids", *cache("past_key_values")],
                output_names=["logits", *cache("present")],
                custom_translation_table=ops.translation_table(),
                optimize=False,
                verbose=False,
            )
    finally:
        logging.disable(logging.NOTSET)
    assert program is not None
    model = ir.to_proto(ops.attach_functions(program.model))
    onnx.checker.check_model(model, full_check=True)
    return model


@pytest.mark.parametrize(
    ("name", "dtype", "nodes"),
    [
        ("llama", torch.float32, {"TopKSparsify": 4, "Attention": 1, "RotaryEmbedding": 2, "MatMul": 8, "Gemm": 0}),
        ("bitnet", torch.float32, {"TopKSparsify": 4, "TernaryMatMul": 7, "MatMul": 0, "Gemm": 1, "Transpose": 0}),
        ("relu2", torch.float16, {"MatMul": 8, "RMSNormalization": 3}),
        ("moe", torch.float16, {"TopKSparsify": 2 + 1 + 4, "NonZero": 4}),
    ],
)
def test_logits_and_cache_equal_pytorchs(configs, tiny_decoder, name, dtype, nodes):
    config = dataclasses.replace(configs[name], layers=1)
    module = deploy(tiny_decoder(config).to(dtype))
    model = export(module, config, dtype)
    kinds = [node.op_type for node in model.graph.node]
    assert {kind: kinds.count(kind) for kind in nodes} == nodes
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def run(ids: np.ndarray, mask: np.ndarray, cache: list[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
        positions = (mask.cumsum(1) - 1).clip(0)[:, -ids.shape[1] :]
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        for i, (key, value) in enumerate(cache):
            feeds |= {f"past_key_values.{i}.key": key, f"past_key_values.{i}.value": value}
        got = session.run(None, feeds)
        with torch.no_grad():
            logits, present = module(
                *(torch.from_numpy(feeds[n]) for n in ("input_ids", "attention_mask", "position_ids")),
                [(torch.from_numpy(key), torch.from_numpy(value)) for key, value in cache],
            )
        expected = [logits.numpy(), *(t.numpy() for pair in present for t in pair)]
        for mine, theirs in zip(got, expected, strict=True):
            assert mine.shape == theirs.shape and mine.dtype == theirs.dtype and np.isfinite(mine).all()
            error = np.linalg.norm((mine - theirs).astype(np.float32)) / np.linalg.norm(theirs.astype(np.float32))
            # float16: a mask or an int8 value may flip where two magnitudes differ by a rounding
            assert error < (1e-5 if dtype == torch.float32 else 5e-2)
        return got

    rng = np.random.default_rng(0)
    ids = rng.integers(0, 96, (2, 7))
    mask = np.ones((2, 7), np.int64)
    mask[0, :3] = 0  # left padding
    empty = np.zeros((2, config.kv_heads, 0, config.head_dim), np.float32 if dtype == torch.float32 else np.float16)
    _, *cache = run(ids, mask, [(empty, empty)])
    run(ids[:, :2], np.concatenate([mask, np.ones((2, 2), np.int64)], 1), [(cache[0], cache[1])])
    run(ids[:1, :1], mask[1:, :1], [(empty[:1], empty[:1])])
