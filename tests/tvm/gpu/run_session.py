"""BUNDLE FOLDER: a child process of test_whole_models.py. Runs the feeds N.npz of FOLDER in order in one session on the stand-in.

Writes what a run returns to N-made.npz, and the stand-in's counts to N.json. The last is run once more, on caches that
lie on the device and are written in place: in-place.npz and in-place.json.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

import numpy as np

from qsparse_export.runtimes.tvm.runtime import TvmRuntime

BUNDLE, FOLDER = map(Path, sys.argv[1:])
ROOM = 4


def counts(stand_in: ctypes.CDLL) -> str:
    """JSON, of what has happened since the last time."""
    stand_in.stand_in_take_counts.restype = ctypes.c_char_p
    return stand_in.stand_in_take_counts().decode()


stand_in = ctypes.CDLL("libcudart.so.13")
session = TvmRuntime().open(BUNDLE, threads=1, native=True)
for number in range(len(list(FOLDER.glob("*.npz")))):
    with np.load(FOLDER / f"{number}.npz") as loaded:
        feeds = dict(loaded)
    counts(stand_in)
    made = session.run(feeds)
    (FOLDER / f"{number}.json").write_text(counts(stand_in), "utf-8")
    np.savez(FOLDER / f"{number}-made", **{name: session.to_numpy(tensor) for name, tensor in made.items()})

room = ((0, 0), (0, 0), (0, ROOM), (0, 0))
pasts = [name for name in session.input_names if name.startswith("past_key_values.")]
caches = {name: session.to_tensor(np.pad(feeds[name], room)) for name in pasts}
results = {name.replace("past_key_values.", "present."): tensor for name, tensor in caches.items()}
counts(stand_in)
made = session.run(feeds | caches, results)
(FOLDER / "in-place.json").write_text(counts(stand_in), "utf-8")
assert all(made[name] is tensor for name, tensor in results.items())
np.savez(FOLDER / "in-place", **{name: session.to_numpy(tensor) for name, tensor in made.items()})
print(json.dumps(session.native_calls()))
