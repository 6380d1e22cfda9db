"""Bundle, original ONNX file -> Parity: the fused graph against the file that it was made from, run by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from qsparse_export.errors import ParityError
from qsparse_export.rounding import RUNS
from qsparse_export.verify import CEILING, FLOOR, NOISE_FACTOR, native_ops, paths_of
from qsparse_export.verify_module import ModulePathParity

if TYPE_CHECKING:
    import onnx_ir as ir

    from qsparse_export.guided import Guide, Tap
    from qsparse_export.original import Original
    from qsparse_export.passes.original_choices import Choice
    from qsparse_export.runtimes.base import Runtime

JUDGE = "the original file, run by ONNX Runtime"


@dataclass(frozen=True)
class OriginalParity:
    """What verification measured, as :class:`~qsparse_export.verify_module.ModuleParity`.

    ``choices`` masks and roundings were made, and the original followed ``followed`` of them (the others it does not name).
    ``free_relative_error`` is that against the file as it is, which a flipped choice moves.
    """

    judge: str
    level: Literal["full", "quick"]
    noise: float
    limit: float
    choices: int
    followed: int
    free_relative_error: float
    paths: tuple[ModulePathParity, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the manifest."""
        return asdict(self)


def verify_onnx(
    folder: Path,
    runtime: Runtime,
    graph: ir.Model,
    original: Path,
    given: Mapping[str, np.ndarray] | None,
    level: Literal["full", "quick"],
    *,
    native: bool,
) -> OriginalParity:
    """Runs the compiled graph both ways, and the file at ``original`` following its choices, on the same inputs.

    Raises ParityError when an output differs by more than rounding, or a choice is none that the original could have made,
    and UsageError when no inputs can be made up and none are ``given``.
    """
    import onnx_ir

    from qsparse_export.original import Original

    pairs = _choices(graph)
    judge = Original(original, [choice for _, choice in pairs])
    by_choice = {id(choice): tap for tap, choice in pairs}
    taps = [by_choice[id(entry.choice)] for entry in judge.followed]
    feeds, as_it_is = _first_run(judge, onnx_ir.load(original).graph, given)
    names = tuple(dict.fromkeys(name for tap in taps for name in tap.values if name not in feeds))
    floor = FLOOR[_lowest_float(as_it_is.values())]
    noise, limit, free_error = 0.0, floor, 0.0
    paths: list[ModulePathParity] = []
    for path in paths_of(runtime, level, native=native):
        session = runtime.open(folder, threads=None, native=path == "native", taps=names)
        outputs = {name: session.to_numpy(value) for name, value in session.run(feeds).items()}
        guides = _guides(judge, taps, feeds | outputs)
        followed = judge.follow(feeds, guides, optimise=True)
        if not paths:
            noise = _noise(judge, feeds, guides, followed, list(as_it_is))
            limit = max(NOISE_FACTOR * noise, floor)
            if not limit <= CEILING:
                raise ParityError(
                    f"rounding errors move the original's own outputs by {noise:.3g} of their size: choose other inputs with "
                    "--inputs, or export with --verify none"
                )
        guide = _check(judge, taps, guides, followed, limit)
        free = _error(outputs, as_it_is, as_it_is)
        free_error = max(free_error, free)
        parity = ModulePathParity(
            path,
            max((float(np.abs(_wide(outputs[n]) - _wide(followed[n])).max(initial=0)) for n in as_it_is), default=0.0),
            # Where no choice was another one, the file as it is must agree as well.
            max(_error(outputs, followed, as_it_is), 0.0 if guide.flips else free),
            guide.flips,
            session.native_calls(),
        )
        if path == "native" and (unused := sorted(native_ops(graph) - parity.native_calls.keys())):
            raise ParityError(f"the native kernels of {', '.join(unused)} never ran although the graph uses them")
        if guide.wrong or not parity.relative_error <= limit:
            where = "".join(f" At {choice.scope}: {choice.reason}." for choice in guide.wrong[:1])
            raise ParityError(
                f"the {path} path differs from the original file by {parity.relative_error:.3g} relative "
                f"({parity.max_error:.3g} absolute), allowed {limit:.3g}.{where}"
            )
        paths.append(parity)
    return OriginalParity(JUDGE, level, noise, limit, len(pairs), len(taps), free_error, tuple(paths))


def _first_run(
    judge: Original, graph: ir.Graph, given: Mapping[str, np.ndarray] | None
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Inputs that the original takes, and its outputs."""
    from qsparse_export.example_inputs import example_feeds

    try:
        feeds = example_feeds(graph, given)
        return feeds, judge.run(feeds)
    except ParityError:
        # Some exports promise any batch and run with one only: transformers' rotary embedding at opset 23, for example.
        feeds = example_feeds(graph, given, batch=1)
        return feeds, judge.run(feeds)


def _choices(graph: ir.Model) -> list[tuple[Tap, Choice]]:
    """Every choice of the fused graph that came out of the original's, and where to read it."""
    from qsparse_export.guided import DOMAIN, taps_of
    from qsparse_export.passes.original_choices import choices_of

    pairs: list[tuple[Tap, Choice]] = []
    for node in graph.graph:
        choices = choices_of(node) if node.domain == DOMAIN else []
        if choices:
            pairs.extend(zip(taps_of(node), choices, strict=True))
    return pairs


def _guides(judge: Original, taps: Sequence[Tap], values: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """What the compiled model chose: bool masks and float32 integers."""
    import torch

    from qsparse_export.guided import rounded
    from qsparse_export.passes.original_choices import MaskChoice

    guides = []
    for entry, tap in zip(judge.followed, taps, strict=True):
        row = tap.choice_in(values)
        is_mask = isinstance(entry.choice, MaskChoice)
        guides.append(row != 0 if is_mask else rounded(torch.from_numpy(np.array(row))).numpy())
    return guides


def _check(
    judge: Original, taps: Sequence[Tap], guides: Sequence[np.ndarray], followed: Mapping[str, np.ndarray], limit: float
) -> Guide:
    """Compares each choice with the values that the original would have chosen from."""
    import torch

    from qsparse_export.guided import Guide
    from qsparse_export.passes.original_choices import MaskChoice

    guide = Guide((), limit)
    for entry, tap, chosen in zip(judge.followed, taps, guides, strict=True):
        seen = torch.from_numpy(_wide(followed[entry.seen])).float()
        theirs = torch.from_numpy(chosen).reshape(seen.shape)  # blocks are rows of their own there
        if isinstance(entry.choice, MaskChoice):
            # What is 0 anyway does not show whether it was kept.
            shows = torch.from_numpy(_wide(followed[entry.kept])).reshape(seen.shape) != 0
            free = torch.from_numpy(_wide(followed[entry.free])).reshape(seen.shape) != 0
            guide.check_mask(tap, seen, theirs & shows, free & shows)
        else:
            # Behind a mask the integers that it drops are not known, and the original's own stay.
            integers = torch.where(theirs == 0, seen.round(), theirs) if entry.choice.masked else theirs
            guide.check_rounding(tap, integers, seen)
    return guide


def _noise(
    judge: Original,
    feeds: Mapping[str, np.ndarray],
    guides: Sequence[np.ndarray],
    still: Mapping[str, np.ndarray],
    names: Sequence[str],
) -> float:
    """How far rounding moves the original: without ONNX Runtime's optimiser, and with inputs one unit off in the last place."""
    wanted = {name: still[name] for name in names}
    errors = [_error(judge.follow(feeds, guides, optimise=False), still, wanted)]
    for seed in range(RUNS):
        random = np.random.default_rng(seed)
        nudged = {
            name: (x * (1 + random.choice((-1, 1), x.shape) * np.finfo(x.dtype).eps)).astype(x.dtype)
            if np.issubdtype(x.dtype, np.floating)
            else x
            for name, x in feeds.items()
        }
        if any(nudged[name] is not feeds[name] for name in feeds):
            errors.append(_error(judge.follow(nudged, guides, optimise=True), still, wanted))
    return max(errors)


def _wide(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float64)


def _lowest_float(arrays: Any) -> str:
    return "float16" if any(array.dtype == np.float16 for array in arrays) else "float32"


def _error(got: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], names: Any) -> float:
    """Largest over the outputs ``names`` of L2(got - expected) / L2(expected); inf where one is NaN and the other is not."""
    worst = 0.0
    for name in names:
        a, b = _wide(got[name]).ravel(), _wide(expected[name]).ravel()
        if a.shape != b.shape or not np.array_equal(np.isfinite(a), np.isfinite(b)):
            return float("inf")
        valid = np.isfinite(b)
        norm = float(np.linalg.norm(b[valid]))
        worst = max(worst, float(np.linalg.norm(a[valid] - b[valid])) / max(norm, 1e-30))
    return worst
