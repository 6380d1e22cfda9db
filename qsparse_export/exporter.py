"""nn.Module -> ir.Model: torch.onnx with our ops left whole, and weights that are read only when the file is written."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from qsparse_export.errors import ExportError
from qsparse_export.weight_formats import AS_IN_THE_MODEL, WeightFormats

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

    from qsparse_export.config import ModelConfig
    from qsparse_export.loader import Program
    from qsparse_export.weights import WeightSource

OPSET = 23
SMALL_BYTES = 1024


def decoder_graph(
    config: ModelConfig, weights: WeightSource, dtype: torch.dtype, formats: WeightFormats = AS_IN_THE_MODEL
) -> ir.Model:
    """The graph of a decoder with dynamic batch, sequence and past, and onnxruntime-genai's names.

    Inputs: input_ids, position_ids int64 [B, S], attention_mask int64 [B, P+S], past_key_values.%d.key/value ``dtype``
    [B, kv_heads, P, head_dim]. Outputs: logits ``dtype`` [B, S, vocab], present.%d.key/value [B, kv_heads, P+S, head_dim].
    ``weights`` must give the matrices of ``formats`` in their groups (``nn.quantized_source``). No weight is read: each
    initialiser is lazy, and packed when it is written. Raises ExportError when torch.onnx fails.
    """
    from qsparse_export.repeat_layer import layers_to_trace, repeat_last_layer

    traced = layers_to_trace(config)
    graph = trace(replace(config, layers=traced), dtype, formats).clone()
    if traced < config.layers:
        repeat_last_layer(graph.graph, config.layers)
    _attach_weights(graph, weights)
    return graph


@lru_cache(maxsize=32)
def trace(config: ModelConfig, dtype: torch.dtype, formats: WeightFormats) -> ir.Model:
    """The graph of ``decoder_graph`` with fake weights.

    Kept, some hundred nodes: tracing takes most of an export's time, and the same model goes to several targets.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from qsparse_export.nn.decoder import Decoder
    from qsparse_export.nn.deploy import deploy
    from qsparse_export.passes.annotate_scope import AnnotateScope

    with torch.device("meta"):
        module = deploy(Decoder(config).to(dtype), formats).eval()
    with FakeTensorMode():
        _make_fake(module)
        inputs, shapes = _example_inputs(config, dtype)
        names_in, names_out = _tensor_names(config)
        graph = _torch_onnx(module, inputs, shapes, names_in, names_out)
    _name_dimensions(graph)
    AnnotateScope()(graph)
    return graph


def _make_fake(module: torch.nn.Module) -> None:
    """Inside a fake tensor mode: replaces parameters and buffers on the meta device by fake ones on the CPU."""
    import torch

    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            fake = torch.empty(parameter.shape, dtype=parameter.dtype)
            setattr(owner, name, torch.nn.Parameter(fake, requires_grad=False))
        for name, buffer in owner.named_buffers(recurse=False):
            setattr(owner, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def module_graph(program: Program) -> ir.Model:
    """The graph of any module of tensors (its Q-Sparse layers deployed) or exported program, weights in memory."""
    import torch

    from qsparse_export.nn.deploy import deploy

    module = program.module
    if isinstance(module, torch.nn.Module):
        module = deploy(module).eval()
    return _torch_onnx(module, program.example_inputs, program.dynamic_shapes, None, None)


def _example_inputs(config: ModelConfig, dtype: torch.dtype) -> tuple[tuple[Any, ...], Any]:
    import torch
    from torch.export import Dim

    batch, sequence, past = 2, 3, 5  # distinct and above 1: torch specialises 0 and 1
    cache = (batch, config.kv_heads, past, config.head_dim)
    pairs = [(torch.zeros(cache, dtype=dtype), torch.zeros(cache, dtype=dtype)) for _ in range(config.layers)]
    # Two tensors, and not one twice: torch.export takes the same object for the same input.
    ids, positions = (torch.zeros(batch, sequence, dtype=torch.int64) for _ in range(2))
    mask = torch.ones(batch, past + sequence, dtype=torch.int64)
    dims = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    kv = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC}
    return (ids, mask, positions, pairs), (dims, dims, dims, [(kv, kv)] * config.layers)


def _tensor_names(config: ModelConfig) -> tuple[list[str], list[str]]:
    def cache(prefix: str) -> list[str]:
        return [f"{prefix}.{i}.{part}" for i in range(config.layers) for part in ("key", "value")]

    return ["input_ids", "attention_mask", "position_ids", *cache("past_key_values")], ["logits", *cache("present")]


def _name_dimensions(graph: ir.Model) -> None:
    """Gives the symbolic dimensions of inputs and outputs the names that people read: batch, sequence, past, total."""
    import onnx_ir

    by_input = {
        "input_ids": ("batch", "sequence"),
        "position_ids": ("batch", "sequence"),
        "attention_mask": ("batch", "total"),
        "logits": ("batch", "sequence", None),
    }
    renamed = {}
    for value in (*graph.graph.inputs, *graph.graph.outputs):
        name = value.name or ""
        length = "past" if name.startswith("past_key_values.") else "total"
        wanted = by_input.get(name, ("batch", None, length, None))
        assert value.shape is not None
        for axis, dim in enumerate(wanted):
            if dim is not None and isinstance(value.shape[axis], onnx_ir.SymbolicDim):
                renamed[str(value.shape[axis])] = dim
        value.shape = onnx_ir.Shape([dim if dim is not None else value.shape[axis] for axis, dim in enumerate(wanted)])
    for node in graph.graph.all_nodes():
        for output in node.outputs:
            if output.shape is not None and output not in graph.graph.outputs:
                output.shape = onnx_ir.Shape([renamed.get(str(d), d) for d in output.shape])


def _torch_onnx(
    module: torch.nn.Module | torch.export.ExportedProgram,
    inputs: tuple[Any, ...],
    dynamic_shapes: Any,
    input_names: list[str] | None,
    output_names: list[str] | None,
) -> ir.Model:
    import torch

    from qsparse_export import ops

    ops.register()
    try:
        with torch.no_grad(), _quiet():
            program = torch.onnx.export(
                module,
                inputs,
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=dynamic_shapes,
                input_names=input_names,
                output_names=output_names,
                custom_translation_table=ops.translation_table(),
                optimize=False,  # would read every weight
                verbose=False,
            )
    except (torch.onnx.OnnxExporterError, RuntimeError, TypeError) as error:
        raise ExportError(
            f"torch.onnx could not export {type(module).__name__}: {error}\n"
            "expected a module whose forward takes and returns tensors and whose control flow does not depend on data"
        ) from error
    assert program is not None
    return program.model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns about its own internals; what goes wrong is raised, the rest is noise for our users."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)


def _attach_weights(graph: ir.Model, weights: WeightSource) -> None:
    """Replaces the fake initialisers of ``graph``, all named like tensors of the module, by lazy ones."""
    import onnx_ir
    from torch._subclasses import FakeTensor

    for name, value in graph.graph.initializers.items():
        fake = value.const_value
        if fake is None or not isinstance(fake.raw, FakeTensor):
            continue  # a constant of the computation, such as the rotary frequencies
        codes = _code_type(value)
        dtype = fake.dtype if codes is None else codes
        shape = onnx_ir.Shape(fake.raw.shape)
        if codes is not None:
            # PyTorch has no type for packed codes of 4 bits: the graph gets the one that ONNX has.
            shape = onnx_ir.Shape([shape[0], fake.raw.shape[1] * 8 // int(codes.bitwidth)])
            value.type, value.shape = onnx_ir.TensorType(codes), shape
        value.const_value = onnx_ir.LazyTensor(
            _reader(name, weights, fake.raw.dtype, codes, shape),
            dtype=dtype,
            shape=shape,
            # A ternary scale is four bytes, and comes out of a whole matrix each time that it is asked for.
            cache=fake.nbytes <= SMALL_BYTES,
            name=name,
        )


def _code_type(value: ir.Value) -> ir.DataType | None:
    """INT4 or INT8 for the weights of SparseMatMulNBits, None for all others."""
    import onnx_ir

    for use in value.uses():
        if use.node.op_type == "SparseMatMulNBits" and use.idx == 1:
            is_4_bits = use.node.attributes["bits"].as_int() == 4
            return onnx_ir.DataType.INT4 if is_4_bits else onnx_ir.DataType.INT8
    return None


def _reader(
    name: str, weights: WeightSource, dtype: torch.dtype, codes: ir.DataType | None, shape: ir.Shape
) -> Callable[[], ir.TensorProtocol]:
    def read() -> ir.TensorProtocol:
        import numpy as np
        import onnx_ir

        from qsparse_export.nn.deploy import deployed_tensor

        tensor = deployed_tensor(name, weights)
        if tensor.dtype != dtype and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        array = tensor.contiguous().numpy()
        if codes == onnx_ir.DataType.INT4:
            return onnx_ir.PackedTensor(array.reshape(-1), codes, shape=shape, name=name)
        return onnx_ir.Tensor(array if codes is None else array.view(np.int8), name=name)

    return read
