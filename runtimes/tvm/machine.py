"""Where a compiled module runs: in this process, on its GPU, or on a device behind TVM's RPC."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qsparse_export.errors import BundleError, TargetError
from qsparse_export.runtimes.tvm import environment
from qsparse_export.runtimes.tvm.gpu.failures import gpu_failures
from qsparse_export.runtimes.tvm.tensors import copied
from qsparse_export.runtimes.tvm.weights import Weight, mapped, resident


class Machine(Protocol):
    """A Relax virtual machine with the weights of a module. ``runs`` counts how often its graph ran.

    ``copies_inputs``: what a run writes over is a copy of the tensor that it was given.
    """

    runs: int
    copies_inputs: bool

    def tensor(self, array: np.ndarray) -> Any:
        """``array`` as a tensor there."""
        ...

    def numpy(self, tensor: Any) -> np.ndarray:
        """The values of a tensor there."""
        ...

    def copy(self, tensor: Any, into: Any) -> None:
        """Writes the values of a tensor there over those of another one of its shape."""
        ...

    def call(self, inputs: Sequence[Any]) -> Sequence[Any]:
        """Runs the graph once on tensors of :meth:`tensor`, in the order of its inputs; its outputs."""
        ...


class LocalMachine:
    """This process. See :class:`Machine`."""

    copies_inputs = False

    def __init__(self, library: Path, weights: tuple[Weight, ...], file: Path, threads: int | None) -> None:
        """``library`` is the compiled module, ``file`` what its weights lie in."""
        self._tvm = environment.tvm()
        self._threads = threads
        self.runs = 0
        environment.use_threads(threads)
        machine = self._tvm.relax.VirtualMachine(self._tvm.runtime.load_module(str(library)), self._tvm.cpu())
        self._main = machine["main"]
        self._weights = resident(weights, file)

    def tensor(self, array: np.ndarray) -> Any:
        """See :class:`Machine`."""
        return copied(array)

    def numpy(self, tensor: Any) -> np.ndarray:
        """See :class:`Machine`."""
        return tensor.numpy()

    def copy(self, tensor: Any, into: Any) -> None:
        """See :class:`Machine`."""
        into.copyfrom(tensor)

    def call(self, inputs: Sequence[Any]) -> Sequence[Any]:
        """See :class:`Machine`; BundleError for inputs that the module does not take."""
        environment.use_threads(self._threads)
        made = _called(self._main, (*inputs, *self._weights))
        self.runs += 1
        return made


class GpuMachine:
    """The GPU of this machine. See :class:`Machine`. Weights are copied there once; tensors stay there.

    TargetError from every method where the GPU fails, or has no memory left.
    """

    copies_inputs = False

    def __init__(self, library: Path, weights: tuple[Weight, ...], file: Path, device: Any) -> None:
        """``library`` is the compiled module, ``file`` what its weights lie in, ``device`` TVM's."""
        self._tvm = environment.tvm()
        self._device = device
        self.runs = 0
        with gpu_failures():
            machine = self._tvm.relax.VirtualMachine(self._tvm.runtime.load_module(str(library)), device)
            self._weights = list(_sent(weights, file, device, lambda _sent, _total: None))
        self._main = machine["main"]

    def tensor(self, array: np.ndarray) -> Any:
        """See :class:`Machine`."""
        with gpu_failures():
            return self._tvm.runtime.tensor(np.ascontiguousarray(array), self._device)

    def numpy(self, tensor: Any) -> np.ndarray:
        """See :class:`Machine`."""
        with gpu_failures():
            return tensor.numpy()

    def copy(self, tensor: Any, into: Any) -> None:
        """See :class:`Machine`."""
        with gpu_failures():
            into.copyfrom(tensor)

    def call(self, inputs: Sequence[Any]) -> Sequence[Any]:
        """See :class:`Machine`; BundleError for inputs that the module does not take."""
        made = _called(self._run, (*inputs, *self._weights))
        self.runs += 1
        return made

    def _run(self, *arguments: Any) -> Any:
        """Until all is done: what fails on the way is to be told here, and not by the first tensor that is freed."""
        with gpu_failures():
            made = self._main(*arguments)
            self._device.sync()
            return made


class RemoteMachine:
    """A device behind an RPC session. See :class:`Machine`. What TVM raises when the device goes away is passed on.

    Over RPC a virtual machine copies every tensor that it is given. So the weights are bound to its function once, as its
    last arguments, and the tensors that they came in let go; a run binds its inputs first, outside of what is timed.
    """

    copies_inputs = True

    def __init__(
        self,
        remote: Any,
        library: Path,
        weights: tuple[Weight, ...],
        file: Path,
        on_bytes: Callable[[int, int], object],
    ) -> None:
        """``remote`` is a TVM RPCSession; ``on_bytes`` is told how many bytes of how many are there.

        TargetError when the device cannot load the module. While the weights are bound they are there twice.
        """
        self._tvm = environment.tvm()
        self._device = remote.cpu(0)
        self._item = remote.get_function("ffi.ArrayGetItem")
        self._size = remote.get_function("ffi.ArraySize")
        self.runs = 0
        remote.upload(bytearray(library.read_bytes()), target=library.name)
        try:
            module = remote.load_module(library.name)
        except RuntimeError as error:
            raise TargetError(
                f"the device cannot load {library.name}: {str(error).strip().splitlines()[-1]}; export the bundle with the "
                "--target of that device"
            ) from error
        self._machine = self._tvm.relax.VirtualMachine(module, self._device)
        self._machine.save_function("main", "weighted", *_sent(weights, file, self._device, on_bytes))

    def tensor(self, array: np.ndarray) -> Any:
        """See :class:`Machine`."""
        return self._tvm.runtime.tensor(np.ascontiguousarray(array), self._device)

    def numpy(self, tensor: Any) -> np.ndarray:
        """See :class:`Machine`."""
        return tensor.numpy()

    def copy(self, tensor: Any, into: Any) -> None:
        """See :class:`Machine`."""
        into.copyfrom(tensor)

    def call(self, inputs: Sequence[Any]) -> Sequence[Any]:
        """See :class:`Machine`."""
        self._machine.save_function("weighted", "step", *inputs)
        made = self._machine.module["step"]()
        self.runs += 1
        if isinstance(made, self._tvm.runtime.Tensor):
            return (made,)
        return tuple(self._item(made, number) for number in range(self._size(made)))

    def seconds(self, repetitions: int) -> tuple[float, ...]:
        """Does the last run again, once unmeasured and so often measured: the seconds of each, by the device's own clock.

        The same tokens are written to the same places of the caches, so that every one is the same work.
        """
        timed = self._machine.module.time_evaluator("step", self._device, number=1, repeat=repetitions)()
        self.runs += repetitions + 1
        return tuple(map(float, timed.results))


def _called(main: Callable[..., Any], arguments: Sequence[Any]) -> Sequence[Any]:
    try:
        made = main(*arguments)
    except (RuntimeError, TypeError, ValueError) as error:  # TVM's own errors have no common base
        raise BundleError(
            f"the compiled module does not take what the graph gives it: {error}; feed what the graph's inputs say, or "
            "export the bundle again"
        ) from error
    return (made,) if isinstance(made, environment.tvm().runtime.Tensor) else made


def _sent(
    weights: tuple[Weight, ...], file: Path, device: Any, on_bytes: Callable[[int, int], object]
) -> Iterator[Any]:
    """Each weight on ``device``; ``on_bytes`` is told how many bytes of how many are there."""
    total, sent = sum(weight.size_bytes for weight in weights), 0
    for weight, here in zip(weights, mapped(weights, file), strict=True):
        there = environment.tvm().runtime.empty(weight.shape, weight.dtype, device)
        there.copyfrom(here)
        yield there
        sent += weight.size_bytes
        on_bytes(sent, total)


def use_threads(remote: Any, count: int) -> None:
    """Lets what an RPC session runs use ``count`` threads; TargetError where its pool has fewer."""
    environment.configure_pool(remote.get_function("runtime.config_threadpool"), count)
    if (most := threads_of(remote)) != count:
        raise TargetError(
            f"{count} threads, and the device's pool has {most}: start its server with TVM_NUM_THREADS={count} in the "
            "environment, or choose fewer"
        )


def threads_of(remote: Any) -> int:
    """The threads that an RPC session runs with."""
    return int(remote.get_function("runtime.NumThreads")())
