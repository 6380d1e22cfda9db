"""What every pass of the table promises: ONNX's own node cases keep their results, and twice is once on whole decoders."""

import dataclasses
import warnings
from collections.abc import Iterator

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from graph_text import on_onnx, spelled
from onnx.backend.test.case.test_case import TestCase

from qsparse_export.config import ModelConfig, MoE, SparsityRule, TopK
from qsparse_export.errors import QSparseError
from qsparse_export.exporter import decoder_graph
from qsparse_export.nn.decoder import Decoder
from qsparse_export.passes import PASSES
from qsparse_export.passes.base import parse_pipeline, pass_class
from qsparse_export.passes.pipelines import DEFAULT
from qsparse_export.weights import StateDict

RANDOM = "test_bernoulli"  # right by chance
NOT_JUDGED = {"range", "scan", "scatter"}  # the evaluator of onnx 1.23 lacks them or gives other shapes
NARROWS = "float16"  # takes other inputs by contract; tests/passes/test_lower_float16.py judges it
TINY = ModelConfig(
    architecture="llama",
    vocab_size=40,
    hidden_size=16,
    intermediate_size=26,
    layers=2,
    heads=2,
    kv_heads=1,
    head_dim=8,
    max_positions=64,
    activation="relu2",
    qkv_bias=True,
    sparsity=(SparsityRule("*", TopK(0.4)),),
)
DECODERS = {
    "relu2": TINY,
    "silu": dataclasses.replace(TINY, activation="silu", tied_embeddings=True),
    "bitnet": dataclasses.replace(TINY, quantization="bitnet", sub_norms=True, qkv_bias=False),
    "moe": dataclasses.replace(TINY, moe=MoE(experts=2, experts_per_token=1)),
}


@pytest.fixture(scope="module")
def spellings(cases) -> dict[str, bytes]:
    """The files that the cases make, by name."""
    return {case.name: spelled(ir.from_proto(case.model)) for case in cases}


@pytest.fixture(scope="module")
def judged(cases) -> set[str]:
    """The names of the cases whose expected outputs ONNX's evaluator gives without any pass."""
    return {case.name for case in cases if is_judged(case)}


@pytest.fixture(scope="module")
def cases() -> list[TestCase]:
    """The node cases that ONNX's evaluator computes as they say, so that it can judge what a pass made of them."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        found = [case for case in collect_testcases(None) if isinstance(case.model, onnx.ModelProto)]
    return [case for case in found if not case.name.startswith(RANDOM)]


def disagreements(case: TestCase, model: onnx.ModelProto) -> Iterator[str]:
    """Where ``model`` gives other outputs than ``case`` expects."""
    names = [value.name for value in case.model.graph.input]
    for inputs, outputs in case.data_sets:
        got = on_onnx(model, dict(zip(names, map(array_of, inputs), strict=False)))
        for mine, expected in zip(got, map(array_of, outputs), strict=True):
            try:
                if not isinstance(expected, np.ndarray):
                    continue
                if expected.dtype.isbuiltin == 2:  # bfloat16 and the like: NumPy does not take their NaN for equal
                    assert mine.dtype == expected.dtype
                    np.testing.assert_array_equal(mine.astype(np.float32), expected.astype(np.float32))
                elif expected.dtype.kind in "fiub":
                    np.testing.assert_allclose(mine, expected, rtol=case.rtol, atol=max(case.atol, 1e-6))
                else:
                    np.testing.assert_array_equal(mine, expected)
            except AssertionError as error:
                yield f"{case.name}: {error}"


def array_of(value: object) -> object:
    """Values of types that NumPy lacks come as protos."""
    return onnx.numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value


def is_judged(case: TestCase) -> bool:
    """Whether ONNX's evaluator gives what the case says without any pass."""
    try:
        return not list(disagreements(case, case.model))
    except (RuntimeError, TypeError):  # RuntimeImplementationError among them
        return False


def test_onnxs_evaluator_judges_nearly_all(cases, judged):
    """What it cannot judge, it cannot judge after a pass: few, and of these ops."""
    left_out = sorted({case.name for case in cases} - judged)
    print(len(left_out), left_out)
    assert {name.split("_")[1] for name in left_out} <= NOT_JUDGED and len(left_out) <= 10


def told(spelling: bytes) -> str:
    """The graph without what computes nothing: types of inner values, and the names of constants' tensors."""
    model = onnx.ModelProto.FromString(spelling)

    def strip(graph: onnx.GraphProto) -> None:
        del graph.value_info[:]
        for attribute in (attribute for node in graph.node for attribute in node.attribute):
            attribute.t.ClearField("name")
            for inner in (attribute.g, *attribute.graphs):
                strip(inner)

    strip(model.graph)
    return str(model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(set(PASSES) - {NARROWS}))
def test_onnxs_node_cases_keep_their_results(cases, spellings, judged, name):
    """A pass that leaves the file as it was needs no judge; the others' graphs are computed again."""
    unchanged, recomputed, refused = 0, 0, 0
    for case in cases:
        graph = ir.from_proto(case.model)
        before = spellings[case.name]
        try:
            modified = pass_class(name)()(graph).modified
        except QSparseError:
            refused += 1
            continue
        after = spelled(graph)
        altered = before != after and told(before) != told(after)
        assert modified == altered or name == "infer-shapes", f"{case.name}: modified is {modified}"
        if before == after:
            unchanged += 1
        elif case.name in judged:
            recomputed += 1
            assert not list(disagreements(case, onnx.ModelProto.FromString(after))), case.name
    print(f"{name}: {unchanged} left as they were, {recomputed} computed again, {refused} refused")
    assert unchanged + recomputed > 500


@pytest.fixture(scope="module")
def decoders() -> dict[str, onnx.ModelProto]:
    """Decoders as they leave the exporter."""
    made = {}
    for name, config in DECODERS.items():
        torch.manual_seed(0)
        graph = decoder_graph(config, StateDict(Decoder(config).state_dict()), torch.float32)
        made[name] = ir.to_proto(graph)
    return made


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", PASSES)
def test_twice_is_once(decoders, decoder, name):
    """After the passes that come before it in the default pipeline, and alone on what the exporter wrote."""
    steps = parse_pipeline(DEFAULT)
    names = [step.name for step in steps]
    before = steps[: names.index(name)] if name in names else steps[: names.index("fuse-glu")]
    for earlier in ((), before):
        graph = ir.from_proto(decoders[decoder])
        for step in earlier:
            step(graph)
        once = pass_class(name)()
        once(graph)
        first = spelled(graph)
        assert not once(graph).modified and spelled(graph) == first
