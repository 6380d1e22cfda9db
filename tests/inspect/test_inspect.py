"""qsparse-inspect on bundles, ONNX files and checkpoints: what is shown is what is there; pages load nothing; names are data."""

import json
import re
import sys
import types
from html.parser import HTMLParser

import numpy as np
import onnx
import pytest
import torch

import qsparse_export as qs
from qsparse_export.bundle import Bundle
from qsparse_export.cli.inspect import main
from qsparse_export.config import ModelConfig, SparsityRule, TopK
from qsparse_export.formats.ternary import row_bytes
from qsparse_export.inspect.measure import measured
from qsparse_export.inspect.page import page
from qsparse_export.inspect.report import inspect
from qsparse_export.inspect.table import table
from qsparse_export.nn.decoder import Decoder

CONFIG = ModelConfig(
    architecture="bitnet",
    vocab_size=96,
    hidden_size=48,
    intermediate_size=130,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=12,
    max_positions=64,
    quantization="bitnet",
    activation="relu2",
    sparsity=(SparsityRule("*", TopK(0.5)), SparsityRule("*.down_proj", TopK(0.8))),
)


@pytest.fixture(scope="session")
def bundle(tmp_path_factory):
    torch.manual_seed(0)
    return qs.export(
        Decoder(CONFIG).eval(), out=tmp_path_factory.mktemp("inspect") / "bundle", name="tiny", verify="quick"
    )


@pytest.fixture(scope="session")
def report(bundle):
    return inspect(bundle.path)


def test_a_bundle_shows_its_layers_as_they_are(report):
    ternary = [layer for layer in report.layers if layer.format == "ternary"]
    first = [(layer.inputs, layer.outputs, layer.k, layer.out_of) for layer in ternary[:4]]
    assert first == [(48, (48, 24, 24), 24, 48), (48, (48,), 24, 48), (48, (130, 130), 24, 48), (130, (48,), 25, 130)]
    joined = ternary[0]
    assert joined.bytes == 48 * (2 * row_bytes(24) + row_bytes(48)) + 3 * 4
    assert joined.density == 0.5 and ternary[3].density == 25 / 130
    assert "self_attn" in joined.name and len(ternary) == 8
    head = report.layers[-1]
    assert (head.inputs, head.outputs, head.format, head.density) == (48, (96,), "float32", 1.0)


def test_a_bundle_shows_nodes_parity_and_files(bundle, report):
    nodes = bundle.manifest["nodes"]
    assert (report.nodes_before, report.nodes_after) == (nodes["before"], nodes["after"])
    assert nodes["after"] < nodes["before"]
    made = onnx.load(bundle.path / "model.onnx", load_external_data=False)
    assert nodes["after"] == len(made.graph.node)
    assert sum(report.ops.values()) == len(made.graph.node)
    assert report.parity == bundle.manifest["parity"]
    assert report.files["model.onnx.data"] == (bundle.path / "model.onnx.data").stat().st_size


def test_measuring_finds_the_density_of_the_masks_and_kernels_that_agree(bundle, report):
    with_figures = measured(report, bundle)
    products = [layer for layer in with_figures.layers if layer.format == "ternary"]
    assert [layer.measured_density for layer in products[:3]] == pytest.approx([0.5, 0.5, 0.5])
    # Squared ReLU leaves zeros of its own, so that fewer than the 25 kept channels of 130 may be there.
    assert 0 < products[3].measured_density <= 25 / 130 + 1e-9
    assert all(layer.kernel_error < 1e-4 for layer in with_figures.layers)
    assert with_figures.layers[0].name == report.layers[0].name


def test_the_table_holds_every_layer(report):
    text = table(report)
    assert all(layer.name in text for layer in report.layers)
    assert "48 -> 48+24+24" in text and "50.0%" in text and "before lowering" in text
    assert re.search(r"parity native: relative error \d.*against PyTorch", text)


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen, self.attributes, self.depth = [], [], []

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += attrs

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag != "meta":
            self.depth.append(tag)

    def handle_endtag(self, tag):
        assert self.depth.pop() == tag


def parsed(text):
    tags = Tags()
    tags.feed(text)
    assert tags.depth == []
    return tags


def test_the_page_is_whole_and_loads_nothing(bundle, report):
    with_figures = measured(report, bundle)
    text = page(with_figures)
    tags = parsed(text)
    assert not {"script", "link", "img", "iframe", "object"} & set(tags.seen)
    assert not [name for name, _ in tags.attributes if name in ("src", "href") or name.startswith("on")]
    assert "http" not in text and "url(" not in text and "@import" not in text
    assert tags.seen.count("svg") == 4  # densities, bytes, errors, nodes
    widths = [float(value) for name, value in tags.attributes if name == "width" and "." in value]
    assert max(widths) == pytest.approx(540, abs=1) and all(width >= 0 for width in widths)
    assert text.count("<tr>") == len(report.layers) + 2


def hostile(tmp_path):
    graph = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 23]> g (float[M, 4] x) => (float[M, 3] y) <float[4, 3] w> { y = MatMul (x, w) }'
    )
    graph.graph.node[0].name = "<script>alert('&')</script>"
    del graph.graph.input[1:]
    graph.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((4, 3), np.float32), "w"))
    path = tmp_path / "m.onnx"
    onnx.save(graph, path)
    return path


def test_names_in_a_file_are_no_markup(tmp_path):
    text = page(inspect(hostile(tmp_path)))
    assert "<script>" not in text and "&lt;script&gt;alert(&#x27;&amp;&#x27;)" in text
    parsed(text)


def test_an_onnx_file(tmp_path):
    report = inspect(hostile(tmp_path))
    (layer,) = report.layers
    assert (report.kind, layer.inputs, layer.outputs, layer.bytes, layer.density) == ("onnx", 4, (3,), 48, 1.0)
    assert (report.nodes_before, report.nodes_after) == (1, None)


def test_a_checkpoint():
    report = inspect("shape:bitnet-qsparse-700m,layers=1")
    layers = {layer.name: layer for layer in report.layers}
    down = layers["model.layers.0.mlp.down_proj"]
    assert (down.inputs, down.outputs, down.format, down.bytes) == (4096, (1536,), "ternary", 4096 * 1536 // 4)
    assert down.density == pytest.approx(0.7, abs=1e-3)
    assert "700m" in table(report) and parsed(page(report))


def test_the_command_line(bundle, tmp_path, capfd):
    out = tmp_path / "report.html"
    assert main([str(bundle.path), "--html", str(out), "--measure", "--json"]) == 0
    printed = json.loads(capfd.readouterr().out)
    assert printed["layers"][0]["measured_density"] == pytest.approx(0.5)
    assert printed["nodes_after"] == bundle.manifest["nodes"]["after"]
    parsed(out.read_text("utf-8"))
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    assert main([str(bundle.path)]) == 0
    assert "48 -> 48+24+24" in capfd.readouterr().out


def test_mistakes_are_named(bundle, tmp_path, capfd, monkeypatch):
    path = hostile(tmp_path)
    assert main([str(path), "--measure"]) == 2
    assert "is no bundle, and only those are run" in capfd.readouterr().err
    assert main([str(bundle.path), "--html", str(tmp_path / "no" / "r.html")]) == 1
    assert "cannot write" in capfd.readouterr().err
    assert main([str(tmp_path / "nothing")]) == 1
    monkeypatch.setitem(sys.modules, "netron", None)
    assert main([str(path), "--netron"]) == 2
    assert "pip install netron" in capfd.readouterr().err


def test_netron_opens_the_graph(bundle, monkeypatch, capfd):
    opened = []
    netron = types.ModuleType("netron")
    netron.start = opened.append
    netron.__spec__ = types.SimpleNamespace(name="netron")
    monkeypatch.setitem(sys.modules, "netron", netron)
    assert main([str(bundle.path), "--netron"]) == 0
    assert opened == [str(bundle.path / "model.onnx")]
    capfd.readouterr()


def test_a_damaged_graph_is_named(bundle, tmp_path, capfd):
    import shutil

    shutil.copytree(bundle.path, tmp_path / "copy")
    (tmp_path / "copy" / "model.onnx").write_bytes(b"\x08\x0a\x3a\xff")
    assert main([str(tmp_path / "copy")]) == 1
    assert "is damaged" in capfd.readouterr().err
    (tmp_path / "copy" / "model.onnx").unlink()
    assert main([str(tmp_path / "copy")]) == 1
    assert isinstance(Bundle.load(bundle.path), Bundle)
