"""The contract of a runtime: it compiles a graph into files of a bundle, and opens such a bundle to run it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import onnx_ir as ir

    from qsparse_export.targets.target import Target

NativeCalls = dict[str, dict[str, int]]
"""Op name to kernel variant to number of calls: which native kernels ran, and how often."""


def subtract_calls(after: NativeCalls, before: NativeCalls) -> NativeCalls:
    """Calls that were counted in ``after`` and not yet in ``before``; ops and variants without any are left out."""
    calls: NativeCalls = {}
    for op, variants in after.items():
        for variant, count in variants.items():
            new = count - before.get(op, {}).get(variant, 0)
            if new:
                calls.setdefault(op, {})[variant] = new
    return calls


@dataclass(frozen=True)
class Tuning:
    """How kernels are tuned before they are compiled: ``trials`` candidates of each are measured (0: those on record count).

    ``database`` is the folder of records (None: the runtime's own). ``tracker`` "host:port" and ``key`` name a device that
    candidates run on in place of this machine. ``report`` is told of every measurement: how many are done, of how many, and
    a line of text.
    """

    trials: int = 0
    database: Path | None = None
    tracker: str | None = None
    key: str | None = None
    report: Callable[[int, int, str], None] | None = None


class Session(Protocol):
    """A compiled model, ready to run. Tensors are the runtime's own; ``to_numpy`` reads one.

    ``shares_cache``: a cache may have room behind its filled part, and may be given as input and result at once.
    """

    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    shares_cache: bool

    def run(self, feeds: Mapping[str, Any], results: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Runs once. ``feeds`` are NumPy arrays or tensors that an earlier run returned (a KV cache is not copied).

        ``results`` names tensors of :meth:`to_tensor` that outputs are written into; they may be among ``feeds`` where
        ``shares_cache`` says so.
        """
        ...

    def to_tensor(self, array: Any) -> Any:
        """A NumPy array as a tensor of this runtime, to be fed and written to."""
        ...

    def to_numpy(self, tensor: Any) -> Any:
        """The values of a tensor that ``run`` returned, as a NumPy array."""
        ...

    def native_calls(self) -> NativeCalls:
        """Native kernel calls since this session was opened; empty when it runs function bodies."""
        ...


class SessionView:
    """A session that does what another one does: the base of those that record its values."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.input_names = session.input_names
        self.output_names = session.output_names
        self.shares_cache = session.shares_cache

    def run(self, feeds: Mapping[str, Any], results: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """See :class:`Session`."""
        return self._session.run(feeds, results)

    def to_tensor(self, array: Any) -> Any:
        """See :class:`Session`."""
        return self._session.to_tensor(array)

    def to_numpy(self, tensor: Any) -> Any:
        """See :class:`Session`."""
        return self._session.to_numpy(tensor)

    def native_calls(self) -> NativeCalls:
        """See :class:`Session`."""
        return self._session.native_calls()


class Runtime(Protocol):
    """One way to run a graph; ``name`` is what ``--runtime`` takes.

    ``dtypes`` are the number formats that it computes activations in (NumPy names). ``has_bodies``: it can run function
    bodies in place of kernels (``native=False``); where it cannot, no bundle of it is portable.
    """

    @property
    def name(self) -> str:
        """What ``--runtime`` takes."""
        ...

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Number formats of activations."""
        ...

    @property
    def has_bodies(self) -> bool:
        """Whether function bodies run in place of kernels."""
        ...

    def require_target(self, target: Target) -> None:
        """Raises TargetError when :meth:`compile` could not make native kernels for ``target`` on this machine."""
        ...

    def with_ops(self, target: Target) -> Target:
        """``target`` with the ops that this runtime itself has kernels for there."""
        ...

    def tuned(self, tuning: Tuning) -> Runtime:
        """This runtime with kernels tuned as :meth:`compile` makes them; UsageError where nothing can be tuned."""
        ...

    def on_this_machine(self, target: Target) -> Runtime:
        """The runtime that verifies here what :meth:`compile` made for ``target``: this one, unless the files are of no use
        here and it can make its own of the same graph."""
        ...

    def code_record(self, target: Target) -> dict[str, Any] | None:
        """Where the native code of a bundle for ``target`` comes from, for the manifest; None where there is none."""
        ...

    def verified_record(self, target: Target) -> dict[str, Any]:
        """What native code ran here in place of that for ``target``: ``library``, ``covers_library`` (whether it is the
        bundle's own) and, where not, a ``note``; empty where there is none."""
        ...

    def compile(self, model: ir.Model, target: Target, folder: Path, *, native: bool) -> tuple[str, ...]:
        """Writes what this runtime needs into ``folder``; returns the names of the files written."""
        ...

    def open(
        self, folder: Path, *, threads: int | None, native: bool, taps: Sequence[str] = (), graph: Path | None = None
    ) -> Session:
        """Opens what :meth:`compile` wrote; ``native=False`` runs the function bodies instead of the kernels.

        ``taps`` are inner values of the graph that are made outputs too, to see what a model computes on the way.
        ``graph`` is an altered copy of the graph, anywhere, that is run in its place with the weights of ``folder``.
        Nothing is written into ``folder``.
        """
        ...
