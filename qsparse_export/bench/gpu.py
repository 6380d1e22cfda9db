"""A bundle on the NVIDIA GPU of this machine, beside the most that the GPU's data sheet allows."""

from __future__ import annotations

import ctypes
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from qsparse_export.bench.roofline import GPUS, Expected, roofline
from qsparse_export.bench.runner import local_command, process_runner
from qsparse_export.bundle import Bundle
from qsparse_export.errors import TargetError

if TYPE_CHECKING:
    import onnx_ir as ir

TOKENS = 128
"""That are generated, where the model has as many positions; and as many before, which do not count."""
_DRIVER = "libcuda.so.1"
_NAME_BYTES = 256


@dataclass(frozen=True)
class OnGpu:
    """Median time of one of ``tokens`` generated tokens, each kernel launched by itself; ``gb_per_s`` of weights (1e9 bytes).

    ``expected``: the roofline with what the graph's masks keep; None for a GPU whose data sheet is not known here.
    """

    gpu: str
    tokens: int
    ms_per_token: float
    gb_per_s: float
    expected: Expected | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ``share`` and ``captured_share`` of the roofline among them."""
        best = self.expected
        return asdict(self) | {
            "share": best.ms_per_token / self.ms_per_token if best else None,
            "captured_share": best.captured_ms_per_token / self.ms_per_token if best else None,
        }


def require_gpu_for(bundle: Bundle) -> str:
    """The name of the GPU that can run ``bundle``'s kernels here; TargetError, which says what is missing."""
    if not bundle.manifest["native"]:
        raise TargetError(f"{bundle.path} was exported with --portable: its function bodies run on the CPU here")
    name = gpu_name()
    if name is None:
        raise TargetError("no NVIDIA GPU answers on this machine")
    bundle.require_host()
    return name


def gpu_name() -> str | None:
    """What the driver calls this machine's first GPU; None without a driver or a GPU."""
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError:
        return None
    device, name = ctypes.c_int(), ctypes.create_string_buffer(_NAME_BYTES)
    status = driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0)
    status = status or driver.cuDeviceGetName(name, _NAME_BYTES, device)
    return None if status else name.value.decode(errors="replace")


def measure(bundle: Bundle, model: ir.Model, gpu: str) -> OnGpu:
    """Generates on the GPU called ``gpu``; ``model`` is the graph of ``bundle``. TargetError where it cannot be run."""
    tokens = min(TOKENS, bundle.decoder_shape().max_positions)
    command = local_command(bundle.path, None, native=True, threads=1)
    with process_runner(command, f"{bundle.path} on {gpu}") as runner:
        runner.generate(tokens)
        seconds = float(np.median(runner.generate(tokens)))
    known = [each for each in GPUS if each.reported == gpu]
    found = roofline(model, densities=(None,), gpus=known)
    return OnGpu(gpu, tokens, seconds * 1e3, found.masked_bytes / seconds / 1e9, next(iter(found.expected), None))


def spell(found: OnGpu) -> str:
    """One sentence."""
    measured = (
        f"Measured on {found.gpu}: {found.ms_per_token:.2f} ms per token (median of {found.tokens}), "
        f"{found.gb_per_s:.0f} GB/s of weights"
    )
    best, shares = found.expected, found.to_dict()
    if best is None:
        return f"{measured}; its data sheet is not known here."
    return (
        f"{measured}. With this bundle's masks {best.ms_per_token:.2f} ms at best: {shares['share']:.0%} of the roofline is "
        f"reached; in a captured graph {best.captured_ms_per_token:.2f} ms ({shares['captured_share']:.0%})."
    )
