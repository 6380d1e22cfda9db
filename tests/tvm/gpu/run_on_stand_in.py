"""LIBRARY FOLDER: the child process of executing_cuda.py, which has written arrays.npz and calls.json to the folder."""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

import numpy as np
import tvm
from tvm import relax

LIBRARY, FOLDER = sys.argv[1], Path(sys.argv[2])


def counts(stand_in: ctypes.CDLL) -> str:
    """JSON, of what has happened since the last time."""
    stand_in.stand_in_take_counts.restype = ctypes.c_char_p
    return stand_in.stand_in_take_counts().decode()


def problem(stand_in: ctypes.CDLL) -> str:
    """Also such as TVM did not hear of."""
    stand_in.stand_in_problem.restype = ctypes.c_char_p
    return stand_in.stand_in_problem().decode()


def flat(result: object) -> list[tvm.runtime.Tensor]:
    """The tensors of a result, in order."""
    if isinstance(result, tvm.runtime.Tensor):
        return [result]
    return [tensor for each in result for tensor in flat(each)]


stand_in = ctypes.CDLL("libcudart.so.13")
device = tvm.cuda(0)
machine = relax.VirtualMachine(tvm.runtime.load_module(LIBRARY), device, memory_cfg="naive")
with np.load(FOLDER / "arrays.npz") as arrays:
    tensors = {name: tvm.runtime.tensor(array, device) for name, array in arrays.items()}
for number, call in enumerate(json.loads((FOLDER / "calls.json").read_text("utf-8"))):
    given = [tensors[each] if isinstance(each, str) else tvm.runtime.ShapeTuple(each) for each in call["inputs"]]
    counts(stand_in)
    result = flat(machine[call["function"]](*given))
    device.sync()
    (FOLDER / f"{number}.json").write_text(counts(stand_in), "utf-8")
    tensors |= dict(zip(call["outputs"], result, strict=True))
    np.savez(FOLDER / f"{number}.npz", **{name: tensors[name].numpy() for name in (*call["outputs"], *call["read"])})
del given, result, tensors, machine
if problem(stand_in):
    sys.exit(f"stand-in: {problem(stand_in)}")
