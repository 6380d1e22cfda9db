"""Exported programs: only with trust, custom operators included."""

import pytest
import torch

import qsparse_export as qs
from qsparse_export.config import TopK
from qsparse_export.errors import CheckpointError, UsageError
from qsparse_export.nn.linear import QSparseLinear
from qsparse_export.sparsity import parse_sparsity


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    module = torch.nn.Sequential(QSparseLinear(6, 4, TopK(0.5)), torch.nn.ReLU(), torch.nn.Linear(4, 3)).eval()
    x = torch.randn(2, 6)
    torch.export.save(torch.export.export(module, (x,)), tmp_path / "m.pt2")
    return tmp_path / "m.pt2", module, x


def test_trust_is_needed_and_named(saved):
    with pytest.raises(CheckpointError, match="--trust"):
        qs.load(saved[0])


def test_the_program_computes_what_the_module_does(saved):
    path, module, x = saved
    model = qs.load(path, trust=True)
    assert (model.name, model.source_format, model.config, model.tokenizer) == ("m", "pt2", None, None)
    assert torch.equal(model.program.eager()(x), module(x))
    assert torch.equal(model.program.example_inputs[0], x)
    assert model.weights.shapes == {name: tuple(t.shape) for name, t in module.state_dict().items()}


def test_sparsity_comes_too_late(saved):
    with pytest.raises(UsageError, match="sparsify"):
        qs.load(saved[0], trust=True, sparsity=parse_sparsity(["0.5"]))


def test_damaged_programs_and_programs_without_positional_inputs(saved, tmp_path):
    raw = saved[0].read_bytes()
    for length in (100, len(raw) // 2, len(raw) - 50):
        (tmp_path / "cut.pt2").write_bytes(raw[:length])
        with pytest.raises(CheckpointError, match=r"cut\.pt2"):
            qs.load(tmp_path / "cut.pt2", trust=True)
    spoilt = bytearray(raw)
    position = raw.index(b'"graph_module"')
    spoilt[position : position + 5] = b"\xff" * 5
    (tmp_path / "spoilt.pt2").write_bytes(spoilt)
    with pytest.raises(CheckpointError, match=r"spoilt\.pt2 cannot be loaded"):
        qs.load(tmp_path / "spoilt.pt2", trust=True)
    program = torch.export.export(torch.nn.Linear(2, 2), (), {"input": torch.zeros(1, 2)})
    torch.export.save(program, tmp_path / "keyword.pt2")
    with pytest.raises(CheckpointError, match="by keyword"):
        qs.load(tmp_path / "keyword.pt2", trust=True)
