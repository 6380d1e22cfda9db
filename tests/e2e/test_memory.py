"""Anonymous memory of an export does not grow with the model: 1 GiB and twice the largest tensor at most."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

import qsparse_export as qs

GIB = 1 << 30
SAMPLE_S = 0.02


def peak_anonymous_bytes(process):
    """The most anonymous memory that ``process`` was seen to have, sampled until it ends."""
    peak = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:  # it ended between the two calls
            break
        lines = [line for line in status.splitlines() if line.startswith("RssAnon:")]
        peak = max([peak, *(int(line.split()[1]) * 1024 for line in lines)])
        time.sleep(SAMPLE_S)
    return peak


@pytest.mark.parametrize("head", ["keep", "int4"])
def test_export_of_the_bitnet_2b_4t_shape_streams_its_weights(tmp_path, head):
    """Four of 30 layers: the embedding, which is the largest tensor by far, is whole, and quantised in slices."""
    shape = "shape:bitnet-2b-4t,layers=4"
    config = qs.load(shape).config
    assert config is not None
    weights = config.vocab_size * config.hidden_size
    largest = weights * 4
    script = Path(sys.executable).with_name("qsparse-export")
    words = [str(script), shape, "--head", head, "--verify", "none", "-o", str(tmp_path / "bundle")]
    with subprocess.Popen(words, stderr=subprocess.DEVNULL) as process:
        peak = peak_anonymous_bytes(process)
    written = (tmp_path / "bundle" / "model.onnx.data").stat().st_size
    print(f"peak anonymous memory {peak / 2**20:.0f} MiB, {written / 2**20:.0f} MiB written")
    assert process.returncode == 0 and written > (largest if head == "keep" else weights / 2)
    assert peak <= GIB + 2 * largest
