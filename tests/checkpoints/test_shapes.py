"""Random models of published shapes: deterministic per tensor, plausible, refused when misspelt."""

import math

import pytest
import torch

import qsparse_export as qs
from qsparse_export.checkpoints.expected import expected_shapes
from qsparse_export.checkpoints.shapes import SHAPES
from qsparse_export.errors import UsageError
from qsparse_export.nn.deploy import materialize
from qsparse_export.sparsity import parse_sparsity
from qsparse_export.weights import TernaryWeight

UP, EMBEDDING = "model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"
PARAMETERS_IN_BLOCKS = {"300m": 0.30e9, "700m": 0.68e9, "1.3b": 1.21e9, "7b": 6.48e9}


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_loads_with_the_tensors_that_it_implies(name):
    model = qs.load(f"shape:{name}")
    assert (model.name, model.source_format, model.tokenizer) == (name, "shape", None)
    assert model.weights.shapes == expected_shapes(model.config)
    assert (model.config.quantization == "bitnet") == name.startswith("bitnet")
    if "qsparse" in name:
        blocks = sum(math.prod(shape) for n, shape in model.weights.shapes.items() if ".layers." in n)
        assert blocks == pytest.approx(PARAMETERS_IN_BLOCKS[name.rpartition("-")[2]], rel=0.02)
        assert model.config.sparsity[0].topk.sparse_ratio == 0.3 and model.config.activation == "relu2"
    else:
        assert not model.config.sparsity and model.config.sub_norms and model.config.tied_embeddings


def test_weights_depend_on_seed_and_name_alone():
    first, other = qs.load("shape:qsparse-300m,layers=2"), qs.load("shape:qsparse-300m,layers=3")
    reseeded = qs.load("shape:qsparse-300m,layers=2", seed=1)
    assert torch.equal(first.weights.read(UP), other.weights.read(UP))
    assert torch.equal(first.weights.read(UP), first.weights.read(UP))
    assert not torch.equal(first.weights.read(UP), reseeded.weights.read(UP))
    assert not torch.equal(first.weights.read(UP), first.weights.read(UP.replace("up", "gate")))
    assert len({model.source_sha256 for model in (first, other, reseeded)}) == 3
    assert first.source_sha256 == qs.load("shape:qsparse-300m,layers=2").source_sha256
    assert first.name == "qsparse-300m-2l" and first.config.layers == 2


def test_ternary_linears_come_as_such_and_keep_the_variance():
    model = qs.load("shape:bitnet-qsparse-300m,layers=1")
    weight = model.weights.read(UP)
    assert isinstance(weight, TernaryWeight) and weight.values.dtype == torch.int8
    assert weight.values.unique().tolist() == [-1, 0, 1] and tuple(weight.values.shape) == (2730, 1024)
    variance = float((weight.values.float() * weight.scale).var())
    assert variance == pytest.approx(1 / 1024, rel=0.01)
    embedding = model.weights.read(EMBEDDING)
    assert embedding.dtype == torch.bfloat16 and float(embedding.float().var()) == pytest.approx(1 / 1024, rel=0.01)


def test_a_random_model_computes_finite_logits():
    model = qs.load("shape:bitnet-qsparse-300m,layers=1", sparsity=parse_sparsity(["0.5"]), override=True)
    with torch.no_grad():
        logits = materialize(model.config, model.weights, torch.float32)(torch.tensor([[1, 2, 3]]))[0]
    assert logits.isfinite().all() and 0.1 < float(logits.std()) < 10


@pytest.mark.parametrize(
    "text",
    ["bitnet-2b", "", "qsparse-7b,"]
    + [f"qsparse-7b,{option}" for option in ("layers=0", "layers=x", "layers=5000", "layers=²", "heads=2")],
)
def test_misspelt_shapes_are_usage_errors(text):
    with pytest.raises(UsageError):
        qs.load(f"shape:{text}")
    with pytest.raises(UsageError, match="did you mean bitnet-2b-4t"):
        qs.load("shape:bitnet-2b")
    with pytest.raises(UsageError, match="seed"):
        qs.load("shape:qsparse-7b", seed=-1)
