"""The sample's page and its JavaScript: text in and text out, and what is said of bundles and prompts that cannot be run."""

import dataclasses
import json
import shutil

import pytest
import torch
from counting_models import QSPARSE
from javascript import SAMPLE, browse, node
from tokenizers import ByteLevelBPETokenizer, Tokenizer

import qsparse_export as qs
from qsparse_export.nn.decoder import Decoder
from qsparse_export.tokenizer import TokenizerFiles
from qsparse_export.verify import PROMPT
from qsparse_export.weights import StateDict

pytestmark = pytest.mark.web


@pytest.fixture(scope="module")
def talker(bundles, tmp_path_factory):
    """The bundle of a random model with a tokenizer that knows the sentence of verification, called talker."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([PROMPT] * 4, vocab_size=320, show_progress=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = dataclasses.replace(QSPARSE, vocab_size=320, layers=1)
    torch.manual_seed(0)
    decoder = Decoder(config)
    with torch.no_grad():
        for weight in decoder.parameters():
            weight.mul_(4 if weight.dim() == 2 else 1)  # far from uniform
    model = qs.Model.in_memory("talker", config, StateDict(decoder.state_dict()))
    tokens = TokenizerFiles({"tokenizer.json": folder / "tokenizer.json"})
    return qs.export(dataclasses.replace(model, tokenizer=tokens), target="web", out=bundles / "talker", verify="quick")


@pytest.fixture(scope="module")
def text_case(talker):
    """A prompt, a number of tokens that rounding does not change, and the text that they are."""
    parity = talker.manifest["parity"]
    tokenizer = Tokenizer.from_file(str(talker.path / "tokenizer.json"))
    prompt = tokenizer.decode(parity["prompt_ids"])
    assert tokenizer.encode(prompt).ids == list(parity["prompt_ids"])
    (recorded,) = parity["paths"]
    count = recorded["steady_greedy_tokens"]
    assert count > 2
    return prompt, count, tokenizer.decode(recorded["greedy_ids"][:count])


def form(bundle, prompt, count):
    return {"do": "generate", "bundle": bundle, "prompt": prompt, "count": count}


def test_the_page_writes_on_and_says_what_it_cannot_do(bundle, bundles, talker, text_case):
    prompt, count, text = text_case
    web = bundle("bitnet", "web")
    cut = bundles / "cut"
    shutil.copytree(web.path, cut, dirs_exist_ok=True)
    (cut / "model.onnx.data").write_bytes((cut / "model.onnx.data").read_bytes()[:-1])
    size = web.manifest["files"]["model.onnx.data"]["bytes"]
    expected = {
        ("bundles/talker", prompt, count): ("done", text),
        ("bundles/talker", prompt[:-1], 40): ("done", None),  # the page can be asked again
        ("bundles/none", "1", 1): ("failed", "bundles/none/manifest.json: 404 File not found"),
        ("bundles/cut", "1", 1): (
            "failed",
            f"bundles/cut/model.onnx.data has {size - 1} bytes, the manifest says {size}",
        ),
        ("bundles/bitnet-web", "1, 96", 1): ("failed", "token 96; expected 0 to 95"),
        ("bundles/bitnet-web", "1, 2", 255): (
            "failed",
            "2 prompt tokens and 255 new ones; the model has 256 positions",
        ),
    }
    shown = browse(bundles, *(form(*fields) for fields in expected))
    for page, (state, output) in zip(shown, expected.values(), strict=True):
        assert page["state"] == state
        assert output is None or page["output"] == output


def test_text_in_node(talker, text_case):
    prompt, count, text = text_case
    result = node(SAMPLE / "generate.mjs", str(talker.path), prompt, str(count))
    assert (result.returncode, result.stdout) == (0, text + "\n"), result.stderr


def test_a_bundle_with_a_library_or_of_another_kind_is_refused(bundle, tmp_path):
    path = tmp_path / "altered"
    shutil.copytree(bundle("bitnet", "node").path, path)
    manifest = json.loads((path / "manifest.json").read_text())
    for change, message in (
        (
            {"native": True},
            "which ONNX Runtime cannot load from JavaScript: export it with --target web or --target node",
        ),
        ({"kind": "module"}, "manifest.json: schema 1, kind module; expected schema 1, kind decoder"),
        ({"schema": 2}, "manifest.json: schema 2, kind decoder; expected"),
    ):
        (path / "manifest.json").write_text(json.dumps(manifest | change))
        result = node(SAMPLE / "generate.mjs", str(path), "1", "1")
        assert result.returncode != 0 and message in result.stderr
