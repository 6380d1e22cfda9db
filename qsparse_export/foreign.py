"""A graph that another exporter wrote -> files of a bundle: lowered with its own pipeline, judged by the original file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qsparse_export.errors import ExportError, QSparseError, UsageError

if TYPE_CHECKING:
    import numpy as np

    from qsparse_export.api import Options
    from qsparse_export.checkpoints.model import Model, OnnxFile
    from qsparse_export.runtimes.base import Runtime
    from qsparse_export.targets.target import Target


def export_onnx(
    model: Model,
    file: OnnxFile,
    target: Target,
    runtime: Runtime,
    options: Options,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None,
    folder: Path,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Writes into ``folder`` what ``runtime`` runs and returns the manifest, whose ``unfused`` says what was left as it was.

    Raises UsageError when weights are to be changed or ``example_inputs`` have no names.
    """
    from qsparse_export.api import manifest_of
    from qsparse_export.compile import compile_graph, placement_record, verification_record
    from qsparse_export.lower import lower
    from qsparse_export.passes.pipelines import foreign_pipeline_for
    from qsparse_export.verify_onnx import verify_onnx

    if options.weights != "keep":
        raise UsageError(
            f"--weights {options.weights} needs a checkpoint; the weights of an ONNX file stay what they are: --weights keep"
        )
    if options.head not in (None, "keep") or options.activations not in (None, "fp32") or options.with_bench:
        raise UsageError("--head, --activations and --with-bench need a checkpoint; an ONNX file is compiled as it is")
    inputs = _by_name(example_inputs)
    tell("export")
    graph = file.read()
    tell("lower")
    native_ops = target.native_ops if target.runs_native(options.portable) else frozenset()
    try:
        default = foreign_pipeline_for(native_ops, provider_ops=target.provider_ops, lacking_ops=target.lacking_ops)
        lowered = lower(graph, options.pipeline, default, options.on_pass)
    except QSparseError:
        raise
    except Exception as error:  # a stranger's graph may hold what no checker looks at, such as a Cast to type 44
        raise ExportError(
            f"{file.path} cannot be lowered: {error}; look for a damaged node, or leave the pass out (--passes default,-NAME)"
        ) from error
    tell("compile")
    compile_graph(graph, target, runtime, folder, native=not options.portable)
    manifest = manifest_of("module", model, target, runtime, options, lowered) | {"unfused": unfused(graph)}
    manifest |= placement_record(graph, target, native=not options.portable)
    if options.verify != "none":
        tell("verify")
        here = runtime if options.portable else runtime.on_this_machine(target)
        manifest["parity"] = verify_onnx(
            folder, here, graph, file.path, inputs, options.verify, native=not options.portable
        ).to_dict()
        manifest["parity"]["ran_on"] = verification_record(target, runtime, native=not options.portable)
    return manifest


def unfused(model: Any) -> dict[str, str]:
    """What in ``model`` nearly was an op of ours, by the name of its node, and why it was left as it is."""
    from qsparse_export.passes import fuse_ternary, fuse_topk

    return fuse_topk.explain(model.graph) | fuse_ternary.explain(model.graph)


def _by_name(example_inputs: Any) -> Mapping[str, np.ndarray] | None:
    if example_inputs is None or isinstance(example_inputs, Mapping):
        return example_inputs
    raise UsageError("the inputs of an ONNX file are given by name: example_inputs={name: array}")
