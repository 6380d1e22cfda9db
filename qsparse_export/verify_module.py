"""Bundle, any nn.Module -> Parity: the compiled module against PyTorch on its example inputs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from qsparse_export.errors import ParityError
from qsparse_export.nn.deploy import deploy
from qsparse_export.rounding import RUNS
from qsparse_export.verify import CEILING, FLOOR, NOISE_FACTOR, native_ops, paths_of

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

    from qsparse_export.loader import Program
    from qsparse_export.runtimes.base import NativeCalls, Runtime


@dataclass(frozen=True)
class ModulePathParity:
    """One way to run the module: largest absolute error, largest relative one (L2 over L2, per output), flipped choices."""

    path: str
    max_error: float
    relative_error: float
    flipped_choices: int
    native_calls: NativeCalls


@dataclass(frozen=True)
class ModuleParity:
    """What verification measured; ``noise`` and ``limit`` as in :mod:`qsparse_export.verify`."""

    level: Literal["full", "quick"]
    noise: float
    limit: float
    paths: tuple[ModulePathParity, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the manifest."""
        return asdict(self)


def verify_module(
    folder: Path, runtime: Runtime, graph: ir.Model, program: Program, level: Literal["full", "quick"], *, native: bool
) -> ModuleParity:
    """Runs the compiled module both ways on ``program``'s example inputs, PyTorch following its choices.

    Raises ParityError when an output differs by more than rounding, or a choice is none that PyTorch could have made.
    """
    import torch

    from qsparse_export.guided import Guide, choice_taps

    judge = deploy(program.eager())
    taps = choice_taps(graph)
    given = {value.name for value in graph.graph.inputs}
    names = tuple(dict.fromkeys(name for tap in taps for name in tap.values if name not in given))
    noise, limit = 0.0, FLOOR["float32"]
    paths: list[ModulePathParity] = []
    for path in paths_of(runtime, level, native=native):
        session = runtime.open(folder, threads=None, native=path == "native", taps=names)
        feeds = dict(zip(session.input_names, _arrays(program.example_inputs), strict=True))
        results = session.run(feeds)
        outputs = {name: session.to_numpy(value) for name, value in results.items()}
        got = [outputs[name] for name in session.output_names if name not in names]
        choices = [(tap, tap.choice_in(feeds | outputs)) for tap in taps]

        def guided(inputs: tuple[Any, ...], guide: Guide) -> list[np.ndarray]:
            with guide, torch.no_grad():
                return _arrays(judge(*inputs))

        if not paths:
            still = guided(program.example_inputs, Guide(choices, CEILING))
            moved = [guided(_nudged(program.example_inputs, seed), Guide(choices, CEILING)) for seed in range(RUNS)]
            noise = max(_error(outputs_moved, still) for outputs_moved in moved)
            limit = max(NOISE_FACTOR * noise, FLOOR["float32"])
            if not limit <= CEILING:
                raise ParityError(
                    f"rounding errors in the inputs move the PyTorch module's own outputs by {noise:.3g} of their size: "
                    "choose other example inputs, or export with --verify none"
                )
        guide = Guide(choices, limit)
        expected = guided(program.example_inputs, guide)
        parity = ModulePathParity(
            path,
            max(float(np.abs(a - b).max(initial=0)) for a, b in zip(got, expected, strict=True)),
            _error(got, expected),
            guide.flips,
            session.native_calls(),
        )
        if path == "native" and (unused := sorted(native_ops(graph) - parity.native_calls.keys())):
            raise ParityError(f"the native kernels of {', '.join(unused)} never ran although the graph uses them")
        if guide.wrong or not parity.relative_error <= limit:
            where = "".join(f" At {choice.scope}: {choice.reason}." for choice in guide.wrong[:1])
            raise ParityError(
                f"the {path} path differs from PyTorch on the example inputs by {parity.relative_error:.3g} relative "
                f"({parity.max_error:.3g} absolute), allowed {limit:.3g}.{where}"
            )
        paths.append(parity)
    return ModuleParity(level, noise, limit, tuple(paths))


def _nudged(inputs: tuple[Any, ...], seed: int) -> tuple[Any, ...]:
    import torch
    from torch.utils import _pytree

    random = torch.Generator().manual_seed(seed)

    def nudge(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            return x
        signs = torch.randint(0, 2, x.shape, generator=random).to(x.dtype) * 2 - 1
        return x * (1 + signs * torch.finfo(x.dtype).eps)

    return _pytree.tree_map(nudge, inputs)


def _arrays(values: Any) -> list[np.ndarray]:
    from torch.utils import _pytree

    leaves: list[torch.Tensor] = _pytree.tree_leaves(values)
    return [leaf.detach().numpy() for leaf in leaves]


def _error(got: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """Largest over the outputs of L2(got - expected) / L2(expected); inf where one is NaN and the other is not."""
    worst = 0.0
    for a, b in zip(got, expected, strict=True):
        a64, b64 = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
        if not np.array_equal(np.isnan(a64), np.isnan(b64)):
            return float("inf")
        valid = ~np.isnan(a64)
        norm = float(np.linalg.norm(b64[valid]))
        worst = max(worst, float(np.linalg.norm(a64[valid] - b64[valid])) / max(norm, 1e-30))
    return worst
