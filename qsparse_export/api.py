"""The whole path in one function: load -> export -> lower -> compile -> verify -> bundle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qsparse_export.bundle import SCHEMA, Bundle, staged, write_manifest
from qsparse_export.config import ModelConfig, topk_of
from qsparse_export.errors import UsageError
from qsparse_export.precision import Activations, Head, Precision, Weights, precision

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

    from qsparse_export.loader import Model
    from qsparse_export.runtimes.base import Runtime
    from qsparse_export.targets.target import Target
    from qsparse_export.weights import WeightSource


@dataclass(frozen=True)
class Options:
    """How to compile. ``weights``: keep (ternary stays ternary, floats become float32 without loss), fp32, fp16, ternary
    (BitNet quantisation of every block linear), int8 or int4 (groups). ``head`` and ``activations``: see
    :func:`qsparse_export.precision.precision`. ``portable`` leaves the kernel library out. ``pipeline`` is a spec string of
    passes (None: the default). ``with_bench`` adds qsparse-device-bench."""

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
    example_inputs: Sequence[Any] | None = None,
    dynamic_shapes: Any = None,
    with_bench: bool = False,
    on_stage: Callable[[str], None] | None = None,
) -> Bundle:
    """Compiles ``model`` for ``target`` into the folder ``out`` (default: NAME-TARGET in the working directory).

    ``model`` is what :func:`qsparse_export.load` returned, a trained :class:`qsparse_export.nn.decoder.Decoder`, or any
    module or exported program of tensors; a module that is no decoder needs ``example_inputs`` (and ``dynamic_shapes`` as
    for torch.export). Before success the bundle is run against PyTorch (see :mod:`qsparse_export.verify`) and written
    atomically. A target whose runtime can load no library gets the function bodies alone. ``with_bench`` puts
    qsparse-device-bench into the bundle of a decoder. ``on_stage`` is told the name of each stage as it starts.

    Raises a :class:`qsparse_export.errors.QSparseError`: nothing is left in ``out`` then.
    """
    from qsparse_export.compile import check_target
    from qsparse_export.runtimes import get_runtime
    from qsparse_export.targets.target import load_target

    device, backend = load_target(target), get_runtime(runtime)
    dtype = "float16" if "fp16" in (weights, activations) else "float32"
    native = check_target(device, backend, portable=portable, dtype=dtype, with_bench=with_bench)
    options = Options(target, runtime, weights, head, activations, not native, verify, pipeline, force, with_bench)
    tell = on_stage or (lambda _stage: None)
    loaded = as_model(model, name, example_inputs, dynamic_shapes)
    folder = Path(out) if out is not None else Path.cwd() / f"{loaded.name}-{device.name}"
    with staged(folder, force=force) as staging:
        if loaded.config is None:
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

    from qsparse_export.compile import add_decoder_files, add_device_bench, compile_graph, verification_record
    from qsparse_export.exporter import decoder_graph
    from qsparse_export.nn.quantized_source import QuantizedSource
    from qsparse_export.quantization_report import quantization_table

    chosen = precision(config, options.weights, options.head, options.activations)
    config = chosen.config
    source = QuantizedSource(model.weights, chosen.formats, config.tied_embeddings)
    tell("export")
    graph = decoder_graph(config, source, getattr(torch, chosen.dtype), chosen.formats)
    tell("lower")
    pipeline = _lower(graph, options)
    tell("compile")
    files = compile_graph(graph, target, runtime, folder, native=not options.portable)
    add_decoder_files(folder, files, config, model.tokenizer.read() if model.tokenizer else None)
    if options.with_bench:
        add_device_bench(folder, target)
    manifest = _manifest("decoder", model, target, runtime, options, pipeline)
    manifest |= {
        "dtype": chosen.dtype,
        "model": config.to_dict(),
        "sparsity": sparsity_table(config),
        "quantization": quantization_table(chosen.formats, source) if chosen.is_quantized else None,
    }
    if options.verify != "none":
        tell("verify")
        _verify_decoder(model.weights, source, chosen, graph, runtime, options, folder, manifest)
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
    from qsparse_export.quantization_report import logit_distance
    from qsparse_export.verify import Case, prompt_ids, verify_decoder

    config, dtype = chosen.config, getattr(torch, chosen.dtype)
    prompt = prompt_ids(config.vocab_size, folder / "tokenizer.json")
    case = Case(materialize(config, source, dtype, chosen.formats), config, chosen.dtype, prompt)
    parity = verify_decoder(folder, runtime, graph, case, options.verify, native=not options.portable)
    manifest["parity"] = parity.to_dict()
    if chosen.is_quantized:
        quantized = case.judge().logits(prompt)
        del case  # one model in memory at a time
        original = Case(materialize(config, weights, dtype), config, chosen.dtype, prompt).judge().logits(prompt)
        manifest["quantization"]["logits"] = logit_distance(quantized, original)


def _export_module(
    model: Model, target: Target, runtime: Runtime, options: Options, folder: Path, tell: Callable[[str], None]
) -> dict[str, Any]:
    from qsparse_export.compile import compile_graph, verification_record
    from qsparse_export.exporter import module_graph
    from qsparse_export.verify_module import verify_module

    if options.weights not in ("keep", "fp32"):
        raise UsageError(
            f"--weights {options.weights} needs a decoder; quantise this module with qsparse_export.nn.sparsify first"
        )
    if options.with_bench:
        raise UsageError("--with-bench needs a decoder: qsparse-device-bench generates tokens, which a module does not")
    if options.head not in (None, "keep") or options.activations not in (None, "fp32"):
        raise UsageError("--head and --activations need a decoder; this module is exported as it is")
    assert model.program is not None
    tell("export")
    graph = module_graph(model.program)
    tell("lower")
    pipeline = _lower(graph, options)
    tell("compile")
    compile_graph(graph, target, runtime, folder, native=not options.portable)
    manifest = _manifest("module", model, target, runtime, options, pipeline)
    if options.verify != "none":
        tell("verify")
        manifest["parity"] = verify_module(
            folder, runtime, graph, model.program, options.verify, native=not options.portable
        ).to_dict()
        manifest["parity"]["ran_on"] = verification_record(target, runtime, native=not options.portable)
    return manifest


def _lower(graph: ir.Model, options: Options) -> str:
    from qsparse_export.lower import lower
    from qsparse_export.passes.pipelines import DEFAULT

    return lower(graph, DEFAULT if options.pipeline is None else options.pipeline)


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


def _manifest(
    kind: str, model: Model, target: Target, runtime: Runtime, options: Options, pipeline: str
) -> dict[str, Any]:
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
        "pipeline": pipeline,
        "tools": tool_versions(),
        "parity": None,
    }
