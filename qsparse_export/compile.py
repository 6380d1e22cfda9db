"""ir.Model, Target -> files of a bundle: hands over to one runtime and adds what its callers need."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qsparse_export.errors import TargetError

if TYPE_CHECKING:
    import onnx_ir as ir

    from qsparse_export.config import ModelConfig
    from qsparse_export.runtimes.base import Runtime
    from qsparse_export.targets.target import Target


def preferred_dtype(target: Target, runtime: Runtime) -> str:
    """The number format where nothing is asked: the first of the target's that ``runtime`` computes in, if there is any."""
    return next((dtype for dtype in target.dtypes if dtype in runtime.dtypes), target.dtypes[0])


def check_target(target: Target, runtime: Runtime, *, portable: bool, dtype: str, with_bench: bool) -> bool:
    """Whether the bundle will hold native kernels; TargetError, before any work is done, for what ``target`` cannot do.

    ``dtype`` is the number format of activations, a NumPy name; ``with_bench`` asks for qsparse-device-bench.
    """
    target.require_runtime(runtime.name)
    target.require_dtype(dtype)
    if dtype not in runtime.dtypes:
        raise TargetError(
            f"the runtime {runtime.name} computes in {', '.join(runtime.dtypes)}, not in {dtype}: choose --weights keep, or "
            "another --runtime"
        )
    if portable and not runtime.has_bodies:
        raise TargetError(
            f"the runtime {runtime.name} compiles kernels and has no function bodies to fall back on: leave --portable out, "
            "or choose another --runtime"
        )
    if with_bench and (runtime.name != "ort" or target.library == "impossible"):
        raise TargetError(
            f"qsparse-device-bench is a native program for the runtime ort: there is none for target {target.name} with "
            f"{runtime.name}; leave --with-bench out"
        )
    if with_bench and "cuda" in target.features:
        raise TargetError(
            f"qsparse-device-bench runs on a device's CPU, and target {target.name} is a GPU: leave --with-bench out"
        )
    native = target.runs_native(portable)
    if native or with_bench:
        runtime.require_target(target)
    return native


def compile_graph(graph: ir.Model, target: Target, runtime: Runtime, folder: Path, *, native: bool) -> tuple[str, ...]:
    """Writes into ``folder`` what ``runtime`` runs on ``target``; returns the file names.

    Raises TargetError when the weights exceed what the target can load or hold, before they are written.
    """
    weights = sum(
        value.const_value.nbytes for value in graph.graph.initializers.values() if value.const_value is not None
    )
    target.require_room({"the weights' file": weights})
    files = runtime.compile(graph, target, folder, native=native)
    target.require_room({name: (folder / name).stat().st_size for name in files})
    return files


def graph_name(files: tuple[str, ...]) -> str:
    """Which of the compiled ``files`` is the graph."""
    return next(name for name in files if name.endswith(".onnx"))


def add_device_bench(folder: Path, target: Target) -> str:
    """Puts qsparse-device-bench for ``target`` into ``folder``; returns its name. TargetError where there is none."""
    from qsparse_export.runtimes.ort import bundled

    return bundled.add_device_bench(target, folder)


def library_record(target: Target, runtime: Runtime, *, native: bool) -> dict[str, Any] | None:
    """Where the bundle's kernel library comes from, for the manifest; None for a bundle without one."""
    return runtime.code_record(target) if native else None


def placement_record(graph: ir.Model, target: Target, *, native: bool) -> dict[str, Any]:
    """``placement`` of the manifest: which ops of ``graph`` run on the GPU, and which fall back to the CPU; for a CPU nothing.

    Nodes are counted by op. ``bodies`` are ops of ours in a bundle without a library: ONNX Runtime opens their function
    bodies, folds what is constant in them, and places the rest by itself.
    """
    if not target.provider_ops:
        return {}
    from collections import Counter

    counts: dict[str, Counter[str]] = {device: Counter() for device in ("gpu", "cpu", "bodies")}
    for node in graph.graph.all_nodes():
        if node.op_type == "Constant":
            continue
        name = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        if node.domain != "ai.qsparse":
            device = "gpu" if name in target.provider_ops else "cpu"
        elif native:
            device = "gpu" if node.op_type in target.native_ops else "cpu"
        else:
            device = "bodies"
        counts[device][name] += 1
    return {"placement": {device: dict(sorted(ops.items())) for device, ops in counts.items()}}


def verification_record(target: Target, runtime: Runtime, *, native: bool) -> dict[str, Any]:
    """Which machine verified the bundle, and with which kernels: ``ran_on`` of the manifest's parity.

    A bundle for another architecture is verified with this machine's own build of the same sources, one for a GPU with the
    CPU's kernels in its own library; ``covers_library`` says whether all of the bundle's library was there to be run.
    """
    from qsparse_export.targets.detect import host

    here = host()
    record: dict[str, Any] = {"arch": here.arch, "system": here.system, "features": sorted(here.features)}
    record |= runtime.verified_record(target) if native else {}
    if target.provider_ops:
        record["note"] = "verified on the CPU provider; no GPU ran it"
    return record


def add_decoder_files(
    folder: Path,
    files: tuple[str, ...],
    target: Target,
    config: ModelConfig,
    tokenizer: Mapping[str, bytes] | None,
    *,
    shares_cache: bool,
) -> None:
    """Writes genai_config.json for the compiled ``files`` and the tokenizer's files (name -> content).

    ``shares_cache``: the graph takes one buffer as past and present.
    """
    from qsparse_export.runtimes.ort.genai import genai_config
    from qsparse_export.runtimes.ort.library import CUDA_LIBRARY_NAME, LIBRARY_NAME

    graph = graph_name(files)
    library = next((name for name in (LIBRARY_NAME, CUDA_LIBRARY_NAME) if name in files), None)
    provider = "cuda" if target.provider_ops else None
    plain = genai_config(config.to_dict(), graph, library, provider, shares_cache=shares_cache)
    (folder / "genai_config.json").write_text(json.dumps(plain, indent=2) + "\n", "utf-8")
    tokens = dict(tokenizer or {})
    if "tokenizer.json" in tokens:  # onnxruntime-genai refuses a tokenizer without the second file
        tokens.setdefault("tokenizer_config.json", b'{"tokenizer_class": "PreTrainedTokenizerFast"}\n')
    for name, content in tokens.items():
        (folder / name).write_bytes(content)
