"""A 30-layer model of two billion weights lowers in little memory, since no weight is read; and what is left of a layer."""

import collections
import json
import subprocess
import sys

GIB = 1 << 30
MOST_NODES_PER_LAYER = 12
SCRIPT = """
import json, pathlib, torch
import qsparse_export as qs
from qsparse_export.exporter import decoder_graph
from qsparse_export.lower import lower
from qsparse_export.passes.annotate_scope import SCOPE
from qsparse_export.passes.pipelines import pipeline_for
from qsparse_export.targets.target import load_target

model = qs.load("shape:bitnet-2b-4t")
graph = decoder_graph(model.config, model.weights, torch.float32)
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
lower(graph, None, pipeline_for(load_target("cpu").native_ops))
status = pathlib.Path("/proc/self/status").read_text().splitlines()
peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
scopes = [node.metadata_props.get(SCOPE, "") for node in graph.graph if node.op_type != "Constant"]
print(json.dumps({"layers": model.config.layers, "peak_bytes": peak, "scopes": scopes}))
"""


def test_thirty_layers_lower_within_a_gibibyte_to_twelve_nodes_each():
    done = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["layers"] == 30 and told["peak_bytes"] < GIB
    layers = [scope.split(".")[2] for scope in told["scopes"] if scope.startswith("model.layers.")]
    per_layer = collections.Counter(layers)
    print(f"peak {told['peak_bytes'] / 2**20:.0f} MiB, nodes per layer {sorted(set(per_layer.values()))}")
    assert len(per_layer) == 30 and max(per_layer.values()) <= MOST_NODES_PER_LAYER
