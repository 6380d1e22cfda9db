"""The whole path in one function: load -> export -> lower -> compile -> verify -> bundle."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qsparse_export.bundle import SCHEMA, Bundle, staged, write_manifest
from qsparse_export.config import ModelConfig, topk_of
from qsparse_export.errors import ExportError, UsageError
from qsparse_export.precision import Activations, Head, Precision, Weights, dtype_of, precision

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

    from qsparse_export.loader import Model
    from qsparse_export.lower import Lowered
    from qsparse_export.passes.base import OnPass
    from qsparse_export.runtimes.base import Runtime, Tuning
    from qsparse_export.targets.target import Target
    from qsparse_export.weights import WeightSource


KEPT_BYTES = 1 << 30
"""Of dequantised n-bit weights, while PyTorch is compared: a model of 250 million weights then dequantises each once."""


@dataclass(frozen=True)
class Options:
    """How to compile. ``weights``: keep (ternary stays ternary, floats become float32 without loss), fp32, fp16, ternary
    (BitNet quantisation of every block linear), int8 or int4 (groups). ``head`` and ``activations``: see
    :func:`qsparse_export.precision.precision`. ``portable`` leaves the kernel library out. ``pipeline`` is a spec string of
    passes, or an edit of the default one (None: the default). ``with_bench`` adds qsparse-device-bench. ``logits``: of a
    decoder, of all positions or of the last one alone, which makes prompts faster and perplexity impossible."""

    target: str = "cpu"
    runtime: str = "ort"
    weights: Weights = "keep"
    head: Head | None = None
    activations: Activations | None = None
    portable: bool = False
    verify: Literal["full", "quick", "none"] = "full"
    pipeline: str | None = None
    force: bool = False
    with_bench: bool = False
    logits: Literal["all", "last"] = "all"
    on_pass: OnPass | None = None


def export(
    model: Model | torch.nn.Module | torch.export.ExportedProgram,
    *,
    target: str = "cpu",
    out: str | Path | None = None,
    runtime: str = "ort",
    weights: Weights = "keep",
    head: Head | None = None,
    activations: Activations | None = None,
    portable: bool = False,
    verify: Literal["full", "quick", "none"] = "full",
    pipeline: str | None = None,
    force: bool = False,
    name: str | None = None,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    with_bench: bool = False,
    logits: Literal["all", "last"] = "all",
    tuning: Tuning | None = None,
    on_stage: Callable[[str], None] | None = None,
    on_pass: OnPass | None = None,
) -> Bundle:
    """Compiles ``model`` for ``target`` into the folder ``out`` (default: NAME-TARGET in the working directory).

    ``model`` is what :func:`qsparse_export.load` returned, a trained :class:`qsparse_export.nn.decoder.Decoder`, or any
    module or exported program of tensors; a module that is no decoder needs ``example_inputs`` (and ``dynamic_shapes`` as
    for torch.export). Before success the bundle is run against PyTorch (see :mod:`qsparse_export.verify`) and written
    atomically. An ONNX file is verified against itself, run by ONNX Runtime on ``example_inputs`` by name, or on inputs
    that are made up. A target whose runtime can load no library gets the function bodies alone. ``with_bench`` puts
    qsparse-device-bench into the bundle of a decoder. ``tuning``: kernels are measured first, which the runtime tvm can
    do. ``on_stage`` is told the name of each stage as it starts, ``on_pass``
    the graph after each pass.

    Raises a :class:`qsparse_export.errors.QSparseError`: nothing is left in ``out`` then.
    """
    from qsparse_export.compile import check_target, preferred_dtype
    from qsparse_export.foreign import export_onnx
    from qsparse_export.runtimes import get_runtime
    from qsparse_export.targets.target import load_target

    device, backend = load_target(target), get_runtime(runtime)
    if tuning is not None:
        backend = backend.tuned(tuning)
    dtype = dtype_of(weights, activations, preferred_dtype(device, backend))
    native = check_target(device, backend, portable=portable, dtype=dtype, with_bench=with_bench)
    device = backend.with_ops(device)
    options = Options(
        target, runtime, weights, head, activations, not native, verify, pipeline, force, with_bench, logits, on_pass
    )
    tell = on_stage or (lambda _stage: None)
    positional = None if isinstance(example_inputs, Mapping) else example_inputs
    loaded = as_model(model, name, positional, dynamic_shapes)
    folder = Path(out) if out is not None else Path.cwd() / f"{loaded.name}-{device.name}"
    with staged(folder, force=force) as staging:
        if loaded.onnx is not None:
            manifest = export_onnx(loaded, loaded.onnx, device, backend, options, example_inputs, staging, tell)
        elif loaded.config is None:
            manifest = _export_module(loaded, device, backend, options, staging, tell)
        else:
            manifest = _export_decoder(loaded, loaded.config, device, backend, options, staging, tell)
        tell("bundle")
        write_manifest(staging, manifest)
    return Bundle.load(folder, check=False)


def as_model(
    model: Any, name: str | None = None, example_inputs: Sequence[Any] | None = None, dynamic_shapes: Any = None
) -> Model:
    """A :class:`Model` from whatever :func:`export` takes."""
    import torch

    from qsparse_export.loader import Model
    from qsparse_export.nn.decoder import Decoder
    from qsparse_export.weights import StateDict

    if isinstance(model, Model):
        return replace(model, name=name or model.name)
    if isinstance(model, Decoder):
        return Model.in_memory(name or "decoder", model.config, StateDict(model.state_dict()))
    if isinstance(model, torch.export.ExportedProgram):
        return Model.of_program(name or "program", model)
    if isinstance(model, torch.nn.Module):
        if example_inputs is None:
            raise UsageError(
                f"{type(model).__name__} is no qsparse_export decoder; exporting any other module needs example_inputs=, "
                "a tuple of tensors as its forward takes them"
            )
        return Model.of_module(name or type(model).__name__, model, tuple(example_inputs), dynamic_shapes)
    raise UsageError(f"cannot export a {type(model).__name__}; expected load(path), an nn.Module or an ExportedProgram")


def _export_decoder(
    model: Model,
    config: ModelConfig,
    target: Target,
    runtime: Runtime,
    options: Options,
    folder: Path,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    import torch

    from qsparse_export.compile import (
        add_decoder_files,
        add_device_bench,
        compile_graph,
        graph_name,
        placement_record,
        preferred_dtype,
        verification_record,
    )
    from qsparse_export.exporter import decoder_graph
    from qsparse_export.nn.quantized_source import QuantizedSource
    from qsparse_export.ops.cached_attention import SHARED_CACHE
    from qsparse_export.passes.lower_last_logits import explain
    from qsparse_export.quantization_report import quantization_table

    chosen = precision(config, options.weights, options.head, options.activations, preferred_dtype(target, runtime))
    config = chosen.config
    source = QuantizedSource(model.weights, chosen.formats, config.tied_embeddings)
    tell("export")
    graph = decoder_graph(config, source, torch.float32, chosen.formats)
    tell("lower")
    lowered = _lower(graph, target, options, narrow=chosen.dtype == "float16")
    _require_dtype(graph, chosen.dtype, lowered.pipeline)
    shape = graph.graph.outputs[0].shape
    logits = "last" if shape is not None and shape[1] == 1 else "all"
    if logits != options.logits and options.pipeline is None:
        raise ExportError(f"--logits {options.logits} cannot be had: {explain(graph.graph)}")
    tell("compile")
    files = compile_graph(graph, target, runtime, folder, native=not options.portable)
    shares_cache = graph.metadata_props.get(SHARED_CACHE) == "true"
    tokenizer = model.tokenizer.read() if model.tokenizer else None
    add_decoder_files(folder, files, target, config, tokenizer, shares_cache=shares_cache)
    if options.with_bench:
        add_device_bench(folder, target)
    manifest = manifest_of("decoder", model, target, runtime, options, lowered)
    manifest |= {
        "dtype": chosen.dtype,
        "model": config.to_dict(),
        "logits": logits,
        "head": options.head or ("int8" if chosen.formats.head else "keep"),
        "sparsity": sparsity_table(config),
        "quantization": quantization_table(chosen.formats, source) if chosen.is_quantized else None,
    }
    manifest |= placement_record(graph, target, native=not options.portable)
    if options.with_bench:
        from qsparse_export.bench.device_files import add_device_files

        manifest["bench"] = add_device_files(folder, graph_name(files), manifest)
    if options.verify != "none":
        tell("verify")
        here = runtime if options.portable else runtime.on_this_machine(target)
        _verify_decoder(model.weights, source, chosen, graph, here, options, folder, manifest)
        manifest["parity"]["ran_on"] = verification_record(target, runtime, native=not options.portable)
    return manifest


def _verify_decoder(
    weights: WeightSource,
    source: WeightSource,
    chosen: Precision,
    graph: ir.Model,
    runtime: Runtime,
    options: Options,
    folder: Path,
    manifest: dict[str, Any],
) -> None:
    """Enters ``parity``, and how far quantising moved the logits; ``source`` is ``weights`` quantised."""
    import torch

    from qsparse_export.nn.deploy import materialize
    from qsparse_export.ops.kept_matrices import keep_dequantized
    from qsparse_export.quantization_report import logit_distance
    from qsparse_export.verify import Case, prompt_ids, verify_decoder

    config, dtype = chosen.config, getattr(torch, chosen.dtype)
    prompt = prompt_ids(config.vocab_size, folder / "tokenizer.json")
    case = Case(materialize(config, source, dtype, chosen.formats), config, chosen.dtype, prompt)
    with keep_dequantized(KEPT_BYTES):
        parity = verify_decoder(folder, runtime, graph, case, options.verify, native=not options.portable)
        quantized = case.judge().logits(prompt) if chosen.is_quantized else None
    manifest["parity"] = parity.to_dict()
    if quantized is not None:
        del case  # one model in memory at a time
        original = Case(materialize(config, weights, dtype), config, chosen.dtype, prompt).judge().logits(prompt)
        manifest["quantization"]["logits"] = logit_distance(quantized, original)


def _export_module(
    model: Model, target: Target, runtime: Runtime, options: Options, folder: Path, tell: Callable[[str], None]
) -> dict[str, Any]:
    from qsparse_export.compile import compile_graph, placement_record, verification_record
    from qsparse_export.exporter import module_graph
    from qsparse_export.verify_module import verify_module

    if options.weights not in ("keep", "fp32"):
        raise UsageError(
            f"--weights {options.weights} needs a decoder; quantise this module with qsparse_export.nn.sparsify first"
        )
    if options.head not in (None, "keep") or options.activations not in (None, "fp32"):
        raise UsageError("--head and --activations need a decoder; this module is exported as it is")
    if options.logits != "all":
        raise UsageError("--logits last needs a decoder; this module is exported as it is")
    if options.with_bench:
        raise UsageError("--with-bench needs a decoder: qsparse-device-bench generates tokens, which a module does not")
    assert model.program is not None
    tell("export")
    graph = module_graph(model.program)
    tell("lower")
    lowered = _lower(graph, target, options)
    tell("compile")
    compile_graph(graph, target, runtime, folder, native=not options.portable)
    manifest = manifest_of("module", model, target, runtime, options, lowered)
    manifest |= placement_record(graph, target, native=not options.portable)
    if options.verify != "none":
        tell("verify")
        here = runtime if options.portable else runtime.on_this_machine(target)
        manifest["parity"] = verify_module(
            folder, here, graph, model.program, options.verify, native=not options.portable
        ).to_dict()
        manifest["parity"]["ran_on"] = verification_record(target, runtime, native=not options.portable)
    return manifest


def _lower(graph: ir.Model, target: Target, options: Options, *, narrow: bool = False) -> Lowered:
    from qsparse_export.lower import lower
    from qsparse_export.passes.pipelines import pipeline_for

    native_ops = target.native_ops if target.runs_native(options.portable) else frozenset()
    last = options.logits == "last"
    default = pipeline_for(
        native_ops,
        provider_ops=target.provider_ops,
        lacking_ops=target.lacking_ops,
        narrow=narrow,
        last_logits=last,
    )
    return lower(graph, options.pipeline, default, options.on_pass)


def _require_dtype(graph: ir.Model, dtype: str, pipeline: str) -> None:
    """UsageError when a pipeline of the user's own left the graph in another type than the one asked for."""
    import onnx_ir

    made = "float16" if graph.graph.outputs[0].dtype == onnx_ir.DataType.FLOAT16 else "float32"
    if made != dtype:
        raise UsageError(
            f"the passes make a {made} graph and the options ask for {dtype}: the pass float16, before attach-bodies, is "
            f"what narrows it (--weights fp16 or --activations fp16 bring it along); the passes were {pipeline}"
        )


def sparsity_table(config: ModelConfig) -> list[dict[str, Any]]:
    """Per block linear: its name, input width, and the k, block, rescale and sparse ratio of its mask."""
    widths = {
        "self_attn.q_proj": config.hidden_size,
        "self_attn.k_proj": config.hidden_size,
        "self_attn.v_proj": config.hidden_size,
        "self_attn.o_proj": config.heads * config.head_dim,
    }
    experts = [f"mlp.experts.{e}" for e in range(config.moe.experts)] if config.moe else ["mlp"]
    for expert in experts:
        widths |= {f"{expert}.gate_proj": config.hidden_size, f"{expert}.up_proj": config.hidden_size}
        widths[f"{expert}.down_proj"] = config.intermediate_size
    rows = []
    for layer in range(config.layers):
        for projection, width in widths.items():
            name = f"model.layers.{layer}.{projection}"
            topk = topk_of(config.sparsity, name)
            rows.append(
                {
                    "name": name,
                    "width": width,
                    "k": topk.k(width),
                    "block": topk.block,
                    "rescale": topk.rescale,
                    "sparse_ratio": topk.sparse_ratio,
                }
            )
    return rows


def manifest_of(
    kind: str, model: Model, target: Target, runtime: Runtime, options: Options, lowered: Lowered
) -> dict[str, Any]:
    """What every manifest says, whatever was compiled."""
    from qsparse_export import __version__
    from qsparse_export.compile import library_record
    from qsparse_export.versions import tool_versions

    return {
        "schema": SCHEMA,
        "kind": kind,
        "name": model.name,
        "qsparse_export": __version__,
        "source": {"format": model.source_format, "sha256": model.source_sha256},
        "target": {
            "name": target.name,
            "triple": target.triple,
            "arch": target.arch,
            "system": target.system,
            "features": sorted(target.features),
            "threads": target.threads,
        },
        "runtime": options.runtime,
        "native": not options.portable,
        "library": library_record(target, runtime, native=not options.portable),
        "weights": options.weights,
        **lowered.to_dict(),
        "tools": tool_versions(),
        "parity": None,
    }
