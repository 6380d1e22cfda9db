"""The portable proof: Node and a real browser run the function bodies and generate the tokens that PyTorch does."""

import json

import numpy as np
import pytest
from evidence import EXECUTED, WHOLE_MODELS, Evidence
from javascript import TESTS, browse, node, printed
from web_cases import CASES

from qsparse_export.generate import greedy
from qsparse_export.nn.deploy import deploy
from qsparse_export.precision import precision
from qsparse_export.rounding import steady_tokens
from qsparse_export.verify import CEILING, Case, relative_error

pytestmark = pytest.mark.web

TARGETS = ("node", "web")
COUNTING = [3, 5, 7, 9]
TOKENS = 24


@pytest.fixture(scope="module")
def traces(bundle, bundles):
    """Target to case to the traces behind COUNTING and behind the recorded prompt: one process and one page for all."""
    made = {}

    def jobs(target):
        for case in CASES:
            prompts = [COUNTING, bundle(case, "web").manifest["parity"]["prompt_ids"]]
            yield {"bundle": bundle(case, target).path.name, "prompts": prompts, "count": TOKENS}

    def trace(target, case):
        if target not in made and target == "node":
            folders = [job | {"bundle": str(bundles / job["bundle"])} for job in jobs("node")]
            made["node"] = printed(node(TESTS / "run_node.mjs", json.dumps(folders)))
        elif target not in made:
            steps = [job | {"do": "trace", "bundle": f"/bundles/{job['bundle']}"} for job in jobs("web")]
            made["web"] = browse(bundles, *steps)
        return dict(zip(CASES, made[target], strict=True))[case]

    return trace


@pytest.fixture(scope="module")
def by_pytorch(decoder):
    """Case to the greedy tokens of PyTorch on its own behind COUNTING, how many are steady, and logits [TOKENS, vocab]."""

    def run(name):
        chosen = precision(decoder(name).config, CASES[name][1].get("weights", "keep"))
        module = deploy(decoder(name), chosen.formats)
        module = module.half() if chosen.dtype == "float16" else module
        case = Case(module, chosen.config, chosen.dtype, tuple(COUNTING))
        tokens, logits = [], []
        for rows, choose in case.judge().steps(COUNTING):
            tokens.append(greedy(rows[-1]))
            logits.append(rows[-1])
            if len(tokens) < TOKENS:
                choose(tokens[-1])
        return tokens, steady_tokens(case, (*COUNTING, *tokens[:-1]), tuple(tokens)), logits

    return run


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES)
def test_same_greedy_tokens_as_pytorch(traces, by_pytorch, bundle, case, target, evidence):
    tokens, steady, logits = by_pytorch(case)
    assert len(set(tokens)) > TOKENS // 2  # a model that repeats one token proves little
    assert steady == TOKENS
    trace, _ = traces(target, case)
    assert trace["tokens"] == tokens
    errors = [relative_error(np.array(row), expected) for row, expected in zip(trace["logits"], logits, strict=True)]
    # A step may differ by more where rounding flips a top-k choice, as float16 does in most. That half of the steps do says
    # that something else is computed, such as activations that the runtime rounds to 8 bits of its own accord.
    limit = CEILING if case == "fp16" else bundle(case, "web").manifest["parity"]["limit"]
    assert np.median(errors) <= limit, (np.median(errors), limit)
    code = {"node": "Node", "web": "Chromium"}[target]
    share = float(np.median(errors)) / limit
    evidence(Evidence(WHOLE_MODELS, "ONNX Runtime, function bodies", code, EXECUTED, error_share=share))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES)
def test_same_tokens_as_the_manifest_records(traces, bundle, case, target):
    (recorded,) = bundle(case, "web").manifest["parity"]["paths"]
    steady = recorded["steady_greedy_tokens"]
    assert steady > 0
    _, trace = traces(target, case)
    assert trace["tokens"][:steady] == recorded["greedy_ids"][:steady]


@pytest.mark.parametrize("case", CASES)
def test_node_and_browser_are_given_the_same_graph_and_weights(bundle, case):
    """So that what was verified for one of them holds for the other."""
    for target in TARGETS:
        manifest = bundle(case, target).manifest
        assert (manifest["native"], manifest["target"]["name"]) == (False, target)
    node, web = (bundle(case, target).manifest["files"] for target in TARGETS)
    assert node == web and {"model.onnx", "model.onnx.data"} <= web.keys()
